"""Combinations of a sweep's settings: the recipe of each, and its name in the sweep's folder."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.experiment.recognition import open_recipe
from fedloom.host.files import take_lock, write_json
from fedloom.progress import Say
from fedloom.recipe.axes import choose, collect_axes, combine, name_run
from fedloom.recipe.loading import SWEEP_TABLE
from fedloom.recipe.recipe import Recipe
from fedloom.records.going_on import how_to_go_on
from fedloom.records.run import SWEEP, flatten, read_sweep
from fedloom.records.sweep_folder import is_done, is_sweep, list_runs
from fedloom.text import count, list_some

MEND = "name another with --out"
MOST = 5
"""Keys, and values of each, that are named of what differs."""


@dataclass(frozen=True)
class Combination:
    """One combination of settings: its recipe, and the name of its run's folder."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def expand(
    source: str | Path, typed: Sequence[str], num_random: int | None = None, say: Say | None = None
) -> Iterator[Combination]:
    """Yield the combinations, each with its recipe: of the axes in its `[sweep]` table, and of those that were typed.

    `say` is told what choices leave out of the recipe, once for all combinations.

    Raises:
        RecipeError: an axis that can't be read, or a recipe that can't be.
    """
    said: Counter[tuple[str, str]] = Counter()
    found: dict[str, Combination] = {}
    for chosen in choose(collect_axes(source, typed), num_random):
        overrides, name = combine(chosen), name_run(chosen, found)
        recipe = open_recipe(source, overrides, lambda what, detail: said.update([(what, detail)]))
        found[name] = Combination(name, overrides, recipe)
    for (what, detail), number in said.items():
        if say and what != SWEEP_TABLE:
            say(what, detail if number == len(found) else f"{number} of {len(found)} runs: {detail}")
    yield from found.values()


def open_sweep(folder: Path, combinations: Sequence[Combination]) -> list[Combination]:
    """Make the sweep's folder, or make sure that it is one of these combinations; they have its names then.

    One whose combinations are all done takes further ones: what is done stays as it is.

    Raises:
        RunError: it is one of others, or can't be made.
    """
    if is_sweep(folder):
        found = _take_names(folder, combinations)
        if len(found) > len(list_runs(folder)):
            with closing(take_lock(folder)):
                write_json(folder / SWEEP, _manifest(found))
        return found
    try:
        taken = any(folder.iterdir()) if folder.is_dir() else folder.exists() or folder.is_symlink()
    except (OSError, ValueError) as error:
        raise RunError("not a possible folder", where=str(folder)[:120], mend=MEND) from error
    if taken:
        raise RunError("it exists and is no sweep", where=str(folder), mend=MEND)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SWEEP, _manifest(combinations))
    except OSError as error:
        raise RunError(f"can't make the folder: {error.strerror}", where=str(folder)) from error
    return [*combinations]


def _take_names(folder: Path, combinations: Sequence[Combination]) -> list[Combination]:
    """Return the combinations by the names that their recipes have in the folder: an early version chose others.

    Raises:
        RunError: the folder has others, naming what differs, or some that are not done beside which others are asked.
    """
    began = read_sweep(folder)
    names: dict[str, list[str]] = defaultdict(list)
    for name, recipe in began.items():
        names[_text(recipe)].append(name)
    taken, found = {*began, *(combination.name for combination in combinations)}, []
    for combination in combinations:
        name, same = combination.name, names[_text(_dump(combination))]
        further = _free_name(name, taken) if name in began else name
        found.append(replace(combination, name=same.pop(0) if same else further))
    if not any(names.values()) and len(found) == len(began):
        return found
    differs = describe_difference([*began.values()], [_dump(combination) for combination in combinations])
    if any(names.values()):
        raise RunError(f"this is a sweep over something else: {differs}", where=str(folder), mend=MEND)
    # Beside others it would train otherwise, by rounding, than it began.
    if undone := sum(not is_done(folder / name) for name in began):
        raise RunError(
            f"{undone} of its {count(len(began), 'run')} must be done before others join them: {differs}",
            where=str(folder),
            mend=f"first go on with: {how_to_go_on(folder)}",
        )
    return found


def _free_name(name: str, taken: Collection[str]) -> str:
    """Return a name with a number that nobody has."""
    return next(one for number in itertools.count(2) if (one := f"{name}-{number}") not in taken)


def _manifest(combinations: Sequence[Combination]) -> dict[str, Any]:
    return {combination.name: _dump(combination) for combination in combinations}


def describe_difference(there: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]) -> str:
    """Say which keys take other values in recipes that are asked than in those that are there, and which."""
    ours, theirs = _values_of(asked), _values_of(there)
    keys = [key for key in {**theirs, **ours} if {*theirs.get(key, ())} != {*ours.get(key, ())}]
    if not keys:  # some of the combinations of the same values, as drawn
        return f"{len(there):,} combinations there, and {len(asked):,} asked, of the same values"
    said = [f"{key}: {_some(theirs.get(key, ()))} there, and {_some(ours.get(key, ()))} asked" for key in keys[:MOST]]
    return "; ".join(said) + (f"; and {len(keys) - MOST} keys more" if len(keys) > MOST else "")


def _values_of(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the values of each key, each once, as they are written in JSON."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for recipe in recipes:
        for key, value in flatten(dict(recipe)).items():
            values[key][json.dumps(value, ensure_ascii=False)] = None
    return {key: [*found] for key, found in values.items()}


def _some(values: Sequence[str]) -> str:
    return list_some(values, MOST) or "nothing"


def _dump(combination: Combination) -> dict[str, Any]:
    return combination.recipe.model_dump(mode="json")


def _text(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, sort_keys=True)
