"""Reports with empty plots: to draw one takes longer than a tiny run."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def plain_plots() -> Iterator[None]:
    """Leave plots empty inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedloom.report.run_report.draw", lambda plot: "<svg></svg>")
        yield
