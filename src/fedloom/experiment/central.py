"""Runs whose clients are protected as a whole: their terms, and what a plan says of them."""

from __future__ import annotations

from typing import Any

from fedloom.errors import RecipeError
from fedloom.privacy.accounting import calibrate
from fedloom.privacy.central import NORM_RATE, CentralTerms
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan
from fedloom.text import round_down


def set_run_terms(recipe: Recipe, clients: int) -> CentralTerms:
    """Return the terms of a run with so many clients that have something to train on.

    Raises:
        RecipeError: δ is not below one over their number, or so few are expected that the norm can't be led.
    """
    section = recipe.privacy
    assert section is not None, "a recipe without a bound"
    if section.delta >= 1 / clients:
        raise RecipeError(
            f"{section.delta:g} is no less than one over the {clients:,} clients: to tell all of one would keep it",
            where="privacy.delta",
            mend=f"at most {round_down(0.99 / clients)}, better a tenth of that",
        )
    rate, rounds, noise_multiplier = recipe.federation.fraction, recipe.federation.rounds, section.noise_multiplier
    if noise_multiplier is None:
        assert section.epsilon is not None, "neither a noise multiplier nor an ε"
        noise_multiplier = calibrate(rate, rounds, section.epsilon, section.delta)
    led = section.norm_quantile, section.norm_rate or NORM_RATE
    terms = CentralTerms(noise_multiplier, section.max_norm, clients, rate, section.delta, *led)
    if terms.quantile is not None and not terms.can_adapt:
        raise RecipeError(
            f"with {terms.expected:.3g} clients a round and noise of {terms.noise_multiplier:.3g}, no noise on the"
            " changes makes up for that on how many are within the norm",
            where="privacy.norm_quantile",
            mend="leave it out, or raise data.clients, federation.fraction or privacy.epsilon:"
            f" the noise has to be below {2 * terms.bit_noise:.3g}",
        )
    return terms


def describe_central(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Return what a plan holds of a run whose clients are protected: the promise, its terms, and what is left."""
    assert recipe.privacy is not None, "a recipe without a bound"
    terms = set_run_terms(recipe, sum(client.steps > 0 for client in plan.clients))
    rounds = recipe.federation.rounds
    over_norm = terms.noise_over_norm(plan.trainable_parameters)
    return {
        "unit": "client",
        "adjacency": "zero-out",
        "delta": terms.delta,
        "max_norm": terms.max_norm,
        "noise": recipe.privacy.noise,
        # A run's changes add up, and its noise as their root: the rule of thumb that documents have.
        "noise_over_signal": over_norm / rounds**0.5,
        "central": {
            "clients": terms.clients,
            "rate": terms.rate,
            "noise_multiplier": terms.noise_multiplier,
            "change_noise": terms.change_noise,
            **({} if terms.quantile is None else {"quantile": terms.quantile}),
            "noise_over_norm": over_norm,
            "epsilon": terms.epsilon(rounds),
            "recognised": terms.recognised(rounds),
        },
    }
