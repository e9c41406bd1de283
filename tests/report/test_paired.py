"""Paired differences against scipy, and against every combination of signs counted by hand."""

import math

import pytest
from scipy import stats

from fedloom.report.paired import compare_pairs, least_flipped_p, t_quantile, t_within

DIFFERENCES = [
    [-0.012, -0.010, -0.015],
    [0.3, -0.2],
    [0.01, -0.02, 0.03, 0.004, -0.011, 0.02, 0.008],
    [1.0, 1.1, 0.9, 1.2, 0.95, 1.05, 1.0, 1.1],
]


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 47])
def test_students_t_is_scipys(freedom: int) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)
    for t in (0.0, 0.3, 2.0, 40.0):
        assert 1 - t_within(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-9)


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_a_paired_comparison_is_scipys(differences: list[float]) -> None:
    found = compare_pairs(differences)
    theirs = stats.ttest_1samp(differences, 0.0)
    low, high = theirs.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, low, high), rel=1e-6)
    flipped = stats.permutation_test(
        (differences, [0.0] * len(differences)),
        lambda one, other: sum(one) - sum(other),
        permutation_type="samples",
        n_resamples=math.inf,
    )
    assert found.flipped_p == pytest.approx(flipped.pvalue)
    assert found.is_seen == (theirs.pvalue < 0.05)


def test_what_few_pairs_can_not_say() -> None:
    assert compare_pairs([0.5]).p is None
    assert not compare_pairs([0.5]).is_seen
    for pairs in (2, 3, 5, 6):
        assert compare_pairs([1.0 + number / 100 for number in range(pairs)]).flipped_p == least_flipped_p(pairs)
    assert least_flipped_p(5) > 0.05 > least_flipped_p(6)


def test_differences_that_are_all_alike_have_an_end() -> None:
    same, nothing = compare_pairs([-0.25, -0.25, -0.25]), compare_pairs([0.0, 0.0])
    assert (same.is_seen, same.p, same.low) == (True, pytest.approx(0.0), -0.25)
    assert (nothing.is_seen, nothing.p, nothing.flipped_p) == (False, 1.0, 1.0)
    assert compare_pairs([0.1] * 40).flipped_p is None
