"""Hearing of a process that says lines: `fedloom join` hears its worker, so that its log and notices have them too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import MappingProxyType

from fedloom.progress import Say

MARK = "\x1e"
"""Beginning of a line that was said: no text that is shown has it, and what a library prints has none."""
MARKED = "FEDLOOM_MARK"
"""Environment variable with the mark."""
HEARD = MappingProxyType({MARKED: MARK, "PYTHONIOENCODING": "utf-8"})
"""Environment of a process whose lines are heard."""
WHAT_LETTERS = 10
"""Letters of a line in which the word of what is done stands."""
CLOSE_SECONDS = 5.0


@contextmanager
def hearing(tell: Say) -> Iterator[int]:
    """Give a descriptor for the output of a process, until the block ends: `tell` is called with each line it says.

    Whatever else is printed there goes to standard output as it is.
    """
    end, descriptor = os.pipe()
    listener = threading.Thread(target=_listen, args=(end, tell), name="fedloom hearing", daemon=True)
    listener.start()
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        # What the process said last is heard, too; one that it has left behind holds nobody up.
        listener.join(CLOSE_SECONDS)


def _listen(end: int, tell: Say) -> None:
    with open(end, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            # Nobody may read what this process prints any more; the other one must be able to go on.
            with suppress(OSError):
                if line.startswith(MARK):
                    said = line[len(MARK) :].rstrip("\n")
                    tell(said[:WHAT_LETTERS].rstrip(), said[WHAT_LETTERS:])
                else:
                    print(line, end="", flush=True)
