"""Stages that follow the rounds of a run, counted for its plan: baselines, clients that go on alone, contributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedloom.experiment.arms import plan_arms
from fedloom.experiment.baselines import baseline_rounds
from fedloom.progress import Stage, add_stages
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.training_section import Training
from fedloom.records.plan import Plan


def plan_later(plan: Plan, recipe: Recipe, find_capacity: Callable[[int], int]) -> Plan:
    """Return the plan with the stages that follow its rounds, in the order in which a run passes through them.

    `find_capacity` says how many of so many clients there is room for at once.
    """
    later = []
    if {"local", "pooled"} & {*recipe.baselines}:  # round 0 is there already
        later.append(add_stages("baselines", _count_baselines(plan, recipe)))
    if section := recipe.personalise:
        later.append(_count_personal(plan, section.alone(recipe.training)))
    return plan_arms(replace(plan, later=tuple(later)), recipe, find_capacity)


def _count_baselines(plan: Plan, recipe: Recipe) -> list[Stage]:
    """Return each baseline's work. A client's own hold-out is scored whenever its adapter is the best so far."""
    able = [number for number, client in enumerate(plan.clients) if client.steps]
    rounds = baseline_rounds(recipe, len(able), plan.rounds)
    judged, tokens = (rounds + 1) * (plan.central_tokens or plan.judged_tokens), plan.tokens_of_each
    alone = [
        Stage(
            "baselines",
            rounds * plan.clients[client].steps,
            round(rounds * tokens[client]),
            judged + (rounds + 1) * plan.clients[client].holdout_tokens,
        )
        for client in able
    ]
    found = alone if "local" in recipe.baselines else []
    if "pooled" in recipe.baselines:
        blocks = sum(plan.clients[client].blocks for client in able)
        together = add_stages("baselines", alone)
        steps = together.steps if recipe.training.max_steps else rounds * recipe.training.steps_of(blocks)
        found = [*found, replace(together, steps=steps, evaluate=judged)]
    return found


def _count_personal(plan: Plan, training: Training) -> Stage:
    """Return the work of clients that go on by themselves, each scored before and after on what it holds out."""
    able = [client for client in plan.clients if client.blocks]
    steps = sum(training.steps_of(client.blocks) for client in able)
    tokens = training.epochs * sum(client.tokens for client in able)
    return Stage("personalise", steps, tokens, 2 * plan.judged_tokens)
