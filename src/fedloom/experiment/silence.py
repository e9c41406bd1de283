"""Silence of a process that trains elsewhere: how long it may last, by the process's own pace, and waits that look up.

A process that ends closes its socket, and who waits for it hears that. One that is stopped, or hangs, says nothing for
ever. While it loads it says each half minute that it is there; while it trains, it tells of each step.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fedloom.progress import Say
from fedloom.text import format_seconds

LOOK_SECONDS = 0.5
"""Time after which a wait looks up: whether the run is to end, and how long nothing was heard."""
BEAT_SECONDS = 30.0
"""Time between two words of a process that loads a model."""
LATE_SECONDS, LATE_TIMES = 60.0, 3
"""Silence that people are told of: this long, and so many times the longest before."""
LONGEST_SECONDS, LONGEST_TIMES = 900.0, 10
"""Silence after which a process is given up."""
FIRST_SECONDS = 3600.0
"""The same before a process has told of a first step, when its pace is not known."""
CHUNK_BYTES = 2**20


class SilentError(Exception):
    """A process says nothing for longer than it may; its text says for how long."""


class Silence:
    """Clock of what comes from a process, known by its name; `say` is told when it is late, and when it is back."""

    def __init__(self, name: str, say: Say, now: Callable[[], float] = time.monotonic) -> None:
        self._name, self._say, self._now = name, say, now
        self._longest = 0.0
        self._is_late = False
        self._since = now()
        self.has_pace = False
        """True once it has told of a step, or that it loads: how long it is silent at most is known from then on."""

    def begin(self) -> None:
        """Count from here: something is asked of it."""
        self._since = self._now()

    def end(self) -> None:
        """Count from here: bytes came from it, or went to it."""
        silent = self._now() - self._since
        self._longest = max(silent, self._longest)
        if self._is_late:
            self._say("back", f"{self._name}, after {format_seconds(silent)} of silence")
        self._is_late = False
        self.begin()

    def look(self) -> None:
        """Tell people that it is late, once for each silence.

        Raises:
            SilentError: it is given up.
        """
        silent = self._now() - self._since
        most = max(LONGEST_SECONDS, LONGEST_TIMES * self._longest) if self.has_pace else FIRST_SECONDS
        known = f", and for {format_seconds(self._longest)} at most before" if self.has_pace else ""
        if silent > most:
            raise SilentError(f"said nothing for {format_seconds(silent)}{known}")
        if not self._is_late and silent > max(LATE_SECONDS, LATE_TIMES * self._longest * self.has_pace):
            self._is_late = True
            told = f"{self._name} has said nothing for {format_seconds(silent)}{known}"
            self._say("late", f"{told}; given up after {format_seconds(most)}")


class LookingSocket(socket.socket):
    """Socket that calls `look` now and then while it waits, and `moved` whenever bytes came or went.

    What `look` raises ends the wait, in the middle of a frame: the socket is of no use from then on.
    """

    look: Callable[[], object]
    moved: Callable[[], object]

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Wait for bytes."""
        self._check_open()
        while not select.select([self], [], [], LOOK_SECONDS)[0]:
            self.look()
        self.moved()
        return super().recv_into(buffer, nbytes, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all bytes."""
        self._check_open()
        left = memoryview(data).cast("B")
        while left:
            while not select.select([], [self], [], LOOK_SECONDS)[1]:
                self.look()
            # Without the flag, the kernel would wait until it has room for all of it.
            with suppress(BlockingIOError):
                left = left[super().send(left[:CHUNK_BYTES], flags | socket.MSG_DONTWAIT) :]
                self.moved()

    def _check_open(self) -> None:
        if self.fileno() < 0:  # of which `select` says something that is no OSError
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
