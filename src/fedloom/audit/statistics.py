"""Statistics of attacks: how well two groups are told apart, how sure that is, and the word for it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedloom.privacy.accounting import FALSE_ALARMS

Array = NDArray[np.float64]
Word = Literal["yes", "no", "too few documents to say", "not tried"]
YES: Word = "yes"
NO: Word = "no"
TOO_FEW: Word = "too few documents to say"
NOT_TRIED: Word = "not tried"

UNSURE = 0.05
"""Probability with which any of the intervals of one kind, of all clients together, is beside what it estimates."""
TOLD_APART = 0.6
"""AUC above which two groups are told apart."""
RECOGNISED = 0.05
"""Share of members that are recognised with few false alarms, above which that counts."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def judge(self, threshold: float) -> Word:
        """Return whether what was estimated is above a threshold: only where the whole interval says so."""
        return YES if self.low > threshold else NO if self.high < threshold else TOO_FEW


def auc(inside: Sequence[float] | Array, outside: Sequence[float] | Array) -> float:
    """Return the probability that one of those inside scores above one of those outside; of equal scores, half."""
    ours, others = np.sort(np.asarray(outside, dtype=np.float64)), np.asarray(inside, dtype=np.float64)
    below = np.searchsorted(ours, others, side="left")
    up_to = np.searchsorted(ours, others, side="right")
    return float((below + up_to).sum() / (2 * len(ours) * len(others)))


def measure_auc(inside: Sequence[float] | Array, outside: Sequence[float] | Array, clients: int = 1) -> Interval:
    """Return the AUC with its interval, by Hanley and McNeil (1982), equation 2.

    Their error of an AUC of 1 is 0, however few there are: it is taken at half a pair less than all, and is never below
    that of scores which tell nothing as long as the AUC could be theirs. Of several clients, each has so wide a one
    that all of theirs hold together (Bonferroni): else one of a dozen is told apart by chance.
    """
    sure = NormalDist().inv_cdf(1 - UNSURE / 2 / clients)
    found, n, m = auc(inside, outside), len(inside), len(outside)
    at = min(max(found, 0.5 / (n * m)), 1 - 0.5 / (n * m))
    first, second = at / (2 - at), 2 * at**2 / (1 + at)
    variance = (at * (1 - at) + (n - 1) * (first - at**2) + (m - 1) * (second - at**2)) / (n * m)
    chance = math.sqrt((n + m + 1) / (12 * n * m))
    error = sure * math.sqrt(variance)
    if abs(found - 0.5) < sure * chance:
        error = max(error, sure * chance)
    return Interval(found, max(0.0, found - error), min(1.0, found + error))


def measure_share(some: int, of: int, clients: int = 1) -> Interval:
    """Return a share with its exact interval (Clopper and Pearson 1934)."""
    low = 0.0 if some == 0 else _solve(some, of, UNSURE / 2 / clients)
    high = 1.0 if some == of else _solve(some + 1, of, 1 - UNSURE / 2 / clients)
    return Interval(some / of, low, high)


def measure_recognised(
    inside: Sequence[float] | Array, outside: Sequence[float] | Array, clients: int = 1
) -> tuple[Interval, float]:
    """Return the share of those inside that score above all but 1 % of those outside, and that share of false alarms.

    With fewer than 100 outside, above all of them: how rare false alarms are is then not known to be 1 %.
    """
    alarms = math.floor(FALSE_ALARMS * len(outside))
    bar = np.sort(np.asarray(outside, dtype=np.float64))[::-1][alarms]
    return measure_share(int((np.asarray(inside) > bar).sum()), len(inside), clients), alarms / len(outside)


def judge_membership(apart: Interval, recognised: Interval, outside: int) -> Word:
    """Return the word for an attack on membership: yes where either measure says so, no where both do.

    The share recognised at 1 % of false alarms can't be judged by fewer than 100 outside.
    """
    words = {apart.judge(TOLD_APART), recognised.judge(RECOGNISED) if outside * FALSE_ALARMS >= 1 else TOO_FEW}
    return YES if YES in words else NO if words == {NO} else TOO_FEW


def chance_of(inside: Sequence[float] | Array, outside: Sequence[float] | Array) -> float:
    """Return the probability of an AUC as high as this where scores tell nothing (Mann and Whitney 1947, normal)."""
    n, m = len(inside), len(outside)
    excess = (auc(inside, outside) - 0.5) * n * m - 0.5
    return 0.5 * math.erfc(excess / math.sqrt(n * m * (n + m + 1) / 12) / math.sqrt(2))


def _solve(some: int, of: int, probability: float) -> float:
    """Return the share at which so many of `of`, or more, have this probability."""
    k = np.arange(some, of + 1)
    ways = np.array([math.lgamma(of + 1) - math.lgamma(i + 1) - math.lgamma(of - i + 1) for i in k])
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        more = np.exp(ways + k * math.log(p) + (of - k) * math.log1p(-p)).sum() > probability
        low, high = (low, p) if more else (p, high)
    return (low + high) / 2
