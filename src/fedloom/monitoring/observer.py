"""Observers of a run: people, files, trackers. They are told what happens, and can end a run after a round.

No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedloom.errors import FedloomError
from fedloom.host.signals import Terminated
from fedloom.progress import Progress, Stage, StageName

if TYPE_CHECKING:
    from fedloom.records.plan import Plan
    from fedloom.records.run import RoundRecord, Run


class Observer:
    """Someone who is told of a run while it works. This one does nothing: override what is wanted.

    What a method raises ends the run: an observer that the run can do without handles its own errors.
    """

    def show_step(self, what: str, detail: str) -> None:
        """Hear what is done now, outside of training: a word, and what there is to say of it."""

    def show_plan(self, plan: Plan) -> None:
        """Hear what the run will load and need."""

    def show_folder(self, folder: Path) -> None:
        """Hear that the rounds begin, and in which run directory."""

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        """Hear that the next stage of that name begins, of which a share is left to do."""

    def show_past(self, plan: Plan, records: Sequence[RoundRecord]) -> None:
        """Hear which rounds a run has on record as it goes on; none where it begins."""

    def watch(self, progress: Progress) -> None:
        """Hear of one optimizer step, or of one evaluated batch. It is called often, in the middle of training."""

    def check(self) -> None:
        """End the run here where that is wanted, by what this raises. It is called while the run waits for others."""

    def show_round(self, record: RoundRecord) -> None:
        """Hear of a complete round, which is on record and can't be lost any more."""

    def stop_after(self, record: RoundRecord) -> str | None:
        """Return why the run should end after this round, or None.

        A run that was stopped and goes on asks first about the rounds that it has, in their order.
        """
        return None

    def show_clients(self, phases: Mapping[str, str]) -> None:
        """Hear what each client of a deployment is doing, by name."""

    def show_wait(self) -> None:
        """Hear that nobody works, as all clients that are waited for are away; it is called as long as they are."""

    def show_end(self, run: Run, report: Path) -> None:
        """Hear that the run is done."""

    def show_failure(self, state: Literal["failed", "interrupted"], why: str) -> None:
        """Hear that the run ended before its end, and why."""

    def show_next(self, folder: Path | None) -> None:
        """Hear that a service begins with a run, in which run directory, or that it has none to begin with."""

    def show_queue(self, runs: Sequence[Mapping[str, Any]]) -> None:
        """Hear of the runs that a service has had, has and will have: a record of each, by number."""

    def show_sweep(self, stages: Sequence[Stage]) -> None:
        """Hear that a sweep begins, and which stages it has, in their order: those of one pass after another."""

    def show_left(self, stages: Sequence[Stage]) -> None:
        """Hear that less is left than was planned: what of the stage under way, and of each that is to come."""

    def show_pass(self, names: Sequence[str], plans: Sequence[Plan]) -> None:
        """Hear which runs of a sweep train together now."""

    def show_trial(self, name: str, record: RoundRecord) -> None:
        """Hear of a complete round of one of them."""

    def show_sweep_end(self, ranked: Sequence[tuple[str, float, float, int]], folder: Path) -> None:
        """Hear how the runs of a sweep did, the best first: name, best and last loss, best round."""

    def close(self) -> None:
        """Hear that nothing more comes, however the run ended."""


class Observers(Observer):
    """Several observers as one: each is told everything, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def show_step(self, what: str, detail: str) -> None:
        for observer in self._observers:
            observer.show_step(what, detail)

    def show_plan(self, plan: Plan) -> None:
        for observer in self._observers:
            observer.show_plan(plan)

    def show_folder(self, folder: Path) -> None:
        for observer in self._observers:
            observer.show_folder(folder)

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        for observer in self._observers:
            observer.show_stage(name, share)

    def show_past(self, plan: Plan, records: Sequence[RoundRecord]) -> None:
        for observer in self._observers:
            observer.show_past(plan, records)

    def watch(self, progress: Progress) -> None:
        for observer in self._observers:
            observer.watch(progress)

    def check(self) -> None:
        for observer in self._observers:
            observer.check()

    def show_round(self, record: RoundRecord) -> None:
        for observer in self._observers:
            observer.show_round(record)

    def stop_after(self, record: RoundRecord) -> str | None:
        """Return the first reason that an observer has to end the run."""
        reasons = [observer.stop_after(record) for observer in self._observers]
        return next(filter(None, reasons), None)

    def show_clients(self, phases: Mapping[str, str]) -> None:
        for observer in self._observers:
            observer.show_clients(phases)

    def show_wait(self) -> None:
        for observer in self._observers:
            observer.show_wait()

    def show_end(self, run: Run, report: Path) -> None:
        for observer in self._observers:
            observer.show_end(run, report)

    def show_failure(self, state: Literal["failed", "interrupted"], why: str) -> None:
        for observer in self._observers:
            observer.show_failure(state, why)

    def show_next(self, folder: Path | None) -> None:
        for observer in self._observers:
            observer.show_next(folder)

    def show_queue(self, runs: Sequence[Mapping[str, Any]]) -> None:
        for observer in self._observers:
            observer.show_queue(runs)

    def show_sweep(self, stages: Sequence[Stage]) -> None:
        for observer in self._observers:
            observer.show_sweep(stages)

    def show_left(self, stages: Sequence[Stage]) -> None:
        for observer in self._observers:
            observer.show_left(stages)

    def show_pass(self, names: Sequence[str], plans: Sequence[Plan]) -> None:
        for observer in self._observers:
            observer.show_pass(names, plans)

    def show_trial(self, name: str, record: RoundRecord) -> None:
        for observer in self._observers:
            observer.show_trial(name, record)

    def show_sweep_end(self, ranked: Sequence[tuple[str, float, float, int]], folder: Path) -> None:
        for observer in self._observers:
            observer.show_sweep_end(ranked, folder)

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, the last first, whatever another raises
            for observer in self._observers:
                stack.callback(observer.close)


def describe_end(error: BaseException) -> tuple[Literal["failed", "interrupted"], str]:
    """Return how a run ended that an error ended, and why, as the run's status has it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"
    return "failed", str(error) if isinstance(error, FedloomError) else f"bug: {type(error).__name__}"
