"""The report's section on tasks: what the base model and the run's adapters can do, beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.records.answers import (
    ALONE,
    BASE,
    POOLED,
    explain_figures,
    is_alone,
    list_measures,
    list_notes,
    name_measure,
    name_model,
    show_alone,
    show_figure,
    show_number,
    show_value,
    tabulate,
    tabulate_alone,
)
from fedloom.records.run import Record, Run
from fedloom.report.document import Block, Bullets, Table, Text, to_lines


def describe_evaluations(records: Sequence[Record]) -> list[str]:
    """Return records as lines of a table for a terminal, a line for each measure, with warnings behind them."""
    tables = [tabulate(records), *([tabulate_alone(records)] if any(map(is_alone, records)) else [])]
    lines = [line for header, rows in tables for line in to_lines(Table(header, rows, text_columns=len(header)))]
    return [*lines, *(f"note      {line}" for line in list_notes(records))]


def show_tasks(run: Run) -> list[Block]:
    """Show a table of all tasks that were asked; nothing for a run without any."""
    return [*_show_asked(run), *_show_own(run)]


def _show_own(run: Run) -> list[Block]:
    """Show what clients elsewhere told of tasks of their own: a row for each client, task and measure."""
    if not run.own_evaluations:
        return []
    head, _ = tabulate(run.own_evaluations)
    rows = []
    for holder in sorted({record["holder"] for record in run.own_evaluations}):
        own, found = tabulate([record for record in run.own_evaluations if record["holder"] == holder])
        cells = [dict(zip(own, row, strict=True)) for row in found]
        rows += [[f"client {holder}", *(named.get(title, "") for title in head)] for named in cells]
    return [
        Text(
            "Tasks that clients hold themselves, asked on their own machines. They tell how many answers were right,"
            " and nobody here knows the questions: figures of two clients can't be compared."
        ),
        Table(["Client", *head], rows, text_columns=3),
    ]


def _show_asked(run: Run) -> list[Block]:
    records = run.evaluations
    if not records:
        return []
    alone = any(map(is_alone, records))
    best = f" Round {run.best_round} is the best by its loss." if run.best_round is not None else ""
    return [
        Text(
            f"{explain_figures(records)} A model is better where the intervals lie apart; where they do not, these"
            f" questions can't tell.{best}"
        ),
        Table(*tabulate(records), text_columns=2),
        *([Table(*tabulate_alone(records))] if alone else []),
        *([Bullets(notes)] if (notes := list_notes(records)) else []),
    ]


def tell_tasks(run: Run) -> str | None:
    """Say on which tasks the best adapter is surely better or worse than the base model, and on which nobody can tell.

    Return None for a run whose base model was not asked the same.
    """
    found: dict[str, list[str]] = {}
    for task, record in _best_asked(run).items():
        base = _find(run, task, BASE)
        shared = [name for name in list_measures(record) if base and name in base["measures"]]
        if not base or not shared or base["digest"] != record["digest"]:
            continue
        name = shared[0]
        ours, theirs = record["measures"][name], base["measures"][name]
        if "low" not in ours or "low" not in theirs:
            continue
        above, below = ours["low"] > theirs["high"], ours["high"] < theirs["low"]
        if not ours.get("higher_is_better", True):
            above, below = below, above
        told = "better" if above else "worse" if below else "unsure"
        values = f"{show_number(base, theirs['value'])} to {show_value(record, ours['value'])}"
        found.setdefault(told, []).append(f"{task} ({values}, {name_measure(name)})")
    words = {
        "better": "On these tasks the adapter is better than the base model, beyond chance: ",
        "worse": "On these it is worse than the base model, beyond chance: ",
        "unsure": "These can't tell the adapter from the base model: ",
    }
    return " ".join(f"{said}{', '.join(found[told])}." for told, said in words.items() if told in found) or None


def compare_tasks(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """Set what runs can do side by side: each run's best adapter that was asked, its base and its baselines.

    Nothing is shown where no run was asked.
    """
    asked = [_best_asked(run) for run in runs]
    tasks = dict.fromkeys(task for records in asked for task in records)
    rows, notes = [], []
    for task in tasks:
        of_task = [records.get(task) for records in asked]
        bases = [_find(run, task, BASE) for run in runs]
        for name in dict.fromkeys(name for record in of_task if record for name in list_measures(record)):
            cells = [
                _show_beside(run, record, name) if record and name in record["measures"] else ""
                for run, record in zip(runs, of_task, strict=True)
            ]
            rows.append([task, name_measure(name), *cells])
        if len({record["digest"] for record in [*of_task, *bases] if record}) > 1:
            notes.append(f"{task}: not all runs were asked the same questions, so its figures can't be compared")
    if not rows:
        return []
    return [
        Text("Each run's best adapter that was asked, with 95 % intervals, its base model and its baselines."),
        Table(["Task", "Measure", *names], rows, text_columns=2 + len(names)),
        *([Bullets(notes)] if notes else []),
    ]


def _best_asked(run: Run) -> dict[str, Record]:
    """Return by task the record of the best adapter, or of the last round that was asked."""
    rounds = sorted({record["round"] for record in run.evaluations if "round" in record} - {run.best_round})
    order = [*rounds, run.best_round]
    return {record["task"]: record for round in order for record in run.evaluations if record.get("round", -1) == round}


def _find(run: Run, task: str, model: str) -> Record | None:
    return next((one for one in run.evaluations if one["task"] == task and name_model(one) == model), None)


def _show_beside(run: Run, record: Record, name: str) -> str:
    """Return a figure of a run's adapter, and what else the run knows of that task, in one cell."""
    shown = [f"{show_figure(record, name)}, {name_model(record)}"]
    for model in (BASE, POOLED):
        if (other := _find(run, record["task"], model)) and name in other["measures"]:
            shown.append(f"{model} {show_value(other, other['measures'][name]['value'])}")
    alone = [one for one in run.evaluations if one["task"] == record["task"] and is_alone(one)]
    if mean := show_alone(alone, name):
        shown.append(f"{ALONE} {mean}")
    return "; ".join(shown)
