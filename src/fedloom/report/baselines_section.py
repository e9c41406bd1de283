"""Did federation help? A run set against its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from fedloom.records.run import Run
from fedloom.report.document import Block, Figure, Table, Text
from fedloom.report.figures import judged_series, series
from fedloom.report.plots import Line, draw_lines


class Trained(NamedTuple):
    """One row: what was trained, on how many tokens, and its judged losses by round."""

    name: str
    tokens: int
    losses: Sequence[float]


def trained_things(run: Run) -> list[Trained]:
    """The federation first, then its baselines that came to an end, clients alone one by one; empty without any."""
    record = run.baselines
    if not record or not judged_series(run)[2]:
        return []
    found = [Trained("the federation", int(sum(series(run, "train_tokens")[1])), judged_series(run)[2])]
    others = {"no training": record.get("round0", {}), "all documents together": record.get("pooled", {})}
    others |= {f"client {client} alone": told for client, told in record.get("local", {}).items()}
    return found + [
        Trained(name, told["tokens"], told["losses"])
        for name, told in others.items()
        if told.get("losses") and "error" not in told
    ]


def alone(things: Sequence[Trained]) -> list[Trained]:
    return [thing for thing in things if thing.name.endswith(" alone")]


def show_help(run: Run, loss_axis: str) -> list[Block]:
    """A table and a plot; nothing for a run without baselines."""
    things = trained_things(run)
    if not things:
        return []
    single = alone(things)
    rows = [
        [thing.name, f"{thing.tokens:,}", f"{min(thing.losses):.4f}", f"{thing.losses[-1]:.4f}"]
        for thing in things
        if thing not in single
    ]
    if single:
        bests = [min(thing.losses) for thing in single]
        best, worst = single[bests.index(min(bests))], single[bests.index(max(bests))]
        mean_tokens, mean_last = fmean(thing.tokens for thing in single), fmean(thing.losses[-1] for thing in single)
        rows.append(["a client alone, on average", f"{mean_tokens:,.0f}", f"{fmean(bests):.4f}", f"{mean_last:.4f}"])
        for word, thing in (("best", best), ("worst", worst)) if len(single) > 1 else ():
            rows.append(
                [
                    f"the {word}, {thing.name}",
                    f"{thing.tokens:,}",
                    f"{min(thing.losses):.4f}",
                    f"{thing.losses[-1]:.4f}",
                ]
            )
    drawn = [thing for thing in things if len(thing.losses) > 1][:6]
    return [
        Text(
            "All of them start from the same adapter and are judged on the same documents. A baseline trains on its"
            " documents as often as the federation did, without the proximal term."
        ),
        Table(["Trained", "Tokens", "Best loss", "Last loss"], rows),
        Figure(
            "baselines",
            "The judged loss by round, of the federation and of what it is set against.",
            draw_lines(
                [Line(thing.name, range(len(thing.losses)), thing.losses) for thing in drawn],
                x_label="round",
                y_label=loss_axis,
            ),
        ),
    ]


def did_it_help(run: Run) -> str | None:
    """Whether the federation's best adapter is better than the best that a client has alone."""
    things = trained_things(run)
    single = alone(things)
    if not single:
        return None
    ours, best = min(things[0].losses), min(single, key=lambda thing: min(thing.losses))
    gap = min(best.losses) - ours
    if gap > 0:
        text = f"Federation helped: its best loss is {gap:.4f} nats a token below that of {best.name}, the best of them"
    elif gap < 0:
        text = f"Federation did not help: {best.name} is {-gap:.4f} nats a token below its best loss"
    else:
        text = f"Federation made no difference: {best.name} comes to the same loss"
    pooled = [thing for thing in things if thing.name == "all documents together"]
    if not pooled:
        return text + "."
    apart = ours - min(pooled[0].losses)
    return f"{text}; all documents together come to {abs(apart):.4f} {'less' if apart > 0 else 'more'}."
