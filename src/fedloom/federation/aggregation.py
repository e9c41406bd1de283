"""Strategies that turn updates into the next global adapter: arithmetic over the flat vector.

Updates are taken in as they arrive, so the server's memory does not grow with the number of clients. The robust rules
compare updates with each other, so they hold all updates of a round.

Letters: K clients of a round, P adapter parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.sections import Strategy

State = Any
"""State that a strategy keeps from one round to the next."""


class RoundSum(NamedTuple):
    """One round of a strategy, open for updates."""

    add: Callable[[ClientUpdate], None]
    """Take in one update. It may be lent until the next one comes: what is kept of it longer is copied."""
    finish: Callable[[], tuple[State, Adapter]]
    """Return the strategy's new state and the new adapter, once all updates are in."""


@dataclass(frozen=True)
class Aggregate:
    """Strategy: `init(adapter)` gives the state that it begins with, `open(state, adapter)` a round to add to."""

    init: Callable[[Adapter], State]
    open: Callable[[State, Adapter], RoundSum]
    name: str = ""
    """Name of a strategy that no recipe names, for the run's records."""
    draw: Callable[[Sequence[int], int, Adapter], list[int]] | None = None
    """Draw of a round's clients, (clients, round, adapter), where each update is bounded by itself and what they add
    up to is noised: there may be none then, and none is judged by the others."""

    def update(self, state: State, adapter: Adapter, updates: Iterable[ClientUpdate]) -> tuple[State, Adapter]:
        """Aggregate a round whose updates are all there; return the new state and the new adapter."""
        round = self.open(state, adapter)
        for update in updates:
            round.add(update)
        return round.finish()


class Amount(Protocol):
    """Amount that a client trained on, or has to: its report, or its size."""

    @property
    def examples(self) -> int: ...

    @property
    def tokens(self) -> int: ...


WEIGHTS: dict[str, Callable[[Amount], float]] = {
    "examples": lambda report: report.examples,
    "tokens": lambda report: report.tokens,
    "equal": lambda report: 1,
}
"""Numbers that a client's share in the mean can be proportional to."""


MOST_IN_FLOAT64 = 2**26
"""Number of weights up to which a sum is in float64. For a whole model it would be as large as two more models, which
may not fit where the model itself does; float32 loses a 10⁻⁷th of a weight."""


class WeightedMean:
    """Σ n_k w_k / Σ n_k of updates as they come (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    The sum is in float64, so that the mean of equal updates is that update to the bit, and the order of arrival is
    lost in the rounding. With more than `MOST_IN_FLOAT64` weights it is in their own dtype.
    """

    def __init__(self, adapter: Adapter, weigh: Callable[[ClientReport], float]) -> None:
        wide = adapter.weights_P.numel() <= MOST_IN_FLOAT64
        self._adapter, self._weigh = adapter, weigh
        self._total, self._sum_P = 0.0, torch.zeros_like(adapter.weights_P, dtype=torch.float64 if wide else None)

    def add(self, update: ClientUpdate) -> None:
        """Add one client's weights, at once: an update may be lent, and is valid until the next one comes."""
        weight = float(self._weigh(update.report)) * update.weight_scale
        self._sum_P.add_(update.adapter.weights_P, alpha=weight)
        self._total += weight

    def result(self) -> Adapter:
        """Return the mean, in the layout and dtype of the adapter that the round began with; nothing is added then."""
        assert self._total > 0, "a round without updates has no mean"
        # Divided in place: of a whole model, another sum would not fit.
        return replace(self._adapter, weights_P=self._sum_P.div_(self._total).to(self._adapter.weights_P.dtype))


def weighted_mean(adapter: Adapter, updates: Iterable[ClientUpdate], weigh: Callable[[ClientReport], float]) -> Adapter:
    """Return the `WeightedMean` of updates that are all there."""
    mean = WeightedMean(adapter, weigh)
    for update in updates:
        mean.add(update)
    return mean.result()


def no_state(adapter: Adapter) -> None:
    """Begin with nothing to remember."""


def fedavg(strategy: Strategy) -> Aggregate:
    """Take the weighted mean of the updates, with nothing to remember (arXiv 1602.05629, algorithm 1)."""
    weigh = WEIGHTS[strategy.weight_by]

    def open_round(state: State, adapter: Adapter) -> RoundSum:
        mean = WeightedMean(adapter, weigh)
        return RoundSum(mean.add, lambda: (state, mean.result()))

    return Aggregate(no_state, open_round)


