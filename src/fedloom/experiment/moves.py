"""Moves of a run that goes on: what it may go on with other values of, and how that is put on record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.experiment.trial import AT_ONCE
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import make_absolute
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import flatten, has_plan, read_run
from fedloom.records.state import BEGIN_AGAIN, committed, count_rounds
from fedloom.records.writer import RunWriter

MOVABLE = {"training.devices", AT_ONCE}
"""Keys that a run may go on with other values of: where clients train, and how many at once, moves results by rounding.
A device may be gone."""


def find_moves(writer: RunWriter, recipe: Recipe) -> dict[str, Any]:
    """Return the keys of `MOVABLE` that differ from what a run last went on with, and refuse another recipe.

    Raises:
        RunError: naming the keys that differ beside those; or there are rounds, and no plan that says what of.
    """
    folder = writer.folder
    if not has_plan(folder):
        if count_rounds(folder) or committed(folder):  # whose recipe it can't be told to have
            why = "plan.json is missing, without which a run that has rounds can't go on"
            raise RunError(why, where=str(folder), mend=f"restore plan.json, or {BEGIN_AGAIN}")
        return {}
    run = read_run(folder)
    make_absolute(run.recipe, Path.cwd())  # early versions kept paths as they were written
    began, asked = flatten(run.recipe), flatten(recipe.model_dump(mode="json"))
    plain = Recipe.model_validate({"name": "plain", "model": {"source": "any"}, "data": {"source": "any"}})
    usual = flatten(plain.model_dump(mode="json"))
    # What an earlier version did not know of, it did not do, or did as is done where nothing is said of it.
    differing = sorted(
        key
        for key in (began | asked).keys() - MOVABLE
        if began.get(key) != asked.get(key) and (key in began or (asked[key] and asked[key] != usual.get(key)))
    )
    if differing:
        raise RunError(
            f"the run began with another recipe: {', '.join(differing[:5])}",
            where=str(folder),
            mend="go on with the recipe.toml in it, or begin a run of its own with another --out"
            + ("; a run that goes on has the rounds it began with" if "federation.rounds" in differing else ""),
        )
    last = {**began, **writer.status.get("moved_to", {})}
    return {key: asked.get(key) for key in sorted(MOVABLE) if last.get(key) != asked.get(key)}


def note_moves(writer: RunWriter, moved: Mapping[str, Any], after: int, watchers: Observer) -> None:
    """Put on record what a run goes on with after a round that it had not before."""
    said = [f"{key} = {json.dumps(value)}" if value is not None else f"no {key}" for key, value in moved.items()]
    for one in said:
        watchers.show_step("moved", f"{one} from here on, which moves results by rounding")
    status = writer.status
    told: dict[str, Any] = {
        "moved": [*status.get("moved", []), *(f"after round {after} with {one}" for one in said)],
        "moved_to": {**status.get("moved_to", {}), **moved},
    }
    if AT_ONCE in moved:
        told["clients_at_once"] = moved[AT_ONCE] or read_run(writer.folder).plan["clients_at_once"]
    writer.write_status("running", **told)
