"""Answers to tasks, counted: `evaluation.jsonl` of a run directory. No torch here.

A line is one task of one model: the adapter of a `round`, that of a `baseline` (pooled, or local of a `client`), or
else the base model. A task that a client elsewhere holds itself has that client as its `holder`. What is asked again
replaces its line, so nothing is there twice; the file is written whole, so no line is ever half there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fedloom.host.failpoints import failpoint
from fedloom.host.files import write_text
from fedloom.records.run import EVALUATIONS, Record, Run, read_lines

MODEL = ("round", "baseline", "client")
"""Keys that say which model a record is of."""
BASELINES = "baselines"
"""Folder of the baselines' adapters in a run directory."""


def baseline_folder(client: int | None) -> str:
    """Return where a baseline's adapter lies in a run directory: that of a client alone, or of all documents."""
    return f"{BASELINES}/{'pooled' if client is None else f'client-{client}'}"


def kept_baselines(run: Run) -> list[tuple[Record, Path]]:
    """Return the baselines whose adapters are there, as records name such a model, each with its folder."""
    told: list[tuple[Record, Record]] = [({"baseline": "pooled"}, run.baselines.get("pooled", {}))]
    told += [({"baseline": "local", "client": int(name)}, one) for name, one in run.baselines.get("local", {}).items()]
    # Whoever has no use for an adapter may have removed it.
    return [
        ({**model, "adapter_sha256": one["adapter_sha256"]}, folder)
        for model, one in told
        if "adapter_sha256" in one and (folder := run.folder / baseline_folder(model.get("client"))).is_dir()
    ]


def add_evaluations(folder: Path, records: Sequence[Record]) -> None:
    """Add records to a run's, in place of those of the same task, holder and model."""
    new = {key_of(record) for record in records}
    _write(folder, lambda record: key_of(record) not in new, records)
    failpoint("evaluation.written")


def forget_evaluations(folder: Path, after: int | None) -> None:
    """Remove the records of adapters after a round, which will be other ones; all of them where that is None."""
    if (folder / EVALUATIONS).is_file():
        _write(folder, lambda record: after is not None and record.get("round", 0) <= after)


def find_evaluation(folder: Path, task: str, *, digest: str, model: Record) -> Record | None:
    """Return the record of a task that was asked of the same model, with the same questions; None for none."""
    told = {**model, "task": task, "digest": digest}
    wanted = {key: told.get(key) for key in ("task", "digest", "adapter_sha256", *MODEL)}
    records = read_lines(folder / EVALUATIONS)
    return next((one for one in records if all(one.get(key) == value for key, value in wanted.items())), None)


def key_of(record: Record) -> tuple[object, ...]:
    """Return what no two records have alike: their task, whoever holds it, and their model."""
    return record.get("task"), record.get("holder"), *(record.get(key) for key in MODEL)


def _write(folder: Path, keep: Callable[[Record], bool], more: Sequence[Record] = ()) -> None:
    kept = [record for record in read_lines(folder / EVALUATIONS) if keep(record)]
    write_text(folder / EVALUATIONS, "".join(json.dumps(one, allow_nan=False) + "\n" for one in [*kept, *more]))
