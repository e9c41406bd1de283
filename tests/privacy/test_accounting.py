"""ε against golden values of Google's dp-accounting, closed forms, and what any accountant must hold."""

import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.privacy import accounting
from fedloom.privacy.accounting import (
    FALSE_ALARMS,
    ORDERS,
    calibrate,
    compose,
    epsilon,
    most_apart,
    recognised,
    renyi,
    renyi_epsilon,
)

NORMAL = NormalDist()
GOLDEN = (
    (0.01, 1.0, 1000, 1e-5, 1.82824, 2.10775),
    (0.01, 4.0, 10000, 1e-5, 0.94700, 1.03549),
    (0.05, 1.0, 500, 1e-5, 7.52370, 8.43231),
    (0.1, 2.0, 300, 1e-6, 4.71277, 5.09918),
    (0.25, 1.5, 60, 1e-6, 8.26672, 9.12283),
    (1.0, 5.0, 60, 1e-5, 7.32937, 7.88786),
    (0.02, 0.6, 2000, 1e-6, 22.35539, 24.45955),
    (0.064, 1.0, 1, 1e-5, 1.24800, 1.80916),
)
"""q, σ, T, δ; ε of dp-accounting 0.6.0 (PLD, on a grid of 1e-4 or 0.01 / T), and by Rényi divergences."""


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "theirs", "by_renyi"), GOLDEN)
def test_it_is_never_below_the_reference_and_hardly_above(
    rate: float, noise: float, steps: int, delta: float, theirs: float, by_renyi: float
) -> None:
    found = epsilon(rate, noise, steps, delta)
    assert theirs - 5e-6 <= found <= 1.001 * theirs
    assert renyi_epsilon(renyi(rate, noise, steps), delta) == pytest.approx(by_renyi, abs=1e-5)


def gaussian_delta(noise: float, steps: int, found: float) -> float:
    """δ of T steps that everybody takes part in (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(steps) / noise
    return NORMAL.cdf(mu / 2 - found / mu) - math.exp(found) * NORMAL.cdf(-mu / 2 - found / mu)


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 60), (1.0, 1), (20.0, 1000), (0.7, 3)])
def test_where_all_take_part_it_is_the_analytic_gaussian(noise: float, steps: int) -> None:
    found = epsilon(1.0, noise, steps, 1e-5)
    # What the grid adds, and no less than the truth.
    assert gaussian_delta(noise, steps, found) <= 1e-5 <= gaussian_delta(noise, steps, 0.999 * found)


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0, 10.0])
def test_where_all_take_part_the_most_that_is_told_apart_is_the_exact_gaussians(noise: float) -> None:
    exact = NORMAL.cdf(1 / (noise * math.sqrt(2)))
    assert exact <= most_apart(1.0, noise, 1) <= exact + 0.005


def test_more_noise_and_fewer_steps_tell_less_apart() -> None:
    told = [most_apart(0.2, noise, steps) for noise, steps in ((8.0, 10), (2.0, 10), (2.0, 60), (0.5, 60))]
    assert told == sorted(told)
    assert 0.5 < told[0] < told[-1] <= 1


@given(
    rate=st.floats(1e-3, 1.0),
    noise=st.floats(0.4, 8.0),
    steps=st.integers(1, 400),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
)
@settings(max_examples=20, deadline=None)
def test_it_rises_and_falls_as_it_must(rate: float, noise: float, steps: int, delta: float) -> None:
    found = epsilon(rate, noise, steps, delta)
    tolerance = 1e-3 * found + 1e-6  # two grids differ by as much
    assert found <= epsilon(rate, noise, 2 * steps, delta) + tolerance
    assert found <= epsilon(min(1.0, 1.5 * rate), noise, steps, delta) + tolerance
    assert epsilon(rate, 1.5 * noise, steps, delta) <= found + tolerance
    assert epsilon(rate, noise, steps, 10 * delta) <= found + tolerance
    assert found <= renyi_epsilon(renyi(rate, noise, steps), delta) + tolerance, "never above the looser bound"


@pytest.mark.parametrize(("rate", "steps", "target", "delta"), [(0.128, 160, 8.0, 1e-5), (0.25, 60, 1.0, 1e-6)])
def test_calibrated_noise_just_suffices(rate: float, steps: int, target: float, delta: float) -> None:
    noise = calibrate(rate, steps, target, delta)
    assert epsilon(rate, noise, steps, delta) <= target < epsilon(rate, 0.995 * noise, steps, delta)


def test_noise_is_found_in_a_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan looks for the noise of every size that a client has: with 1,000 sizes, each look is five seconds."""
    looks: list[float] = []

    def look(rate: float, noise: float, steps: int, delta: float) -> float:
        looks.append(noise)
        return epsilon(rate, noise, steps, delta)

    monkeypatch.setattr(accounting, "epsilon", look)
    counts = []
    for rate, steps, target, delta in SETTINGS:
        looks.clear()
        noise = calibrate.__wrapped__(rate, steps, target, delta)
        counts.append(len(looks))
        assert epsilon(rate, noise, steps, delta) <= target < epsilon(rate, noise / 1.0012, steps, delta)
    assert max(counts) <= 9
    assert sum(counts) <= 5.5 * len(counts)


