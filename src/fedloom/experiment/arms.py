"""Arms: federations of some of a run's clients, which show what the others bring. Which ones, and what they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fedloom.errors import RecipeError
from fedloom.federation.coalitions import Coalition, coalitions_to_train, draw_orders
from fedloom.federation.schedule import cohort_size
from fedloom.federation.strategies import least_clients
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan


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
            mend="leave it out, or raise data.clients",
        )


def plan_arms(plan: Plan, recipe: Recipe) -> Plan:
    """Return the plan with what the recipe's contributions take."""
    able = [number for number, client in enumerate(plan.clients) if client.steps]
    if not recipe.contributions:
        return plan
    arms, tokens = choose_arms(recipe, able).coalitions, plan.tokens_of_each
    a_round = sum(
        sum(tokens[client] for client in arm) * cohort_size(len(arm), recipe.federation) / len(arm) for arm in arms
    )
    return replace(plan, arms=len(arms), arm_tokens=round(plan.rounds * a_round))
