"""Which values of a test stand for the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], keep: int = 1, every: int = 1) -> list[Any]:
    """List values of which the first few are in `make test`; the others, which repeat them, are marked `long`.

    Of the others one in `every` is, where they are so many that the rest is left to `make soak`.
    """
    return [value if number < keep else _marked(value, (number - keep) % every) for number, value in enumerate(values)]


def _marked(value: Any, place: int) -> Any:
    mark = pytest.mark.slow if place else pytest.mark.long
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=mark)
