"""Lines for whoever watches `fedloom join`. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fedloom.deployment.client.hearing import MARKED, WHAT_LETTERS
from fedloom.text import show_controls

_WHOSE: ContextVar[str] = ContextVar("whose", default="")


def say(what: str, detail: str) -> None:
    """Print a line for whoever watches `fedloom join`, with the client's name where there are several."""
    whose = _WHOSE.get()
    told = f"{what:<{WHAT_LETTERS}}{whose and f'{whose}: '}{detail}"
    print(f"{os.environ.get(MARKED, '')}{show_controls(told)}", flush=True)


@contextmanager
def speaking_of(name: str) -> Iterator[None]:
    """Have the lines that are said in the block bear a client's name; an empty one is none."""
    before = _WHOSE.set(name)
    try:
        yield
    finally:
        _WHOSE.reset(before)
