"""Answers to tasks as people read them: figures with their intervals, a column a model. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fedloom.records.run import Record
from fedloom.text import count, list_reasons

BASE = "base"
POOLED = "all documents together"
ALONE = "clients alone, on average"
HARNESS = "harness"
"""Kind of a task that lm-evaluation-harness asked: its figures are shown as it shows them."""
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
"""Measures in their order, and as people read them; those of others have their own names."""


def name_model(record: Record) -> str:
    """Return the name of the model that a record is of: the base, the adapter of a round, or a baseline's."""
    if record.get("baseline") == "local":
        return f"client {record['client']} alone"
    if "baseline" in record:
        return POOLED
    return f"round {record['round']}" if "round" in record else BASE


def is_alone(record: Record) -> bool:
    """Return whether a record is of a client that trained alone."""
    return record.get("baseline") == "local"


def name_measure(name: str) -> str:
    """Return a measure's name as people read it."""
    return MEASURES.get(name, name)


def list_measures(record: Record) -> list[str]:
    """Return the names of a record's measures, in their order."""
    told = record["measures"]
    return [name for name in MEASURES if name in told] + [name for name in told if name not in MEASURES]


def show_number(record: Record, value: float) -> str:
    """Return a value of a record's measures without its unit: per cent, and of the harness what it tells."""
    return f"{value:.4f}" if record.get("kind") == HARNESS else f"{100 * value:.1f}"


def show_value(record: Record, value: float) -> str:
    """Return a value of a record's measures: `41.7 %`, or of the harness `0.4167`."""
    return show_number(record, value) + ("" if record.get("kind") == HARNESS else " %")


def show_figure(record: Record, name: str) -> str:
    """Return a measure of a record with its interval, where it has one: `41.7 % (10 of 24; 24.5 to 61.2)`."""
    measure = record["measures"][name]
    shown = show_value(record, measure["value"])
    if "low" not in measure:
        return shown
    low, high = show_number(record, measure["low"]), show_number(record, measure["high"])
    counted = f"{measure['right']:,} of {measure['of']:,}; " if "right" in measure else ""
    return f"{shown} ({counted}{low} to {high})"


def show_alone(records: Sequence[Record], name: str) -> str:
    """Return the mean of a measure over clients that trained alone, from the lowest to the highest of them."""
    having = [record for record in records if name in record["measures"]]
    if not having:
        return ""
    values = [record["measures"][name]["value"] for record in having]
    mean = show_value(having[0], fmean(values))
    low, high = show_number(having[0], min(values)), show_number(having[0], max(values))
    return f"{mean} ({low} to {high})" if len(having) > 1 else mean


def tabulate(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return a header, and a row for each measure of each task: a column a model, one for all clients alone."""
    alone = [record for record in records if is_alone(record)]
    shared = [record for record in records if not is_alone(record)]
    order = {name_model(one): ("baseline" in one, one.get("round", -1)) for one in shared}
    models = sorted(order, key=order.__getitem__)
    found = {(record["task"], name_model(record)): record for record in shared}
    rows = []
    for task in dict.fromkeys(record["task"] for record in records):
        of_task = [found.get((task, model)) for model in models]
        of_clients = [record for record in alone if record["task"] == task]
        having = [*(record for record in of_task if record), *of_clients]
        for name in dict.fromkeys(name for record in having for name in list_measures(record)):
            cells = [show_figure(one, name) if one and name in one["measures"] else "" for one in of_task]
            cells += [show_alone(of_clients, name)] if alone else []
            rows.append([task, name_measure(name), *cells])
    return ["Task", "Measure", *models, *([ALONE] if alone else [])], rows


def tabulate_alone(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Return a header, and a row for each client that trained alone: a column a task, by its first measure."""
    alone = [record for record in records if is_alone(record) and list_measures(record)]
    tasks = {record["task"]: list_measures(record)[0] for record in alone}
    found = {(record["client"], record["task"]): record for record in alone}
    rows = [
        [
            f"client {client}",
            *(
                show_figure(one, name) if (one := found.get((client, task))) and name in one["measures"] else ""
                for task, name in tasks.items()
            ),
        ]
        for client in sorted({record["client"] for record in alone})
    ]
    return ["Alone", *(f"{task}, {name_measure(name)}" for task, name in tasks.items())], rows


def explain_figures(records: Sequence[Record]) -> str:
    """Say what the figures of records are."""
    said = [
        "Each figure with its 95 % interval, in which it would lie with other questions of the same kind: Wilson's for"
        " shares, a bootstrap for means."
    ]
    if any(record.get("kind") == HARNESS for record in records):
        said.append("Figures of lm-evaluation-harness stand as it gives them, ± 1.96 of its standard errors.")
    if any(map(is_alone, records)):
        said.append("Of the clients alone the mean is shown, from the lowest to the highest of them.")
    return " ".join(said)


def explain_seen(number: int) -> str:
    """Say how many questions of a task are among the documents that were trained on."""
    return f"{number:,} of them among the documents trained on" if number else "none among the documents trained on"


def list_notes(records: Sequence[Record]) -> list[str]:
    """Return what else is to be known of tasks: chance, questions that were trained on, rows skipped, templates."""
    notes = []
    for record in {record["task"]: record for record in records}.values():
        skipped = record.get("skipped", {})
        said = [
            *([f"chance is {100 * record['chance']:.1f} %"] if "chance" in record else []),
            *([f"the mean of {', '.join(record['of_tasks'])}"] if "of_tasks" in record else []),
            *(
                [f"{record['questions']:,} questions, {explain_seen(record['in_training'])}"]
                if "in_training" in record
                else []
            ),
            *([f"{count(sum(skipped.values()), 'row')} skipped: {list_reasons(skipped)}"] if skipped else []),
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
