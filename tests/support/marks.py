"""Which values of a test stand for the others, which files begin, and whether an oracle is there."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest

LONGEST = (
    "tests/deployment/client/test_options.py",
    "tests/experiment/test_nodes.py",
    "tests/experiment/test_experiment_recipes.py",
    "tests/experiment/test_cards.py",
    "tests/experiment/test_controls.py",
    "tests/experiment/test_sweep.py",
    "tests/faults/test_kills.py",
    "tests/test_package.py",
    "tests/handover/test_llama_cpp.py",
    "tests/deployment/test_own_part.py",
    "tests/faults/test_stalled_downloads.py",
    "tests/monitoring/test_status.py",
    "tests/test_cli.py",
    "tests/data/test_long_texts.py",
    "tests/experiment/test_unused.py",
)
"""Files whose few tests take twenty seconds and more: neither a limit nor their number tells."""


CI = pytest.mark.long("beside all others")
"""Marks values that CI tries beside those of every other list, so that none of them is left to `make soak`."""


def first(
    values: Iterable[Any], keep: int = 1, rest: pytest.MarkDecorator = pytest.mark.long, every: int = 1
) -> list[Any]:
    """List values of which the first few are in `make test`; the others, which repeat them, are marked `long`, say.

    Of the others one in `every` is, where they are so many that what is left goes to `make soak`.
    """

    def mark(value: Any, place: int) -> Any:
        marks = pytest.mark.slow if place % every else rest
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)

    return [value if number < keep else mark(value, number - keep) for number, value in enumerate(values)]


def is_installed(name: str) -> bool:
    """Return whether a package is there: a folder of its name without it, as one left half-made, is a place alone."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None
