"""Queue of a service: a file for each run in the server's folder, from its submission on. No torch here.

A run has the number of its file, and runs are taken in that order. Each file is written whole or not at all, by one
process at a time, so that whoever is killed leaves a queue in which nothing is lost and nothing stands twice. A file
that can't be read is told of, and keeps no other from its turn.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from fedloom.deployment.keys import SERVE_LOCK
from fedloom.errors import DeploymentError, FedloomError, RunError
from fedloom.host.files import Lock, is_held, read_holder, replace_file, writing
from fedloom.recipe.section import Section
from fedloom.records.run import read_json
from fedloom.records.writer import default_folder, now
from fedloom.report.document import Table, to_lines

OPTION = "--server"
QUEUE = "queue"
"""Folder in a server's folder."""
NAME = re.compile(r"(\d{6}|[1-9]\d{6,})\.json", re.ASCII)
"""Name of a run's file. Each number has one name alone: of two files with one number, one would be passed over."""
MOST_RECIPE_BYTES = 2**20
"""Largest file of a run as it is submitted: a recipe with a chat template has some 20 kB."""
MOST_BYTES = 2 * MOST_RECIPE_BYTES
"""Largest file of a run: it grows by how the run ends."""
PATIENCE_SECONDS = 20.0
"""Time for which a process waits until another one has written."""
LOOK_SECONDS = 0.05
SETTLED_SECONDS = 2.0
"""Age from which on a file is known by its time and size: clocks of disks tick a few milliseconds apart."""
State = Literal["waiting", "running", "done", "failed", "stopped"]
UNFINISHED: tuple[State, ...] = ("waiting", "running")
HEADER = ("number", "state", "round", "name", "submitted (UTC)", "run directory")
SUBMIT = "fedloom submit"
"""Command that a run of a queue begins with, and goes on with."""
BRANCH = "fedloom branch"
"""Command of who works with a server's folder and takes no runs from its queue."""
STOPPED = "fedloom stop"
"""Reason of a run that somebody stopped."""
AGAIN = "do it again: the queue is as it was"
AS_ITS_USER = "be the user that the server runs as, as with: runuser -u fedloom -- fedloom ..."


class Entry(Section):
    """Run of a queue, as its file has it."""

    number: int = Field(exclude=True)
    """Number of its file."""
    name: str = Field(max_length=1000)
    recipe: dict[str, JsonValue]
    """Recipe as it was when it was submitted, with absolute paths."""
    out: str = Field(pattern=r"^/[^\x00]*$", max_length=4096)
    """Run directory, absolute."""
    submitted: str = Field(max_length=100)
    resume: bool = False
    """True where the run directory may be there already: the run goes on."""
    state: State = "waiting"
    changed: str = Field("", max_length=100)
    """Time of the last change of state."""
    why: str = Field("", max_length=5000)
    """Reason why it failed or was stopped."""
    stop: Literal["", "round", "now"] = ""
    """Wish that it end: after the round that is under way, or at once; empty where nobody has it."""
    round: int | None = None
    """Last complete round, of one that has ended; None where none was begun."""
    rounds: int | None = None

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def is_unfinished(self) -> bool:
        return self.state in UNFINISHED

    def after(self, state: State, why: str = "") -> Entry:
        """Return it with another state, as of now."""
        changed: dict[str, Any] = {"state": state, "changed": now(), "why": why[:5000], "stop": ""}
        return self.model_copy(update=changed | ({} if state in UNFINISHED else rounds_of(self.folder)))

    def to_bytes(self) -> bytes:
        """Return what its file has."""
        # In ASCII: in a recipe that somebody wrote into its file there may be halves of characters.
        return f"{json.dumps(self.model_dump(), indent=1)}\n".encode()

    def to_record(self) -> dict[str, Any]:
        """Return what is shown of it, for programs: its round too, as its run directory has it."""
        told = self.model_dump(include={"name", "state", "submitted", "changed", "why", "round", "rounds"})
        stopping = {"state": "stopping"} if self.stop else {}
        return (
            {"number": self.number}
            | told
            | {"run": self.out}
            | (rounds_of(self.folder) if self.state == "running" else {})
            | stopping
        )


