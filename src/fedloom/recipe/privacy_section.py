"""Section `privacy` of a recipe: how much what leaves a client may tell of one document. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedloom.recipe.section import Section


class Privacy(Section):
    """A bound on what everything that leaves a client tells of any one of its documents (differential privacy)."""

    epsilon: float | None = Field(
        None, gt=0, le=1000, description="ε of the whole run, at each client; its noise follows from its documents"
    )
    noise_multiplier: float | None = Field(
        None, ge=0.1, le=1000, description="noise in units of `max_norm`, in place of `epsilon`, which then follows"
    )
    delta: float = Field(
        ge=1e-10, lt=1, description="δ: the probability with which ε may not hold; below one over a client's documents"
    )
    max_norm: float = Field(1.0, gt=0, le=1e6, description="norm to which a document's gradient is scaled down")
    noise: Literal["secret", "seed"] = Field(
        "secret",
        description="source of draws and noise: a secret of the run, or for tests the recipe's seed: NOT private",
    )

    @model_validator(mode="after")
    def _says_how_much(self) -> Privacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("needs either epsilon or noise_multiplier, and not both")
        return self
