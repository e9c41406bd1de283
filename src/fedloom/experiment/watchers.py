"""Everybody who watches a run, opened and closed together: people, files, trackers, the meter, and signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from fedloom.errors import RunError
from fedloom.host.signals import Interruption
from fedloom.monitoring.observer import Observer, Observers
from fedloom.monitoring.status import status_file
from fedloom.monitoring.telemetry import Telemetry
from fedloom.progress import Progress
from fedloom.records.run import RoundRecord
from fedloom.report.run_report import write_report


class Interruptible(Observers):
    """Observers of work that a signal may end after a step."""

    def __init__(self, observers: Sequence[Observer], interruption: Interruption) -> None:
        super().__init__(*observers)
        self._interruption = interruption

    def watch(self, progress: Progress) -> None:
        """Tell everybody of a step; end the run after it if a signal came."""
        super().watch(progress)
        self.check()

    def check(self) -> None:
        """End the run here, if a signal came.

        Raises:
            KeyboardInterrupt
        """
        super().check()
        self._interruption.check()


class OfOneRun(Observers):
    """Observers that are told of one run of several: its name stands before what is said."""

    def __init__(self, name: str, *observers: Observer) -> None:
        super().__init__(*observers)
        self._name = name

    def show_step(self, what: str, detail: str) -> None:
        super().show_step(what, f"{self._name}: {detail}")


class ToldOnce(Observers):
    """Observers that are told a thing once which is said of several runs alike."""

    def __init__(self, *observers: Observer) -> None:
        super().__init__(*observers)
        self._told: set[tuple[str, str]] = set()

    def show_step(self, what: str, detail: str) -> None:
        if (what, detail) not in self._told:
            self._told.add((what, detail))
            super().show_step(what, detail)


class Watchers(Interruptible):
    """The observers of a run, its telemetry, and the signals that may end it."""

    def __init__(self, observers: Sequence[Observer], telemetry: Telemetry, interruption: Interruption) -> None:
        super().__init__([*observers, telemetry], interruption)
        self.telemetry = telemetry


class ReportWriter(Observer):
    """An observer that writes the report after every round."""

    def __init__(self, folder: Path, others: Observer) -> None:
        self._folder, self._others = folder, others

    def show_round(self, record: RoundRecord) -> None:
        """Write the report; the run can do without it, and goes on if that fails."""
        try:
            write_report(self._folder)
        except RunError as error:
            self._others.show_step("report", str(error))


@contextmanager
def open_watchers(
    folder: Path, command: str, observers: Sequence[Observer], *, gpu: bool, report: bool
) -> Iterator[Watchers]:
    """Watch a run with these observers, and with its status file, signals and telemetry, until the block ends.

    The first of the observers is told what the others have to say of themselves.
    """
    with ExitStack() as stack:
        file = stack.enter_context(status_file(folder, command))
        writers = [ReportWriter(folder, observers[0])] if report else []
        everyone = [observers[0], file, *observers[1:], *writers]
        telemetry = stack.enter_context(Telemetry(gpu=gpu))
        interruption = stack.enter_context(Interruption(partial(Observers(*everyone).show_step, "stopping")))
        watchers = Watchers(everyone, telemetry, interruption)
        stack.callback(watchers.close)
        yield watchers
