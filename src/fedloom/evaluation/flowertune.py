"""Rules by which FlowerTune's board lets answers be written and reads them, to repeat its numbers.

As in Flower's benchmarks/flowertune-llm/evaluation of March 2026. What is no answer at all is told apart here: the
board counts it as wrong, and of a sentiment as neutral.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

LONGEST = 512
"""Tokens of a question on sentiment with its answer."""
READABLE = ("a", "b", "c", "d", "e", "yes", "no")
"""Answers that the board knows; any other is compared as it was written."""
REPEATED = {"yesyes": "yes", "nono": "no", "yesno": "yes", "noyes": "no"}


class BoardRule(NamedTuple):
    """A rule of the board."""

    room: Callable[[int, int], int]
    """The most tokens of an answer, of the tokens of its question and of the first right answer."""
    read: Callable[[str, str], tuple[bool, bool]]
    """Judgement on what was written, by what is right: right or not, and an answer at all or not."""


def _room_of_gold(prompt: int, gold: int) -> int:
    return gold


def _room_of_sentiment(prompt: int, gold: int) -> int:
    return LONGEST - prompt


def _cleaned(said: str) -> str:
    """Return what was written with letters and digits alone, from where it first has a heading on."""
    parts = said.split("\n##")
    text = parts[1].split("\n")[0].strip() if len(parts) > 1 else said
    return " ".join(re.sub(r"[^a-zA-Z0-9]", " ", text).split())


def _read_letter(said: str, right: str) -> tuple[bool, bool]:
    written = said.lower()
    found = _cleaned(written)[:1]
    known = found in READABLE
    return (found if known else written) == right.lower(), known


def _read_boolean(said: str, right: str) -> tuple[bool, bool]:
    written = said.lower()
    found = _cleaned(written)
    twice = next((both for both in REPEATED if both in found), None)
    if twice:
        found = found.replace(twice, REPEATED[twice])
    known = found in READABLE
    # What the board has no word for is right as it stands: maybe.
    return (found if known else written) == right.lower(), known or found == "maybe"


def _read_sentiment(said: str, right: str) -> tuple[bool, bool]:
    written = said.split("Answer: ")[0]

    def has(word: str) -> bool:
        return word in written or word.capitalize() in written

    found = next((word for word in ("positive", "negative") if has(word)), "neutral")
    return found == right, found != "neutral" or has("neutral")


BOARD_RULES: Mapping[str, BoardRule] = {
    "flowertune-letter": BoardRule(_room_of_gold, _read_letter),
    "flowertune-boolean": BoardRule(_room_of_gold, _read_boolean),
    "flowertune-sentiment": BoardRule(_room_of_sentiment, _read_sentiment),
}
"""Rules by the name that a task has for them in `rule`."""


def count_board(said: Sequence[str], right: Sequence[str], rule: str) -> tuple[list[float], list[float]]:
    """Return for each answer whether the board takes it for right, and whether it is none at all, as 0 or 1."""
    read = [BOARD_RULES[rule].read(*pair) for pair in zip(said, right, strict=True)]
    return [float(good) for good, _ in read], [float(not known) for _, known in read]
