"""Ration of a client: how its training draws and covers documents in a round, and what that costs.

What is protected is a unit: a document, or all that one person wrote. A unit of several rows gives one of them, drawn
by chance, in each step that draws it. So its gradient is on average the mean of its rows', its step costs as much as
any other, and what it can change is as bounded: over the chance of the row, (ε, δ) holds as it does for each row (joint
convexity). A mean over its rows would take as many passes as the longest unit has rows; more units in a step are worth
more under noise than more rows of one (Charles et al. 2024, arXiv 2407.07737, weigh the two).

Liu et al. 2022 (arXiv 2206.07902) call it silo-specific record-level privacy: each client noises for itself, and trusts
nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from fedloom.privacy.accounting import FALSE_ALARMS, calibrate, epsilon, most_apart, recognised
from fedloom.privacy.noise import derive_key, draw_noise, draw_places, draw_units


@dataclass(frozen=True)
class Terms:
    """Terms on which a client trains over a whole run: nothing in them is secret."""

    noise_multiplier: float
    """Standard deviation of the noise on a sum of gradients, in units of `max_norm`."""
    max_norm: float
    """Norm to which a unit's gradient is scaled down."""
    batch: int
    """Units that a step draws on average, by which the noised sum is divided."""
    units: int
    """Units that the client has to train on."""
    steps: int
    """Steps of a round."""
    delta: float

    @property
    def rate(self) -> float:
        """Return the probability with which a step draws a unit."""
        return min(1.0, self.batch / self.units)

    def epsilon(self, rounds: int) -> float:
        """Return ε of so many rounds."""
        return epsilon(self.rate, self.noise_multiplier, rounds * self.steps, self.delta)

    def recognised(self, rounds: int, false_alarms: float = FALSE_ALARMS) -> float:
        """Return the share of units that an attack with so many false alarms recognises at most; 1 % of them."""
        return recognised(self.rate, self.noise_multiplier, rounds * self.steps, false_alarms)

    def most_apart(self, rounds: int) -> float:
        """Return the largest AUC with which an attack tells units that took part from others."""
        return most_apart(self.rate, self.noise_multiplier, rounds * self.steps)

    def noise_over_signal(self, parameters: int, rounds: int, clients: int) -> float:
        """Return how large the noise left in the mean of all clients is beside what they can move together.

        A rule of thumb: σ √P / (B √(T K)). Below 0.2 a run is worth trying; above 1 noise moves more than
        training can at most, in all directions alike, and the loss may fall all the same.
        """
        steps = rounds * self.steps * clients
        return self.noise_multiplier * math.sqrt(parameters) / (self.batch * math.sqrt(steps))


def set_terms(
    *, units: int, batch: int, steps: int, rounds: int, max_norm: float, delta: float,
    target: float | None, noise_multiplier: float | None,
) -> Terms:  # fmt: skip
    """Return a client's terms: with the noise that is given, or the least that keeps ε of the run at `target`."""
    if noise_multiplier is None:
        assert target is not None, "neither a noise multiplier nor an ε"
        noise_multiplier = calibrate(min(1.0, batch / units), rounds * steps, target, delta)
    return Terms(noise_multiplier, max_norm, min(batch, units), units, steps, delta)


@dataclass(frozen=True)
class Ration:
    """Terms of a client with the key of one task, from which its draws and its noise come."""

    terms: Terms
    key: bytes = field(repr=False)

    def draw(self, step: int) -> Tensor:
        """Return the units of a step (from 0): each by itself with the terms' probability; there may be none."""
        return draw_units(self.key, step, self.terms.rate, self.terms.units)

    def draw_rows(self, step: int, units_N: Tensor) -> Tensor:
        """Return the rows of a step: one of each drawn unit; `units_N` has each row's unit.

        Of some of the terms' units nothing may be left to train on: they are drawn all the same, and bring no row.
        """
        _, sizes_U = units_N.unique(return_counts=True)
        begins_U = sizes_U.cumsum(0) - sizes_U
        rows_N = units_N.argsort(stable=True)
        drawn = self.draw(step)
        return rows_N[(begins_U + draw_places(self.key, step, sizes_U))[drawn[drawn < len(sizes_U)]]]

    def dropout_seed(self, step: int, tokens_T: Tensor) -> int:
        """Return the seed of a document's dropout in a step: of its own tokens, [T], and of nothing beside it.

        Masks that others had a part in would make one document change all gradients, and the noise covers one.
        """
        told = tokens_T.numpy().tobytes().hex()
        return int.from_bytes(derive_key(self.key, f"dropout {step}", told)[:8], "big") >> 1  # as `derive_seed` has it

    def noise(self, step: int, size: int) -> Tensor:
        """Return the noise of a step's sum of gradients, [P], in float64."""
        return draw_noise(self.key, step, size) * (self.terms.noise_multiplier * self.terms.max_norm)
