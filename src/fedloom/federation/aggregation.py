"""How updates become the next global adapter: pure pairs (init, update) over the flat vector.

Updates are consumed as they arrive, so the server's memory does not grow with the number of clients.

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedloom.adapters.adapter import Adapter
from fedloom.training.jobs import ClientReport, ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe import Strategy

State = Any
"""What a strategy remembers between rounds."""


@dataclass(frozen=True)
class Aggregate:
    """A strategy: `init(adapter) -> state`, `update(state, adapter, updates) -> (state, adapter)`."""

    init: Callable[[Adapter], State]
    update: Callable[[State, Adapter, Iterable[ClientUpdate]], tuple[State, Adapter]]


WEIGHTS: dict[str, Callable[[ClientReport], float]] = {
    "examples": lambda report: report.examples,
    "tokens": lambda report: report.tokens,
}
"""What a client's share in the mean is proportional to."""


def weighted_mean(adapter: Adapter, updates: Iterable[ClientUpdate], weigh: Callable[[ClientReport], float]) -> Adapter:
    """Σ n_k w_k / Σ n_k (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1), in the layout of `adapter`.

    Summed in float64: the mean of equal updates is that update to the bit, and the order of arrival is lost in
    the rounding.
    """
    total, sum_P = 0.0, torch.zeros_like(adapter.weights_P, dtype=torch.float64)
    for update in updates:
        weight = float(weigh(update.report))
        sum_P.add_(update.adapter.weights_P, alpha=weight)
        total += weight
    assert total > 0, "a round without updates has no mean"
    return replace(adapter, weights_P=sum_P.div_(total).to(adapter.weights_P.dtype))


def fedavg(strategy: Strategy) -> Aggregate:
    """The weighted mean, with nothing to remember."""
    weigh = WEIGHTS[strategy.weight_by]
    return Aggregate(
        init=lambda adapter: None,
        update=lambda state, adapter, updates: (state, weighted_mean(adapter, updates, weigh)),
    )


STRATEGIES: dict[str, Callable[[Strategy], Aggregate]] = {"fedavg": fedavg}
