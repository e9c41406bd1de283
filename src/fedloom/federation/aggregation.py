"""Strategies that turn updates into the next global adapter: pure pairs (init, update) over the flat vector.

Updates are consumed as they arrive, so the server's memory does not grow with the number of clients. The robust rules
compare updates with each other, so they hold all updates of a round.

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
"""State that a strategy keeps from one round to the next."""


@dataclass(frozen=True)
class Aggregate:
    """Strategy: `init(adapter) -> state` and `update(state, adapter, updates) -> (state, adapter)`."""

    init: Callable[[Adapter], State]
    update: Callable[[State, Adapter, Iterable[ClientUpdate]], tuple[State, Adapter]]


WEIGHTS: dict[str, Callable[[ClientReport], float]] = {
    "examples": lambda report: report.examples,
    "tokens": lambda report: report.tokens,
}
"""Numbers that a client's share in the mean can be proportional to."""


MOST_IN_FLOAT64 = 2**26
"""Number of weights up to which a sum is in float64. For a whole model it would be as large as two more models, which
may not fit where the model itself does; float32 loses a 10⁻⁷th of a weight."""


def weighted_mean(adapter: Adapter, updates: Iterable[ClientUpdate], weigh: Callable[[ClientReport], float]) -> Adapter:
    """Return Σ n_k w_k / Σ n_k (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1) in the layout of `adapter`.

    The sum is in float64, so that the mean of equal updates is that update to the bit, and the order of arrival is
    lost in the rounding. With more than `MOST_IN_FLOAT64` weights it is in their own dtype.
    """
    wide = adapter.weights_P.numel() <= MOST_IN_FLOAT64
    total, sum_P = 0.0, torch.zeros_like(adapter.weights_P, dtype=torch.float64 if wide else None)
    for update in updates:
        weight = float(weigh(update.report))
        # Added at once: an update may be lent, and is valid until the next is asked for.
        sum_P.add_(update.adapter.weights_P, alpha=weight)
        total += weight
    assert total > 0, "a round without updates has no mean"
    return replace(adapter, weights_P=sum_P.div_(total).to(adapter.weights_P.dtype))


def fedavg(strategy: Strategy) -> Aggregate:
    """Take the weighted mean of the updates, with nothing to remember (arXiv 1602.05629, algorithm 1)."""
    weigh = WEIGHTS[strategy.weight_by]
    return Aggregate(
        init=lambda adapter: None,
        update=lambda state, adapter, updates: (state, weighted_mean(adapter, updates, weigh)),
    )


ServerStep = Callable[[State, Tensor], tuple[State, Tensor]]
"""Step of a server's optimizer: state and the clients' mean change -> new state and change, [P] in float64."""


