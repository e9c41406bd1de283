"""Ledger of a client: how much all that left it may tell of any one unit, as ε over every round of its journal.

A unit is a document, or all of a column's rows with one value. Rounds of one noise and one rate are composed exactly;
those of several add up as Rényi divergences, which say somewhat more than there is. No torch here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.privacy.accounting import epsilon, renyi, renyi_epsilon
from fedloom.recipe.privacy_section import DOCUMENT
from fedloom.records.privacy import count_units, name_unit
from fedloom.text import count

if TYPE_CHECKING:
    from fedloom.deployment.client.policy import PrivacyPolicy

DELTA = 1e-6
"""δ at which a ledger is told where neither a policy nor a recipe says another."""
LONGEST_ROUND = 10**9
"""Steps of a round, beyond which a journal's line is damaged."""


class Cost(NamedTuple):
    """Steps that told something of a unit, each under the same noise."""

    rate: float
    """Probability with which a step drew a unit."""
    noise: float
    """Noise multiplier; 0 where there was none, or one that others can take off."""
    steps: int


UNBOUNDED = Cost(1.0, 0.0, 1)
"""Cost of whatever was told without noise."""


class Charge(NamedTuple):
    """Cost of what was told once, and for what it is the cost."""

    cost: Cost
    unit: str = DOCUMENT
    """Unit of which it tells no more than its cost; of any other, nobody knows."""
    delta: float | None = None
    """δ of the recipe; None where it has none."""

    def cost_to(self, unit: str) -> Cost:
        """Return its cost to a unit: without a bound, where it has one for another alone."""
        return self.cost if unit == self.unit else UNBOUNDED


def read_charge(told: Mapping[str, Any], *, hides: bool = False) -> Charge:
    """Return what a journal's line says that a round cost, or a recipe's question; one that `hides` tells units alone.

    Raises:
        ValueError: it says nothing that can be.
        TypeError, KeyError: it is no such line.
    """
    if hides:
        return Charge(UNBOUNDED._replace(steps=0), str(told.get("unit", DOCUMENT)))
    if "privacy" not in told:
        return Charge(UNBOUNDED)
    rate, noise, steps = (told["privacy"][name] for name in Cost._fields)
    if not (0 < rate <= 1 and 0 <= noise < math.inf and 0 < steps <= LONGEST_ROUND and isinstance(steps, int)):
        raise ValueError("no possible cost")
    unit, delta = str(told["privacy"].get("unit", DOCUMENT)), told["privacy"].get("delta")
    if delta is not None and not 0 < delta < 1:
        raise ValueError("no possible δ")
    return Charge(Cost(rate, noise, steps) if noise else UNBOUNDED, unit, delta)


class Measure(NamedTuple):
    """Unit for which a ledger is told, and δ of its ε."""

    unit: str = DOCUMENT
    delta: float = DELTA
    why: str = ""
    """Words behind δ, where it is one of several."""


def measure_by(owner: PrivacyPolicy | None, promised: Iterable[Charge]) -> Measure:
    """Return what a ledger is told for: the owner's unit and δ, else those of the recipes that were answered.

    Of several units it is the last one's; of several δ, the smallest, at which ε is largest.
    """
    if owner:
        return Measure(owner.unit, owner.delta)
    answered = [one for one in promised if one.delta is not None]
    if not answered:
        return Measure()
    found = sorted({one.delta for one in answered if one.delta is not None})
    why = f", the smallest of {len(found)} that recipes had" if len(found) > 1 else ""
    return Measure(answered[-1].unit, found[0], why)


@dataclass(frozen=True)
class Bound:
    """Bound on what the rounds of a recipe tell of any one unit, at this client."""

    rounds: int
    """Rounds that the recipe's ε is for."""
    cost: Cost
    """Cost of one round."""
    units: int
    """Units among which any one is protected."""
    unit: str
    """Unit that is protected: a document, or a column's."""
    delta: float
    """δ of the recipe."""
    told: Mapping[str, Any]
    """Numbers for each round's line in the journal, beside these."""

    @property
    def charge(self) -> Charge:
        """Return what one round costs, and for what."""
        return Charge(self.cost, self.unit, self.delta)

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
        return f"{count(self.unbounded, 'answer')} of this journal had no noise for it"

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
        why = f"bounds what is told of {name_unit(owner.unit)}, and {all_runs.why_unbounded}"
        why += ": begin a new journal for new documents"
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
    """Yield that a policy's δ is too large for so few units: a whole one could be told within it."""
    if owner and owner.delta > 1 / bound.units:
        there = count_units(bound.unit, bound.units)
        yield "privacy.delta", f"has δ = {owner.delta:g}, more than one over the {there} here"


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


def describe_spent(owner: PrivacyPolicy | None, all_runs: Ledger, measure: Measure) -> str:
    """Say how much was told of any one unit, and how much more may be."""
    one = name_unit(measure.unit)
    if all_runs.unbounded:
        return f"ε = ∞ of {one}: {all_runs.why_unbounded}"
    limit, spent = owner.max_epsilon if owner else None, all_runs.epsilon(measure.delta)
    left = "without a limit (policy.privacy.max_epsilon)" if limit is None else f"{max(0, limit - spent):.3g} is left"
    return f"ε = {spent:.3g} of {one} is spent (δ = {measure.delta:g}{measure.why}), {left}"
