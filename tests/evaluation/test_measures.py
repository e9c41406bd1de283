"""Measures against figures by hand and by other programs."""

import math
import random

import pytest

from fedloom.errors import DataError
from fedloom.evaluation import measures
from fedloom.evaluation.measures import bootstrap, find_answers, is_same, mean, rouge_l, share, token_f1, wilson


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # By statsmodels' proportion_confint(..., method="wilson"), and by Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_newcombes(right: int, of: int, low: float, high: float) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=5e-5)


def test_a_share_has_its_counts() -> None:
    found = share([1.0, 0.0, 1.0, 1.0])
    assert (found.value, found.right, found.of) == (0.75, 3, 4)
    assert found.interval.startswith("Wilson")
    assert found.low < 0.75 < found.high


def test_a_bootstrap_is_as_wide_as_the_normal_interval_and_the_same_each_time() -> None:
    drawn = random.Random(3)
    values = [drawn.gauss(0.5, 0.1) for _ in range(400)]
    low, high = bootstrap(values)
    middle = sum(values) / len(values)
    deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / len(values))
    assert high - low == pytest.approx(2 * 1.96 * deviation / 20, rel=0.1)
    assert bootstrap(values) == (low, high)
    found = mean(values)
    assert found.interval.startswith("bootstrap")
    assert found.low < found.value < found.high
    assert found.right is None


def test_each_group_counts_alike_in_a_mean_of_means() -> None:
    assert mean([1.0] * 90, [0.0] * 10).value == 0.5


def test_values_that_are_all_the_same_have_the_interval_of_a_share() -> None:
    """Resamples of them are all the same too: one question would have been as good as a thousand."""
    of_share, of_mean = share([0.0] * 10), mean([0.0] * 10)
    assert (of_mean.low, of_mean.high, of_mean.interval) == (of_share.low, of_share.high, of_share.interval)
    one = mean([0.4])
    assert one.low < 0.1
    assert one.high > 0.8
    both, more = mean([0.5] * 10, [0.5] * 10), mean([0.5] * 20)
    assert (both.low, both.high) == pytest.approx((more.low, more.high))
    assert mean([0.4, 0.5]).interval.startswith("bootstrap")


def test_a_group_whose_values_are_all_the_same_is_not_taken_for_certain_beside_others() -> None:
    others = [0.0, 1.0] * 200
    found, alone = mean([0.0] * 10, others), mean([0.0] * 10)
    assert found.value == 0.25
    # The few questions of the first are what nobody knows: their own interval, halved, is most of it.
    assert found.high - found.value == pytest.approx(alone.high / 2, rel=0.05)
    assert found.high > bootstrap([0.0] * 10, others)[1] + 0.1
    assert found.interval.startswith("bootstrap")


def test_the_same_but_for_white_space() -> None:
    assert is_same(" yes\n", ["no", "yes"]) == 1
    assert is_same("Yes", ["yes"]) == 0


def test_f1_is_squads() -> None:
    assert token_f1("The cat, sat!", ["a cat sat"]) == 1
    # 2 words in common of 3 and 4: 2 * 2 / 7.
    assert token_f1("black cat sat", ["one cat sat down"]) == pytest.approx(4 / 7)
    assert token_f1("", ["cat"]) == 0
    assert token_f1("dog", ["cat", "dog"]) == 1


def test_rouge_l_is_lins() -> None:
    # Lin 2004, section 3: "police killed the gunman" against two candidates, whose common subsequences have 3 and 2.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(2 / 4)
    assert rouge_l("", ["police"]) == 0
    assert rouge_l("Police!", ["the", "police"]) == 1


@pytest.mark.parametrize(
    ("pattern", "said", "found"),
    [(r"-?\d+", "it is 42, or 7", "42"), (r"is (\w+)", "it is so", "so"), (r"\d", "none", None), (r"(x)?y", "y", "")],
)
def test_a_pattern_finds_its_group_or_the_whole_match(pattern: str, said: str, found: str | None) -> None:
    assert find_answers(pattern, [said], where="task") == [found]


def test_a_pattern_is_looked_for_in_whatever_was_written() -> None:
    said = ["a\ud800b", "a\nb", "", "aéb"]
    assert find_answers("a(.)b", said, where="task") == ["\ud800", None, None, "é"]


def test_a_pattern_that_comes_to_no_end_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "SEARCH_SECONDS", 1.0)
    with pytest.raises(
        DataError, match=r"^task mine: its pattern came to no end on 1 answer within 1 seconds"
    ) as found:
        find_answers("(a+)+$", ["a" * 60 + "secret"], where="task mine")
    assert "secret" not in str(found.value)
