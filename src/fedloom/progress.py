"""Progress of long jobs: reports of finished steps, and the time that is left. No torch here."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Phase = Literal["train", "evaluate", "ask"]
"""Kinds of work: training, scoring held-out text, and asking the questions of tasks."""
StageName = Literal["rounds", "baselines", "personalise", "contributions", "tasks", "answers"]


@dataclass(frozen=True)
class Progress:
    """One finished piece of work: an optimizer step of a client, an evaluated batch, or one of questions.

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


def as_questions(watch: Watch) -> Watch:
    """Return a function that tells `watch` of work as that of asking questions."""
    return lambda progress: watch(replace(progress, phase="ask"))


def say_nothing(what: str, detail: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Stage:
    """A part of a run, by its name: the rounds, or one of what follows them. Its work is counted before it begins."""

    name: StageName
    steps: int
    train: int
    """Tokens to train on."""
    evaluate: int
    """Tokens to score."""

    def part(self, share: float, evaluated: float | None = None) -> Stage:
        """Return the stage with a share of its work, and another share of what it scores where `evaluated` says so."""
        scored = share if evaluated is None else evaluated
        steps, train, evaluate = round(self.steps * share), round(self.train * share), round(self.evaluate * scored)
        return replace(self, steps=steps, train=train, evaluate=evaluate)

    def without(self, done: Stage) -> Stage:
        """Return what is left of the stage after work that is done."""
        left = (self.steps - done.steps, self.train - done.train, self.evaluate - done.evaluate)
        steps, train, evaluate = (max(0, number) for number in left)
        return replace(self, steps=steps, train=train, evaluate=evaluate)

    def tokens(self, phase: Phase) -> int:
        """Return how many tokens the stage has in a phase. Those of questions are not counted before they are asked."""
        return {"train": self.train, "evaluate": self.evaluate, "ask": 0}[phase]


def add_stages(name: StageName, stages: Sequence[Stage]) -> Stage:
    """Return the stages of several runs that pass through them together, as one."""
    steps, train, evaluate = (sum(getattr(one, what) for one in stages) for what in ("steps", "train", "evaluate"))
    return Stage(name, steps, train, evaluate)


class Clock:
    """Pace and time left of work in stages, computed from what is done so far and from what they are said to have."""

    def __init__(self, stages: Sequence[Stage] = (), now: Callable[[], float] = time.perf_counter) -> None:
        self._coming, self._now = [*stages], now
        self._stage: Stage | None = None
        self.steps = 0
        """Steps that are done, of this process and of those before it."""
        self._steps_before = 0
        self._done: Counter[Phase] = Counter()
        """Tokens that are done of the stage."""
        self._tokens: Counter[Phase] = Counter()
        self._seconds: dict[Phase, float] = defaultdict(float)
        self.start()

    def start(self) -> None:
        """Start timing, or start again after a wait that was no work: the next step's time counts from here."""
        self._last = self._now()

    def begin(self, name: StageName, share: float = 1.0) -> None:
        """Begin the next stage of that name, of which a share is left to do. What was to come before it is left out.

        One that was not counted before has an unknown end.
        """
        places = [place for place, stage in enumerate(self._coming) if stage.name == name]
        self._stage = self._coming[places[0]].part(share) if places else None
        self._coming = self._coming[places[0] + 1 :] if places else self._coming
        self._steps_before = self.steps
        self._done.clear()

    def expect(self, here: Stage, *coming: Stage) -> None:
        """Take other work as what is left: of the stage that is under way, and of those to come after it."""
        self._stage, self._coming = here, [*coming]
        self._steps_before = self.steps
        self._done.clear()

    def skip(self, done: Stage) -> None:
        """Count work of the stage as done before, in no time of this clock's."""
        self.steps += done.steps
        self._done.update(train=done.train, evaluate=done.evaluate)

    def tick(self, progress: Progress) -> None:
        """Add the time since the last tick, or since `start`, to the phase of this piece of work."""
        now = self._now()
        self._seconds[progress.phase] += now - self._last
        self._tokens[progress.phase] += progress.tokens
        self._done[progress.phase] += progress.tokens
        self.steps += progress.phase == "train"
        self._last = now

    @property
    def total_steps(self) -> int | None:
        """Steps of all stages together; None while one of an unknown end is under way."""
        if self._stage is None:
            return None
        here = max(self._stage.steps, self.steps - self._steps_before)
        return self._steps_before + here + sum(stage.steps for stage in self._coming)

    def tokens_per_second(self, phase: Phase) -> float | None:
        """Return a phase's mean rate so far; None until it has done work."""
        return self._tokens[phase] / self._seconds[phase] if self._seconds[phase] and self._tokens[phase] else None

    def seconds_left(self) -> float | None:
        """Return the seconds that the stages will still take; None while a phase with work left has no rate yet."""
        if self._stage is None:
            return None
        left = 0.0
        for phase in get_args(Phase):
            remaining = max(0, self._stage.tokens(phase) - self._done[phase])
            remaining += sum(stage.tokens(phase) for stage in self._coming)
            rate = self.tokens_per_second(phase)
            if remaining and rate is None:
                return None
            left += remaining / rate if rate else 0.0
        return left