class Queue:
    """Runs of a server's folder, in the order in which they were submitted."""

    def __init__(self, server: Path) -> None:
        self.server = server.absolute()
        self.folder = self.server / QUEUE
        self._known: dict[tuple[int, ...], Entry] = {}
        """Runs as they were read, by number and by what changes when a file is written."""

    def read(self) -> tuple[list[Entry], list[DeploymentError]]:
        """Return all runs by number, and an error for each file that holds none."""
        entries, errors, known = [], [], {}
        for number, path in sorted(self.paths().items()):
            try:
                stamp = (number, *_stamp(path))
                entry = self._known.get(stamp) or read_entry(path)
            except DeploymentError as error:
                errors.append(error)
                continue
            entries.append(entry)
            if stamp[-1] < time.time_ns() - SETTLED_SECONDS * 1e9:
                known[stamp] = entry
        self._known = known
        return entries, errors

    def add(self, name: str, recipe: Mapping[str, Any], out: Path | None = None, *, resume: bool = False) -> Entry:
        """Put a run at the end; without a run directory it gets one of its own, beside the server's folder.

        Raises:
            DeploymentError: there is no such folder, it is another user's, or the recipe is too large.
            RunError: another run of the queue has that run directory, its path is too long or no text, or the file
                can't be written.
        """
        with self._alone():
            entries, _ = self.read()
            taken = {entry.out: entry for entry in entries if entry.is_unfinished}
            out = out and out.resolve()
            if out and (other := taken.get(str(out))):
                raise RunError(
                    f"run {other.number} of the queue has it ({other.state})",
                    where=str(out),
                    mend="name another with --out, or wait for its end: fedloom runs",
                )
            folder = str(out or self._free_folder(name, {entry.out for entry in entries}))
            told: dict[str, Any] = {"number": max(self.paths(), default=0) + 1, "resume": resume, "changed": now()}
            try:
                entry = Entry(name=name, recipe=dict(recipe), out=folder, submitted=now(), **told)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                raise RunError(
                    first["msg"], where=f"{first['loc'][0]}: {folder}", mend="name another with --out"
                ) from None
            if len(entry.to_bytes()) > MOST_RECIPE_BYTES:
                raise DeploymentError(f"the recipe has more than {MOST_RECIPE_BYTES:,} bytes", where=name)
            self._write(entry)
        return entry

    def take(self) -> Entry | None:
        """Return the run whose turn it is, as running; None where none waits.

        A run that is called running already was left by a service that was killed: it goes on. One of those that was
        to be stopped has ended.

        Raises:
            RunError: it can't be written down.
        """
        with self._alone():
            for entry in sorted(self._unfinished(), key=lambda entry: (entry.state != "running", entry.number)):
                if entry.stop:
                    self._write(entry.after("stopped", STOPPED))
                    continue
                begun = entry.after("running").model_copy(update={"resume": entry.resume or entry.state == "running"})
                self._write(begun)
                return begun
        return None

    def end(self, entry: Entry, state: State, why: str = "") -> None:
        """Write down how a run that was taken has ended.

        Raises:
            RunError: it can't be written.
        """
        with self._alone():
            self._write(entry.after(state, why))

    def stop(self, entry: Entry, *, at_once: bool) -> Entry:
        """Take a run that waits out, or have one that is at work end; return it as it is now.

        Raises:
            RunError: it can't be written.
        """
        with self._alone():
            found = next((one for one in self.read()[0] if one.number == entry.number), entry)
            if not found.is_unfinished:
                return found
            if found.state == "running" and self.is_served:
                changed = found.model_copy(update={"stop": "now" if at_once else "round"})
            else:
                changed = found.after("stopped", STOPPED)
            if changed != found:
                self._write(changed)
        return changed

    def asked_to_stop(self, number: int) -> Literal["", "round", "now"]:
        """Return whether a run is to end, and when; of a file that can't be read, nothing is known."""
        with suppress(DeploymentError):
            return read_entry(self.folder / f"{number:06d}.json").stop
        return ""

    def find(self, out: Path) -> Entry | None:
        """Return the last run that was submitted for a run directory."""
        found = [entry for entry in self.read()[0] if entry.out == str(out.resolve())]
        return found[-1] if found else None

    @property
    def is_served(self) -> bool:
        """True while a server that takes its runs works with the folder."""
        return is_held(self.server / SERVE_LOCK) and not self.one_run

    @property
    def one_run(self) -> str:
        """Run for which alone a server works with the folder, so that it takes no queue; empty where none does."""
        lock = self.server / SERVE_LOCK
        if not is_held(lock):
            return ""
        holder = read_holder(lock)
        # In a container, the server has other paths.
        is_here = holder.work and holder.who.endswith(f" on {platform.node()}")
        return holder.work if is_here and Path(holder.work).resolve() != self.server.resolve() else ""

    def _unfinished(self) -> list[Entry]:
        return [entry for entry in self.read()[0] if entry.is_unfinished]

    def paths(self) -> dict[int, Path]:
        """Return the files of its runs, by number.

        Raises:
            DeploymentError: the folder can't be read.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:  # nothing was submitted yet
            return {}
        except OSError as error:
            raise DeploymentError(
                f"can't be read ({error.strerror})", where=str(self.folder), mend=AS_ITS_USER
            ) from None
        return {int(found[1]): self.folder / name for name in names if (found := NAME.fullmatch(name))}

    def _free_folder(self, name: str, taken: set[str]) -> Path:
        first = self.server.resolve().parent / default_folder(name)
        folders = [first, *(first.with_name(f"{first.name}-{number}") for number in range(2, len(taken) + 100))]
        return next(folder for folder in folders if str(folder) not in taken and not folder.exists())

    def _write(self, entry: Entry) -> None:
        path = self.folder / f"{entry.number:06d}.json"
        with writing(path, AGAIN):
            replace_file(path, entry.to_bytes(), rights=0o600, durable=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only one that writes, until the block ends.

        Raises:
            DeploymentError: the folder is not there, is another user's, or another process does not let go of it.
        """
        try:
            # Root's files in it the server could not read. In a container the queue alone is the server's.
            if (self.folder if self.folder.is_dir() else self.server).stat().st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it is another user's")
            self.folder.mkdir(mode=0o700, exist_ok=True)
            lock = self._lock(time.monotonic() + PATIENCE_SECONDS)
        except FileNotFoundError:
            raise DeploymentError(
                "no server is set up in it", where=str(self.server), mend="make one: fedloom provision init --host HOST"
            ) from None
        except BlockingIOError:
            raise DeploymentError(
                "another process writes it and does not end", where=str(self.folder), mend="look for it, and end it"
            ) from None
        except OSError as error:
            raise DeploymentError(
                f"can't be written ({error.strerror})",
                where=str(self.folder),
                mend=AS_ITS_USER,
            ) from None
        with lock:
            yield

    def _lock(self, until: float) -> Lock:
        while True:
            try:
                return Lock(self.folder / "lock", 0o600)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
            time.sleep(LOOK_SECONDS)


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written, its time last.

    Raises:
        DeploymentError: it is not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DeploymentError(f"can't be read ({error.strerror})", where=str(path)) from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_entry(path: Path) -> Entry:
    """Read the file of a run, which may hold anything.

    Raises:
        DeploymentError: it is none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DeploymentError(f"can't be read ({error.strerror})", where=str(path)) from None
    return parse_entry(content, path)


def parse_entry(content: bytes, path: Path) -> Entry:
    """Read what stands in the file of a run; `path` is the file, whose name has the run's number.

    Raises:
        DeploymentError: it is none.
    """
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        return Entry.model_validate({**json.loads(content), "number": int(path.stem)})
    except (ValueError, TypeError, RecursionError) as error:
        why = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DeploymentError(
            f"not a run of a queue: {why[:200]}", where=str(path), mend="remove it, and submit the run again"
        ) from None


def rounds_of(run: Path) -> dict[str, int | None]:
    """Return the last complete round in a run directory, and how many there will be; None for what is not known."""
    status: Mapping[str, Any] = {}
    with suppress(FedloomError, OSError):
        status = read_json(run / "status.json")
    known = {key: status.get(key) for key in ("round", "rounds")}
    return {key: value if type(value) is int else None for key, value in known.items()}


def list_runs(server: Path) -> dict[str, Any]:
    """Return a record of a server's queue, of each of its runs, and of what can't be read.

    Raises:
        DeploymentError: there is no such folder, or its queue can't be read.
    """
    queue = Queue(server)
    entries, errors = queue.read()
    if not server.is_dir():
        raise DeploymentError("no server is set up in it", where=str(server), mend=f"name another with {OPTION}")
    served = {"server": str(queue.server), "served": queue.is_served, "one_run": queue.one_run}
    return {**served, "runs": [entry.to_record() for entry in entries], "damaged": [str(error) for error in errors]}


def write_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `list_runs` found as lines: a table of the runs, why they ended, and what is to be done."""
    runs = told["runs"]
    if runs:
        yield from to_lines(Table(HEADER, [_to_row(run) for run in runs], text_columns=len(HEADER)))
    else:
        yield "no runs yet: fedloom submit RECIPE"
    yield from (f"{run['number']}: {run['why']}" for run in runs if run["why"] not in ("", STOPPED))
    yield from (f"damaged: {error}" for error in told["damaged"])
    if not told["served"] and any(run["state"] in (*UNFINISHED, "stopping") for run in runs):
        nobody = f"nobody works with {told['server']}: start it with fedloom serve"
        alone = f"the server there carries out {told['one_run']} alone, and none of these"
        yield alone if told["one_run"] else nobody


def _to_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    of = "" if run["rounds"] is None else f" of {run['rounds']}"
    round = "" if run["round"] is None else f"{run['round']}{of}"
    submitted = run["submitted"][:16].replace("T", " ")
    return str(run["number"]), run["state"], round, run["name"], submitted, run["run"]
