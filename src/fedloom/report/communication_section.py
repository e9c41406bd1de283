"""The report's section on communication: the adapters that travelled, by round, and what is not counted among them."""

from __future__ import annotations

from fedloom.records.run import Run
from fedloom.report import figures
from fedloom.report.document import Block, Table, Text
from fedloom.text import count, format_bytes


def show_communication(run: Run) -> list[Block]:
    """Show the bytes of each round, both ways, beside those of the whole model."""
    rounds = figures.trained_rounds(run)
    if not rounds:
        return [Text("Nothing has been exchanged yet.")]
    whole = figures.full_model_bytes(run)
    rows = [
        [
            str(record["round"]),
            format_bytes(record["bytes_down"]),
            format_bytes(record["bytes_up"]),
            format_bytes(record["bytes_up"] / len(record["clients"])) if record["clients"] else "",
            format_bytes(whole * figures.transfers(run, [record])),
        ]
        for record in rounds
    ]
    header = ["Round", "Down", "Up", "Up, a client", "The full model, both ways"]
    moved, sizes = figures.bytes_moved(run), f"he whole model in float32 has {format_bytes(whole)}"
    is_whole = run.recipe["adapter"]["method"] == "full"
    sizes = f"T{sizes}" if is_whole else f"An adapter has {format_bytes(run.plan['payload_bytes'])}, t{sizes}"
    return [
        Text(f"{sizes}. Both ways, {format_bytes(moved)} were exchanged in training.{_say_what_is_not_counted(run)}"),
        Table(header, rows),
    ]


def _say_what_is_not_counted(run: Run) -> str:
    """Say what the bytes are without: what carries adapters, and those that clients are sent to be scored."""
    elsewhere = bool(run.plan.get("elsewhere"))
    times = sum(len(record.get("client_losses", ())) for record in run.rounds)
    # Of a rule whose adapters grow, that is what they are at first.
    least = "at least " if run.plan.get("bytes_are") == "at first" else ""
    scoring = (
        f" Not counted: to be scored on clients' hold-outs, adapters {'were' if elsewhere else 'would have been'} sent"
        f" {count(times, 'time')} more, {least}{format_bytes(times * run.plan['payload_bytes'])}."
        if times
        else ""
    )
    if elsewhere:
        return f" These are the adapters alone: what carries them adds its own.{scoring}"
    return f" All clients were on this machine: this is what a network would have carried.{scoring}"
