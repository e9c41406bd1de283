"""Arms: federations of some of a run's clients, which show what the others bring. Which ones, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fedloom.errors import RecipeError
from fedloom.federation.coalitions import Coalition, coalitions_to_train, draw_orders
from fedloom.federation.schedule import cohort_size
from fedloom.federation.strategies import least_clients
from fedloom.progress import Stage
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan

UPDATES_HELD = 64
"""Updates of a pass that wait for its round to end, in memory, beyond which another pass is made."""


class Arms(NamedTuple):
    """Coalitions to train, and the orders in which Shapley values let clients come in; none where there are none."""

    coalitions: Sequence[Coalition]
    orders: Sequence[Sequence[int]]


def choose_arms(recipe: Recipe, clients: Sequence[int]) -> Arms:
    """Return what a recipe trains to find what each of these clients brings.

    A strategy that needs several clients can't have a federation of one, with which every order begins.
    """
    orders = draw_orders(clients, recipe.seed) if least_clients(recipe.federation.strategy) == 1 else []
    return Arms(coalitions_to_train(clients, orders), orders)


def check_arms(recipe: Recipe, clients: int) -> None:
    """Refuse contributions of clients without one of which the strategy has too few.

    Raises:
        RecipeError
    """
    section = recipe.federation
    left = cohort_size(clients, section) - section.max_lost_clients
    if left < (least := least_clients(section.strategy)):
        raise RecipeError(
            f'"{section.strategy.kind}" needs {least} clients in a round, and without one of them there are {left}',
            where="contributions",
            mend="leave it out, raise data.clients, or lower federation.max_lost_clients",
        )


def divide_arms(recipe: Recipe, engine: str, arms: Sequence[Coalition]) -> Iterator[list[Coalition]]:
    """Divide arms into passes, always into the same ones: what trains beside moves results by rounding.

    The engine `batched` takes many in one, unless each has a residual of its own.
    """
    alone = engine == "reference" or recipe.federation.lora_rule == "fedex"
    together: list[Coalition] = []
    for arm in arms:
        if together and (alone or count_updates(recipe, [*together, arm]) > UPDATES_HELD):
            yield together
            together = []
        together.append(arm)
    if together:
        yield together


def count_updates(recipe: Recipe, arms: Sequence[Coalition]) -> int:
    """Return how many clients train in a round of these arms, all of them together."""
    return sum(cohort_size(len(arm), recipe.federation) for arm in arms)


def plan_arms(plan: Plan, recipe: Recipe, find_capacity: Callable[[int], int]) -> Plan:
    """Return the plan with what the recipe's contributions take.

    `find_capacity` says how many of so many clients there is room for at once.
    """
    able = [number for number, client in enumerate(plan.clients) if client.steps]
    arms = choose_arms(recipe, able).coalitions if recipe.contributions else []
    if not arms:
        return plan
    shares = {arm: cohort_size(len(arm), recipe.federation) / len(arm) for arm in arms}

    def a_round(each: Sequence[float]) -> float:
        """Return what all arms have together in a round, of what each client has."""
        return sum(share * sum(each[client] for client in arm) for arm, share in shares.items())

    most = max(count_updates(recipe, together) for together in divide_arms(recipe, plan.engine, arms))
    arm_tokens = round(plan.rounds * a_round(plan.tokens_of_each))
    steps = round(plan.rounds * a_round([client.steps for client in plan.clients]))
    evaluated = plan.evaluated_rounds or plan.rounds
    scored = len(arms) * (evaluated + 1) * (plan.central_tokens or plan.judged_tokens)
    if not plan.central_tokens:  # each client's own adapter is scored too, where what it holds out judges
        held_out = [client.holdout_tokens for client in plan.clients]
        scored += round(evaluated * a_round(held_out) * plan.judged_tokens / sum(held_out))
    return replace(
        plan,
        arms=len(arms),
        arm_tokens=arm_tokens,
        arms_at_once=min(most, find_capacity(most)),
        later=(*plan.later, Stage("contributions", steps, arm_tokens, scored)),
    )
