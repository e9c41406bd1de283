"""How updates become the next global adapter: pure pairs (init, update) over the flat vector.

Updates are consumed as they arrive, so the server's memory does not grow with the number of clients; the robust rules,
which set updates against each other, hold those of a round.

Letters: K clients of a round, P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.errors import RecipeError
from fedloom.training.jobs import ClientReport, ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.sections import Strategy

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


MOST_IN_FLOAT64 = 2**26
"""Weights that are summed in float64. Of a whole model the sum would be as large as two more models, so that the server
had no room in what it has room for; float32 loses a 10⁻⁷th of a weight."""


def weighted_mean(adapter: Adapter, updates: Iterable[ClientUpdate], weigh: Callable[[ClientReport], float]) -> Adapter:
    """Σ n_k w_k / Σ n_k (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1), in the layout of `adapter`.

    Summed in float64: the mean of equal updates is that update to the bit, and the order of arrival is lost in
    the rounding. Of more than `MOST_IN_FLOAT64` weights, in their own dtype.
    """
    wide = adapter.weights_P.numel() <= MOST_IN_FLOAT64
    total, sum_P = 0.0, torch.zeros_like(adapter.weights_P, dtype=torch.float64 if wide else None)
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


ServerStep = Callable[[State, Tensor], tuple[State, Tensor]]
"""The state and the clients' mean change -> the new state and the change to make, [P] in float64."""


