"""Standing of a run or a sweep that nobody is at work in, and the command that goes on with it. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import isfile
from pathlib import Path

from fedloom.errors import RunError
from fedloom.host.files import LOCK, is_held
from fedloom.records.going_on import how_to_go_on
from fedloom.records.run import Run, has_plan, missing_records, read_run
from fedloom.records.sweep_folder import is_done, list_runs
from fedloom.text import count

AT_WORK = "at work, but not for this user to see"
RUNS_SHOWN = 10
"""Runs of a sweep that are told one by one; of more, how many there are."""


def describe_run(run: Run) -> Iterator[str]:
    """Say in lines how a run ended, and how it goes on unless it is done; or that a process has it."""
    if is_held(run.folder / LOCK):  # whatever its status says: one that goes on prepares first
        yield f"{'run':<10}{AT_WORK}"
        return
    state = _state_of(run)
    yield f"{'ended':<10}{state}, {run.status.get('updated', '')}"
    if error := run.status.get("error"):
        yield f"{'error':<10}{error}"
    if why := run.status.get("stopped_early"):
        yield f"{'early end':<10}{why}"
    if state == "done":
        return
    if run.status.get("state") != "done" and (missing := _missing(run)):
        yield f"{'rounds':<10}{missing}"
    yield f"{'go on':<10}{how_to_go_on(run.folder)}"


def describe_sweep(folder: Path) -> Iterator[str]:
    """Say in lines how a sweep stands: what is done, where its other runs stopped, and how it goes on.

    Raises:
        RunError: the list of its runs is damaged.
    """
    names = list_runs(folder)
    others = [name for name in names if not is_done(folder / name)]
    if is_held(folder / LOCK):
        yield f"{'sweep':<10}{AT_WORK}"
    yield _say_done(len(names) - len(others), len(names))
    # A run that lost its recipe began, too: a sweep goes on with it only once that is mended.
    begun = [name for name in others if isfile(folder / name / "resolved.json") or has_plan(folder / name)]
    for name in begun[:RUNS_SHOWN]:
        yield f"{'run':<10}{name}: {_where_it_stopped(folder / name)}"
    if len(begun) > RUNS_SHOWN:
        yield f"{'runs':<10}{len(begun) - RUNS_SHOWN:,} more that began"
    if waiting := len(others) - len(begun):
        yield f"{'runs':<10}{waiting:,} not begun"
    page = folder / "comparison.html"
    if others or (len(names) > 1 and not page.is_file()):
        yield f"{'go on':<10}{how_to_go_on(folder)}"
    elif page.is_file():
        yield f"{'compared':<10}{page}"


def count_done(folder: Path) -> str:
    """Say in a line how many of a sweep's runs are done.

    Raises:
        RunError: the list of its runs is damaged.
    """
    names = list_runs(folder)
    return _say_done(sum(is_done(folder / name) for name in names), len(names))


def _say_done(done: int, runs: int) -> str:
    return f"{'sweep':<10}{done:,} of {count(runs, 'run')} done"


def is_sweep_done(folder: Path) -> bool:
    """Return whether all runs of a sweep are done.

    Raises:
        RunError: the list of its runs is damaged.
    """
    return all(is_done(folder / name) for name in list_runs(folder))


def _where_it_stopped(folder: Path) -> str:
    try:
        run = read_run(folder)
    except RunError as error:
        return str(error)
    at_work = is_held(folder / LOCK)
    state = "at work by itself" if at_work else _state_of(run)
    if run.status.get("state") == "done":
        where = ""
    elif not run.rounds:
        where = " before round 0"
    elif missing := _missing(run):
        where = f", {missing}"
    else:
        where = f" after round {run.rounds[-1]['round']} of {run.recipe['federation']['rounds']}"
    why = "" if at_work else run.status.get("error")
    return f"{state}{where}{f': {why}' if why else ''}"


def _state_of(run: Run) -> str:
    state = str(run.status.get("state", "unknown"))
    if state == "done" and (lack := run.lack):
        return f"done, but {lack}"
    return "killed" if state == "running" else state


def _missing(run: Run) -> str:
    """Say what is missing of a run whose rounds are all done; nothing of one that has rounds left."""
    rounds = run.rounds[-1]["round"] if run.rounds else 0
    if not run.rounds or (rounds < run.recipe["federation"]["rounds"] and not run.status.get("stopped_early")):
        return ""
    names = missing_records(run)
    names += ["tasks"] if run.recipe.get("evaluation", {}).get("tasks") else []
    return f"all {count(rounds, 'round')} are done, but not what follows them{': ' if names else ''}{', '.join(names)}"
