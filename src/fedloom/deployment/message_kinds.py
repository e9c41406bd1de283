"""Kinds of fields that travel: each takes what another machine told, or refuses it. No torch here.

A refusal names the field and what it has to be, and quotes nothing of what came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedloom.errors import MessageError


class Kind(Protocol):
    """Kind of a field; as a text it says what such a field may hold."""

    def read(self, told: Any, where: str) -> Any:
        """Return what was told, if it is of this kind.

        Raises:
            MessageError: it is not; the error names the field, `where`.
        """
        ...


def refused(where: str, kind: object) -> MessageError:
    """Return the error for a field that is not of its kind."""
    return MessageError(f"not a {kind}", where=where)


@dataclass(frozen=True)
class Count:
    """Whole number within bounds, both included."""

    least: int
    most: int

    def read(self, told: Any, where: str) -> int:
        # Not isinstance: a truth value is a whole number, too.
        if type(told) is not int or not self.least <= told <= self.most:
            raise refused(where, self)
        return told

    def __str__(self) -> str:
        return f"whole number from {self.least:,} to {self.most:,}"


@dataclass(frozen=True)
class Real:
    """Finite number within bounds, which are included but where they are said not to be."""

    least: float
    most: float
    above: bool = False
    """True where it must be more than `least`."""
    below: bool = False
    """True where it must be less than `most`."""

    def read(self, told: Any, where: str) -> float:
        # What is no number at all compares as False.
        if type(told) not in (int, float) or not self.least <= told <= self.most:
            raise refused(where, self)
        if (self.above and told == self.least) or (self.below and told == self.most):
            raise refused(where, self)
        return float(told)

    def __str__(self) -> str:
        low = f"more than {self.least:g}" if self.above else f"from {self.least:g}"
        return f"number {low}, {'less than' if self.below else 'up to'} {self.most:g}"


@dataclass(frozen=True)
class Flag:
    """Truth value."""

    def read(self, told: Any, where: str) -> bool:
        if type(told) is not bool:
            raise refused(where, self)
        return told

    def __str__(self) -> str:
        return "truth value"


@dataclass(frozen=True)
class Word:
    """One word of a list."""

    words: tuple[str, ...]

    def read(self, told: Any, where: str) -> str:
        if type(told) is not str or told not in self.words:
            raise refused(where, "word of its list")
        return told

    def __str__(self) -> str:
        return "word: " + ", ".join(f"`{word}`" for word in self.words)


@dataclass(frozen=True)
class Pattern:
    """Text of a form."""

    what: str
    form: re.Pattern[str] = field(repr=False)

    def read(self, told: Any, where: str) -> str:
        if type(told) is not str or not self.form.fullmatch(told):
            raise refused(where, self)
        return told

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Listing:
    """List of things of one kind."""

    kind: Kind
    least: int
    most: int

    def read(self, told: Any, where: str) -> list[Any]:
        if type(told) is not list or not self.least <= len(told) <= self.most:
            raise refused(where, f"list of {self.least:,} to {self.most:,}")
        return [self.kind.read(one, where) for one in told]

    def __str__(self) -> str:
        return f"list of {self.least:,} to {self.most:,}, each a {self.kind}"


@dataclass(frozen=True)
class Row:
    """List of fields that are told by their places."""

    fields: tuple[Field, ...]

    def read(self, told: Any, where: str) -> list[Any]:
        if type(told) is not list or len(told) != len(self.fields):
            raise refused(where, f"list of {len(self.fields)}")
        return [one.kind.read(value, f"{where}.{one.name}") for one, value in zip(self.fields, told, strict=True)]

    def __str__(self) -> str:
        return "row of " + "; ".join(f"`{one.name}`: {one.kind}" for one in self.fields)


@dataclass(frozen=True)
class Table:
    """Things of one kind by their names."""

    names: Kind
    kind: Kind
    most: int

    def read(self, told: Any, where: str) -> dict[str, Any]:
        if type(told) is not dict or len(told) > self.most:
            raise refused(where, f"table of at most {self.most:,}")
        return {self.names.read(name, where): self.kind.read(value, where) for name, value in told.items()}

    def __str__(self) -> str:
        return f"table of at most {self.most:,}, by {self.names}, each a {self.kind}"


@dataclass(frozen=True)
class Either:
    """Field that may be of any of some kinds."""

    kinds: tuple[Kind, ...]

    def read(self, told: Any, where: str) -> Any:
        for kind in self.kinds:
            try:
                return kind.read(told, where)
            except MessageError:
                continue
        raise refused(where, self)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.kinds))


@dataclass(frozen=True)
class Only:
    """One value, whatever there is to tell."""

    value: float | None

    def read(self, told: Any, where: str) -> float | None:
        if type(told) is not type(self.value) or told != self.value:
            raise refused(where, self)
        return self.value

    def __str__(self) -> str:
        return "null" if self.value is None else f"{self.value:g}"


@dataclass(frozen=True)
class Field:
    """Field of a message."""

    name: str
    kind: Kind
    meaning: str
    required: bool = True
    policy: str = ""
    """Keys of the policy by which a client's owner limits or forbids it, with spaces between."""
    private: Only | None = None
    """Value that stands in its place in a private run, where it would tell of documents."""


@dataclass(frozen=True)
class Record:
    """Fields by their names, and no others."""

    fields: tuple[Field, ...]

    def read(self, told: Any, where: str = "") -> dict[str, Any]:
        """Return the fields that were told.

        Raises:
            MessageError: one is missing, is not of its kind or is unknown.
        """
        if not isinstance(told, Mapping):
            raise refused(where, "table")
        known = {one.name: one for one in self.fields}
        if not told.keys() <= known.keys():
            raise MessageError("has a field that is unknown or never told", where=where)
        if missing := [one.name for one in self.fields if one.required and one.name not in told]:
            raise MessageError(f"lacks {', '.join(missing)}", where=where)
        return {name: known[name].kind.read(value, f"{where}.{name}".lstrip(".")) for name, value in told.items()}

    def pick(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of one's own may be told: these fields alone, of tables within it likewise."""
        return {
            one.name: one.kind.pick(told[one.name]) if isinstance(one.kind, Record) else told[one.name]
            for one in self.fields
            if one.name in told
        }

    def walk(self, where: str = "") -> Iterator[tuple[str, Field]]:
        """Yield every field with its dotted name, those of tables within it likewise."""
        for one in self.fields:
            name = f"{where}.{one.name}".lstrip(".")
            if isinstance(one.kind, Record):
                yield from one.kind.walk(name)
            else:
                yield name, one

    def __str__(self) -> str:
        return "table"


def as_private(kind: Kind) -> Kind:
    """Return a kind as it is in a run whose recipe has `[privacy]`: what would tell of documents is one value."""
    match kind:
        case Record(fields):
            return Record(tuple(map(_private_field, fields)))
        case Row(fields):
            return Row(tuple(map(_private_field, fields)))
        case Listing(inner, least, most):
            return Listing(as_private(inner), least, most)
    return kind


def _private_field(field: Field) -> Field:
    return replace(field, kind=field.private or as_private(field.kind))


def hide(kind: Kind, told: Any) -> Any:
    """Return what was told with the one value in the place of every field that may have no other."""
    match kind:
        case Only(value):
            return value
        case Record(fields):
            kinds = {field.name: field.kind for field in fields}
            return {name: hide(kinds[name], value) for name, value in told.items()}
        case Row(fields):
            return [hide(field.kind, value) for field, value in zip(fields, told, strict=True)]
        case Listing(inner):
            return [hide(inner, one) for one in told]
    return told