SETTINGS = (
    (0.128, 160, 8.0, 1e-5), (0.5, 18, 8.0, 1e-3), (1.0, 9, 8.0, 1e-3), (0.1, 20, 8.0, 1e-4), (1.0, 1, 1000.0, 1e-3),
    (0.5, 3, 0.01, 1e-3), (0.5, 2, 0.001, 1e-2), (0.03, 90, 0.16, 1e-7), (0.9, 400, 30.0, 1e-8), (0.01, 10, 2.0, 1e-6),
)  # fmt: skip
"""q, T, ε, δ: of many steps and one, little noise and much, and where δ alone is nearly enough."""


def test_nothing_and_all() -> None:
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0 == epsilon(0.0, 1.0, 9, 1e-5)
    assert epsilon(0.1, 0.0, 1, 1e-5) == math.inf
    assert recognised(0.1, 0.0, 1) == 1
    assert recognised(0.1, 1.0, 0) == FALSE_ALARMS
    assert epsilon(0.5, 1e-2, 3, 1e-5) > 1000, "hardly any noise"


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (3.0, 4), (0.5, 1), (40.0, 10)])
def test_an_attacks_power_is_that_of_the_best_test(noise: float, steps: int) -> None:
    """Between two Gaussians the likelihood ratio's, by Neyman and Pearson."""
    best = NORMAL.cdf(NORMAL.inv_cdf(FALSE_ALARMS) + math.sqrt(steps) / noise)
    assert best <= recognised(1.0, noise, steps) <= 1.02 * best + 1e-4


def test_an_attack_on_drawn_units_stays_below_the_bound() -> None:
    """The best test of one subsampled step, played out."""
    rate, noise, draws = 0.3, 0.8, 400_000
    generator = np.random.default_rng(0)
    without = noise * generator.standard_normal(draws)
    with_it = noise * generator.standard_normal(draws) + (generator.random(draws) < rate)
    threshold = np.quantile(without, 1 - FALSE_ALARMS)
    power = float((with_it > threshold).mean())
    assert power == pytest.approx(recognised(rate, noise, 1), rel=0.03)
    assert power < recognised(rate, noise, 1) + 3 * math.sqrt(power / draws)


def test_composed_losses_are_probabilities() -> None:
    for loss in compose(0.1, 1.0, 50):
        assert loss.probabilities.sum() + loss.infinite == pytest.approx(1, abs=1e-9)
        places = np.linspace(-2, 6, 50)
        assert all(one >= other for one, other in pairwise(loss.delta(places)))


def test_a_ledger_of_two_runs_adds_up() -> None:
    together = [one + other for one, other in zip(renyi(0.1, 1.0, 30), renyi(0.1, 1.0, 70), strict=True)]
    assert together == pytest.approx(renyi(0.1, 1.0, 100))
    assert len(together) == len(ORDERS)
    assert renyi_epsilon(renyi(0.1, 0.0, 1), 1e-5) == math.inf
    assert renyi_epsilon([0.0] * len(ORDERS), 1e-5) == pytest.approx(0, abs=0.02)
