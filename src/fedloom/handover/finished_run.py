"""Recipe of a finished run, and the folders of its adapters."""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import RunError
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.recipe import Recipe, pin
from fedloom.records.run import read_run


def recipe_of(folder: Path) -> Recipe:
    """Return a run's recipe, pinned to the commits that the run used: a hub's main branch may have moved on.

    Raises:
        RunError: there is no such run.
    """
    run = read_run(folder)
    return pin(load_recipe(run.folder / "recipe.toml"), run.plan)


def adapter_folder(folder: Path, which: str) -> Path:
    """Return the folder of a run's `best`, `last` or `initial` adapter.

    Raises:
        RunError: the run has no such adapter, or a part of it is with the clients alone.
    """
    if read_run(folder).plan.get("shared_alone"):
        raise RunError(
            "its adapters have A alone: each client has a B of its own on its own machine",
            where=str(folder),
            mend="use the adapters that fedloom join kept there",
        )
    source = folder / "adapters" / which
    if not source.is_dir():
        raise RunError(f'no adapter "{which}"', where=str(folder), mend="it has one when its first round is complete")
    return source
