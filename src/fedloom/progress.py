"""What a long job says while it works, and how much of it is left. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Progress:
    """One optimizer step of a client, or one evaluated batch, of so many real tokens and sequences."""

    phase: Phase
    tokens: int
    samples: int = 1
    round: int | None = None
    client: int | None = None


Watch = Callable[[Progress], None]
"""A function that is called after every step and batch; it may raise, where the work is to end."""
Say = Callable[[str, str], object]
"""A function that tells people what is done now: a word, and what there is to say of it."""


def ignore(progress: Progress) -> None:
    """Watch nothing."""


def say_nothing(what: str, detail: str) -> None:
    """Tell nobody."""


@dataclass
class Clock:
    """Tokens a second and time left, from what was done so far and the tokens that the whole run has."""

    total: dict[Phase, int]
    now: Callable[[], float] = time.perf_counter
    done: dict[Phase, int] = field(default_factory=lambda: {"train": 0, "evaluate": 0})
    seconds: dict[Phase, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0})

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Work begins now."""
        self._last = self.now()

    def tick(self, progress: Progress) -> None:
        """The time since the last tick was spent on this."""
        now = self.now()
        self.seconds[progress.phase] += now - self._last
        self.done[progress.phase] += progress.tokens
        self._last = now

    def tokens_per_second(self, phase: Phase) -> float | None:
        return self.done[phase] / self.seconds[phase] if self.seconds[phase] and self.done[phase] else None

    def seconds_left(self) -> float | None:
        """None until every phase that is to come has been seen."""
        left = 0.0
        for phase, total in self.total.items():
            remaining = max(0, total - self.done[phase])
            rate = self.tokens_per_second(phase)
            if remaining and rate is None:
                return None
            left += remaining / rate if rate else 0.0
        return left
