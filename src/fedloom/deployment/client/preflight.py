"""Preflight of a client, before it starts anything heavy: does the kit's server answer, and do both clocks agree?

One HTTP request, for its status and time. Flower itself says nothing of all this: with another's certificate its
SuperNode tries for ever, and one whose clock is off ends without a word. Nothing of the client's is told.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

from fedloom.deployment.addresses import split_address
from fedloom.deployment.keys import describe_expiry
from fedloom.deployment.processes import rest
from fedloom.deployment.status import KEYS_HEADER, STAMP_HEADER, STATUS_PATH
from fedloom.errors import DeploymentError

AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 305.0
"""Limits to how far a client's clock may be off. Its SuperNode signs each request with the time; beyond them the server
refuses it with HTTP 401 (flwr.superlink.routers.fleet.node_auth)."""
ANSWER_SECONDS = 15.0
AGAIN_SECONDS = 2.0
"""Time between two looks for a server that is not there yet."""
CLOCK_TRIES = 3
"""Looks at the clocks that must agree that they differ: a machine may have been stopped for a moment in one."""
NOT_YET = (502, 503, 504)
"""Statuses of a server whose SuperLink does not answer yet, or has not read its clients' keys."""
NO_CHECK_TIME = 0x200000
"""Flag of OpenSSL that leaves a certificate's dates to us, who know the server's clock too."""
MOST_SECONDS = 1e11
"""Seconds since 1970 that no clock has: thirty centuries."""
OTHER_NAME = (62, 64)
"""Codes of OpenSSL for a certificate that is for other names or addresses."""


class AbsentError(Exception):
    """Nobody answers yet."""


class ClockError(DeploymentError):
    """This machine's clock is off, or the server's."""


class Greeting(NamedTuple):
    """Answer of a server that takes its clients."""

    words: str
    """Words for this client's owner."""
    keys_seconds: float
    """Time since it looked at the list of its clients' keys."""


def await_server(server: str, ca: str, say: Callable[[str, str], object], check: Callable[[], None]) -> Greeting:
    """Wait until the kit's server takes its clients, and return how it answers; meanwhile, `check` may raise.

    Raises:
        DeploymentError: another server answers, or it would refuse this machine for its clock.
    """
    told: set[str] = set()
    clocks = 0
    while True:
        check()
        try:
            return greet_server(server, ca)
        except ClockError:
            clocks += 1
            if clocks == CLOCK_TRIES:
                raise
        except AbsentError as absent:
            if str(absent) not in told:
                say("waiting", f"for {server}: {absent}")
            told.add(str(absent))
        rest(AGAIN_SECONDS, check)


def greet_server(server: str, ca: str) -> Greeting:
    """Ask a server once, and return how it answers; without a certificate authority, over plain HTTP.

    Raises:
        AbsentError: nobody answers, or it takes no clients yet.
        DeploymentError: another server answers, or it would refuse this machine for its clock.
    """
    host, port = split_address(server)
    # Behind a proxy of the environment, Flower's connection goes another way than this one would.
    if ca and getproxies().keys() & {"https", "all"} and not proxy_bypass(host):
        return Greeting("", 0.0)
    connection = _connect(host, port, ca)
    try:
        connection.connect()
        certificate = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
        before = time.time()
        connection.request("GET", STATUS_PATH)
        answer = connection.getresponse()
        after = time.time()
    except ssl.SSLCertVerificationError as error:
        raise _refusal(error, server, host) from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise AbsentError("it closes the connection") from None
    except ssl.SSLError as error:
        raise DeploymentError(f"TLS fails: {error.reason or error}", where=server, mend="ask its owner") from None
    except TimeoutError:
        raise AbsentError("no answer") from None
    except HTTPException:
        raise AbsentError("the answer is not HTTP") from None
    except OSError as error:
        raise AbsentError((error.strerror or type(error).__name__).lower()) from None
    finally:
        connection.close()
    if (served := _read_seconds(answer.getheader(STAMP_HEADER))) is not None:
        check_clock(served, before, after)
    words = _check_dates(certificate, server) if certificate else ""
    if answer.status in NOT_YET:
        raise AbsentError("it is starting, or starting again" if served is None else "it reads its clients' keys")
    return Greeting(words, _read_seconds(answer.getheader(KEYS_HEADER)) or 0.0)


def check_clock(served: float, before: float, after: float) -> None:
    """Refuse a clock that Flower would, given the server's time at some moment between two of ours.

    Raises:
        ClockError: it is off however those are read.
    """
    ahead, behind = before - served, served - after
    mend = "set it (timedatectl set-ntp true), or have the server's set"
    for seconds, most, side in ((ahead, AHEAD_SECONDS, "ahead of"), (behind, BEHIND_SECONDS, "behind")):
        if seconds >= most:
            off = f"{seconds:.0f} s" if seconds < 7200 else str(timedelta(seconds=round(seconds)))
            raise ClockError(
                f"this machine's clock is {off} {side} the server's: Flower refuses more than {most:.0f} s", mend=mend
            )


def _read_seconds(header: str | None) -> float | None:
    """Read seconds that a server tells, or None where it tells none, or none that a clock has."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < MOST_SECONDS else None


def _connect(host: str, port: int, ca: str) -> HTTPConnection:
    if not ca:
        return HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    try:
        context = ssl.create_default_context(cadata=ca)
    except ssl.SSLError:
        raise DeploymentError(
            "the kit's certificate can't be read", mend="ask the server's owner for the kit again"
        ) from None
    context.verify_flags |= NO_CHECK_TIME
    return HTTPSConnection(host, port, timeout=ANSWER_SECONDS, context=context)


def _refusal(error: ssl.SSLCertVerificationError, server: str, host: str) -> DeploymentError:
    if error.verify_code in OTHER_NAME:
        return DeploymentError(f"the server's certificate is not for {host}", where=server, mend="ask its owner")
    return DeploymentError(
        f"the server's certificate is not signed by the kit's authority ({error.verify_message})",
        where=server,
        mend="ask its owner for a new kit, and compare the fingerprint",
    )


def _check_dates(certificate: Mapping[str, object], server: str) -> str:
    """Return what to say of a certificate's dates, after both clocks were found to agree."""
    begins, ends = (
        datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate[key])), UTC)
        for key in ("notBefore", "notAfter")
    )
    now = datetime.now(UTC)
    if now > ends:
        raise DeploymentError(
            f"the server's certificate expired on {ends:%Y-%m-%d}; both clocks agree on that",
            where=server,
            mend="its owner makes another: fedloom provision renew, and fedloom serve --resume if it runs",
        )
    if now < begins:
        raise DeploymentError(
            f"the server's certificate begins on {begins:%Y-%m-%d %H:%M} UTC, and both clocks say that it is not yet",
            where=server,
            mend="set both machines' clocks",
        )
    return describe_expiry(ends)
