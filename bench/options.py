"""Options that benchmarks share: a part of them, and no program. What is unknown is refused in a line, with exit 2."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence


def open_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help has a module's docstring as it stands, line by line."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_parts(parser: argparse.ArgumentParser, parts: Iterable[str]) -> None:
    """Add the parts of a benchmark that can be had alone; `options.parts` is empty where all are meant."""
    names = [*parts]

    def read_part(word: str) -> str:
        if word not in names:
            raise argparse.ArgumentTypeError(f"no part {word!r} (known: {', '.join(names)})")
        return word

    # Not by `choices`: before Python 3.14 argparse holds the empty list to them, too.
    parser.add_argument("parts", nargs="*", type=read_part, metavar="PART", help=f"{', '.join(names)}; all by default")


def add_shape(parser: argparse.ArgumentParser, *names: str, default: str | None = None) -> None:
    """Add the shape of a random model, by position or as an option."""
    from fedloom.model.source import SHAPES

    more = f" (default: {default})" if default else ""
    known = f"of random weights: {', '.join(SHAPES)}{more}"
    parser.add_argument(*names, type=read_shape, default=default, metavar="SHAPE", help=known)


def read_shape(word: str) -> str:
    """Return the name of a shape that there is.

    Raises:
        ArgumentTypeError: there is no such shape.
    """
    from fedloom.model.source import SHAPES

    if word not in SHAPES:
        raise argparse.ArgumentTypeError(f"no shape {word!r} (known: {', '.join(SHAPES)})")
    return word


def read_case(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[str, list[int]]:
    """Return the shape and the numbers of `--case`, or end with what is wrong with them."""
    try:
        return read_shape(words[0]), [int(word) for word in words[1:]]
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(f"--case: {error}")
