"""Preflight of a client, before it starts anything heavy: does the kit's server answer, and do both clocks agree?

One HTTP request, for the date of its answer. Flower itself says nothing of all this: with another's certificate its
SuperNode tries for ever, and one whose clock is off ends without a word. Nothing of the client's is told.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.request import getproxies, proxy_bypass

from fedloom.deployment.addresses import split_address
from fedloom.deployment.keys import describe_expiry
from fedloom.deployment.processes import rest
from fedloom.errors import DeploymentError

AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 305.0
"""Limits to how far a client's clock may be off. Its SuperNode signs each request with the time; beyond them the server
refuses it with HTTP 401 (flwr.superlink.routers.fleet.node_auth)."""
ANSWER_SECONDS = 15.0
AGAIN_SECONDS = 2.0
"""Time between two looks for a server that is not there yet."""
NO_CHECK_TIME = 0x200000
"""Flag of OpenSSL that leaves a certificate's dates to us, who know the server's clock too."""
OTHER_NAME = (62, 64)
"""Codes of OpenSSL for a certificate that is for other names or addresses."""


class AbsentError(Exception):
    """Nobody answers yet."""


def await_server(server: str, ca: str, say: Callable[[str, str], object], check: Callable[[], None]) -> str:
    """Wait until the kit's server answers, and return what to say of it; meanwhile, `check` may raise.

    Raises:
        DeploymentError: another server answers, or it would refuse this machine for its clock.
    """
    told: set[str] = set()
    while True:
        check()
        try:
            return greet_server(server, ca)
        except AbsentError as absent:
            if str(absent) not in told:
                say("waiting", f"for {server}: {absent}")
            told.add(str(absent))
        rest(AGAIN_SECONDS, check)


def greet_server(server: str, ca: str) -> str:
    """Ask a server once, and return what to say of it; without a certificate authority, over plain HTTP.

    Raises:
        AbsentError: nobody answers.
        DeploymentError: another server answers, or it would refuse this machine for its clock.
    """
    host, port = split_address(server)
    # Behind a proxy of the environment, Flower's connection goes another way than this one would.
    if ca and getproxies().keys() & {"https", "all"} and not proxy_bypass(host):
        return ""
    connection = _connect(host, port, ca)
    try:
        before = time.time()
        connection.connect()
        certificate = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
        connection.request("HEAD", "/")
        date = connection.getresponse().getheader("Date")
        after = time.time()
    except ssl.SSLCertVerificationError as error:
        raise _refusal(error, server, host) from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise AbsentError("it closes the connection") from None
    except ssl.SSLError as error:
        raise DeploymentError(f"TLS fails: {error.reason or error}", where=server) from None
    except TimeoutError:
        raise AbsentError("no answer") from None
    except HTTPException:
        raise AbsentError("the answer is not HTTP") from None
    except OSError as error:
        raise AbsentError((error.strerror or type(error).__name__).lower()) from None
    finally:
        connection.close()
    if (served := _read_date(date or "")) is not None:
        check_clock(served, before, after)
    return _check_dates(certificate, server) if certificate else ""


def check_clock(served: float, before: float, after: float) -> None:
    """Refuse a clock that Flower would, given the server's time in whole seconds at some moment between two of ours.

    Raises:
        DeploymentError: it is off however those are read.
    """
    # The server read its clock somewhere between our two readings, and cut off the fraction of a second.
    ahead, behind = before - (served + 1), served - after
    mend = "set it (timedatectl set-ntp true), or have the server's set"
    for seconds, most, side in ((ahead, AHEAD_SECONDS, "ahead of"), (behind, BEHIND_SECONDS, "behind")):
        if seconds >= most:
            off = f"{seconds:.0f} s" if seconds < 7200 else str(timedelta(seconds=round(seconds)))
            raise DeploymentError(
                f"this machine's clock is {off} {side} the server's: Flower refuses more than {most:.0f} s", mend=mend
            )


def _read_date(header: str) -> float | None:
    """Read the server's time, or None where what it tells is not a date."""
    try:
        return parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):
        return None


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
