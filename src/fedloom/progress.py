"""Progress of long jobs: reports of finished steps, and the time that is left. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Progress:
    """One finished piece of work: an optimizer step of a client, or an evaluated batch.

    `tokens` leaves padding out; `samples` counts sequences.
    """

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
    """Do nothing with a report of progress."""


def say_nothing(what: str, detail: str) -> None:
    """Tell nobody."""


@dataclass
class Clock:
    """Tokens a second and time left, computed from the work done so far and from the tokens of the whole run."""

    total: dict[Phase, int]
    """Tokens that the whole run has in each phase."""
    now: Callable[[], float] = time.perf_counter
    past: dict[Phase, int] = field(default_factory=lambda: {"train": 0, "evaluate": 0})
    """Tokens that were done before this clock began, which say nothing of its pace."""
    done: dict[Phase, int] = field(default_factory=lambda: {"train": 0, "evaluate": 0})
    seconds: dict[Phase, float] = field(default_factory=lambda: {"train": 0.0, "evaluate": 0.0})

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start timing: the first step's time counts from here."""
        self._last = self.now()

    def skip(self, tokens: Mapping[Phase, int]) -> None:
        """Count tokens as done before, in no time of this clock's."""
        for phase, number in tokens.items():
            self.past[phase] += number

    def tick(self, progress: Progress) -> None:
        """Add the time since the last tick, or since `start`, to the phase of this piece of work."""
        now = self.now()
        self.seconds[progress.phase] += now - self._last
        self.done[progress.phase] += progress.tokens
        self._last = now

    def tokens_per_second(self, phase: Phase) -> float | None:
        """Return a phase's mean rate so far; None until it has done work."""
        return self.done[phase] / self.seconds[phase] if self.seconds[phase] and self.done[phase] else None

    def seconds_left(self) -> float | None:
        """Return the seconds that the rest of the run will take; None while a phase with work left has no rate yet."""
        left = 0.0
        for phase, total in self.total.items():
            remaining = max(0, total - self.past[phase] - self.done[phase])
            rate = self.tokens_per_second(phase)
            if remaining and rate is None:
                return None
            left += remaining / rate if rate else 0.0
        return left
