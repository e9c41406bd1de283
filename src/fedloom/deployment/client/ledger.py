"""Ledger of a client: how much all that left it may tell of any one document, as ε over every round of its journal.

Rounds of one noise and one rate are composed exactly; those of several add up as Rényi divergences, which say somewhat
more than there is. No torch here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.privacy.accounting import epsilon, renyi, renyi_epsilon
from fedloom.text import count

if TYPE_CHECKING:
    from fedloom.deployment.client.policy import PrivacyPolicy

DELTA = 1e-6
"""δ at which a ledger is told where no policy says another."""
LONGEST_ROUND = 10**9
"""Steps of a round, beyond which a journal's line is damaged."""


class Cost(NamedTuple):
    """Steps that told something of a document, each under the same noise."""

    rate: float
    """Probability with which a step drew a document."""
    noise: float
    """Noise multiplier; 0 where there was none, or one that others can take off."""
    steps: int


UNBOUNDED = Cost(1.0, 0.0, 1)
"""Cost of whatever was told without noise."""


def read_cost(told: Mapping[str, Any]) -> Cost:
    """Return what a journal's line says that a round cost.

    Raises:
        ValueError: it says nothing that can be.
        TypeError, KeyError: it is no such line.
    """
    if "privacy" not in told:
        return UNBOUNDED
    rate, noise, steps = (told["privacy"][name] for name in Cost._fields)
    if not (0 < rate <= 1 and 0 <= noise < math.inf and 0 < steps <= LONGEST_ROUND and isinstance(steps, int)):
        raise ValueError("no possible cost")
    return Cost(rate, noise, steps) if noise else UNBOUNDED


@dataclass(frozen=True)
class Bound:
    """Bound on what the rounds of a recipe tell of any one document, at this client."""

    rounds: int
    """Rounds that the recipe's ε is for."""
    cost: Cost
    """Cost of one round."""
    units: int
    """Documents among which any one is protected."""
    told: Mapping[str, Any]
    """Words and numbers for each round's line in the journal, beside its cost and `units`."""

    def cost_of(self, rounds: int) -> Cost:
        """Return the cost of so many rounds."""
        return self.cost._replace(steps=rounds * self.cost.steps)


class Ledger:
    """Costs of all that was told."""

    def __init__(self, costs: Iterable[Cost]) -> None:
        self._steps: Counter[tuple[float, float]] = Counter()
        for cost in costs:
            if cost.steps:
                self._steps[cost.rate, cost.noise] += cost.steps

    @property
    def unbounded(self) -> int:
        """Number of rounds, of losses, and of recipes with counts of the documents, that were told without noise."""
        return self._steps[UNBOUNDED[:2]]

    @property
    def why_unbounded(self) -> str:
        """Return why ε is infinite."""
        return f"{count(self.unbounded, 'answer')} of this journal had no noise"

    def plus(self, *costs: Cost) -> Ledger:
        """Return the ledger with more costs."""
        return Ledger([*(Cost(*how, steps) for how, steps in self._steps.items()), *costs])

    def epsilon(self, delta: float) -> float:
        """Return ε of all that was told; infinite where something was told without noise."""
        if self.unbounded:
            return math.inf
        if len(self._steps) <= 1:
            return max((epsilon(*how, steps, delta) for how, steps in self._steps.items()), default=0.0)
        parts = [renyi(*how, steps) for how, steps in self._steps.items()]
        return renyi_epsilon([sum(at_order) for at_order in zip(*parts, strict=True)], delta)


def judge(owner: PrivacyPolicy | None, all_runs: Ledger, this_run: Ledger, cost: Cost) -> Iterator[tuple[str, str]]:
    """Yield which keys of a policy refuse to let so much more be told, and why."""
    if owner is None:
        return
    if owner.max_epsilon is not None and all_runs.unbounded:
        why = f"bounds what is told, and {all_runs.why_unbounded}: begin a new journal for new documents"
        yield "privacy.max_epsilon", why
        return
    for key, most, what, ledger in (
        ("max_epsilon", owner.max_epsilon, "in all", all_runs),
        ("max_epsilon_a_run", owner.max_epsilon_a_run, "a recipe", this_run),
    ):
        if most is not None and (after := ledger.plus(cost).epsilon(owner.delta)) > most:
            spent = f"{ledger.epsilon(owner.delta):.3g} is spent, and this would make it {after:.3g}"
            yield f"privacy.{key}", f"allows ε {most:g} {what} (δ = {owner.delta:g}): {spent}"


def judge_delta(owner: PrivacyPolicy | None, bound: Bound) -> Iterator[tuple[str, str]]:
    """Yield that a policy's δ is too large for so few documents: a whole one could be told within it."""
    if owner and owner.delta > 1 / bound.units:
        yield "privacy.delta", f"has δ = {owner.delta:g}, more than one over the {count(bound.units, 'document')} here"


def afford(owner: PrivacyPolicy | None, all_runs: Ledger, this_run: Ledger, bound: Bound, most: int) -> int:
    """Return how many more rounds of a recipe a policy allows, of `most` at most."""

    def allows(rounds: int) -> bool:
        return not [*judge(owner, all_runs, this_run, bound.cost_of(rounds))]

    if not most or allows(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allows(middle) else (low, middle)
    return low


def describe_spent(owner: PrivacyPolicy | None, all_runs: Ledger) -> str:
    """Say how much was told of any one document, and how much more may be."""
    if all_runs.unbounded:
        return f"ε = ∞ of any one document: {all_runs.why_unbounded}"
    delta, limit = (owner.delta, owner.max_epsilon) if owner else (DELTA, None)
    spent = all_runs.epsilon(delta)
    left = "without a limit (policy.privacy.max_epsilon)" if limit is None else f"{max(0, limit - spent):.3g} is left"
    return f"ε = {spent:.3g} of any one document is spent (δ = {delta:g}), {left}"
