"""Axes of a sweep: keys, each with the values that it takes in turn, typed or from a recipe's own `[sweep]` table.

In a table, an axis is a list of values, or a table of them in which each brings keys of its own. No torch here.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from fedloom.errors import RecipeError
from fedloom.recipe.loading import SWEEP_TABLE, absolute_source, find_recipe, list_keys, read_toml

PATHS = ("model.source", "data.source", "data.chat_template")
"""Keys whose values may be paths, which a file means from its own folder."""
MOST = 10_000
"""Combinations of one sweep: each is a recipe that is checked before the first one runs."""
LONGEST_NAME = 200
"""Bytes of a run's name, which is a folder's: file systems take 255."""


@dataclass(frozen=True)
class Axis:
    """A key, and its values as they stand in TOML, each with the overrides that it brings."""

    key: str
    choices: Mapping[str, Sequence[str]]


def collect_axes(source: str | Path, typed: Sequence[str]) -> list[Axis]:
    """Return the axes of a recipe's `[sweep]` table and those that were typed, which take the place of its own.

    Raises:
        RecipeError: an axis that can't be read, one typed twice, or none at all.
    """
    axes = {axis.key: axis for axis in axes_of(source)}
    own = [read_axis(text) for text in typed]
    if twice := next((axis.key for axis in own if [other.key for other in own].count(axis.key) > 1), None):
        raise RecipeError(f"{twice} is named twice", where="fedloom sweep", mend=f"write {twice}=VALUE,VALUE once")
    axes |= {axis.key: axis for axis in own}
    if not axes:
        mend = f"name some: training.proximal_mu=0,0.1, or a [{SWEEP_TABLE}] table in the recipe"
        raise RecipeError("nothing to sweep over", where="fedloom sweep", mend=mend)
    return list(axes.values())


def choose(axes: Sequence[Axis], num_random: int | None = None) -> list[list[tuple[Axis, str]]]:
    """Return every combination of the axes' values, the last axis' changing first, or `num_random` of them drawn.

    Raises:
        RecipeError: there are more than `MOST`.
    """
    number = math.prod(len(axis.choices) for axis in axes)
    wanted = number if num_random is None else min(num_random, number)
    if wanted > MOST:
        mend = f"leave some out, or draw at most {MOST:,} of them: --random"
        raise RecipeError(f"{wanted:,} combinations are more than {MOST:,}", where="fedloom sweep", mend=mend)
    places = range(number) if num_random is None else sorted(random.Random(0).sample(range(number), wanted))
    return [_pick(axes, place) for place in places]


def _pick(axes: Sequence[Axis], place: int) -> list[tuple[Axis, str]]:
    """Return the combination at a place, without those before it: there may be more than fit in memory."""
    chosen = []
    for axis in reversed(axes):
        place, at = divmod(place, len(axis.choices))
        chosen.append((axis, list(axis.choices)[at]))
    return chosen[::-1]


def name_run(chosen: Sequence[tuple[Axis, str]], taken: Collection[str]) -> str:
    """Name a combination's folder after its values of what varies, or after all of them where nothing does.

    Where that is too long, or taken, a number tells it apart.
    """
    varying = [(axis, value) for axis, value in chosen if len(axis.choices) > 1] or chosen
    short = "_".join(f"{axis.key.rpartition('.')[2]}={value}" for axis, value in varying)
    plain = re.sub(r"[^\w.=+-]+", "-", short).strip("-")
    name = plain.encode()[:LONGEST_NAME].decode(errors="ignore")
    return name if name == plain and name not in taken else f"{name}-{len(taken) + 1}"


def combine(chosen: Sequence[tuple[Axis, str]]) -> tuple[str, ...]:
    """Return the overrides of a combination: each axis' value, and what the values bring.

    Raises:
        RecipeError: two of them set the same key, or one inside the other.
    """
    overrides = [override for axis, value in chosen for override in (f"{axis.key}={value}", *axis.choices[value])]
    keys = [override.partition("=")[0] for override in overrides]
    for one, other in itertools.permutations(keys, 2):
        if f"{one}.".startswith(f"{other}."):
            raise RecipeError(
                f"{one} is set twice", where="fedloom sweep", mend="an axis, or one value's own key: not both"
            )
    return tuple(overrides)


def axes_of(source: str | Path) -> Iterator[Axis]:
    """Yield the axes of a recipe's own table; none where it has none.

    Raises:
        RecipeError: no such recipe, or something else stands in the table.
    """
    text, where = find_recipe(source)
    table = read_toml(text, where).get(SWEEP_TABLE, {})
    if not isinstance(table, dict):
        raise RecipeError(f"[{SWEEP_TABLE}] is no table", where=where, mend="write seed = [1, 2] in it, say")
    beside = Path(where).expanduser().parent
    keys = set(list_keys())
    for key, found in _walk(table, keys):
        if isinstance(found, list):
            choices: dict[str, Sequence[str]] = {_write(key, value, beside): () for value in found}
        elif isinstance(found, dict) and all(isinstance(brought, dict) for brought in found.values()):
            choices = {
                value: [f"{below}={_write(below, one, beside)}" for below, one in _walk(brought)]
                for value, brought in found.items()
            }
        else:
            raise RecipeError(
                "it is neither a list of values nor a table of them",
                where=f"{where}: {SWEEP_TABLE}.{key}",
                mend=f"write {key} = [VALUE, VALUE], or VALUE = {{section.key = ...}} for each in a table",
            )
        yield _check(Axis(key, choices), len(found), f"{where}: {SWEEP_TABLE}.{key}")


def _walk(table: Mapping[str, Any], keys: set[str] | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what stands in nested tables by its dotted key; with all `keys`, what may be the value of one is whole."""
    for name, found in table.items():
        dotted = f"{prefix}{name}"
        above = keys is None or (dotted not in keys and any(key.startswith(f"{dotted}.") for key in keys))
        if isinstance(found, dict) and above:
            yield from _walk(found, keys, f"{dotted}.")
        else:
            yield dotted, found