ServerStep = Callable[[State, Tensor], tuple[State, Tensor]]
"""Step of a server's optimizer: state and the clients' mean change -> new state and change, [P] in float64."""


def server_optimizer(strategy: Strategy, init: Callable[[Adapter], State], step: ServerStep) -> Aggregate:
    """Take the clients' mean change as the negative gradient of a server's optimizer (arXiv 2003.00295)."""
    weigh = WEIGHTS[strategy.weight_by]

    def open_round(state: State, adapter: Adapter) -> RoundSum:
        mean = WeightedMean(adapter, weigh)

        def finish() -> tuple[State, Adapter]:
            before_P = adapter.weights_P.double()
            after, change_P = step(state, mean.result().weights_P.double() - before_P)
            return after, replace(adapter, weights_P=(before_P + change_P).to(adapter.weights_P.dtype))

        return RoundSum(mean.add, finish)

    return Aggregate(init, open_round)


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
    """Step by m/(√v + τ), with v a decaying mean of Δ² (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), at a rate
    corrected as Flower's for the zeros that m and v start from: η √(1 − β₂ᵗ⁺¹) / (1 − β₁ᵗ⁺¹) in round t.

    Adam's correction has t where this has t + 1.
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

    def open_round(state: State, adapter: Adapter) -> RoundSum:
        mean = WeightedMean(adapter, weigh)

        def add_clipped(update: ClientUpdate) -> None:
            delta_P = update.adapter.weights_P - adapter.weights_P
            # 1e-30, so that an update without any change divides by something.
            scale = min(1.0, max_norm / max(float(delta_P.norm()), 1e-30))
            mean.add(replace(update, adapter=replace(adapter, weights_P=adapter.weights_P + scale * delta_P)))

        return RoundSum(add_clipped, lambda: (state, mean.result()))

    return Aggregate(no_state, open_round)


def once_all_are_there(combine: Callable[[Adapter, Sequence[ClientUpdate]], Adapter]) -> Aggregate:
    """Make a strategy of a function of the adapter that a round begins with and all its updates: (adapter, updates).

    The updates are held in memory, in the order in which they came. For a strategy of one's own that is the shortest
    way: `fedloom.run(recipe, aggregate=once_all_are_there(combine))`.
    """

    def open_round(state: State, adapter: Adapter) -> RoundSum:
        arrived: list[ClientUpdate] = []

        def add(update: ClientUpdate) -> None:
            # A copy: an update may be lent, until the next one comes.
            mine = replace(update.adapter, weights_P=update.adapter.weights_P.clone())
            arrived.append(replace(update, adapter=mine))

        return RoundSum(add, lambda: (state, combine(adapter, arrived)))

    return Aggregate(no_state, open_round, getattr(combine, "__name__", type(combine).__name__))


def robust(choose: Callable[[Tensor, Tensor], Tensor], strategy: Strategy) -> Aggregate:
    """Build a strategy from a rule that looks at all updates at once: weights [K, P] and client weights [K] -> [P].

    It holds every update of the round in memory, in the order of the clients, so that the order of arrival does not
    matter.
    """
    weigh = WEIGHTS[strategy.weight_by]

    def combine(adapter: Adapter, updates: Sequence[ClientUpdate]) -> Adapter:
        arrived = sorted(updates, key=lambda update: update.client)
        weights_KP = torch.stack([update.adapter.weights_P.double() for update in arrived])
        weight_K = [float(weigh(update.report)) * update.weight_scale for update in arrived]
        share_K = torch.tensor(weight_K, dtype=torch.float64)
        return replace(adapter, weights_P=choose(weights_KP, share_K).to(adapter.weights_P.dtype))

    return once_all_are_there(combine)


def fedmedian(strategy: Strategy) -> Aggregate:
    """Take each weight's median, or the mean of its middle two (Yin et al. 2018, arXiv 1803.01498, algorithm 1)."""
    # Not torch.median, which takes the lower of the middle two.
    return robust(lambda weights_KP, share_K: weights_KP.quantile(0.5, dim=0), strategy)


def count_trimmed(trim: float, clients: int) -> int:
    """Return how many values `trimmed_mean` leaves out at each end."""
    return int(trim * clients)


def trimmed_mean(strategy: Strategy) -> Aggregate:
    """Average each weight without its largest and smallest values (arXiv 1803.01498, algorithm 1)."""
    trim = strategy.setting("trim")

    def choose(weights_KP: Tensor, share_K: Tensor) -> Tensor:
        cut = count_trimmed(trim, len(weights_KP))
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