def server_optimizer(strategy: Strategy, init: Callable[[Adapter], State], step: ServerStep) -> Aggregate:
    """The clients' mean change as the (negative) gradient of an optimizer of the server's (Reddi et al. 2021)."""
    weigh = WEIGHTS[strategy.weight_by]

    def update(state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        before_P = adapter.weights_P.double()
        state, change_P = step(state, weighted_mean(adapter, updates, weigh).weights_P.double() - before_P)
        return state, replace(adapter, weights_P=(before_P + change_P).to(adapter.weights_P.dtype))

    return Aggregate(init, update)


def fedavgm(strategy: Strategy) -> Aggregate:
    """v ← βv + Δ, w ← w + ηv, or w + η(Δ + βv) with Nesterov (Hsu et al. 2019, arXiv 1909.06335, section 4.3)."""
    rate, momentum, nesterov = (strategy.setting(key) for key in ("learning_rate", "momentum", "nesterov"))

    def step(velocity_P: Tensor, delta_P: Tensor) -> tuple[Tensor, Tensor]:
        velocity_P = momentum * velocity_P + delta_P
        return velocity_P, rate * (delta_P + momentum * velocity_P if nesterov else velocity_P)

    return server_optimizer(strategy, _zeros, step)


def fedadam(strategy: Strategy) -> Aggregate:
    """m/(√v + τ), with v a decaying mean of Δ² (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    The rate is corrected for the zeros that m and v start from, as Flower's is, one round ahead of Adam's own.
    """
    rate, beta_1, beta_2, tau = (strategy.setting(key) for key in ("learning_rate", "beta_1", "beta_2", "tau"))

    def step(state: Moments, delta_P: Tensor) -> tuple[Moments, Tensor]:
        round, mean_P, square_P = state
        mean_P = beta_1 * mean_P + (1 - beta_1) * delta_P
        square_P = beta_2 * square_P + (1 - beta_2) * delta_P**2
        corrected = rate * math.sqrt(1 - beta_2 ** (round + 2)) / (1 - beta_1 ** (round + 2))
        return (round + 1, mean_P, square_P), corrected * mean_P / (square_P.sqrt() + tau)

    return server_optimizer(strategy, _no_moments, step)


def fedyogi(strategy: Strategy) -> Aggregate:
    """As FedAdam with v ← v − (1−β₂)Δ² sign(v − Δ²), and no correction (arXiv 2003.00295, algorithm 2)."""
    rate, beta_1, beta_2, tau = (strategy.setting(key) for key in ("learning_rate", "beta_1", "beta_2", "tau"))

    def step(state: Moments, delta_P: Tensor) -> tuple[Moments, Tensor]:
        round, mean_P, square_P = state
        mean_P = beta_1 * mean_P + (1 - beta_1) * delta_P
        square_P = square_P - (1 - beta_2) * delta_P**2 * (square_P - delta_P**2).sign()
        return (round + 1, mean_P, square_P), rate * mean_P / (square_P.sqrt() + tau)

    return server_optimizer(strategy, _no_moments, step)


def fedadagrad(strategy: Strategy) -> Aggregate:
    """Δ/(√v + τ), with v the sum of all Δ² (arXiv 2003.00295, algorithm 2)."""
    rate, tau = strategy.setting("learning_rate"), strategy.setting("tau")

    def step(square_P: Tensor, delta_P: Tensor) -> tuple[Tensor, Tensor]:
        square_P = square_P + delta_P**2
        return square_P, rate * delta_P / (square_P.sqrt() + tau)

    return server_optimizer(strategy, _zeros, step)


def norm_clipped(strategy: Strategy) -> Aggregate:
    """The mean of changes, each scaled down to a norm (Sun et al. 2019, arXiv 1911.07963, section 4)."""
    weigh, max_norm = WEIGHTS[strategy.weight_by], strategy.setting("max_norm")

    def update(state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        def clipped() -> Iterator[ClientUpdate]:
            for update in updates:
                delta_P = update.adapter.weights_P - adapter.weights_P
                scale = min(1.0, max_norm / max(float(delta_P.norm()), 1e-30))
                yield replace(update, adapter=replace(adapter, weights_P=adapter.weights_P + scale * delta_P))

        return state, weighted_mean(adapter, clipped(), weigh)

    return Aggregate(lambda adapter: None, update)


def robust(choose: Callable[[Tensor, Tensor], Tensor], strategy: Strategy) -> Aggregate:
    """A rule that looks at all updates at once: [K, P] weights and [K] client weights -> [P].

    It holds every update of the round in memory. They are ordered by client, so that the order of arrival does not
    matter.
    """
    weigh = WEIGHTS[strategy.weight_by]

    def update(state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        # Copies: an update may be lent, until the next is asked for.
        arrived = sorted(
            (
                (
                    update.report.client,
                    float(weigh(update.report)),
                    update.adapter.weights_P.to(torch.float64, copy=True),
                )
                for update in updates
            ),
            key=lambda found: found[0],
        )
        weights_KP = torch.stack([weights_P for _, _, weights_P in arrived])
        share_K = torch.tensor([share for _, share, _ in arrived], dtype=torch.float64)
        return state, replace(adapter, weights_P=choose(weights_KP, share_K).to(adapter.weights_P.dtype))

    return Aggregate(lambda adapter: None, update)


def fedmedian(strategy: Strategy) -> Aggregate:
    """The median of each weight, the mean of the middle two (Yin et al. 2018, arXiv 1803.01498, algorithm 1)."""
    return robust(lambda weights_KP, share_K: weights_KP.quantile(0.5, dim=0), strategy)


def trimmed_mean(strategy: Strategy) -> Aggregate:
    """The mean of each weight without its largest and smallest (arXiv 1803.01498, algorithm 1)."""
    trim = strategy.setting("trim")

    def choose(weights_KP: Tensor, share_K: Tensor) -> Tensor:
        cut = int(trim * len(weights_KP))
        return weights_KP.sort(dim=0).values[cut : len(weights_KP) - cut].mean(0)

    return robust(choose, strategy)


def krum(strategy: Strategy) -> Aggregate:
    """The update with the nearest neighbours (Blanchard et al. 2017, arXiv 1703.02757, section 4)."""
    malicious = int(strategy.setting("malicious"))
    return robust(lambda weights_KP, share_K: weights_KP[krum_scores(weights_KP, malicious).argmin()], strategy)


def multi_krum(strategy: Strategy) -> Aggregate:
    """The weighted mean of the updates with the nearest neighbours (arXiv 1703.02757, section 5)."""
    malicious, keep = int(strategy.setting("malicious")), int(strategy.setting("keep"))

    def choose(weights_KP: Tensor, share_K: Tensor) -> Tensor:
        best = krum_scores(weights_KP, malicious).argsort(stable=True)[:keep]
        return (weights_KP[best] * share_K[best, None]).sum(0) / share_K[best].sum()

    return robust(choose, strategy)


def bulyan(strategy: Strategy) -> Aggregate:
    """Updates picked by Krum, then of each weight the values nearest the median (El Mhamdi et al. 2018, 1802.07927)."""
    malicious = int(strategy.setting("malicious"))

    def choose(weights_KP: Tensor, share_K: Tensor) -> Tensor:
        left = list(range(len(weights_KP)))
        picked = []
        for _ in range(len(weights_KP) - 2 * malicious):
            scores = krum_scores(weights_KP[left], malicious)
            picked.append(left.pop(int(scores.argmin())))
        chosen_KP = weights_KP[picked]
        nearest_KP = (chosen_KP - chosen_KP.quantile(0.5, dim=0)).abs().argsort(dim=0, stable=True)
        return chosen_KP.gather(0, nearest_KP[: len(picked) - 2 * malicious]).mean(0)

    return robust(choose, strategy)


def krum_scores(weights_KP: Tensor, malicious: int) -> Tensor:
    """Of each update, the sum of squared distances to its K − f − 2 nearest others, [K]."""
    distances_KK = torch.stack([(weights_KP - weights_P).square().sum(1) for weights_P in weights_KP])
    nearest = max(1, len(weights_KP) - malicious - 2)
    return distances_KK.sort(dim=1).values[:, 1 : nearest + 1].sum(1)


def _zeros(adapter: Adapter) -> Tensor:
    return torch.zeros_like(adapter.weights_P, dtype=torch.float64)


Moments = tuple[int, Tensor, Tensor]
"""Rounds so far, the mean change and its square."""


def _no_moments(adapter: Adapter) -> Moments:
    return 0, _zeros(adapter), _zeros(adapter)


STRATEGIES: dict[str, Callable[[Strategy], Aggregate]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
    "fedmedian": fedmedian,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "norm_clipped": norm_clipped,
}


def describe_table(header: str, table: Mapping[str, object]) -> str:
    """The first paragraph of what each entry says of itself, by its name, as a Markdown table of two columns."""
    rows = [
        f"| `{name}` | {' '.join((entry.__doc__ or '').split(chr(10) * 2)[0].split())} |"
        for name, entry in table.items()
    ]
    return "\n".join([f"| {header} |", "|---|---|", *rows]) + "\n"


def describe_strategies() -> str:
    """Every strategy with what it does and where it comes from, as Markdown: the README's table."""
    return describe_table("strategy | rule and source", STRATEGIES)


LEAST_CLIENTS: dict[str, Callable[[Strategy], int]] = {
    "krum": lambda strategy: int(2 * strategy.setting("malicious") + 3),
    "multi_krum": lambda strategy: int(max(2 * strategy.setting("malicious") + 3, strategy.setting("keep"))),
    "bulyan": lambda strategy: int(4 * strategy.setting("malicious") + 3),
}
"""How many clients a round must have for what the papers prove."""


def check_strategy(strategy: Strategy, clients: int) -> None:
    """Refuse a strategy that so many clients a round can't carry.

    Raises:
        RecipeError
    """
    least = LEAST_CLIENTS[strategy.kind](strategy) if strategy.kind in LEAST_CLIENTS else 1
    if clients < least:
        raise RecipeError(
            f'"{strategy.kind}" needs {least} clients in a round, and {clients} take part',
            where="federation.strategy",
            mend="raise data.clients or federation.fraction, or lower what it allows for",
        )
