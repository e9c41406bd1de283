"""The status of a run that is at work, for `fedloom status` and `fedloom stop` in another terminal. No torch here.

It stands in a file of a folder that is this person's alone, beside another that it holds locked: the lock ends with
the process, however that ends. Runs are found by their folders, which need not be there yet.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from os.path import isfile
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.host.files import LOCK, Lock, hash_text, is_held, read_holder, replace_file
from fedloom.monitoring.display import DOING, STAGES, format_round, is_working, round_header
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.standing import count_done, describe_run, describe_sweep, is_sweep_done
from fedloom.progress import Clock, Phase, Progress, Stage, StageName
from fedloom.records.plan import Plan
from fedloom.records.run import RoundRecord, Run, read_run
from fedloom.records.sweep_folder import is_sweep, list_runs
from fedloom.records.writer import now
from fedloom.text import format_seconds, quote_path

TELL_SECONDS = 1.0
"""Seconds between two writings of progress."""
LOOK_SECONDS = 0.1
ROUNDS_SHOWN = 10


@dataclass(frozen=True)
class Work:
    """A process at work, as it told last."""

    process: int
    command: str
    since: str
    doing: str = "starting"
    round: int | None = None
    rounds: int | None = None
    seconds_left: float | None = None
    clients: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """A deployment's clients by name: what each is doing, and since when (seconds of this machine's clock)."""


class StatusFile(Observer):
    """An observer that keeps a file up to date for as long as the run works; without a file, it does nothing."""

    def __init__(self, command: str, file: Path | None) -> None:
        self._file = file
        self._work = Work(os.getpid(), command, now())
        self._clock = Clock()
        self._stage: StageName = "rounds"
        self._told = 0.0
        self._tell()

    @property
    def work(self) -> Work:
        """Work as it was told last."""
        return self._work

    def show_step(self, what: str, detail: str) -> None:
        self._tell(doing=f"{what}: {detail}")

    def show_plan(self, plan: Plan) -> None:
        self._clock = Clock(plan.stages)
        self._tell(rounds=plan.rounds)

    def show_folder(self, folder: Path) -> None:
        self._clock.start()

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        self._clock.begin(name, share)
        self._stage = name
        self._tell(seconds_left=self._clock.seconds_left(), doing=STAGES.get(name, "rounds"))

    def show_past(self, plan: Plan, records: Sequence[RoundRecord]) -> None:
        self._clock.skip(plan.done_of(records))

    def show_sweep(self, stages: Sequence[Stage]) -> None:
        self._clock = Clock(stages)

    def show_left(self, stages: Sequence[Stage]) -> None:
        self._clock.expect(*stages)

    def show_pass(self, names: Sequence[str], plans: Sequence[Plan]) -> None:
        self._clock.start()

    def show_next(self, folder: Path | None) -> None:
        self._clock = Clock()
        doing = "starting" if folder else "waiting for a run"
        self._tell(doing=doing, round=None, rounds=None, seconds_left=None, clients={})

    def show_clients(self, phases: Mapping[str, str]) -> None:
        known, at = self._work.clients, time.time()
        same = {name for name, phase in phases.items() if name in known and known[name][0] == phase}
        doing = {"doing": self._doing("train" if "training" in phases.values() else "evaluate")}
        self._tell(
            clients={name: known[name] if name in same else (phases[name], at) for name in phases},
            **(doing if is_working(phases.values()) else {}),
        )

    def watch(self, progress: Progress) -> None:
        self._clock.tick(progress)
        if time.monotonic() - self._told > TELL_SECONDS:
            told: dict[str, Any] = {"seconds_left": self._clock.seconds_left() if progress.phase != "ask" else None}
            if self._stage == "rounds" and progress.round:
                told["round"] = progress.round
            if not is_working(phase for phase, _ in self._work.clients.values()):
                told["doing"] = self._doing(progress.phase)
            self._tell(**told)

    def show_round(self, record: RoundRecord) -> None:
        self._tell(round=record["round"], seconds_left=self._clock.seconds_left())

    def show_wait(self) -> None:
        self._clock.start()

    def show_end(self, run: Run, report: Path) -> None:
        self._tell(doing="done", seconds_left=0.0)

    def _doing(self, phase: Phase) -> str:
        return DOING[phase] if self._stage == "rounds" else f"{STAGES[self._stage]}: {DOING[phase]}"

    def _tell(self, **changed: Any) -> None:
        self._told = time.monotonic()
        self._work = replace(self._work, **changed)
        if self._file:
            with suppress(OSError):  # a run can do without
                replace_file(self._file, json.dumps(asdict(self._work)).encode())


_OPEN: dict[Path, StatusFile] = {}
"""Status files that this process keeps: a command opens one before it imports, and what it calls goes on with it."""


@contextmanager
def status_file(run: Path, command: str) -> Iterator[StatusFile]:
    """Keep a status file of a run for whoever asks for it in another terminal; it is gone afterwards."""
    file = _file_of(run)
    if file in _OPEN:
        yield _OPEN[file]
        return
    try:
        lock = Lock(file.with_suffix(".lock"), 0o600) if file else None
    except OSError:  # another one is at work in it, which the run directory's own lock refuses
        file = lock = None
    status = StatusFile(command, file)
    try:
        if file:
            _OPEN[file] = status
        yield status
    finally:
        if file and lock:
            del _OPEN[file]
            for path in (file, file.with_suffix(".lock")):
                path.unlink(missing_ok=True)
            lock.close()


def find_work(run: Path) -> Work | None:
    """Return what the process at work in a run told last; None where there is none on this machine."""
    file = _file_of(run)
    if file is None or not is_held(file.with_suffix(".lock")):
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return Work(**{one.name: told[one.name] for one in fields(Work)})
    except (OSError, ValueError, KeyError):
        return None  # it is just beginning, or ending


def find_sweep(run: Path) -> tuple[Path, Work] | None:
    """Return the folder of the sweep that is at work in one of its runs, and what it told; None where none is."""
    if not isfile(run / LOCK) or not is_held(run / LOCK):
        return None
    home = run.resolve()
    work = find_work(home.parent) if home.name in list_runs(home.parent) else None
    # Beside it, another process may be at work in a run that the sweep leaves to it.
    holds = work and read_holder(home / LOCK).who.startswith(f"process {work.process} ")
    return (home.parent, work) if work and holds else None


def stop(run: Path, *, at_once: bool, say: Callable[[str], object]) -> Work | None:
    """End the process that is at work in a run as Ctrl-C does, and wait for its end; None where there is none.

    Raises:
        RunError: there is no such run or sweep either, or a sweep is at work in it.
    """
    work, file = find_work(run), _file_of(run)
    if work is None or file is None:
        if found := find_sweep(run):
            sweep, work = found
            mend = f"end the sweep, which can go on later: fedloom stop {quote_path(sweep)}"
            raise RunError(f"its sweep is at work in it (process {work.process})", where=str(run), mend=mend)
        if not is_sweep(run):
            read_run(run)
        return None
    say(f"process {work.process} ends{'' if at_once else ' after the step that is under way'}")
    with suppress(ProcessLookupError):
        if at_once:  # the first of two asks, the second ends; of two that are alike, one might be heard
            os.kill(work.process, signal.SIGINT)
        os.kill(work.process, signal.SIGTERM)
    while is_held(file.with_suffix(".lock")):
        time.sleep(LOOK_SECONDS)
    return work


def describe(run: Path) -> Iterator[str]:
    """Say in lines what a run or a sweep is doing, or how it ended and goes on, and a run's last rounds.

    Raises:
        RunError: there is neither a run nor anybody at work.
    """
    work = find_work(run)
    if work is None and is_sweep(run):
        yield from describe_sweep(run)
        return
    read = None
    with nullcontext() if work is None else suppress(RunError):  # of a run that is at work, files may be on their way
        read = read_run(run)
    if work:
        yield f"{'at work':<10}{work.command}, process {work.process}, since {work.since}"
        yield f"{'doing':<10}{work.doing}"
        if work.rounds is not None:
            left = f", {format_seconds(work.seconds_left)} left" if work.seconds_left is not None else ""
            # A run that goes on has told none yet, and has those of before on record.
            done = work.round or (read.rounds[-1]["round"] if read and read.rounds else 0)
            yield f"{'round':<10}{done} of {work.rounds}{left}"
        elif work.seconds_left is not None:  # a sweep's passes have rounds of their own
            yield f"{'left':<10}{format_seconds(work.seconds_left)}"
        if is_sweep(run):
            yield count_done(run)
        for name, (phase, since) in sorted(work.clients.items()):
            yield f"{'client':<10}{name}: {phase}, for {format_seconds(max(time.time() - since, 0.0))}"
    elif found := find_sweep(run):
        sweep, work = found
        yield f"{'at work':<10}{work.command}, process {work.process}, since {work.since}, in this run and others"
        yield f"{'doing':<10}{work.doing}"
        yield f"{'sweep':<10}fedloom status {quote_path(sweep)}, and to end it: fedloom stop {quote_path(sweep)}"
    elif read:
        yield from describe_run(read)
    if read and read.rounds:
        yield round_header(private=bool(read.plan.get("privacy")))
        yield from (format_round(record) for record in read.rounds[-ROUNDS_SHOWN:])


def is_well(run: Path) -> bool:
    """Return whether somebody is at work in a run or a sweep, or it is done.

    Raises:
        RunError: there is no such run.
    """
    if find_work(run) is not None or is_held(run / LOCK):
        return True
    return is_sweep_done(run) if is_sweep(run) else read_run(run).is_done


def _file_of(run: Path) -> Path | None:
    """Return a run's status file; None where this person has no folder that nobody else can write to."""
    folder = Path(tempfile.gettempdir()) / f".fedloom-{os.getuid()}"
    with suppress(OSError, ValueError, RuntimeError):  # of a name that can be no folder's, too
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder / f"{hash_text(str(run.resolve()))[:16]}.json"
    return None