def server_optimizer(strategy: Strategy, init: Callable[[Adapter], State], step: ServerStep) -> Aggregate:
    """Take the clients' mean change as the negative gradient of a server's optimizer (arXiv 2003.00295)."""
    weigh = WEIGHTS[strategy.weight_by]

    def update(state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        before_P = adapter.weights_P.double()
        state, change_P = step(state, weighted_mean(adapter, updates, weigh).weights_P.double() - before_P)
        return state, replace(adapter, weights_P=(before_P + change_P).to(adapter.weights_P.dtype))

    return Aggregate(init, update)


def fedavgm(strategy: Strategy) -> Aggregate:
    """Step with momentum: v ← βv + Δ, w ← w + ηv, or w + η(Δ + βv) with Nesterov (Hsu et al. 2019, arXiv 1909.06335,
    section 4.3).
    """
    rate, momentum, nesterov = (strategy.setting(key) for key in ("learning_rate", "momentum", "nesterov"))

    def step(velocity_P: Tensor, delta_P: Tensor) -> tuple[Tensor, Tensor]:
        velocity_P = momentum * velocity_P + delta_P
        return velocity_P, rate * (delta_P + momentum * velocity_P if nesterov else velocity_P)

    return server_optimizer(strategy, _zeros, step)


def fedadam(strategy: Strategy) -> Aggregate:
    """Step by m/(√v + τ), with v a decaying mean of Δ² (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    The rate is corrected for the zeros that m and v start from. The correction is Flower's, one round ahead of Adam's.
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
    """Step as FedAdam, with v ← v − (1−β₂)Δ² sign(v − Δ²) and no correction (arXiv 2003.00295, algorithm 2)."""
    rate, beta_1, beta_2, tau = (strategy.setting(key) for key in ("learning_rate", "beta_1", "beta_2", "tau"))

    def step(state: Moments, delta_P: Tensor) -> tuple[Moments, Tensor]:
        round, mean_P, square_P = state
        mean_P = beta_1 * mean_P + (1 - beta_1) * delta_P
        square_P = square_P - (1 - beta_2) * delta_P**2 * (square_P - delta_P**2).sign()
        return (round + 1, mean_P, square_P), rate * mean_P / (square_P.sqrt() + tau)

    return server_optimizer(strategy, _no_moments, step)


def fedadagrad(strategy: Strategy) -> Aggregate:
    """Step by Δ/(√v + τ), with v the sum of all Δ² (arXiv 2003.00295, algorithm 2)."""
    rate, tau = strategy.setting("learning_rate"), strategy.setting("tau")

    def step(square_P: Tensor, delta_P: Tensor) -> tuple[Tensor, Tensor]:
        square_P = square_P + delta_P**2
        return square_P, rate * delta_P / (square_P.sqrt() + tau)

    return server_optimizer(strategy, _zeros, step)


def norm_clipped(strategy: Strategy) -> Aggregate:
    """Average the changes, each scaled down to a norm (Sun et al. 2019, arXiv 1911.07963, section 4)."""
    weigh, max_norm = WEIGHTS[strategy.weight_by], strategy.setting("max_norm")

    def update(state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        def clipped() -> Iterator[ClientUpdate]:
            for update in updates:
                delta_P = update.adapter.weights_P - adapter.weights_P
                # 1e-30, so that an update without any change divides by something.
                scale = min(1.0, max_norm / max(float(delta_P.norm()), 1e-30))
                yield replace(update, adapter=replace(adapter, weights_P=adapter.weights_P + scale * delta_P))

        return state, weighted_mean(adapter, clipped(), weigh)

    return Aggregate(lambda adapter: None, update)


def robust(choose: Callable[[Tensor, Tensor], Tensor], strategy: Strategy) -> Aggregate:
    """Build a strategy from a rule that looks at all updates at once: weights [K, P] and client weights [K] -> [P].

    It holds every update of the round in memory, in the order of the clients, so that the order of arrival does not
    matter.
    """
    weigh = WEIGHTS[strategy.weight_by]

    def update(state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        # Copies: an update may be lent, and is valid until the next is asked for.
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
    """Take each weight's median, or the mean of its middle two (Yin et al. 2018, arXiv 1803.01498, algorithm 1)."""
    # Not torch.median, which takes the lower of the middle two.
    return robust(lambda weights_KP, share_K: weights_KP.quantile(0.5, dim=0), strategy)


def trimmed_mean(strategy: Strategy) -> Aggregate:
    """Average each weight without its largest and smallest values (arXiv 1803.01498, algorithm 1)."""
    trim = strategy.setting("trim")

    def choose(weights_KP: Tensor, share_K: Tensor) -> Tensor:
        cut = int(trim * len(weights_KP))
        return weights_KP.sort(dim=0).values[cut : len(weights_KP) - cut].mean(0)

    return robust(choose, strategy)


def krum(strategy: Strategy) -> Aggregate:
    """Take the update with the nearest neighbours (Blanchard et al. 2017, arXiv 1703.02757, section 4)."""
    malicious = int(strategy.setting("malicious"))
    return robust(lambda weights_KP, share_K: weights_KP[krum_scores(weights_KP, malicious).argmin()], strategy)


def multi_krum(strategy: Strategy) -> Aggregate:
    """Take the weighted mean of the updates with the nearest neighbours (arXiv 1703.02757, section 5)."""
    malicious, keep = int(strategy.setting("malicious")), int(strategy.setting("keep"))

    def choose(weights_KP: Tensor, share_K: Tensor) -> Tensor:
        best = krum_scores(weights_KP, malicious).argsort(stable=True)[:keep]
        return (weights_KP[best] * share_K[best, None]).sum(0) / share_K[best].sum()

    return robust(choose, strategy)


def bulyan(strategy: Strategy) -> Aggregate:
    """Pick updates by Krum, then average the values of each weight that are nearest its median (El Mhamdi et al. 2018,
    arXiv 1802.07927).
    """
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
    """Return each update's sum of squared distances to its K − f − 2 nearest others, [K]; f are `malicious`."""
    # One row at a time: all differences at once would be [K, K, P].
    distances_KK = torch.stack([(weights_KP - weights_P).square().sum(1) for weights_P in weights_KP])
    nearest = max(1, len(weights_KP) - malicious - 2)
    # The smallest distance is that to itself.
    return distances_KK.sort(dim=1).values[:, 1 : nearest + 1].sum(1)


def _zeros(adapter: Adapter) -> Tensor:
    return torch.zeros_like(adapter.weights_P, dtype=torch.float64)


Moments = tuple[int, Tensor, Tensor]
"""Moments of FedAdam and FedYogi: rounds so far, and the decaying means of the change and of its square."""


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
    """Return a Markdown table of two columns: each entry's name, and the first paragraph of its docstring."""
    rows = [
        f"| `{name}` | {' '.join((entry.__doc__ or '').split(chr(10) * 2)[0].split())} |"
        for name, entry in table.items()
    ]
    return "\n".join([f"| {header} |", "|---|---|", *rows]) + "\n"


def describe_strategies() -> str:
    """Return the table of strategies for the documentation, in Markdown: what each does and where it comes from."""
    return describe_table("strategy | rule and source", STRATEGIES)


LEAST_CLIENTS: dict[str, Callable[[Strategy], int]] = {
    "krum": lambda strategy: int(2 * strategy.setting("malicious") + 3),
    "multi_krum": lambda strategy: int(max(2 * strategy.setting("malicious") + 3, strategy.setting("keep"))),
    "bulyan": lambda strategy: int(4 * strategy.setting("malicious") + 3),
}
"""Number of clients that a round must have for the papers' proofs to hold."""


def check_strategy(strategy: Strategy, clients: int) -> None:
    """Refuse a strategy that needs more clients in a round than take part.

    Raises:
        RecipeError: there are too few clients.
    """
    least = LEAST_CLIENTS[strategy.kind](strategy) if strategy.kind in LEAST_CLIENTS else 1
    if clients < least:
        raise RecipeError(
            f'"{strategy.kind}" needs {least} clients in a round, and {clients} take part',
            where="federation.strategy",
            mend="raise data.clients or federation.fraction, or lower the strategy's malicious or keep",
        )
