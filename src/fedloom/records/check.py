"""Check that a run directory holds together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import Any

from fedloom.adapters.adapter import Layout
from fedloom.adapters.files import load_adapter
from fedloom.errors import FedloomError, RecipeError, RunError
from fedloom.host.machine import Finding
from fedloom.recipe.loading import load_recipe
from fedloom.records.evaluations import kept_baselines, key_of
from fedloom.records.run import EVALUATIONS, MEND, RECORD_OF, Run, list_adapters, missing_records, read_record, read_run
from fedloom.records.state import (
    BEGIN_AGAIN,
    RunState,
    check_records,
    committed,
    count_rounds,
    damaged_adapters,
    read_state,
)

GO_ON = "go on with it: fedloom run --resume puts it right"
NO_STATE = f"{BEGIN_AGAIN}: no state is whole"
REMADE = ("status.json", "baselines.json", "personalised.json", "contributions.json")
"""Files that a run writes anew when it goes on without them."""
REMOVE = "remove it: a run does without it"
RESTORE = f"restore it, or {BEGIN_AGAIN}"
BY_RECIPE = "restore it, or go on by the recipe that it began with: fedloom run RECIPE --resume --out RUN"


def check_run(folder: str | Path) -> list[Finding]:
    """Check a run directory; return a finding for each thing that must hold.

    Raises:
        RunError: the folder is no run.
    """
    if broken := [*_find_broken(Path(folder))]:
        return broken
    try:
        run = read_run(folder)
    except RunError as error:
        if error.mend != MEND:
            raise
        return [Finding(Path(error.where).name, error.what, RESTORE)]
    states: dict[Path, RunState | RunError] = {}
    for path in committed(run.folder):
        try:
            state = read_state(path)
            check_records(run.folder, state)
            states[path] = state
        except RunError as error:
            states[path] = error
    newest = next((state for state in states.values() if isinstance(state, RunState)), None)
    findings = [
        *_find_missing(run),
        _check_states(run, states),
        _check_rounds(run, newest),
        _check_clients(run),
        _check_numbers(run),
        *([_check_results(run)] if run.status.get("state") == "done" else []),
        *([_check_tasks(run)] if run.evaluations or run.own_evaluations else []),
        *(_check_adapter(run, name, round, newest) for name, round in list_adapters(run).items()),
        *_check_own_adapters(run, newest),
        _check_remains(run),
    ]
    if newest or not states:
        return findings
    mendable = [state.mend for state in states.values() if isinstance(state, RunError) and state.mend]
    mend = next(iter(mendable), NO_STATE)
    return [replace(one, mend=mend) if one.mend == GO_ON else one for one in findings]


def _find_broken(folder: Path) -> Iterator[Finding]:
    """Yield the files that can't be read, and that a run makes again or does without; the rest waits for them."""
    for name, mend in {**dict.fromkeys(REMADE, f"remove it, and {GO_ON}"), "environment.json": REMOVE}.items():
        try:
            read_record(folder / name)
        except RunError as error:
            yield Finding(name, error.what, mend)


def _find_missing(run: Run) -> Iterator[Finding]:
    """Yield the files that a run has from its beginning on, and lacks, or whose recipe nobody could go on by."""
    if not run.plan:
        yield Finding("plan.json", "missing", RESTORE if run.rounds else GO_ON)
    if not run.status:
        yield Finding("status.json", "missing", GO_ON)
    try:
        if isfile(run.folder / "recipe.toml"):  # and no pipe, which would be waited for
            load_recipe(run.folder / "recipe.toml")
        else:
            yield Finding("recipe.toml", "missing", BY_RECIPE)
    except RecipeError as error:
        yield Finding("recipe.toml", error.what, BY_RECIPE)


def missing_results(run: Run) -> list[str]:
    """Return the files that a run lacks although it is done: what its recipe asks for beside rounds and adapters."""
    if run.status.get("state") != "done":
        return []
    # With a single client there is nothing to find out about contributions, and no record of it.
    found = [f"{RECORD_OF[key]}.json" for key in missing_records(run) if key != "contributions" or run.plan.get("arms")]
    asked = run.recipe.get("evaluation", {}).get("tasks") and not (run.folder / EVALUATIONS).is_file()
    return [*found, *([EVALUATIONS] if asked else [])]


def _check_results(run: Run) -> Finding:
    if missing := missing_results(run):
        return Finding("results", f"missing: {', '.join(missing)}", GO_ON)
    return Finding("results", "all that the recipe asks for")


def _check_states(run: Run, states: dict[Path, RunState | RunError]) -> Finding:
    damaged = [f"{path.name} ({state.what})" for path, state in states.items() if isinstance(state, RunError)]
    if damaged:
        return Finding("state", f"damaged: {', '.join(damaged)}", GO_ON)
    newest = next(iter(states), None)
    if newest is None and (rounds := count_rounds(run.folder)) > 1:
        return Finding("state", f"missing, and {rounds} rounds are on record", f"restore it, or {BEGIN_AGAIN}")
    return Finding("state", f"{newest.name} is whole" if newest else "no round was committed")


