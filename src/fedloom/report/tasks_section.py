"""The report's section on tasks: what the base model and the run's adapters can do, beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.records.run import Record, Run
from fedloom.report.document import Block, Bullets, Table, Text, to_lines

BASE = "base"
MEASURES = {
    "accuracy": "accuracy",
    "accuracy_by_length": "accuracy by length",
    "board": "as the board counts",
    "unreadable": "no answer at all",
    "exact_match": "exact match",
    "f1": "F1 of words",
    "rouge_l": "ROUGE-L",
    "pass@1": "pass@1",
    "pass@10": "pass@10",
    "pass@100": "pass@100",
}
"""Measures in their order, and as people read them."""


def describe_evaluations(records: Sequence[Record]) -> list[str]:
    """Return records as lines of a table for a terminal, a line for each measure, with warnings behind them."""
    header, rows = _tabulate(records)
    lines = to_lines(Table(header, rows, text_columns=len(header)))
    return [*lines, *(f"note      {line}" for line in _notes(records))]


def show_tasks(run: Run) -> list[Block]:
    """Show a table of all tasks that were asked; nothing for a run without any."""
    records = run.evaluations
    if not records:
        return []
    best = f" Round {run.best_round} is the best by its loss." if run.best_round is not None else ""
    return [
        Text(
            "Each figure with its 95 % interval, in which it would lie with other questions of the same kind: Wilson's"
            " for shares, a bootstrap for means. A model is better where the intervals lie apart; where they do not,"
            f" these questions can't tell.{best}"
        ),
        Table(*_tabulate(records), text_columns=2),
        *([Bullets(notes)] if (notes := _notes(records)) else []),
    ]


def tell_tasks(run: Run) -> str | None:
    """Say on which tasks the best adapter is surely better or worse than the base model, and on which nobody can tell.

    Return None for a run whose base model was not asked the same.
    """
    found: dict[str, list[str]] = {}
    for task, record in _best_asked(run).items():
        base = _find(run, task, None)
        shared = [name for name in list_measures(record) if base and name in base["measures"]]
        if not base or not shared or base["digest"] != record["digest"]:
            continue
        name = shared[0]
        ours, theirs = record["measures"][name], base["measures"][name]
        told = "better" if ours["low"] > theirs["high"] else "worse" if ours["high"] < theirs["low"] else "unsure"
        found.setdefault(told, []).append(
            f"{task} ({100 * theirs['value']:.1f} to {100 * ours['value']:.1f} %, {MEASURES[name]})"
        )
    words = {
        "better": "On these tasks the adapter is better than the base model, beyond chance: ",
        "worse": "On these it is worse than the base model, beyond chance: ",
        "unsure": "These can't tell the adapter from the base model: ",
    }
    return " ".join(f"{said}{', '.join(found[told])}." for told, said in words.items() if told in found) or None


def compare_tasks(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """Set what runs can do side by side: each run's best adapter that was asked, and its base; nothing without any."""
    asked = [_best_asked(run) for run in runs]
    tasks = dict.fromkeys(task for records in asked for task in records)
    rows, notes = [], []
    for task in tasks:
        of_task = [records.get(task) for records in asked]
        bases = [_find(run, task, None) for run in runs]
        for name in dict.fromkeys(name for record in of_task if record for name in list_measures(record)):
            cells = [
                _show_beside(record, base, name) if record and name in record["measures"] else ""
                for record, base in zip(of_task, bases, strict=True)
            ]
            rows.append([task, MEASURES[name], *cells])
        if len({record["digest"] for record in [*of_task, *bases] if record}) > 1:
            notes.append(f"{task}: not all runs were asked the same questions, so its figures can't be compared")
    if not rows:
        return []
    return [
        Text("Each run's best adapter that was asked, with 95 % intervals, and its base model."),
        Table(["Task", "Measure", *names], rows, text_columns=2 + len(names)),
        *([Bullets(notes)] if notes else []),
    ]


def _best_asked(run: Run) -> dict[str, Record]:
    """Return by task the record of the best adapter, or of the last round that was asked."""
    rounds = sorted({record["round"] for record in run.evaluations if "round" in record} - {run.best_round})
    order = [*rounds, run.best_round]
    return {record["task"]: record for round in order for record in run.evaluations if record.get("round", -1) == round}


def _find(run: Run, task: str, round: int | None) -> Record | None:
    return next((one for one in run.evaluations if one["task"] == task and one.get("round") == round), None)


def _show_beside(record: Record, base: Record | None, name: str) -> str:
    shown = f"{show_figure(record, name)}, {name_model(record)}"
    if not base or name not in base["measures"]:
        return shown
    return f"{shown}; {BASE} {100 * base['measures'][name]['value']:.1f} %"


def show_figure(record: Record, name: str) -> str:
    """Return a measure of a record with its interval: `41.7 % (10 of 24; 24.5 to 61.2)`."""
    measure = record["measures"][name]
    value, low, high = (100 * measure[key] for key in ("value", "low", "high"))
    counted = f"{measure['right']:,} of {measure['of']:,}; " if "right" in measure else ""
    return f"{value:.1f} % ({counted}{low:.1f} to {high:.1f})"


def name_model(record: Record) -> str:
    """Return the name of the model that a record is of: the base, or the adapter of a round."""
    return f"round {record['round']}" if "round" in record else BASE


def list_measures(record: Record) -> list[str]:
    """Return the names of a record's measures, in their order."""
    return [name for name in MEASURES if name in record["measures"]]


def _tabulate(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return a header, and a row for each measure of each task: a column a model."""
    models = sorted({name_model(record): record.get("round", -1) for record in records}.items(), key=lambda one: one[1])
    found = {(record["task"], name_model(record)): record for record in records}
    rows = []
    for task in dict.fromkeys(record["task"] for record in records):
        of_task = [found.get((task, model)) for model, _ in models]
        measures = dict.fromkeys(name for record in of_task if record for name in list_measures(record))
        for name in measures:
            cells = [show_figure(one, name) if one and name in one["measures"] else "" for one in of_task]
            rows.append([task, MEASURES[name], *cells])
    return ["Task", "Measure", *(model for model, _ in models)], rows


def _notes(records: Sequence[Record]) -> list[str]:
    """Return what else is to be known of tasks: chance, rows that were skipped, another template than in training."""
    notes = []
    for record in {record["task"]: record for record in records}.values():
        skipped = sum(record.get("skipped", {}).values())
        said = [
            *([f"chance is {100 * record['chance']:.1f} %"] if "chance" in record else []),
            *([f"the mean of {', '.join(record['of_tasks'])}"] if "of_tasks" in record else []),
            *([f"{skipped:,} rows skipped"] if skipped else []),
            *([record["warning"]] if "warning" in record else []),
        ]
        notes += [f"{record['task']}: {'; '.join(said)}"] if said else []
    digests: dict[str, set[str]] = {}
    for record in records:
        digests.setdefault(record["task"], set()).add(record["digest"])
    return notes + [
        f"{task}: not all models were asked the same questions; ask them again"
        for task, found in digests.items()
        if len(found) > 1
    ]
