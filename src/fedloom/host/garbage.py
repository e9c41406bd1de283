"""Python's garbage collection, where it may not run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leave_garbage() -> Iterator[None]:
    """Collect no garbage inside, however many objects are made there."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
