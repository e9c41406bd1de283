"""Section `privacy` of a recipe: how much what leaves a client may tell of one document, or unit. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedloom.recipe.section import Section

DOCUMENT = "document"
"""Unit that is a single document: no column has that name here."""


class Privacy(Section):
    """A bound on what everything that leaves a client tells of any one of its documents (differential privacy)."""

    unit: str = Field(
        DOCUMENT,
        min_length=1,
        description="what is protected: one document, or all of a client's documents with the same value in the column"
        " of this name, such as its author",
    )
    epsilon: float | None = Field(
        None, gt=0, le=1000, description="ε of the whole run, at each client; its noise follows from its units"
    )
    noise_multiplier: float | None = Field(
        None, ge=0.1, le=1000, description="noise in units of `max_norm`, in place of `epsilon`, which then follows"
    )
    delta: float = Field(
        ge=1e-10, lt=1, description="δ: the probability with which ε may not hold; below one over a client's units"
    )
    max_norm: float = Field(1.0, gt=0, le=1e6, description="norm to which a unit's gradient is scaled down")
    noise: Literal["secret", "seed"] = Field(
        "secret",
        description="source of draws and noise: a secret of the run, or for tests the recipe's seed: NOT private",
    )

    @property
    def unit_column(self) -> str | None:
        """Return the column whose values are the units; None where each document is one."""
        return None if self.unit == DOCUMENT else self.unit

    @model_validator(mode="after")
    def _says_how_much(self) -> Privacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("needs either epsilon or noise_multiplier, and not both")
        return self
