"""Which values of a test stand for the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], keep: int = 1, rest: pytest.MarkDecorator = pytest.mark.long) -> list[Any]:
    """List values of which the first few are in `make test`; the others, which repeat them, are marked `long`, say."""
    return [
        value if number < keep else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=rest)
        for number, value in enumerate(values)
    ]
