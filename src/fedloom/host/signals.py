"""Ctrl-C and SIGTERM: the first ends a run after the step that is under way, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the process is to end as if by Ctrl-C, and to say that it was this."""


class Interruption(AbstractContextManager["Interruption"]):
    """Inside it, a signal waits for the next `check`; outside the main thread, where none arrives, it does nothing.

    One that came after the last check of a block within another is the outer one's to hear.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._asked: int | None = None
        self._is_heard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._come) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        outer = getattr(self._before.get(self._asked or 0), "__self__", None)
        if self._asked is not None and not self._is_heard and isinstance(outer, Interruption):
            outer._come(self._asked, None)

    def check(self) -> None:
        """End here, if that was asked for.

        Raises:
            KeyboardInterrupt, Terminated
        """
        if self._asked is not None:
            self._is_heard = True
            _raise(self._asked)

    def _come(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None:
            self._is_heard = True
            _raise(number)
        self._asked = number
        self._say("ends after this step; once more, and it ends at once")


def _raise(number: int) -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
