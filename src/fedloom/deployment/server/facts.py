"""Facts that clients tell when they enrol, held to the recipe; and the recipes in which branches can take part.

A branch is a server to clients of its own, and answers for them as one client: with their mean, and sums.
"""

from __future__ import annotations

from fedloom.deployment.messages import ClientFacts
from fedloom.errors import MessageError, RecipeError
from fedloom.experiment.private import set_client_terms
from fedloom.federation.branch import ADD_UP
from fedloom.privacy.ration import Terms
from fedloom.recipe.recipe import Recipe

NOISE_ALIKE = 1e-3
"""Share by which the noise of two machines may differ for the same recipe and documents."""


def check_facts(recipe: Recipe, facts: ClientFacts) -> None:
    """Refuse a client that says it has more than may be, more tokens than its blocks can hold, or too little noise.

    Raises:
        MessageError
    """
    if (facts.noise_multiplier is not None) != (recipe.privacy is not None):
        raise MessageError("it says that it takes noise where the recipe has none, or none where it has")
    if recipe.privacy and facts.blocks:
        try:
            terms = terms_of(recipe, facts)
        except RecipeError as error:
            raise MessageError(error.what, where=error.where) from None
        # Two machines may find the least noise that keeps an ε with another last digit.
        if terms.noise_multiplier > (1 + NOISE_ALIKE) * (facts.noise_multiplier or 0.0):
            raise MessageError("it takes less noise than the recipe asks for")
    if facts.weighs:
        check_branch(recipe, facts.weighs)
    most = recipe.federation.max_client_blocks
    for blocks, tokens in ((facts.blocks, facts.tokens), (facts.holdout_blocks, facts.holdout_tokens)):
        if most and blocks > most:
            raise MessageError(f"it says it has {blocks:,} blocks, and federation.max_client_blocks is {most:,}")
        if tokens > blocks * recipe.data.max_length:
            raise MessageError(f"it says it has {tokens:,} tokens in {blocks:,} blocks of {recipe.data.max_length}")


def terms_of(recipe: Recipe, facts: ClientFacts) -> Terms:
    """Return the terms of a client of a private run."""
    return set_client_terms(recipe, facts.blocks, facts.noise_multiplier or 0.0)


def check_adds_up(recipe: Recipe) -> None:
    """Refuse a recipe in which one answer, a mean with sums, can't stand for several clients.

    Raises:
        RecipeError
    """
    section = recipe.federation
    kind, rule = section.strategy.kind, section.lora_rule
    refused = (
        (
            "federation.strategy.kind",
            kind not in ADD_UP,
            f"\"{kind}\" looks at each client's update by itself, and a branch tells the mean of its clients' alone",
            f"use one of {', '.join(ADD_UP)}",
        ),
        (
            "federation.strategy.weight_by",
            section.strategy.weight_by == "equal",
            "a branch would count as one client, however many it has",
            'use "examples" or "tokens", which add up',
        ),
        (
            "federation.lora_rule",
            rule in ("fedsa", "svd", "fedex"),
            f'"{rule}" needs more of each client than a branch tells: its own factors, or a part that stays with it',
            'use "factors", "ffa" or "rolora"',
        ),
        (
            "privacy",
            recipe.privacy is not None,
            "what a private run promises is reckoned from each client's own noise, which a branch does not tell",
            "leave it out, or let clients join the run's own server",
        ),
        (
            "personalise",
            recipe.personalise is not None,
            "what each client's own adapter is worth is told of one client at a time, which a branch does not do",
            "leave it out",
        ),
    )
    for key, is_refused, why, mend in refused:
        if is_refused:
            raise RecipeError(f"not with a branch: {why}", where=key, mend=mend)


def check_branch(recipe: Recipe, weighs: str) -> None:
    """Refuse a branch that a recipe has no use for, or that weighs its clients by another measure than it.

    Raises:
        MessageError
    """
    try:
        check_adds_up(recipe)
    except RecipeError as error:
        raise MessageError(error.what, where=error.where) from None
    if weighs != (ours := recipe.federation.strategy.weight_by):
        raise MessageError(f"it weighs its clients by {weighs}, and federation.strategy.weight_by is {ours}")
