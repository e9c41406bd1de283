"""Lines for whoever watches `fedloom join`. No torch here.

The worker says most of them, and is a process of its own: `join` hears them through a pipe, so that its log and its
notices have them as its terminal does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedloom.progress import Say
from fedloom.text import show_controls

MARK = "\x1e"
"""Beginning of a line that was said: no text that is shown has it, and what a library prints has none."""
MARKED = "FEDLOOM_MARK"
"""Environment variable with the mark, for a process whose lines are heard."""
WHAT_LETTERS = 10
CLOSE_SECONDS = 5.0


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`."""
    print(f"{os.environ.get(MARKED, '')}{show_controls(f'{what:<{WHAT_LETTERS}}{detail}')}", flush=True)


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
