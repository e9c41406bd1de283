"""Client-level privacy: what the adapters of a run tell of any one client, where the server that makes them is trusted.

A round draws each of K clients by itself with probability q, scales each one's whole change down to a norm of C, and
divides the noised sum by qK, the number that is expected and never the one that came (DP-FedAvg: McMahan et al. 2018,
arXiv 1710.06963, algorithm 1). C may follow a quantile of the changes' norms (Andrew et al. 2021, arXiv 1905.03871).

Letters: P adapter parameters, K clients, q their share in a round, C the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from fedloom.privacy.accounting import epsilon, recognised
from fedloom.privacy.noise import derive_key, draw_noise, draw_units

BIT_NOISE = 1 / 20
"""Noise on the number of clients within C, in expected clients of a round (arXiv 1905.03871, section 3.1)."""
NORM_RATE = 0.2
"""Step by which C is led unless another is given, in natural logarithms (ibid.)."""


@dataclass(frozen=True)
class CentralTerms:
    """Terms on which a server makes adapters of its clients' changes over a whole run: nothing in them is secret."""

    noise_multiplier: float
    """Standard deviation of a round's noise, in units of C, that all it tells is accounted by."""
    max_norm: float
    """Norm C that the changes of the first round are scaled down to."""
    clients: int
    rate: float
    """Probability with which a round draws a client."""
    delta: float
    quantile: float | None = None
    """Share of the changes that C is led to leave as they are; None keeps it as it is."""
    norm_rate: float = NORM_RATE

    @property
    def expected(self) -> float:
        """Return the clients that a round draws on average, by which a noised sum is divided."""
        return self.rate * self.clients

    @property
    def bit_noise(self) -> float:
        """Return the standard deviation of the noise on the number of clients within C."""
        return BIT_NOISE * self.expected

    @property
    def change_noise(self) -> float:
        """Return the noise on the sum of changes, in units of C: with the noised number it costs as much as σ alone.

        σ_Δ = (σ⁻² − (2σ_b)⁻²)^(−1/2), which needs σ < 2σ_b (arXiv 1905.03871, theorem 1).
        """
        if self.quantile is None:
            return self.noise_multiplier
        assert self.can_adapt, "no noise on the changes makes up for so little on their number"
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.bit_noise) ** -2)

    @property
    def can_adapt(self) -> bool:
        """Return whether the noise is small enough for C to follow a quantile."""
        return self.noise_multiplier < 2 * self.bit_noise

    def epsilon(self, rounds: int) -> float:
        """Return ε of so many rounds, of a client against the same run in which it changes nothing."""
        return epsilon(self.rate, self.noise_multiplier, rounds, self.delta)

    def recognised(self, rounds: int) -> float:
        """Return the share of clients that an attack with 1 % false alarms recognises at most."""
        return recognised(self.rate, self.noise_multiplier, rounds)

    def noise_over_norm(self, parameters: int) -> float:
        """Return the norm of the noise on a round's mean, in units of C: σ √P / (qK). No mean change is longer than 1,
        but for more clients than are expected.
        """
        return self.change_noise * math.sqrt(parameters) / self.expected

    def adapt_norm(self, max_norm: float, centred: float, noise: float) -> float:
        """Return the next round's C: C exp(−η (b̃ − γ)), with b̃ the noised share of changes within C.

        `centred` is the sum of 1/2 for each client within C and −1/2 for each beyond it, so that no client counts for
        more than 1/2; `noise` is a standard normal number.
        """
        assert self.quantile is not None, "a norm that stays as it is"
        within = 0.5 + (centred + self.bit_noise * noise) / self.expected
        return max_norm * math.exp(-self.norm_rate * (within - self.quantile))


@dataclass(frozen=True)
class CentralNoise:
    """Terms with the secret of a run, from which each round's draw and noise come."""

    terms: CentralTerms
    secret: bytes = field(repr=False)
    facts: tuple[str, ...]
    """All that a round's sum depends on beside its number and the adapter that it begins with."""

    def open(self, round: int, start: str) -> RoundNoise:
        """Return the draw and the noise of a round (from 1) that begins with an adapter of this SHA-256."""
        return RoundNoise(self.terms, derive_key(self.secret, "client level", str(round), start, *self.facts))


@dataclass(frozen=True)
class RoundNoise:
    """Draw and noise of one round: the same for the same round, and of no other."""

    terms: CentralTerms
    key: bytes = field(repr=False)

    def draw(self) -> list[int]:
        """Return the places of the clients that take part, ascending: each by itself; there may be none."""
        places: list[int] = draw_units(self.key, 0, self.terms.rate, self.terms.clients).tolist()
        return places

    def for_changes(self, max_norm: float, size: int) -> Tensor:
        """Return the noise on the sum of changes that are scaled down to `max_norm`, [P], in float64."""
        return draw_noise(self.key, 0, size) * (self.terms.change_noise * max_norm)

    def for_number(self) -> float:
        """Return the standard normal number that covers how many clients are within C."""
        return float(draw_noise(self.key, 1, 1)[0])
