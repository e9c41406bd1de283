"""Answers to tasks, counted: `evaluation.jsonl` of a run directory. No torch here.

A line is one task of one model: the base model, where it has no `round`, or the adapter of a round. A task that a
client elsewhere holds itself has that client as its `holder`. What is asked again replaces its line, so nothing is
there twice; the file is written whole, so no line is ever half there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from fedloom.host.failpoints import failpoint
from fedloom.host.files import write_text
from fedloom.records.run import EVALUATIONS, Record, read_lines


def add_evaluations(folder: Path, records: Sequence[Record]) -> None:
    """Add records to a run's, in place of those of the same task, holder and model."""
    new = {_key(record) for record in records}
    _write(folder, lambda record: _key(record) not in new, records)
    failpoint("evaluation.written")


def forget_evaluations(folder: Path, after: int | None) -> None:
    """Remove the records of adapters after a round, which will be other ones; all of them where that is None."""
    if (folder / EVALUATIONS).is_file():
        _write(folder, lambda record: after is not None and record.get("round", 0) <= after)


def find_evaluation(
    folder: Path, task: str, *, digest: str, round: int | None, adapter_sha256: str | None
) -> Record | None:
    """Return the record of a task that was asked of the same model, with the same questions; None for none."""
    wanted = {"task": task, "digest": digest, "round": round, "adapter_sha256": adapter_sha256}
    records = read_lines(folder / EVALUATIONS)
    return next((one for one in records if all(one.get(key) == value for key, value in wanted.items())), None)


def _key(record: Record) -> tuple[object, ...]:
    return record.get("task"), record.get("round"), record.get("holder")


def _write(folder: Path, keep: Callable[[Record], bool], more: Sequence[Record] = ()) -> None:
    kept = [record for record in read_lines(folder / EVALUATIONS) if keep(record)]
    write_text(folder / EVALUATIONS, "".join(json.dumps(one, allow_nan=False) + "\n" for one in [*kept, *more]))