def _write(key: str, value: Any, beside: Path) -> str:
    """Write a value as it would be typed: a word without quotation marks, where it is one without them too."""
    if not isinstance(value, str):
        return _inline(value)
    value = absolute_source(value, beside) if key in PATHS else value
    plain = value == value.strip() and value.isprintable() and value and not set(value) & set(",\"'[]{}")
    return value if plain and value_of(value) == value else json.dumps(value, ensure_ascii=False)


def _inline(value: Any) -> str:
    """Write a value on one line, as an override has to be."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(tomlkit.item(value).as_string())


def read_axis(text: str) -> Axis:
    """Read `section.key=value,value`.

    Raises:
        RecipeError: there is no key, or a value twice.
    """
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise RecipeError(f"{text!r} is nothing to sweep over", mend="write section.key=value,value")
    found = list(_split(values))
    return _check(Axis(key.strip(), dict.fromkeys(found, ())), len(found), text)


def _check(axis: Axis, number: int, where: str) -> Axis:
    if not axis.choices:
        raise RecipeError("it has no value", where=where, mend="name some")
    if len({repr(value_of(value)) for value in axis.choices}) < number:
        raise RecipeError(f"{where!r} has a value twice", mend="leave one out")
    return axis


def value_of(text: str) -> object:
    """Return what a value is in a recipe: a word that is no TOML stands for itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _split(text: str) -> Iterator[str]:
    """Yield the parts between commas; a comma inside brackets or quotes is part of a value."""
    part = ""
    for piece in text.split(","):
        part = f"{part},{piece}" if part else piece
        try:
            tomllib.loads(f"value = {part}")
        except tomllib.TOMLDecodeError:
            if any(mark in part for mark in "[{\"'"):
                continue  # a value that is not complete yet
        yield part.strip()
        part = ""
    if part:
        yield part.strip()
