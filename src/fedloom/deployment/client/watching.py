"""Watch over the processes of `fedloom join`: what ends is started again, within limits. No torch here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedloom.deployment.client.preflight import Greeting
from fedloom.deployment.processes import Child, rest, tail
from fedloom.errors import DeploymentError

AGAIN_SECONDS = 2.0
"""Pause before a process that ended is started again; it doubles each time."""
RESTARTS = 10
"""Restarts of a process within `SETTLED_SECONDS`, after which it is given up."""
SETTLED_SECONDS = 600.0
MOST_SECONDS = 30.0
"""Longest pause before a process that ends again and again is started again."""
REFUSED_SECONDS = 120.0
"""Time for which a server may refuse a key that it takes later: a SuperNode that was killed counts as connected for a
minute, and a key may have been approved since the server looked, which it does not while it computes."""
REFUSALS = (b"Failed to activate SuperNode", b"SuperNode terminated gracefully")
"""Words of Flower's SuperNode before it ends because its key was refused: when it begins, and after HTTP 401."""
UNTRUSTED = b"SSL/TLS handshake error detected"
"""Words of Flower's SuperNode before it ends because of the server's certificate: it may have expired in a run."""
TAKEN = b"SuperNode ID:"
"""Words of Flower's SuperNode when its key was taken."""


NO_ANSWER = b"Connection attempt failed"
"""Words of Flower's SuperNode before it tries a request to the server again."""
ANSWERED = (b"Connection successful", TAKEN)
"""Words of it when a request that was tried again was answered, or a new SuperNode was taken."""
AWAY_SECONDS = 10.0
"""Time without an answer that people are told of; a server that is busy for a moment is not away."""


class Presence:
    """Presence of a server, by what a SuperNode says of it in its log: it is told when it is away, and when it is back.

    At rest nothing else shows it: a SuperNode tries for ever, without a word to anybody.
    """

    def __init__(
        self, server: str, log: Path, say: Callable[[str, str], object], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._server, self._log, self._say, self._now = server, log, say, now
        self._read = 0
        self._since: float | None = None
        self._is_away = False

    def look(self) -> None:
        """Read what the SuperNode has said since, and say what is new in it."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            told = log.read()
        told = told[: told.rfind(b"\n") + 1]  # half a line is read whole next time
        self._read += len(told)
        failed, answered = told.rfind(NO_ANSWER), max(map(told.rfind, ANSWERED))
        if answered > failed:
            if self._is_away:
                self._say("back", f"{self._server} answers again")
            self._since, self._is_away = None, False
        elif failed >= 0 and self._since is None:
            self._since = self._now()
        if self._since is not None and not self._is_away and self._now() - self._since >= AWAY_SECONDS:
            self._is_away = True
            self._say("away", f"{self._server} does not answer: tried until it does")


class RefusedKey:
    """Time for which the server has refused this client's key, over all starts of its SuperNode."""

    def __init__(self, name: str, log: Path, greet: Callable[[], Greeting], say: Callable[[str, str], object]) -> None:
        self._name, self._log, self._greet, self._say = name, log, greet, say
        self._read = 0
        self._first = self._last = -math.inf

    def look(self) -> bool:
        """Return whether the SuperNode ended because its key was refused.

        Raises:
            DeploymentError: the server is not going to take this client.
        """
        with self._log.open("rb") as log:
            log.seek(self._read)
            told = log.read()
        self._read += len(told)
        if TAKEN in told:
            self._last = -math.inf
        if UNTRUSTED in told:
            self._greet()  # this raises and says why
        if not any(refusal in told for refusal in REFUSALS):
            return False
        # A clock that is off is refused with the same words: this raises and says so.
        greeting = self._greet()
        now = time.monotonic()
        if now - self._last >= REFUSED_SECONDS:
            self._first = now
            minutes = REFUSED_SECONDS / 60
            self._say(
                "not yet",
                f"the server does not take {self._name}'s key yet, as when it has just started, has still to"
                " approve it, or holds the connection of a join that was killed: trying for"
                f" {minutes:.0f} minutes",
            )
        self._last = now
        # A server that has not looked at its clients' keys all that time is slow: it has not refused.
        if now - self._first >= REFUSED_SECONDS and greeting.keys_seconds < now - self._first:
            raise DeploymentError(
                f"the server refuses {self._name}'s key: it was not approved there, it is revoked, its approval has "
                "ended, another key took its place, or another fedloom join uses it",
                mend="ask the server's owner; look for a newer kit, and for another fedloom join with this one",
            )
        return True


def watch(
    children: dict[str, Child],
    refused_keys: Mapping[str, RefusedKey],
    say: Callable[[str, str], object],
    check: Callable[[], None],
) -> None:
    """Start again what ends, until `check` raises; a SuperNode is known by its `refused_keys`.

    One of several SuperNodes that ends again and again, or that the server refuses, is left out: the others' clients
    go on.

    Raises:
        DeploymentError: something ends again and again, or the server refuses the last client.
    """
    restarts: dict[str, list[float]] = {what: [] for what in children}
    # A wait for one child holds up the others, which may have ended too: they are looked at when it is over.
    while True:
        check()
        for what, child in [*children.items()]:
            if child.ended:
                try:
                    pause = _pause_of(what, child, restarts, refused_keys.get(what), say)
                except DeploymentError as error:
                    if sum(other in refused_keys for other in children) < 2 or what not in refused_keys:
                        raise
                    say("left out", str(error))
                    children.pop(what).end()
                    continue
                rest(pause, check)
                child.start()
        time.sleep(0.2)


def _pause_of(
    what: str,
    child: Child,
    restarts: dict[str, list[float]],
    refused_key: RefusedKey | None,
    say: Callable[[str, str], object],
) -> float:
    """Return the seconds after which a process that ended is started again.

    Raises:
        DeploymentError: it ended too often, or the server refuses its client.
    """
    now = time.monotonic()
    recent = restarts[what] = [then for then in restarts[what] if now - then < SETTLED_SECONDS]
    log = child.log
    # A refused key ends the SuperNode every few seconds. That is not its fault, and has a limit of its own.
    if not (refused_key and refused_key.look()):
        recent.append(now)
        if len(recent) > RESTARTS:
            why = log and tail(log)
            raise DeploymentError(f"the {what} ended {RESTARTS} times" + (f": {why}" if why else ""))
        why = log and tail(log, 1)
        say("restart", f"the {what} ended; starting it again" + (f" ({why})" if why else ""))
    return min(AGAIN_SECONDS * 2.0 ** max(len(recent) - 1, 0), MOST_SECONDS)
