"""Accounting of differential privacy: what noised steps tell of one unit, as ε and δ.

A step draws each unit by itself with probability q, adds up gradients of norm at most C, and adds Gaussian noise of
standard deviation σC. It tells apart N(0, σ²) and (1 − q) N(0, σ²) + q N(1, σ²) at most. Its privacy loss is
discretised so that it tells no less (connecting the dots: Doroshenko et al. 2022, arXiv 2207.04380), and composed over
T steps by a Fourier transform (Koskela et al. 2020, arXiv 1906.03049). Adjacency is zero-out: one unit's text is
replaced by nothing; ε is the larger of both directions.

A ledger adds up runs of different q and σ as Rényi divergences (Mironov, Talwar, Zhang 2019, arXiv 1908.10530), which
say somewhat more than there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_DELTA = 1e-10
"""Smallest δ that is accounted: composed probabilities have an error of some 1e-13."""
CUT = 1e-12
"""Probability of losses outside of the composed window, which is added to δ."""
REACH = 10.0
"""Standard deviations of one step's noise that are looked at: beyond lie 1e-23."""
CELLS = 24
"""Cells of the grid in one step's standard deviation of the loss."""
FINE = math.log(1.001)
"""Distance of logarithms within which a noise multiplier is found."""
TILTS = 24
"""Exponents that are tried in a Chernoff bound."""
MOST_CELLS = 2**21
"""Cells of a composed loss at most; beyond, the grid is coarser."""
ORDERS: tuple[int, ...] = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Orders α of the Rényi divergences in a ledger."""
FALSE_ALARMS = 0.01
"""Share of false alarms at which an attack is judged."""


@dataclass(frozen=True)
class Loss:
    """Composed privacy loss: probabilities of losses on a grid, and of an infinite one."""

    values: Array
    """Losses in nats, rising."""
    probabilities: Array
    infinite: float

    def delta(self, epsilon: Array) -> Array:
        """Return δ at each ε: Σ over losses l > ε of (1 − e^(ε − l)) p(l), and the infinite ones."""
        above = np.searchsorted(self.values, epsilon, side="right")
        mass, weighed = self._above
        # Beyond e^700 no float holds it; to leave it out says more is told than is.
        less = np.where(epsilon < 700, np.exp(np.minimum(epsilon, 700.0)) * weighed[above], 0.0)
        found: Array = self.infinite + mass[above] - less
        return np.clip(found, 0.0, 1.0)

    @cached_property
    def _above(self) -> tuple[Array, Array]:
        """The sums of p(l), and of e^−l p(l), over each loss and those above it; 0 after the last."""
        weighed = self.probabilities * np.exp(-np.maximum(self.values, -700.0))
        mass, other = (np.append(np.cumsum(each[::-1])[::-1], 0.0) for each in (self.probabilities, weighed))
        return mass, other

    def epsilon(self, delta: float) -> float:
        """Return the smallest ε ≥ 0 with this δ; infinity where no ε has it."""
        if self.infinite > delta:
            return math.inf
        places = np.concatenate([[0.0], self.values[self.values > 0]])
        enough = np.flatnonzero(self.delta(places) <= delta)
        if not len(enough):
            return math.inf
        if enough[0] == 0:
            return 0.0
        low, high = float(places[enough[0] - 1]), float(places[enough[0]])
        if high >= 700:
            return high
        # Between two points of the grid no loss lies, and δ(ε) = ∞ + Σ p − e^ε Σ e^−l p can be solved for ε.
        place = int(np.searchsorted(self.values, low, side="right"))
        mass, weighed = (sums[place] for sums in self._above)
        # A hair more, so that rounding does not make it less.
        return float(min(high, math.log((self.infinite + mass - delta) / weighed) * (1 + 1e-12) + 1e-12))


@lru_cache(maxsize=4096)  # a round's account asks for it of every client, and most have spent what they had
def epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    """Return ε of `steps` noised steps at δ, of units drawn with probability `rate` under noise of `noise` times C.

    Infinity without noise; 0 without steps.
    """
    if not steps or not rate:
        return 0.0
    if not noise:
        return math.inf
    return max(loss.epsilon(delta) for loss in compose(rate, noise, steps))


@lru_cache(maxsize=4096)  # a plan asks for it, and so does the run
def calibrate(rate: float, steps: int, target: float, delta: float) -> float:
    """Return the least noise multiplier, to 1 in 1,000 above it, with which `steps` steps have ε at most `target`."""
    # Nothing is carried over from other searches: a run and its plan must find the same to the bit.
    places: dict[bool, tuple[float, float]] = {}
    place = math.log(_guess_noise(rate, steps, target, delta))
    while len(places) < 2 or places[True][0] - places[False][0] > FINE:
        found = epsilon(rate, math.exp(place), steps, delta)
        # log ε falls along log σ, nearly in a straight line, from infinity down to where δ alone is enough.
        height = math.log(min(max(found / target, 1e-3), 1e3))
        places[found <= target] = place, height
        place = _next_place(places, place, height)
    return math.exp(places[True][0])


def _next_place(places: Mapping[bool, tuple[float, float]], place: float, height: float) -> float:
    """Return where to look next for ε = target: of noise too little (False) and enough (True), log σ and log(ε/target).

    Between the two it is on the line through them, and a part of FINE beside it, so that the next is on the other side.
    """
    if len(places) < 2:
        # As if ε fell with 1/σ; it falls faster, so the steps grow until they are on the other side.
        return place + (height + math.copysign(FINE, height) / 3 if abs(height) < 1 else math.copysign(1.0, height))
    (low, over), (high, under) = places[False], places[True]
    crossing = low + (high - low) * over / max(over - under, 1e-12)
    beside = FINE / 3
    # A crossing near an end brings that end closer alone, so the step goes to the other side of it.
    crossing += beside if crossing - low < high - crossing else -beside
    return min(max(crossing, low + beside), high - beside)


def _guess_noise(rate: float, steps: int, target: float, delta: float) -> float:
    """Return about the noise multiplier that suffices: by the Gaussian that many steps come to together (Dong, Roth, Su
    2022, arXiv 1905.02383, section 5), μ = q √(T (e^(1/σ²) − 1)), and its δ(ε).
    """
    low, high = 1e-3, 1e3
    for _ in range(30):
        middle = math.sqrt(low * high)
        near, far = middle / 2 - target / middle, -middle / 2 - target / middle
        told = _normal(near) - math.exp(min(target, 700.0)) * _normal(far)
        low, high = (middle, high) if told <= delta else (low, middle)
    return 1 / math.sqrt(math.log1p((low / rate) ** 2 / steps))


def recognised(rate: float, noise: float, steps: int, false_alarms: float = FALSE_ALARMS) -> float:
    """Return the largest share of units that any attack recognises at a share of false alarms (its power).

    From δ(ε) of both directions: a power b at false alarms a has b ≤ e^ε a + δ, and 1 − a ≤ e^ε (1 − b) + δ (Kairouz,
    Oh, Viswanath 2015, arXiv 1311.0776, equation 4).
    """
    if not steps or not rate:
        return false_alarms
    if not noise:
        return 1.0
    removal, addition = compose(rate, noise, steps)
    places = np.concatenate([np.linspace(-20, 20, 801), removal.values[::64]])
    first = np.exp(np.minimum(places, 700)) * false_alarms + removal.delta(places)
    second = 1 - np.exp(-np.minimum(places, 700)) * (1 - false_alarms - addition.delta(places))
    return float(max(false_alarms, min(1.0, first.min(), second.min())))


def most_apart(rate: float, noise: float, steps: int) -> float:
    """Return the largest AUC with which any attack tells units that took part from others.

    It is the area under the largest power at each share of false alarms; between two of them, that of the larger.
    """
    alarms = np.linspace(0, 1, 201)[1:]
    return float(np.mean([recognised(rate, noise, steps, float(share)) for share in alarms]))


@lru_cache(maxsize=8)  # of the last search: each may hold a hundred megabytes
def compose(rate: float, noise: float, steps: int) -> tuple[Loss, Loss]:
    """Return the composed privacy losses of removing a unit and of adding it."""
    return _compose(rate, noise, steps, removal=True), _compose(rate, noise, steps, removal=False)


def _compose(rate: float, noise: float, steps: int, *, removal: bool) -> Loss:
    # The loss of one step has about this standard deviation: it decides how fine the grid has to be.
    spread = min(rate * math.sqrt(math.expm1(min(1 / noise**2, 50.0))), 1 / noise) if noise else 1.0
    cell = max(spread / CELLS, 1e-7)
    while True:
        first, probabilities, infinite = _one_step(rate, noise, cell, removal=removal)
        low, high = _window(first, probabilities, cell, steps)
        if high - low < MOST_CELLS and len(probabilities) < MOST_CELLS:
            break
        cell *= 2
    size = 1 << (max(high - low + 1, len(probabilities)) - 1).bit_length()
    # The sum of T losses wraps around in the window, and is unrolled again: what lies outside has probability CUT.
    placed = np.zeros(size)
    np.add.at(placed, (first + np.arange(len(probabilities))) % size, probabilities)
    whole: Array = np.asarray(np.fft.irfft(np.fft.rfft(placed) ** steps, size), dtype=np.float64)
    cells = np.arange(low, low + size)
    composed = np.maximum(whole[cells % size], 0.0)
    return Loss(np.asarray(cells * cell, dtype=np.float64), composed, -math.expm1(steps * math.log1p(-infinite)) + CUT)


def _one_step(rate: float, noise: float, cell: float, *, removal: bool) -> tuple[int, Array, float]:
    """Return the loss of one step on the grid: its first cell, the probabilities, and that of an infinite loss.

    The probability between two points of the grid is split over them so that its sum and its sum in the other
    distribution stay what they are: both then tell of δ what it is at every point of the grid, and more in between.
    """

    def loss(x: float) -> float:
        exponent = (2 * x - 1) / (2 * noise**2)
        if exponent > 600:
            return exponent + math.log(rate)
        return math.log1p(rate * math.expm1(exponent)) if rate < 1 else exponent

    sign = 1 if removal else -1
    least, most = sorted(sign * loss(place) for place in (-REACH * noise, REACH * noise + 1))
    first, last = math.floor(least / cell), math.ceil(most / cell)
    edges = np.arange(first, last + 1) * cell
    # The place at which the loss has each value; a mixture never tells less than log(1 − q).
    values = edges if removal else -edges
    inner = np.expm1(np.minimum(values, 600.0)) / rate + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.where(
            values > 600,
            noise**2 * (values - math.log(rate)) + 0.5,
            np.where(inner > 0, noise**2 * np.log(np.maximum(inner, 1e-300)) + 0.5, -np.inf),
        )
    plain = _between(place / noise)
    shifted = _between((place - 1) / noise)
    mixed = (1 - rate) * plain + rate * shifted
    here, there = (mixed, plain) if removal else (plain, mixed)
    # Above the lower edge's ratio: the share that goes to the upper edge.
    up = (here - np.exp(np.minimum(edges[:-1], 700.0)) * there) / -math.expm1(-cell)
    up = np.clip(up, 0.0, here)
    probabilities = np.zeros(len(edges))
    probabilities[:-1] += here - up
    probabilities[1:] += up
    # What lies below the grid is put on its first point, what lies above is infinite.
    outside = max(0.0, 1.0 - float(probabilities.sum()))
    beyond = _beyond(rate, place, noise, removal=removal)
    probabilities[0] += max(0.0, outside - beyond)
    return first, probabilities, beyond


def _beyond(rate: float, place: Array, noise: float, *, removal: bool) -> float:
    """Return the probability of a loss above the grid."""
    if removal:
        x = float(place[-1])
        return float((1 - rate) * _normal(-x / noise) + rate * _normal((1 - x) / noise))
    return float(_normal(float(place[-1]) / noise))


def _between(places: Array) -> Array:
    """Return the standard normal's probability between neighbours of a list, whichever way it is ordered."""
    # Differences of small numbers: above 0, those of the upper tail.
    tails = 0.5 * np.fromiter(map(math.erfc, (np.abs(places) / math.sqrt(2)).tolist()), np.float64, len(places))
    low, high = places[:-1], places[1:]
    same = (low > 0) == (high > 0)
    difference = np.abs(tails[1:] - tails[:-1])
    found: Array = np.where(same, difference, 1.0 - tails[1:] - tails[:-1])
    return found


