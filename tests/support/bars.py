"""What a progress bar says of a run or a sweep, stage by stage."""

from collections import Counter
from collections.abc import Sequence

from fedloom.monitoring.observer import Observer
from fedloom.progress import Clock, Progress, Stage, StageName
from fedloom.records.plan import Plan
from fedloom.records.run import RoundRecord


class Bar(Observer):
    """An observer that keeps the total of steps as each stage began, and the tokens that it was to score and did."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.totals: dict[StageName, int | None] = {}
        self.planned: dict[StageName, int] = {}
        self.scored: Counter[StageName] = Counter()
        self._stage: StageName = "rounds"

    @property
    def steps(self) -> int:
        return self.clock.steps

    def show_plan(self, plan: Plan) -> None:
        self.clock = Clock(plan.stages)

    def show_sweep(self, stages: Sequence[Stage]) -> None:
        self.clock = Clock(stages)

    def show_left(self, stages: Sequence[Stage]) -> None:
        self.clock.expect(*stages)

    def show_past(self, plan: Plan, records: Sequence[RoundRecord]) -> None:
        self.clock.skip(plan.done_of(records))

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        self.clock.begin(name, share)
        self.totals[name] = self.clock.total_steps
        self.planned[name] = self.clock._stage.evaluate if self.clock._stage else 0
        self._stage = name

    def watch(self, progress: Progress) -> None:
        self.clock.tick(progress)
        self.scored[self._stage] += progress.tokens * (progress.phase == "evaluate")
