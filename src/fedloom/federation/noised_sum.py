"""Sum of clients' changes of which no one client is told: clipped, noised, divided by the number that was expected.

The strategy that a recipe names sees the noised mean and nothing else, as if it were the one update of a round: all
that it does is made of what may be told anyway.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.federation.aggregation import Aggregate, RoundSum, State
from fedloom.privacy.central import CentralNoise
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientUpdate
from fedloom.training.objective import noised_mean, sum_clipped

PartOf = Callable[[int], Tensor | None]
"""Part of an adapter that is trained in a round (from 1), bool [P]; None is all of it."""


class ClippedSum:
    """Sum of changes, each scaled down to a norm over all weights that are trained, whatever the client's size.

    A change that is no number counts as nothing, as one that never came.
    """

    def __init__(self, adapter: Adapter, max_norm: float, part_P: Tensor | None) -> None:
        self._start_P, self._max_norm = adapter.weights_P.double(), max_norm
        self._still_P = None if part_P is None else ~part_P
        self.sum_P = torch.zeros_like(self._start_P)
        self.centred = 0.0
        """Sum of 1/2 for each change within the norm, and −1/2 for each beyond."""

    def add(self, update: ClientUpdate) -> None:
        """Add one client's change, at once: an update may be lent."""
        change_P = update.adapter.weights_P.double() - self._start_P
        if self._still_P is not None:
            change_P.masked_fill_(self._still_P, 0.0)
        norm = float(change_P.norm())
        if math.isfinite(norm):
            self.centred += 0.5 if norm <= self._max_norm else -0.5
        self.sum_P += sum_clipped(change_P[None], self._max_norm, 1)[0]


def noised_sum(strategy: Aggregate, central: CentralNoise, part_of: PartOf) -> Aggregate:
    """Return a strategy that is given the noised mean of each round's clipped changes, and of no client more.

    It draws the clients of a round, and remembers the rounds so far, the norm C, and what the strategy does.
    """
    terms = central.terms

    def init(adapter: Adapter) -> State:
        return 0, terms.max_norm, strategy.init(adapter)

    def open_round(state: State, adapter: Adapter) -> RoundSum:
        before, max_norm, held = state
        round = before + 1
        part_P = part_of(round)
        total = ClippedSum(adapter, max_norm, part_P)

        def finish() -> tuple[State, Adapter]:
            noise = central.open(round, adapter.sha256())
            noise_P = noise.for_changes(max_norm, len(total.sum_P))
            if part_P is not None:
                noise_P.masked_fill_(~part_P, 0.0)
            mean_1P = noised_mean(total.sum_P[None], noise_P[None], torch.tensor([terms.expected], dtype=torch.float64))
            weights_P = (adapter.weights_P.double() + mean_1P[0]).to(adapter.weights_P.dtype)
            after, made = strategy.update(held, adapter, [_as_one(replace(adapter, weights_P=weights_P), round)])
            # With this round's norm both were scaled and noised; the next has to wait until now.
            adapts = terms.quantile is not None
            next_norm = terms.adapt_norm(max_norm, total.centred, noise.for_number()) if adapts else max_norm
            return (round, next_norm, after), made

        return RoundSum(total.add, finish)

    def draw(clients: Sequence[int], round: int, adapter: Adapter) -> list[int]:
        assert len(clients) == terms.clients, "other clients than were accounted for"
        return [clients[place] for place in central.open(round, adapter.sha256()).draw()]

    return Aggregate(init, open_round, draw=draw)


def norm_of(state: State) -> float:
    """Return the norm C of the round that comes next, of what `noised_sum` remembers."""
    return float(state[1])


def _as_one(adapter: Adapter, round: int) -> ClientUpdate:
    """Return the mean as the one update of a round, of a client that nobody is."""
    report = ClientReport(
        round=round, client=0, examples=1, tokens=1, steps=1, proximal_mu=0.0, loss_first=None, loss_last=None,
        loss_mean=None, proximal_loss=0.0, proximal_ratio=0.0, drift=0.0, seconds=0.0,
    )  # fmt: skip
    return ClientUpdate(report, adapter, {})
