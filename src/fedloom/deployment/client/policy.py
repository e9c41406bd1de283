"""Policy of a client: its owner's limits to what a server may ask of it, checked before anything is loaded."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError

from fedloom.errors import RecipeError
from fedloom.recipe.sections import Names, Section

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe
    from fedloom.training.jobs import ClientTask


class Policy(Section):
    """Limits to what a server may ask. A key that is left out allows everything."""

    models: Names | None = Field(None, description="base models that may be trained, as a recipe's model.source")
    max_epochs: int | None = Field(None, ge=1, description="the most passes over the documents in a round")
    max_rounds: int | None = Field(None, ge=1, description="the most rounds of a run")
    max_rounds_a_day: int | None = Field(None, ge=1, description="the most rounds in 24 hours, of all runs together")
    tell_holdout_loss: bool = Field(True, description="whether the loss on the client's hold-out may be told")


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        RecipeError: the file is not there, or is not a policy.
    """
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"can't read the policy: {error.strerror}", where=str(path)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "policy"
        known = ", ".join(Policy.model_fields)
        raise RecipeError(f"{key}: {first['msg']}", where=str(path), mend=f"known are {known}") from None
    except ValueError:
        raise RecipeError("not valid TOML", where=str(path)) from None


def check_policy(policy: Policy, recipe: Recipe, task: ClientTask | None = None) -> None:
    """Refuse a recipe, or a task whatever its recipe says, that asks for more than the client's owner allows.

    `max_rounds_a_day` is the journal's to check.

    Raises:
        RecipeError: naming what, for both sides.
    """
    epochs, rounds, source = recipe.training.epochs, recipe.federation.rounds, recipe.model.source
    if task:
        # A server could tell a mild recipe and then set harder tasks.
        epochs, rounds = max(epochs, task.training.epochs), max(rounds, task.rounds, task.round)
    if policy.models is not None and source not in policy.models:
        raise RecipeError(f'its policy does not allow the base model "{source}"', where="policy.models")
    if policy.max_epochs is not None and epochs > policy.max_epochs:
        raise RecipeError(
            f"its policy allows {policy.max_epochs} epochs a round, not {epochs}", where="policy.max_epochs"
        )
    if policy.max_rounds is not None and rounds > policy.max_rounds:
        raise RecipeError(f"its policy allows {policy.max_rounds} rounds, not {rounds}", where="policy.max_rounds")
