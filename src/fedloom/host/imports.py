"""Large libraries, imported quicker. No torch here."""

from __future__ import annotations

from contextlib import AbstractContextManager

from fedloom.host.garbage import leave_garbage


def quick_imports() -> AbstractContextManager[None]:
    """Import large libraries in here: it takes a fifth less.

    An import makes hundreds of thousands of objects, and they stay: looking for garbage among them finds none.
    """
    return leave_garbage()
