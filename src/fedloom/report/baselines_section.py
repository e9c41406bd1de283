"""The report's section on whether federation helped: a run beside its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from fedloom.records.run import Run
from fedloom.report.document import Block, Figure, Table, Text
from fedloom.report.figures import (
    ENOUGH,
    are_alike,
    completed,
    count_judges,
    count_rounds,
    describe_judge,
    judged_series,
    series,
)
from fedloom.report.plots import Line, Plot
from fedloom.text import count


class Trained(NamedTuple):
    """A row of the table: the federation or a baseline, the tokens it trained on, and its judged loss by round."""

    name: str
    tokens: int
    losses: Sequence[float]
    """Nats per token, from round 0 on."""


def list_trained(run: Run) -> list[Trained]:
    """List the federation and then its finished baselines, each client alone by itself; empty if it has none."""
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


def select_alone(things: Sequence[Trained]) -> list[Trained]:
    """Return the baselines in which one client trains alone."""
    return [thing for thing in things if thing.name.endswith(" alone")]


def show_baselines(run: Run, loss_axis: str) -> list[Block]:
    """Show a table and a plot of the run and its baselines; nothing for a run without any."""
    things = list_trained(run)
    if not things:
        return []
    single = select_alone(things)
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
    rounds, fewer = completed(run), {len(thing.losses) - 1 for thing in drawn if thing is not things[0]}
    # It has as many passes over its documents as the federation, of whose clients only some may train in a round.
    spread = (
        "" if fewer <= {rounds} else f" Those of a baseline, {fewer.pop()}, are spread over the federation's {rounds}."
    )
    return [
        Text(
            "All of them start from the same adapter and are judged alike, by"
            f" {describe_judge(run)}. A baseline trains without the proximal term, {_how_long(run, things[1:])}."
        ),
        Table(["Trained", "Tokens", "Best loss", "Last loss"], rows),
        Figure(
            "baselines",
            f"Loss by round of the federation and its baselines.{spread}",
            Plot(
                [
                    Line(
                        thing.name,
                        judged_series(run)[1] if thing is things[0] else _spread_over(rounds, len(thing.losses) - 1),
                        thing.losses,
                    )
                    for thing in drawn
                ],
                x_label="round of the federation" if spread else "round",
                y_label=loss_axis,
            ),
        ),
    ]


def _spread_over(rounds: int, own: int) -> list[float]:
    """Return places of a baseline's rounds, the first at 0 and the last at the federation's last."""
    return [rounds * round / own for round in range(own + 1)]


def did_it_help(run: Run) -> str | None:
    """Say if the federation's best adapter is better than the best that a client trains alone.

    Of too few documents there is no verdict, only losses. Return None for a run without such baselines.
    """
    things = list_trained(run)
    single = select_alone(things)
    if not single:
        return None
    ours, best = min(things[0].losses), min(single, key=lambda thing: min(thing.losses))
    gap = min(best.losses) - ours
    if are_alike(gap):
        said, why = "federation made no difference", f"the best loss of {best.name} is as low as its own"
    elif gap > 0:
        said = "federation helped"
        why = f"its best loss is {gap:.4f} nats a token below that of {best.name}, the best client"
    else:
        said, why = "federation did not help", f"{best.name} is {-gap:.4f} nats a token below its best loss"
    if (judges := count_judges(run)) < ENOUGH:
        said = f"nobody can tell if federation helped, which takes {ENOUGH}"
    text = f"Judged by {describe_judge(run)} ({count(judges, 'document')}), {said}: {why}"
    pooled = [thing for thing in things if thing.name == "all documents together"]
    if not pooled:
        return text + "."
    apart = ours - min(pooled[0].losses)
    is_so = "as low as" if are_alike(apart) else f"{abs(apart):.4f} {'below' if apart > 0 else 'above'}"
    return f"{text}. The best loss of training on all documents together is {is_so} the federation's."


def _how_long(run: Run, baselines: Sequence[Trained]) -> str:
    """Say how long baselines trained beside how often clients took part."""
    rounds = max((len(thing.losses) for thing in baselines), default=1) - 1
    if {*count_rounds(run).values()} <= {rounds} or not rounds:
        return "on its documents as many times as the federation did"
    return f"for {count(rounds, 'round')}, as many as a client took part in on average"
