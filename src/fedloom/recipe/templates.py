"""Templates of rows: text with columns in braces, as a recipe has them under `data.prompt` and `data.completion`.

`{name}` stands for a column, `{input.text}` for a value inside of one, and `{{` and `}}` for braces. What stands
between `[[` and `]]` is left out where a column in it is empty. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

PIECES = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}]")
"""Marks in a template, which are no plain text."""


class Piece(NamedTuple):
    """Piece of a template: plain text, or the column that stands there."""

    text: str
    is_column: bool


class RowTemplate(NamedTuple):
    """Template that was read: parts, of which each is pieces and whether it may be left out."""

    parts: tuple[tuple[tuple[Piece, ...], bool], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns that it names, each once, in the order of their first place."""
        return tuple(dict.fromkeys(piece.text for pieces, _ in self.parts for piece in pieces if piece.is_column))

    @property
    def needed(self) -> tuple[str, ...]:
        """Return those of the columns without which there is no text."""
        sure = [piece for pieces, optional in self.parts if not optional for piece in pieces]
        return tuple(dict.fromkeys(piece.text for piece in sure if piece.is_column))

    @property
    def only_column(self) -> str | None:
        """Return its column where it is nothing beside it, so that the column may hold more than text."""
        pieces = [piece for pieces, _ in self.parts for piece in pieces]
        return pieces[0].text if len(pieces) == 1 and pieces[0].is_column else None

    def fill(self, read: Callable[[str, bool], str]) -> str:
        """Return the text of a row, whose columns `read` gives: their names, and whether they may be missing."""
        return "".join(self._fill_parts(read))

    def _fill_parts(self, read: Callable[[str, bool], str]) -> Iterator[str]:
        for pieces, optional in self.parts:
            values = {piece.text: read(piece.text, optional) for piece in pieces if piece.is_column}
            if not optional or all(value.strip() for value in values.values()):
                yield "".join(values[piece.text] if piece.is_column else piece.text for piece in pieces)


@lru_cache(maxsize=64)
def parse_template(text: str) -> RowTemplate:
    """Read a template.

    Raises:
        ValueError: says what is wrong with it.
    """
    parts: list[tuple[tuple[Piece, ...], bool]] = []
    pieces: list[Piece] = []
    inside, end = False, 0
    for found in PIECES.finditer(text):
        pieces += _plain(text[end : found.start()])
        end = found.end()
        mark = found.group()
        if mark in ("{{", "}}"):
            pieces += _plain(mark[0])
        elif mark in ("[[", "]]"):
            if inside == (mark == "[["):
                raise ValueError(f"has a {mark} too many: [[ ... ]] can't stand inside of another")
            parts.append((tuple(pieces), inside))
            if inside and not any(piece.is_column for piece in pieces):
                raise ValueError("has [[ ... ]] without a column in it")
            pieces, inside = [], not inside
        elif found.group(1) is None:
            raise ValueError("has a brace that stands alone: write {{ or }} for the character itself")
        elif not found.group(1).strip():
            raise ValueError("has {} without the name of a column")
        else:
            pieces.append(Piece(found.group(1), True))
    if inside:
        raise ValueError("has a [[ that is never closed")
    pieces += _plain(text[end:])
    parts.append((tuple(pieces), False))
    return RowTemplate(tuple(part for part in parts if part[0]))


def _plain(text: str) -> list[Piece]:
    return [Piece(text, False)] if text else []
