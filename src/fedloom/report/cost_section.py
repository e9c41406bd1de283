"""Sections of a comparison on its price: what it took each run to reach a loss, and what each took in all."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fedloom.records.run import Run
from fedloom.report import figures
from fedloom.report.document import Block, Bullets, Figure, Table, Text
from fedloom.report.plots import Line, Plot
from fedloom.report.run_report import LOSS_AXIS
from fedloom.text import format_bytes, format_seconds


def show_convergence(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """Show what it took each run to reach losses that all of them reached."""
    goal = max(min(figures.judged_series(run)[2]) for run in runs)
    starts = [figures.judged_series(run)[2][0] for run in runs]
    goals = [goal + share * (max(starts) - goal) for share in (0.5, 0.25, 0.0) if max(starts) > goal]
    rows = []
    for loss in goals or [goal]:
        found = [figures.reach(run, loss) for run in runs]
        for what, form in _REACHED.items():
            rows.append(
                [f"{what} to {loss:.4f}", *("never" if one is None else form(one[what.lower()]) for one in found)]
            )
    lines = []
    for run, name in zip(runs, names, strict=True):
        _, rounds, losses = figures.judged_series(run)
        tokens, total = {}, 0
        for record in run.rounds:
            total += record["train_tokens"]
            tokens[record["round"]] = total
        lines.append(Line(name, [tokens[round] / 1000 for round in rounds], losses))
    return [
        Text("The cost of reaching a loss that all runs reached, and of two losses on the way there."),
        Table(["", *names], rows),
        Figure(
            "comparison-tokens",
            "The judged loss over the tokens that were trained on.",
            Plot(lines, x_label="tokens trained on (thousands)", y_label=LOSS_AXIS),
        ),
    ]


_REACHED = {
    "Rounds": lambda value: f"{value:.0f}",
    "Tokens": lambda value: f"{value:,.0f}",
    "Seconds": lambda value: f"{value:,.1f}",
    "Bytes": format_bytes,
}


def show_cost(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    """Show what each run took: time, memory and bytes, and on which machine."""
    rounds = [figures.trained_rounds(run) or run.rounds for run in runs]
    shares = [figures.phase_shares(run) for run in runs]
    columns: dict[str, Sequence[str]] = {
        "Rounds": [f"{figures.completed(run)} of {run.recipe['federation']['rounds']}" for run in runs],
        "Runtime": [_seconds(figures.elapsed_seconds(run)) + figures.shared_with(run) for run in runs],
        "A round": [
            f"{fmean(map(figures.round_seconds, records)):,.1f} s{', its part' if figures.shares_a_pass(run) else ''}"
            for run, records in zip(runs, rounds, strict=True)
        ],
        **{f"Of which {phase}": [f"{100 * share[phase]:.0f} %" for share in shares] for phase in figures.PHASES},
        "Peak RAM": [_peak(run, "ram") for run in runs],
        "Peak GPU memory": [_peak(run, "gpu") for run in runs],
        "Trainable parameters": [f"{run.plan['trainable_parameters']:,}" for run in runs],
        "Adapter": [format_bytes(run.plan["payload_bytes"]) for run in runs],
        "Exchanged in all": [format_bytes(figures.bytes_moved(run)) for run in runs],
    }
    if not any(figures.peak_memory(run, "gpu") for run in runs):
        del columns["Peak GPU memory"]
    rows = [[name, *values] for name, values in columns.items()]
    shared = [name for name, run in zip(names, runs, strict=True) if figures.shares_a_pass(run)]
    # One pass has one clock, so the seconds of runs that shared it can't be told apart.
    notes = [f"{', '.join(shared)}: {figures.SHARED_PASS}"] if shared else []
    return [Table(["", *names], rows), Bullets([*_machines(runs, names), *notes])]


def _machines(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    return [
        f"{name}: {run.environment.get('processor')}, {', '.join(run.environment.get('gpus', ())) or 'no GPU'}"
        for name, run in zip(names, runs, strict=True)
    ]


def _peak(run: Run, kind: str) -> str:
    peaks = figures.peak_memory(run, kind)
    return format_bytes(max(peaks.values())) if peaks else "not on record"


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:,.0f} s ({format_seconds(seconds)})"
