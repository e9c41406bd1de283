"""Journal of what a client was asked: its owner's record, by which rounds, recipes and scores are counted.

A line of JSON for each thing that is done, on disk before it is done, so that no crash hides one. It holds no text and
no paths.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from fedloom.deployment.client.ledger import Charge, Ledger, Measure, describe_spent, measure_by, read_charge
from fedloom.errors import DeploymentError, PolicyError
from fedloom.host.files import hash_pieces
from fedloom.host.frames import Frame
from fedloom.recipe.privacy_section import DOCUMENT

if TYPE_CHECKING:
    from fedloom.deployment.client.policy import PrivacyPolicy

DAY = timedelta(days=1)
Kind = Literal["train", "meet", "score", "tasks", "own", "end", "give_up", "answer"]
"""A round is trained; the documents are read for a recipe; an adapter's loss on the hold-out is told; it is told how
many of the owner's tasks are right; an adapter is kept that is this client's own; a run ended; a round that had begun
was given up, and nothing came of it; the answer to a round with noise is on disk and may leave."""
TELLING: tuple[Kind, ...] = ("train", "score", "meet")
"""Kinds that tell something of single documents: of two counts of all tokens, one added document's own."""
HIDES = "hides"
"""Field of a recipe's line that is true where no count is told but that of its units: those of a private run."""
COUNTED: Mapping[Kind, tuple[str, str]] = {
    "train": ("rounds", "max_rounds_a_day"),
    "meet": ("recipes", "max_meets_a_day"),
    "score": ("scores", "max_scores_a_day"),
    "tasks": ("answers to tasks", "max_answers_a_day"),
    "own": ("adapters of its own", "max_rounds_a_day"),
}
"""Kinds that are limited: a word for several of them, and the policy's key for how many there may be in 24 hours."""

ELSEWHERE = "choose a place for it with fedloom join --journal FILE"

TASK = ("recipe", "layout", "residual", "round", "client", "rounds", "seed", "training", "own")
"""Fields of a question that a training depends on, beside its payload. The others say when and how it was asked."""


class Entry(NamedTuple):
    """Line of a journal."""

    when: datetime
    kind: Kind
    event: str
    """Hash of what was asked: the same twice is one event."""
    told: Mapping[str, Any]
    """Whole line, of which older ones have less."""
    charge: Charge | None = None
    """Cost to the privacy of any one unit; None where nothing was told."""


Judge = Callable[[list[Entry]], Iterable[tuple[str, str]]]
"""A function that says, of all that counts in a journal, which keys of a policy refuse another event, and why."""


def judge_nothing(entries: list[Entry]) -> Iterable[tuple[str, str]]:
    """Refuse nothing."""
    return ()


@dataclass(frozen=True)
class Journal:
    """File of what was asked, to which each of its clients appends."""

    path: Path

    def check(self) -> None:
        """Refuse a journal that can't be read and written, before anything depends on it.

        Raises:
            DeploymentError
        """
        self.read()
        with self._open() as file:
            _cut(file)

    def note(
        self,
        event: str,
        told: Mapping[str, Any],
        *,
        kind: Kind = "train",
        at_most: int | None = None,
        of_run: int | None = None,
        judge: Judge = judge_nothing,
    ) -> None:
        """Write down what is about to be done: an event with this hash (`hash_task` makes that of a round).

        The same event within 24 hours, as after a crash, is another line and counts once. `of_run` is the most events
        of the run `told["run"]`, over all time.

        Raises:
            PolicyError: there were `at_most` others in the past 24 hours, or `of_run` in this run, or `judge` refuses.
            DeploymentError: the journal can't be kept.
        """
        now = datetime.now(UTC)
        with self._open() as file:
            entries = standing(self._parse(_cut(file)))
            run = told.get("run")
            before = {entry.event for entry in entries if entry.kind == kind and entry.told.get("run") == run}
            refusals = [*_judge_day(entries, kind, event, now, at_most)]
            if of_run is not None and event not in before and len(before) >= of_run:
                why = f"allows {of_run} rounds of a recipe, and so many were trained of this one"
                refusals.append(("max_rounds", why))
            if event not in before:
                refusals += judge(entries)
            if refusals:
                raise PolicyError(*refusals)
            _append(file, kind, event, told, now)

    def give_up(self, event: str) -> None:
        """Write down that a round which had begun was given up: nothing of it left this machine, so it does not count.

        Raises:
            DeploymentError: the journal can't be kept.
        """
        with self._open() as file:
            _cut(file)
            _append(file, "give_up", event, {}, datetime.now(UTC))

    def read(self) -> list[Entry]:
        """List what stands in the journal; nothing where it is not there.

        Raises:
            DeploymentError: it can't be read, or a line is damaged.
        """
        with self._explained("read"):
            content = self.path.read_bytes() if self.path.exists() else b""
        return self._parse(content)

    def _parse(self, content: bytes) -> list[Entry]:
        found = []
        # What has no end was cut off while it was written: nothing was done.
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                told = json.loads(line)
                # Rounds alone were written down before there were kinds.
                kind = told.get("kind", "train")
                if kind not in get_args(Kind):
                    raise ValueError("unknown kind")
                when = datetime.fromisoformat(told["when"]).astimezone(UTC)
                hides = kind == "meet" and told.get(HIDES) is True
                charge = read_charge(told, hides=hides) if kind in TELLING else None
                found.append(Entry(when, kind, str(told["task"]), told, charge))
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
                raise DeploymentError(
                    f"line {number} is not an entry of a journal",
                    where=self.path.name,
                    mend="mend the line, or put the file elsewhere",
                ) from None
        return found

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        """Open the file to read and append, for one process at a time: two may count in one journal."""
        with self._explained("written"):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            # Without a buffer: what a full disk did not take would be written when it is closed, half a line of it.
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """Turn errors of the system into one that names the file but not its folder: the server hears it too."""
        try:
            yield
        except OSError as error:
            raise DeploymentError(
                f"the journal can't be {done} ({error.strerror})",
                where=self.path.name,
                mend=ELSEWHERE,
            ) from None


