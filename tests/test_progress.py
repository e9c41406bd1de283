"""Speed, steps and time left."""

import pytest

from fedloom.progress import Clock, Progress, Stage, as_questions


class Hands:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def begin(*stages: Stage) -> tuple[Clock, Hands]:
    """A clock whose first stage has begun."""
    hands = Hands()
    clock = Clock(stages, now=hands)
    clock.begin(stages[0].name)
    return clock, hands


def test_time_left_needs_every_phase_to_have_been_seen() -> None:
    clock, hands = begin(Stage("rounds", 10, 1000, 200))
    assert clock.seconds_left() is None
    hands.time = 2.0
    clock.tick(Progress("evaluate", 100))
    assert clock.tokens_per_second("evaluate") == 50
    assert clock.seconds_left() is None
    hands.time = 12.0
    clock.tick(Progress("train", 100))
    assert clock.tokens_per_second("train") == 10
    assert clock.seconds_left() == 900 / 10 + 100 / 50
    hands.time = 14.0
    clock.tick(Progress("evaluate", 100))
    assert clock.seconds_left() == 90
    assert (clock.steps, clock.total_steps) == (1, 10)


def test_what_was_done_before_is_not_left_and_says_nothing_of_the_pace() -> None:
    clock, hands = begin(Stage("rounds", 10, 1000, 0))
    clock.skip(Stage("rounds", 8, 800, 0))
    assert clock.seconds_left() is None
    hands.time = 10.0
    clock.tick(Progress("train", 100))
    assert clock.seconds_left() == 10
    assert (clock.steps, clock.total_steps) == (9, 10)


def test_more_work_than_planned_leaves_no_negative_time() -> None:
    clock, hands = begin(Stage("rounds", 1, 10, 0), Stage("baselines", 5, 100, 0))
    for seconds in (1.0, 2.0):
        hands.time = seconds
        clock.tick(Progress("train", 100))
    assert clock.seconds_left() == 1.0, "that of the baselines"
    assert (clock.steps, clock.total_steps) == (2, 7)


def test_what_a_stage_did_not_do_is_not_done_in_the_next_one() -> None:
    """Rounds that stop early; an earlier process did half of the contributions."""
    clock, hands = begin(
        Stage("rounds", 10, 1000, 0), Stage("baselines", 10, 1000, 0), Stage("contributions", 4, 400, 0)
    )
    hands.time = 1.0
    clock.tick(Progress("train", 100))
    assert (clock.seconds_left(), clock.total_steps) == (23, 24)
    clock.begin("contributions", 0.5)
    assert (clock.seconds_left(), clock.total_steps) == (2, 3)


def test_less_work_than_was_planned_takes_less_time_at_the_rate_so_far() -> None:
    clock, hands = begin(Stage("rounds", 10, 1000, 0), Stage("baselines", 10, 1000, 0))
    hands.time = 2.0
    clock.tick(Progress("train", 100))
    clock.expect(Stage("rounds", 2, 200, 0), Stage("baselines", 3, 300, 0))
    assert (clock.seconds_left(), clock.total_steps) == (10, 6)
    clock.tick(Progress("train", 100))
    assert clock.total_steps == 6
    clock.begin("baselines")
    assert (clock.seconds_left(), clock.total_steps) == (3, 5)


def test_each_run_of_a_pass_has_a_stage_of_a_name() -> None:
    clock, _ = begin(Stage("rounds", 1, 10, 0), *[Stage("personalise", steps, 10, 0) for steps in (2, 3)])
    for total in (5, 3):
        clock.begin("personalise")
        assert clock.total_steps == total


def test_a_stage_that_was_not_counted_has_no_end() -> None:
    clock, hands = begin(Stage("rounds", 1, 10, 0))
    hands.time = 1.0
    clock.tick(Progress("train", 10))
    clock.begin("personalise")
    clock.tick(Progress("train", 10))
    assert clock.seconds_left() is clock.total_steps is None
    assert clock.steps == 2


def test_questions_leave_the_pace_of_evaluation_alone() -> None:
    clock, hands = begin(Stage("rounds", 0, 0, 200))
    hands.time = 1.0
    clock.tick(Progress("evaluate", 100))
    hands.time = 100.0
    as_questions(clock.tick)(Progress("evaluate", 5))
    assert clock.seconds_left() == pytest.approx(1.0)
    assert clock.tokens_per_second("ask") == pytest.approx(5 / 99)
