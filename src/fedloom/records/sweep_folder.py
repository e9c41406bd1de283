"""The folder of a sweep, beside its runs: their names, and what the sweep was asked for. No torch here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from os.path import isfile
from pathlib import Path

from fedloom.errors import RunError
from fedloom.host.files import write_json
from fedloom.records.run import BEGUN, SWEEP, find_lack, read_lines, read_record, read_sweep
from fedloom.text import quote_path

ASKED = "asked.json"
"""File of a sweep's folder: the recipe, the axes and the draw that it was last started with."""
MEND_ASKED = "remove it, and go on with the command that began the sweep, which writes it again"


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is a sweep's."""
    return isfile(folder / SWEEP)


def list_runs(folder: Path) -> list[str]:
    """Return the names of a sweep's runs, in its order; none where the folder is no sweep's.

    Raises:
        RunError: the list is damaged.
    """
    return [*read_sweep(folder)]


def is_done(run: Path) -> bool:
    """Return whether a run was carried out to its end, and lacks nothing since: see `find_lack`.

    One whose records are damaged is not done. Of what its clients did nothing is read, which would take longest.
    """
    with suppress(RunError):
        status = read_record(run / "status.json")
        if status.get("state") == "done" and not find_lack(run, status, read_lines(run / "rounds.jsonl")):
            return all(read_record(run / name) for name in BEGUN)
    return False


def write_asked(folder: Path, source: str | Path, axes: Sequence[str], num_random: int | None) -> None:
    """Write down what a sweep was started with, so that its command can be told.

    Raises:
        RunError: it can't be written.
    """
    path = Path(source)
    own = path.suffix == ".toml" or len(path.parts) > 1  # and not the name of one that ships
    recipe = str(path.expanduser().absolute()) if own else str(source)
    write_json(folder / ASKED, {"recipe": recipe, "axes": [*axes], "random": num_random})


def command_of(folder: Path) -> str:
    """Return the command that goes on with a sweep, as far as its folder knows it.

    Raises:
        RunError: what was asked for is damaged.
    """
    asked = read_record(folder / ASKED, MEND_ASKED)
    if not asked:  # an early version began it
        return f"the command that began it, and --out {quote_path(folder)}"
    draw = [] if asked["random"] is None else ["--random", str(asked["random"])]
    return shlex.join(["fedloom", "sweep", asked["recipe"], *asked["axes"], *draw, "--out", str(folder)])
