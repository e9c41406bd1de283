"""Compact records of the study's runs, from which the page is written, and from nothing else.

A file is a sweep: a line of JSON with what all its runs share, and a line for each run with the rest: its recipe, what
its plan and its machine were, and each number of its rounds as a column.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rescoring import score_real_tokens

from fedloom.errors import RunError
from fedloom.host.files import write_text
from fedloom.records.plan import Plan
from fedloom.records.run import Record, Run, flatten, read_json, read_run
from fedloom.report.comparison import runs_in

HERE = Path(__file__).parent
RECORDS = HERE / "records"
COLUMNS = (
    "train_loss", "client_loss", "central_loss", "proximal_mu", "proximal_loss", "drift", "lora_error",
    "train_seconds", "aggregate_seconds", "evaluate_seconds", "train_tokens", "evaluate_tokens", "bytes_up",
    "bytes_down", "runs_together",
)  # fmt: skip
"""What is kept of each round, where it is on record."""
REAL_LOSS = "real_loss"
"""Column of a run that counts padding: the central loss over real tokens alone, of its last round."""
PLAN = (
    "model", "model_revision", "dtype", "engine", "parameters", "trainable_parameters", "data", "data_revision",
    "central_documents", "central_tokens", "peak_bytes", "payload_bytes", "steps_per_round", "train_tokens_per_round",
)  # fmt: skip
SIZES = ("parameters", "trainable_parameters", "payload_bytes", "peak_bytes", "clients_at_once", "dtype", "engine")
"""What is kept of a plan of the experiment over OPT-350M itself, which is planned and not run."""
DIGITS = 6
"""Digits of a kept number: losses to a hundred-thousandth."""


def keep(sweep: Path, path: Path) -> None:
    """Write what is kept of each finished run of a sweep's folder into a file, whole or not at all."""
    write_kept([compact(read_run(folder), sweep.parent) for folder in runs_in(sweep)], path)


def write_kept(kept: Sequence[Record], path: Path) -> None:
    """Write records of runs, with what they share in the first line."""
    shared = find_shared(kept)
    lines = [json.dumps(part) for part in (shared, *(without(record, shared) for record in kept))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))


def find_shared(records: Sequence[Record]) -> Record:
    """Return what all records have alike, in nested tables too."""
    first, *others = records
    found: Record = {}
    for key, value in first.items():
        values = [other.get(key) for other in others]
        if all(isinstance(one, dict) for one in (value, *values)):
            if inner := find_shared([value, *values]):
                found[key] = inner
        elif all(one == value for one in values):
            found[key] = value
    return found


def without(record: Record, shared: Record) -> Record:
    """Return a record without what it shares; `merge` puts it back."""
    found: Record = {}
    for key, value in record.items():
        if key not in shared:
            found[key] = value
        elif isinstance(value, dict) and (inner := without(value, shared[key])):
            found[key] = inner
    return found


def merge(shared: Record, record: Record) -> Record:
    """Return a record with what it shares."""
    found = dict(shared)
    for key, value in record.items():
        found[key] = merge(shared[key], value) if key in shared else value
    return found


def compact(run: Run, folder: Path) -> Record:
    """Return what is kept of a run; paths inside of a tier's folder lose what stands before it."""
    columns = {key: [_short(record.get(key)) for record in run.rounds] for key in COLUMNS}
    if run.recipe["data"]["pad_in_loss"]:
        columns[REAL_LOSS] = [None] * (len(run.rounds) - 1) + [_short(score_real_tokens(run.folder))]
    peaks = [peak for record in run.rounds for peak in record.get("ram_peak_bytes", {}).values()]
    found = {
        "name": run.folder.name,
        "recipe": _without_nothing(run.recipe),
        "plan": {key: run.plan[key] for key in PLAN if key in run.plan},
        "environment": run.environment,
        "commit": describe_commit(),
        "status": run.status,
        "ram_peak_bytes": max(peaks, default=None),
        "rounds": {key: values for key, values in columns.items() if any(value is not None for value in values)},
    }
    return json.loads(json.dumps(found).replace(f"{folder}/", ""))  # type: ignore[no-any-return]


def describe_commit() -> str:
    """Return the commit that is checked out, marked where files of the program differ from it."""
    words = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
    return subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


class Tier:
    """The runs of a tier that are on record, by sweep; those of a sweep that is not done are not there."""

    def __init__(self, name: str, records: Path = RECORDS) -> None:
        self.name = name
        self.sweeps = {path.stem: list(_read(path)) for path in sorted((records / name).glob("*.jsonl"))}

    @property
    def runs(self) -> list[Run]:
        """Return the runs of all sweeps."""
        return [run for runs in self.sweeps.values() for run in runs]

    def arm(self, sweep: str, **wanted: object) -> list[Run]:
        """Return the runs of a sweep with these values, in whose keys `__` stands for a dot."""
        keys = {key.replace("__", "."): value for key, value in wanted.items()}
        return [run for run in self.sweeps.get(sweep, []) if keys.items() <= _settings(run).items()]

    def mixed(self, mu: float = 0.1) -> list[Run]:
        """Return the runs over mixed files; with a μ of 0.1 they are the experiment itself."""
        return self.arm("proximal", data__partition__kind="iid", training__proximal_mu=mu)

    def natural(self, mu: float = 0.1) -> list[Run]:
        """Return the runs in which each client has whole packages."""
        return self.arm("proximal", data__partition__kind="natural", training__proximal_mu=mu)


def _settings(run: Run) -> Record:
    return {key: value for key, value in flatten(run.recipe).items() if not isinstance(value, list)}


def _read(path: Path) -> Iterator[Run]:
    """Yield the runs of a file, each as its run directory had it.

    Raises:
        RunError: the file is damaged. A run is never left out of the page in silence.
    """
    shared: Record | None = None
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number += 1
            record = json.loads(line, parse_constant=_refuse)
            if shared is None:
                shared = record
            else:
                yield _restore(path.parent, merge(shared, record))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError("the record is damaged", where=f"{path}:{number}", mend=f"git restore {path}") from error
    if number < 2:
        raise RunError("no run is on record", where=str(path), mend=f"git restore {path}")


def _restore(folder: Path, kept: Record) -> Run:
    columns = kept["rounds"]
    if not all(isinstance(value, int | float | None) for values in columns.values() for value in values):
        raise TypeError("a column holds numbers")
    names, by_round = list(columns), zip(*columns.values(), strict=True)
    rounds = [
        {"round": n, **{name: value for name, value in zip(names, values, strict=True) if value is not None}}
        for n, values in enumerate(by_round)
    ]
    return Run(
        folder / kept["name"], kept["recipe"], {**kept["environment"], "commit": kept["commit"]},
        {**kept["plan"], "ram_peak_bytes": kept["ram_peak_bytes"]},
        kept["status"], rounds, [], {}, {}, {},
    )  # fmt: skip


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of a record")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _without_nothing(recipe: Any) -> Any:
    """Return a recipe without what it leaves out: a key without a value, a section without keys."""
    if not isinstance(recipe, dict):
        return recipe
    kept = {key: _without_nothing(value) for key, value in recipe.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}


def keep_plans(plans: Mapping[str, Plan], path: Path = RECORDS / "plans.json") -> None:
    """Write what plans say of memory and of what is sent, by the name of their recipe."""
    kept = {name: {key: getattr(plan, key) for key in SIZES} for name, plan in plans.items()}
    write_text(path, json.dumps(kept, indent=1) + "\n")


def read_plans(path: Path = RECORDS / "plans.json") -> Record:
    """Return the sizes that plans said, by the name of their recipe."""
    return read_json(path)
