"""Command that goes on with a run or a sweep, for whoever tells of one that ended before its end. No torch here."""

from __future__ import annotations

from pathlib import Path

from fedloom.records.run import read_record
from fedloom.records.sweep_folder import command_of, is_sweep, list_runs
from fedloom.text import quote_path


def how_to_go_on(folder: Path, command: str = "") -> str:
    """Return the command that goes on with a run or a sweep, as far as its records know it.

    A run of a sweep goes on with the sweep, but where `command` names what was at work in the run by itself.

    Raises:
        RunError: the records that say so are damaged.
    """
    if is_sweep(folder):
        return command_of(folder)
    plan = read_record(folder / "plan.json")
    if plan.get("strategy"):
        return "fedloom.run(..., resume=True, aggregate=...)"
    home, name = folder.resolve(), quote_path(folder)
    if command:
        return f"{command} --resume {name}"
    if home.name in list_runs(home.parent):
        return command_of(home.parent)
    if plan.get("elsewhere"):
        return f"fedloom serve --resume {name}, or fedloom submit where a server stays"
    return f"fedloom run --resume {name}"