def _normal(x: float) -> float:
    """Return the standard normal's distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _window(first: int, probabilities: Array, cell: float, steps: int) -> tuple[int, int]:
    """Return the cells between which the sum of the steps' losses lies, but for a probability of CUT (Chernoff)."""
    losses = (first + np.arange(len(probabilities))) * cell
    used = probabilities > 0
    losses, logs = losses[used], np.log(probabilities[used])
    bounds = []
    for sign in (-1.0, 1.0):
        tilts = sign * np.geomspace(1e-3, 1e4, TILTS)
        moments = np.array([_log_sum(logs + tilt * losses) for tilt in tilts])
        bounds.append(np.min((steps * moments + math.log(2 / CUT)) / np.abs(tilts)))
    low, high = -bounds[0] / cell, bounds[1] / cell
    whole = steps * first, steps * (first + len(probabilities) - 1)
    return max(math.floor(low), whole[0]), min(math.ceil(high), whole[1])


def _log_sum(logs: Array) -> float:
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).sum()))


def renyi(rate: float, noise: float, steps: int) -> tuple[float, ...]:
    """Return the Rényi divergence of `steps` steps at each of ORDERS (Mironov et al. 2019, section 3.3)."""
    return tuple(steps * _renyi(rate, noise, order) for order in ORDERS)


def _renyi(rate: float, noise: float, order: int) -> float:
    if not rate:
        return 0.0
    if not noise:
        return math.inf
    if rate == 1:
        return order / (2 * noise**2)
    k = np.arange(order + 1)
    logs = np.array([math.lgamma(order + 1) - math.lgamma(i + 1) - math.lgamma(order - i + 1) for i in k])
    logs += (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
    return _log_sum(logs) / (order - 1)


def renyi_epsilon(divergences: Sequence[float], delta: float) -> float:
    """Return ε at δ of Rényi divergences at ORDERS, those of several runs added up (Canonne et al. 2020, prop. 12)."""
    found = [
        divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        for order, divergence in zip(ORDERS, divergences, strict=True)
    ]
    return max(0.0, min(found))
