"""Secret numbers: of the right distribution, the same for the same task, and unlike for every other."""

import math
from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from fedloom.privacy.noise import derive_key, draw_noise, draw_units
from fedloom.privacy.ration import Ration, Terms, set_terms

SECRET = bytes(range(32))
KEY = derive_key(SECRET, "task")


def test_noise_is_standard_normal() -> None:
    found = draw_noise(KEY, 3, 1_000_001)
    assert found.dtype == torch.float64
    assert len(found) == 1_000_001
    assert float(found.mean()) == pytest.approx(0, abs=4e-3)
    assert float(found.std()) == pytest.approx(1, rel=3e-3)
    assert float(found.pow(4).mean()) == pytest.approx(3, rel=2e-2)
    # Kolmogorov and Smirnov: the largest distance from the normal's distribution function.
    ordered = found.sort().values
    exact = torch.special.ndtr(ordered)
    distance = float((exact - torch.arange(1, len(found) + 1) / len(found)).abs().max())
    assert distance < 1.95 / math.sqrt(len(found))


def others() -> Iterator[tuple[bytes, int]]:
    yield KEY, 3
    yield KEY, 4
    for facts in (("task", ""), ("tas", "k"), ("other",)):
        yield derive_key(SECRET, *facts), 3
    yield derive_key(bytes(32), "task"), 3


@pytest.mark.parametrize("pair", [*combinations(range(6), 2)], ids=str)
def test_noise_of_two_steps_or_tasks_is_uncorrelated(pair: tuple[int, int]) -> None:
    drawn = [*others()]
    one, other = (draw_noise(*drawn[number], 100_000) for number in pair)
    assert float((one * other).mean()) == pytest.approx(0, abs=4 / math.sqrt(100_000))


def test_the_same_task_has_the_same_noise() -> None:
    assert torch.equal(draw_noise(KEY, 3, 99), draw_noise(derive_key(SECRET, "task"), 3, 99))
    assert torch.equal(draw_noise(KEY, 3, 99)[:50], draw_noise(KEY, 3, 99)[:50])
    assert torch.equal(draw_units(KEY, 3, 0.2, 50), draw_units(KEY, 3, 0.2, 50))


def test_each_unit_is_drawn_by_itself() -> None:
    rate, units, steps = 0.15, 60, 4000
    drawn = torch.zeros(steps, units)
    for step in range(steps):
        drawn[step, draw_units(KEY, step, rate, units)] = 1
    assert (drawn.mean(0) - rate).abs().max() < 4 * math.sqrt(rate * (1 - rate) / steps)
    sizes = drawn.sum(1)
    assert float(sizes.mean()) == pytest.approx(units * rate, rel=0.02)
    assert float(sizes.var()) == pytest.approx(units * rate * (1 - rate), rel=0.1)
    centred = drawn - rate
    pairs = (centred.T @ centred / steps).fill_diagonal_(0)
    assert pairs.abs().max() < 5 * rate * (1 - rate) / math.sqrt(steps)


def test_all_are_drawn_with_certainty_and_none_without() -> None:
    assert draw_units(KEY, 0, 1.0, 5).tolist() == [0, 1, 2, 3, 4]
    assert draw_units(KEY, 0, 0.0, 5).tolist() == []
    assert draw_noise(KEY, 0, 0).tolist() == []
    assert len(draw_noise(KEY, 0, 1)) == 1


def test_terms_follow_a_clients_own_number_of_documents() -> None:
    told = {"batch": 20, "steps": 5, "rounds": 4, "max_norm": 1.0, "delta": 1e-4, "noise_multiplier": None}
    few, many = (set_terms(units=units, target=3.0, **told) for units in (100, 1000))
    assert few.rate == 0.2
    assert many.noise_multiplier < few.noise_multiplier
    for terms in (few, many):
        assert 2.9 < terms.epsilon(4) <= 3.0 < terms.epsilon(5)
        assert 0.01 < terms.recognised(1) < terms.recognised(4) < 0.5
    assert set_terms(units=10, target=3.0, **told).rate == 1, "a batch of more than there are draws all"
    fixed = set_terms(units=100, target=None, **{**told, "noise_multiplier": 2.0})
    assert fixed.noise_multiplier == 2.0
    assert fixed.noise_over_signal(10_000, rounds=4, clients=5) == pytest.approx(2 * 100 / (20 * 10))


def test_a_ration_scales_its_noise_and_hides_its_key() -> None:
    terms = Terms(2.0, 0.5, 20, 100, 5, 1e-4)
    ration = Ration(terms, KEY)
    assert torch.equal(ration.noise(3, 50), draw_noise(KEY, 3, 50))
    assert float(Ration(Terms(3.0, 2.0, 20, 100, 5, 1e-4), KEY).noise(3, 100_000).std()) == pytest.approx(6, rel=0.02)
    assert ration.draw(1).tolist() == draw_units(KEY, 1, 0.2, 100).tolist()
    assert KEY.hex() not in repr(ration)
    assert str(KEY) not in repr(ration)
