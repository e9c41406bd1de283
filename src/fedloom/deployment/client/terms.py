"""Terms on which a client takes part in a private run, and what its rounds then tell of any one unit."""

from __future__ import annotations

from fedloom.deployment.client.ledger import Bound, Cost
from fedloom.deployment.client.policy import PrivacyPolicy
from fedloom.experiment.private import set_client_terms
from fedloom.privacy.ration import Terms
from fedloom.recipe.recipe import Recipe


def take_terms(recipe: Recipe, owner: PrivacyPolicy | None, places: int) -> Terms:
    """Return the recipe's terms for so many units, with more noise where their owner wants it.

    Raises:
        RecipeError: δ is above one over their number.
    """
    return set_client_terms(recipe, places, least_noise(owner))


def least_noise(owner: PrivacyPolicy | None) -> float:
    """Return the least noise multiplier that an owner wants; 0 where none is written."""
    return (owner and owner.min_noise_multiplier) or 0.0


def bound_of(recipe: Recipe, terms: Terms) -> Bound | None:
    """Return the bound that the terms are; None where everybody who has the recipe can take the noise off."""
    assert recipe.privacy, "terms of a run without a bound"
    if recipe.privacy.noise == "seed":
        return None
    told = {"batch": terms.batch, "max_norm": terms.max_norm}
    cost = Cost(terms.rate, terms.noise_multiplier, terms.steps)
    return Bound(recipe.federation.rounds, cost, terms.units, recipe.privacy.unit, terms.delta, told)
