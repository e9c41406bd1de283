"""Statistics of an audit: against counting, published intervals and chance, and the three words."""

import numpy as np
import pytest

from fedloom.audit.statistics import (
    NO,
    TOO_FEW,
    YES,
    Interval,
    auc,
    chance_of,
    judge_membership,
    measure_auc,
    measure_recognised,
    measure_share,
)


def test_an_auc_counts_pairs_and_halves_ties() -> None:
    drawn = np.random.default_rng(0)
    inside, outside = drawn.integers(0, 5, 30), drawn.integers(0, 6, 20)
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert auc(inside, outside) == pytest.approx(np.mean(pairs))
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1
    assert auc([1.0], [1.0]) == 0.5


def test_the_error_of_an_auc_is_hanleys_and_mcneils() -> None:
    # Theirs of 51 abnormal and 58 normal cases at an AUC of 0.893: 0.032 (1982, page 33).
    inside = np.array([52] * 40 + [51] * 11) - 0.5
    found = measure_auc(inside, np.arange(58.0))
    assert found.value == pytest.approx(0.893, abs=5e-4)
    assert (found.value - found.low) / 1.96 == pytest.approx(0.032, abs=6e-4)


@pytest.mark.parametrize(
    ("some", "of", "low", "high"),
    # SciPy's quantiles of the beta distribution.
    [(0, 300, 0.0, 0.012221), (9, 12, 0.428142, 0.945139), (12, 12, 0.735351, 1.0), (1, 20, 0.001265, 0.248733)],
)
def test_the_interval_of_a_share_is_exact(some: int, of: int, low: float, high: float) -> None:
    found = measure_share(some, of)
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-6), pytest.approx(high, abs=2e-6))


def test_three_words() -> None:
    assert Interval(0.9, 0.7, 1.0).judge(0.6) == YES
    assert Interval(0.5, 0.45, 0.55).judge(0.6) == NO
    assert Interval(0.7, 0.5, 0.9).judge(0.6) == TOO_FEW


def judged(inside: np.ndarray, outside: np.ndarray) -> str:
    return judge_membership(measure_auc(inside, outside), measure_recognised(inside, outside)[0], len(outside))


def test_a_few_that_are_told_apart_are_a_yes_and_fewer_are_not() -> None:
    assert judged(np.arange(4.0) + 10, np.arange(4.0)) == YES
    assert judged(np.arange(2.0) + 10, np.arange(2.0)) == TOO_FEW


@pytest.mark.parametrize("number", [6, 12, 30, 100])
def test_scores_that_tell_nothing_are_no_leak(number: int) -> None:
    drawn = np.random.default_rng(number)
    words = [judged(drawn.normal(size=number), drawn.normal(size=number)) for _ in range(200)]
    assert words.count(YES) <= 2, "of 200"


def test_no_takes_hundreds() -> None:
    drawn = np.random.default_rng(0)
    words = [judged(drawn.normal(size=300), drawn.normal(size=400)) for _ in range(60)]
    assert words.count(NO) > 48
    assert words.count(YES) <= 1
    assert judged(drawn.normal(size=30), drawn.normal(size=30)) == TOO_FEW


def test_one_document_in_ten_that_is_recognised_is_a_leak_although_the_others_are_not() -> None:
    drawn = np.random.default_rng(0)
    inside, outside = drawn.normal(size=200), drawn.normal(size=300)
    assert judged(inside, outside) != YES
    inside[:30] = 9
    found, alarms = measure_recognised(inside, outside)
    assert (found.value >= 0.15, alarms) == (True, 0.01)
    assert judged(inside, outside) == YES


def test_the_chance_of_an_auc_is_that_of_drawing_it() -> None:
    drawn = np.random.default_rng(0)
    found = [chance_of(drawn.normal(size=8), drawn.normal(size=100)) for _ in range(2000)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.015)
    assert chance_of(np.arange(4.0) + 200, np.arange(100.0)) < 0.001


@pytest.mark.long
def test_of_a_dozen_clients_none_is_told_apart_by_chance() -> None:
    """Each at 95 % by itself, one in seven such audits called a leak where there was none."""
    generator = np.random.default_rng(0)

    def leaks(clients: int) -> bool:
        outside = generator.normal(size=100)
        scores = [generator.normal(size=4) for _ in range(12)]
        return any(
            judge_membership(
                measure_auc(inside, outside, clients), measure_recognised(inside, outside, clients)[0], len(outside)
            )
            == YES
            for inside in scores
        )

    assert sum(leaks(12) for _ in range(300)) <= 0.05 * 300
    assert sum(leaks(1) for _ in range(300)) > 0.05 * 300
