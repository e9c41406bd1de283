"""Branch: clients that carry out a task together, and answer it as one client would.

Their round is one as any (`open_round`): each update is admitted, weighed and added, and too many losses end it. Limits
and shares are by what is known of these clients, and of no others. What the branch tells is their weighted mean, with
the examples and tokens behind it, so that whoever weighs its answer by these weighs it as its clients. The mean is
rounded to float32 on its way: by that alone a tree differs from one server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from fedloom.adapters.adapter import Adapter
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import Admission, change_norm
from fedloom.federation.aggregation import fedavg
from fedloom.federation.fleet import Fleet
from fedloom.federation.open_round import OpenRound
from fedloom.progress import Say
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientTask, ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation

ADD_UP = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
"""Strategies that are functions of the clients' weighted mean, for which means of branches, weighed, stand as well."""


class Branch:
    """Clients that answer as one. Every one of them takes part in every task."""

    def __init__(self, fleet: Fleet, section: Federation, say: Say) -> None:
        """Make a branch of a fleet; `section` has its own limits and quorum, and the measure of the run's weights.

        `say` tells of clients that were lost, capped or scaled down in a round.
        """
        self._fleet, self._section, self._say = fleet, section, say
        # Whatever the run's server does with means, here there is nothing but the mean.
        self._mean = fedavg(section.strategy)
        self._admission = Admission(fleet.sizes, section.max_change)
        self._last_round = 0

    def train(self, task: ClientTask) -> ClientUpdate:
        """Have all clients carry out a task, each by its own number, and return their mean as the answer to it.

        Raises:
            TrainingError: more of them are lost than may be.
        """
        if task.round < self._last_round:  # another run of the same recipe, or one that went back
            self._admission = Admission(self._fleet.sizes, self._section.max_change)
        self._last_round = task.round
        round = OpenRound(
            task.adapter,
            task.round,
            [replace(task, client=client) for client in self._fleet.clients],
            self._mean.open(None, task.adapter),
            self._admission,
            lambda update: None,
            self._section,
            proximal_mu=task.training.proximal_mu,
            foresee=self._fleet.foresee,
        )
        for result in self._fleet.train(round.tasks):
            round.add(result)
            if round.error:
                break
        self._tell_of(round)
        aggregated = round.finish()
        if aggregated is None:
            assert round.error, "a round without an adapter has a reason"
            raise round.error
        _, adapter = aggregated
        drift = change_norm(adapter, task.adapter, task.trains_P)
        return ClientUpdate(join_reports(round.reports, task.client, drift, self._fleet.scores), adapter, {})

    def evaluate(self, adapter: Adapter) -> Score | None:
        """Return the score of an adapter on all clients' hold-outs together; None where none tells of one."""
        scores = self._fleet.evaluate(adapter)
        return reduce(add, scores.values()) if scores else None

    def _tell_of(self, round: OpenRound) -> None:
        for why in round.lost.values():
            self._say("lost", why)
        for client in round.capped:
            share = f"{round.shares[client]:.0%} of this branch's weight, by federation.max_share"
            self._say("capped", f"round {round.number}, client {client}: {share}")
        for client, medians in self._admission.scaled.items():
            self._say(
                "scaled", f"round {round.number}, client {client}: its change, {medians:.3g} times the middle one"
            )


def join_reports(
    reports: Sequence[ClientReport], client: int, drift: float, scores: Mapping[int, Score]
) -> ClientReport:
    """Return the report of clients as of one, by its number: examples and tokens are sums, and times the longest.

    Steps are the most that one of them took, for they step side by side: no more are possible than a task allows.
    Losses are means over tokens; those on hold-outs over the tokens that `scores` says are held out.
    """
    held_out = {
        one.client: scores[one.client].num_targets
        for one in reports
        if one.client in scores and one.holdout_loss_before is not None and one.holdout_loss_after is not None
    }

    def mean(name: str) -> float | None:
        return _mean((getattr(one, name), one.tokens) for one in reports)

    def mean_held_out(name: str) -> float | None:
        return _mean((getattr(one, name), held_out[one.client]) for one in reports if one.client in held_out)

    return replace(
        reports[0],
        client=client,
        examples=sum(one.examples for one in reports),
        tokens=sum(one.tokens for one in reports),
        steps=max(one.steps for one in reports),
        loss_first=mean("loss_first"),
        loss_last=mean("loss_last"),
        loss_mean=mean("loss_mean"),
        proximal_loss=mean("proximal_loss") or 0.0,
        proximal_ratio=mean("proximal_ratio") or 0.0,
        drift=drift,
        seconds=max(one.seconds for one in reports),
        evaluate_seconds=max(one.evaluate_seconds for one in reports),
        holdout_loss_before=mean_held_out("holdout_loss_before"),
        holdout_loss_after=mean_held_out("holdout_loss_after"),
    )


def _mean(told: Iterable[tuple[float, int]]) -> float | None:
    """Return the mean of values by their weights; None of none."""
    pairs = [*told]
    total = sum(weight for _, weight in pairs)
    return sum(value * (weight / total) for value, weight in pairs) if pairs else None
