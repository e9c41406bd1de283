"""Paired differences: a mean with its interval, and two tests of whether there is a difference at all.

Student's paired t takes the differences for normally distributed. The sign-flip test takes nothing of the kind, and so
can say little of few pairs: under no difference each sign is as likely as its opposite, and all of them are counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fedloom.report.figures import spread

LEVEL = 0.95
"""Share of such intervals that hold the true mean."""
MOST_FLIPPED = 16
"""Pairs up to which every combination of signs is counted: 65,536 of them."""
STEPS = 2000
"""Intervals of Simpson's rule: the probability is exact to 1e-9."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, with what is known of its certainty. Of a single pair, nothing is."""

    pairs: int
    mean: float
    low: float = -math.inf
    high: float = math.inf
    p: float | None = None
    """Student's paired t, two-sided: probability of a mean as far from 0 without a difference."""
    flipped_p: float | None = None
    """Sign-flip test, two-sided; None for a single pair, and where there are too many combinations."""

    @property
    def is_seen(self) -> bool:
        """Return whether the interval leaves 0 out."""
        return not self.low <= 0 <= self.high


def compare_pairs(differences: Sequence[float]) -> Difference:
    """Return the mean of differences with its 95 % interval, and both tests."""
    pairs, found = len(differences), spread(differences)
    if pairs < 2:
        return Difference(pairs, found.mean)
    error = found.deviation / math.sqrt(pairs)
    reach = t_quantile(LEVEL, pairs - 1) * error
    t = found.mean / error if error else math.copysign(math.inf, found.mean) if found.mean else 0.0
    p = 1 - t_within(abs(t), pairs - 1)
    return Difference(pairs, found.mean, found.mean - reach, found.mean + reach, p, _flip_signs(differences))


def least_flipped_p(pairs: int) -> float:
    """Return the least p that the sign-flip test can have: all signs as they are, or all of them turned."""
    return 2.0 ** (1 - pairs)


def _flip_signs(differences: Sequence[float]) -> float | None:
    if len(differences) > MOST_FLIPPED:
        return None
    observed = abs(math.fsum(differences)) * (1 - 1e-12)  # as far but for rounding counts
    signs = itertools.product((1, -1), repeat=len(differences) - 1)  # the other half mirrors these
    sums = [abs(math.fsum([differences[0], *map(math.prod, zip(differences[1:], of, strict=True))])) for of in signs]
    return sum(total >= observed for total in sums) / len(sums)


def t_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t with so many degrees of freedom lies within ±t.

    With t = √ν tan θ, its density is that of cos^(ν−1) θ.
    """
    return _angle_within(math.atan(t / math.sqrt(freedom)), freedom)


def _angle_within(angle: float, freedom: int) -> float:
    width = angle / STEPS
    weights = (1 if step in (0, STEPS) else 4 if step % 2 else 2 for step in range(STEPS + 1))
    area = (
        width / 3 * math.fsum(weight * math.cos(step * width) ** (freedom - 1) for step, weight in enumerate(weights))
    )
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return min(1.0, area / whole)


@cache
def t_quantile(level: float, freedom: int) -> float:
    """Return the t within whose ± Student's t lies with a probability: 12.71 for 0.95 and one degree of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _angle_within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
