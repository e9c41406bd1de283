"""Recipe of a finished run, the folders of its adapters, and what is in them: those on record, and no other."""

from __future__ import annotations

from os.path import isfile
from pathlib import Path

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.errors import RunError
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.recipe import Recipe, pin
from fedloom.records.run import MEND, list_adapters, read_run
from fedloom.text import list_numbers


def recipe_of(folder: Path) -> Recipe:
    """Return a run's recipe, pinned to the commits that the run used: a hub's main branch may have moved on.

    Raises:
        RunError: there is no such run, or it lost its recipe.
    """
    run = read_run(folder)
    if not isfile(run.folder / "recipe.toml"):  # and no pipe, which would be waited for
        raise RunError("recipe.toml is missing", where=str(folder), mend=MEND)
    return pin(load_recipe(run.folder / "recipe.toml"), run.plan)


def adapter_folder(folder: Path, which: str | int) -> Path:
    """Return the folder of a run's `best`, `last` or `initial` adapter; by a client's number, of that client's own.

    Raises:
        RunError: the run has no such adapter, or a part of it is with the clients alone.
    """
    if isinstance(which, int):
        places = _own_folders(folder)
        if which not in places:
            mend = 'personalise = { epochs = 1 }, or federation.lora_rule = "fedsa", gives each client one'
            if places:
                mend = f"clients that have one: {list_numbers(sorted(places))}"
            raise RunError(f"client {which} has no adapter of its own", where=str(folder), mend=mend)
        return places[which]
    if read_run(folder).plan.get("shared_alone"):
        raise RunError(
            "its adapters have A alone: each client has a B of its own on its own machine",
            where=str(folder),
            mend="use the adapters that fedloom join kept there",
        )
    source = folder / "adapters" / which
    if not source.is_dir():
        mend = "it has one when its first round is complete"
        if read_run(folder).rounds:
            mend = "go on with fedloom run --resume, which writes it again"
        raise RunError(f'no adapter "{which}"', where=str(folder), mend=mend)
    return source


def _own_folders(folder: Path) -> dict[int, Path]:
    """Return the folders of clients' own adapters; what is not on record may be of an earlier try."""
    told = read_run(folder).personalised.get("clients", {})
    places = {
        int(client): folder / "clients" / client / "adapter" for client in told if "adapter_sha256" in told[client]
    }
    return {client: place for client, place in places.items() if place.is_dir()}


def open_adapter(adapted: AdaptedModel, folder: Path, which: str | int) -> Adapter:
    """Read one of a run's adapters, as `adapter_folder` finds it.

    Raises:
        RunError: as `adapter_folder`, or it is not the one on record.
        ModelError: it can't be read.
    """
    place, run = adapter_folder(folder, which), read_run(folder)
    if isinstance(which, int):
        record = run.personalised["clients"][str(which)]
    else:
        round = list_adapters(run).get(which)
        if round is None:
            raise RunError(f'no round is on record that adapter "{which}" is of', where=str(folder), mend=MEND)
        record = run.record_of(round)
    return open_recorded(adapted, place, record["adapter_sha256"])


def open_recorded(adapted: AdaptedModel, place: Path, digest: str) -> Adapter:
    """Read the adapter in a folder, whose hash a record tells.

    Raises:
        RunError: it is another one, so no figure of the run's is its.
        ModelError: it can't be read.
    """
    adapter = adapted.open(place)
    if adapter.sha256() != digest:
        raise RunError(
            "another adapter than the one on record: it was changed or damaged",
            where=str(place),
            mend="go on with fedloom run --resume, which writes it again; or wait, where the run is at work",
        )
    return adapter
