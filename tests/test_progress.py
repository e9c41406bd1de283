"""Speed and time left."""

from fedloom.progress import Clock, Progress


class Hands:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_time_left_needs_every_phase_to_have_been_seen() -> None:
    hands = Hands()
    clock = Clock({"train": 1000, "evaluate": 200}, now=hands)
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


def test_what_was_done_before_is_not_left_and_says_nothing_of_the_pace() -> None:
    hands = Hands()
    clock = Clock({"train": 1000, "evaluate": 0}, now=hands)
    clock.skip({"train": 800, "evaluate": 0})
    assert clock.seconds_left() is None
    hands.time = 10.0
    clock.tick(Progress("train", 100))
    assert clock.seconds_left() == 10


def test_more_work_than_planned_leaves_no_negative_time() -> None:
    hands = Hands()
    clock = Clock({"train": 10, "evaluate": 0}, now=hands)
    hands.time = 1.0
    clock.tick(Progress("train", 100))
    assert clock.seconds_left() == 0
