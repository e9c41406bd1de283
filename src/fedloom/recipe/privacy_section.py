"""Section `privacy` of a recipe: how much what leaves a client may tell of one document, or unit, or adapters of one
client. No torch here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedloom.recipe.section import Section

DOCUMENT = "document"
"""Unit that is a single document: no column has that name here."""
CLIENT = "client"
"""Unit for which the server adds the noise: a whole client. No column has that name either."""


class Privacy(Section):
    """A bound on what everything that leaves a client tells of any one of its documents (differential privacy)."""

    unit: str = Field(
        DOCUMENT,
        min_length=1,
        description="what is protected: a `document`, or all of a client's documents with the same value in the column"
        " of this name, such as its author, by noise at each client; or in `fedloom run` a whole `client`, by noise at"
        " the server, which is trusted then",
    )
    epsilon: float | None = Field(
        None, gt=0, le=1000, description="ε of the whole run, at each client; its noise follows from its units"
    )
    noise_multiplier: float | None = Field(
        None, ge=0.1, le=1000, description="noise in units of `max_norm`, in place of `epsilon`, which then follows"
    )
    delta: float = Field(
        ge=1e-10,
        lt=1,
        description="δ: the probability with which ε may not hold; below one over a client's units, or over the"
        " clients",
    )
    max_norm: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="norm to which a unit's gradient is scaled down, or a client's change in a round",
    )
    norm_quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the clients' changes that the norm is led to leave as they are, from `max_norm` on"
        ' (`unit = "client"`; arXiv 1905.03871); it stays if left out',
    )
    norm_rate: float | None = Field(
        None, gt=0, le=1, description="step by which the norm is led, in natural logarithms; 0.2 if left out"
    )
    noise: Literal["secret", "seed"] = Field(
        "secret",
        description="source of draws and noise: a secret of the run, or for tests the recipe's seed: NOT private",
    )

    @property
    def unit_column(self) -> str | None:
        """Return the column whose values are the units; None where each document, or each client, is one."""
        return None if self.unit in (DOCUMENT, CLIENT) else self.unit

    @model_validator(mode="after")
    def _says_how_much(self) -> Privacy:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("needs either epsilon or noise_multiplier, and not both")
        if self.norm_quantile is not None and not self.of_clients:
            raise ValueError(f'norm_quantile is for unit = "{CLIENT}": a document\'s norm stays')
        if self.norm_rate is not None and self.norm_quantile is None:
            raise ValueError("norm_rate leads the norm to norm_quantile, and there is none")
        return self

    @property
    def of_clients(self) -> bool:
        """Return whether a whole client is protected."""
        return self.unit == CLIENT