def _cut(file: FileIO) -> bytes:
    """Read a journal, and cut off a last line that has no end: it would spoil the next one."""
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    file.truncate(len(whole))
    file.seek(0, os.SEEK_END)
    return whole


def _append(file: FileIO, kind: Kind, event: str, told: Mapping[str, Any], now: datetime) -> None:
    """Add a line whole or not at all: what is not on disk is not done, and must not count.

    Raises:
        OSError: it can't be written; the journal is as it was.
    """
    line = json.dumps({"when": now.isoformat(timespec="seconds"), "kind": kind, **told, "task": event})
    left, before = memoryview(line.encode() + b"\n"), file.tell()
    try:
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(before)
        raise


def standing(entries: list[Entry]) -> list[Entry]:
    """Return what counts: all but rounds that were given up."""
    found: list[Entry] = []
    for entry in entries:
        if entry.kind != "give_up":
            found.append(entry)
            continue
        # The last beginning alone: one before it may have been answered.
        begun = (place for place in reversed(range(len(found))) if found[place][1:3] == ("train", entry.event))
        if (last := next(begun, None)) is not None:
            del found[last]
    return found


def open_ledger(entries: Iterable[Entry], unit: str = DOCUMENT, run: str | None = None) -> Ledger:
    """Return what all that counts in a journal, or of one run, tells of a unit: the same event twice costs once."""
    costs = {
        (entry.kind, entry.event): entry.charge.cost_to(unit)
        for entry in entries
        if entry.charge and (run is None or entry.told.get("run") == run)
    }
    return Ledger(costs.values())


def measure_of(owner: PrivacyPolicy | None, entries: Iterable[Entry], *asked: Charge) -> Measure:
    """Return what a journal's ledger is told for; `asked` is what is about to be told as well."""
    return measure_by(owner, [*(entry.charge for entry in entries if entry.charge), *asked])


def describe_ledger(owner: PrivacyPolicy | None, entries: Sequence[Entry], *asked: Charge) -> str:
    """Say what all that counts in a journal has told of any one unit; `asked` is what is about to be told as well."""
    measure = measure_of(owner, entries, *asked)
    return describe_spent(owner, open_ledger(entries, measure.unit), measure)


def rounds_of(entries: Iterable[Entry], run: str) -> set[str]:
    """Return the events of a run's rounds."""
    return {entry.event for entry in entries if entry.kind == "train" and entry.told.get("run") == run}


def _judge_day(
    entries: list[Entry], kind: Kind, event: str, now: datetime, at_most: int | None
) -> Iterator[tuple[str, str]]:
    begun = begun_within_a_day(entries, kind, now)
    if at_most is not None and event not in begun and len(begun) >= at_most:
        what, key = COUNTED[kind]
        free = next_free(begun, at_most)
        yield key, f"allows {at_most} {what} a day; the next may begin on {free:%Y-%m-%d at %H:%M:%S} UTC"


def begun_within_a_day(entries: list[Entry], kind: Kind, now: datetime) -> dict[str, datetime]:
    """Return when each event of a kind was first asked in the past 24 hours: asked again, it stays as it is.

    An event that is asked again after more than 24 hours begins anew.
    """
    begun: dict[str, datetime] = {}
    for entry in entries:
        if entry.kind == kind and (entry.event not in begun or entry.when - begun[entry.event] >= DAY):
            begun[entry.event] = entry.when
    return {event: when for event, when in begun.items() if when > now - DAY}


def next_free(begun: Mapping[str, datetime], at_most: int) -> datetime | None:
    """Return when another event may begin, where `at_most` others or more began in the past 24 hours; None for now."""
    return sorted(begun.values())[-at_most] + DAY if len(begun) >= at_most else None


def hash_task(asked: Frame) -> str:
    """Return the SHA-256 of all that a training depends on. The same task twice tells a server nothing new."""
    told = {key: asked.manifest.get(key) for key in TASK}
    return hash_pieces([json.dumps(told, sort_keys=True).encode(), asked.payload])
