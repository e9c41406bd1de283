"""Which values of a test stand for the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], keep: int = 1) -> list[Any]:
    """List values of which the first few are in `make test`; the others, which repeat them, are marked `long`."""
    return [
        value
        if number < keep
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
        for number, value in enumerate(values)
    ]