def _check_rounds(run: Run, newest: RunState | None) -> Finding:
    rounds = [record["round"] for record in run.rounds]
    if rounds != list(range(len(rounds))):
        return Finding("rounds", "not one after another", GO_ON)
    if newest and newest.round >= len(rounds):
        return Finding("rounds", f"round {newest.round} was committed and is not on record", "restore rounds.jsonl")
    if newest and newest.round < len(rounds) - 1:
        return Finding("rounds", f"round {len(rounds) - 1} is on record and was not committed", GO_ON)
    return Finding("rounds", f"{len(rounds)} on record, none missing")


def _check_clients(run: Run) -> Finding:
    seen = Counter((record["round"], record["client"]) for record in run.clients)
    twice = [pair for pair, times in seen.items() if times > 1]
    if twice:
        return Finding("clients", "round {}: client {} is counted twice".format(*twice[0]), GO_ON)
    told = {(record["round"], client) for record in run.rounds for client in record.get("clients", ())}
    if told != set(seen):
        round, client = min(told ^ set(seen))
        return Finding("clients", f"round {round}: client {client} is in one record and not in the other", GO_ON)
    return Finding("clients", f"{len(seen)} updates, none counted twice")


def _check_numbers(run: Run) -> Finding:
    asked = [*run.evaluations, *run.own_evaluations]
    of_file = {"rounds.jsonl": run.rounds, "clients.jsonl": run.clients, EVALUATIONS: asked}
    for name, records in of_file.items():
        for line, record in enumerate(records, start=1):
            if not all(map(math.isfinite, _numbers(record))):
                return Finding("numbers", f"{name}:{line} has one that is not finite", "take the run for failed")
    return Finding("numbers", "all finite")


def _check_tasks(run: Run) -> Finding:
    asked = [*run.evaluations, *run.own_evaluations]
    seen = Counter(map(key_of, asked))
    twice = [task for (task, *_), times in seen.items() if times > 1]
    if twice:
        return Finding("tasks", f"{twice[0]} is on record twice for one model", f"remove {EVALUATIONS}, and ask again")
    rounds = {record["round"] for record in run.rounds}
    lost = {record["round"] for record in asked if "round" in record} - rounds
    if lost:
        return Finding("tasks", f"round {min(lost)} was asked and is not on record", GO_ON)
    return Finding("tasks", f"{len(seen)} answers counted, none twice")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def _check_adapter(run: Run, name: str, round: int, newest: RunState | None) -> Finding:
    what = f"adapters/{name}"
    if newest is None:
        return Finding(what, "not checked: there is no state that says what is in it")
    changed = damaged_adapters(run.folder, newest).get(name)
    if changed and (round <= newest.round or name == "initial"):
        return Finding(what, f"damaged: {', '.join(changed)}", GO_ON)
    mend = REMOVE if name.startswith("round-") else GO_ON
    try:
        found = load_adapter(run.folder / "adapters" / name, newest.adapter.layout, frozen=None)
        recorded = run.record_of(round)["adapter_sha256"]
    except FedloomError as error:
        return Finding(what, str(error), mend)
    if found.sha256() != recorded:
        return Finding(what, f"not the adapter of round {round}", mend)
    return Finding(what, f"the adapter of round {round}")


def damaged_own_adapters(run: Run, layout: Layout) -> dict[str, str]:
    """Return the folders of the clients' own and of the baselines' adapters that are not what was written, with why."""
    told = {f"clients/{client}/adapter": one for client, one in run.personalised.get("clients", {}).items()}
    of_clients = {folder: one["adapter_sha256"] for folder, one in told.items() if "adapter_sha256" in one}
    found = {}
    of_baselines = {str(folder.relative_to(run.folder)): one["adapter_sha256"] for one, folder in kept_baselines(run)}
    for folder, digest in (of_clients | of_baselines).items():
        try:
            adapter = load_adapter(run.folder / folder, layout, frozen=None)
        except FedloomError as error:
            found[folder] = str(error)
        else:
            if adapter.sha256() != digest:
                found[folder] = "another adapter than the one on record"
    return found


def _check_own_adapters(run: Run, newest: RunState | None) -> Iterator[Finding]:
    if newest is None:
        return
    damaged = damaged_own_adapters(run, newest.adapter.layout)
    for folder, why in damaged.items():
        yield Finding(folder, why, GO_ON)
    if run.personalised and not damaged:
        yield Finding("clients' adapters", "those on record")


def _check_remains(run: Run) -> Finding:
    """Only a run that is done must have left nothing behind."""
    patterns: tuple[str, ...] = (".*.tmp", "adapters/.*", "clients/*/.*", "baselines/.*", "state/.*", "plots/.*.tmp")
    left = sorted({str(path.relative_to(run.folder)) for pattern in patterns for path in run.folder.glob(pattern)})
    if left and run.status.get("state") == "done":
        return Finding("remains", f"left behind: {', '.join(left[:3])}", "remove them")
    return Finding("remains", "of a round that was not complete" if left else "nothing left behind")
