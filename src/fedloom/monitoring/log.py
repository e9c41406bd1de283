"""Log of a run: the lines of the terminal's observer, each with its time and level, as text or JSON.

Nothing is written that the terminal is not told. A log that can't be written any more is said once; the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

from fedloom.errors import RunError
from fedloom.monitoring.board import MISSED, TROUBLES
from fedloom.monitoring.display import COLUMNS, PRIVATE_COLUMNS, describe_plan, explain_losses, round_cells
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.trackers import scalars
from fedloom.progress import Say
from fedloom.records.plan import Plan
from fedloom.records.run import RoundRecord, Run
from fedloom.text import hide_secrets, show_controls

Format = Literal["text", "json"]
MOST_BYTES, FILES_KEPT = 10_000_000, 5
"""Size from which on a log file is put aside as FILE.1, and how many of those are kept."""
WARNED = {*TROUBLES, *MISSED, "keys", "restart", "retry", "scaled", "note"}
"""Words of lines that are warnings."""


class Log(Observer):
    """A log on a file, which is rotated by its size, or on standard error."""

    def __init__(self, file: Path | None, form: Format, say: Say) -> None:
        """Open a log; `say` is told if it can't be written later.

        Raises:
            RunError: the file can't be opened.
        """
        try:
            self._handler: logging.Handler = _RotatedFile(file, say) if file else logging.StreamHandler(sys.stderr)
        except OSError as error:
            raise RunError(
                f"can't be written ({error.strerror})", where=f"--log-file {file}", mend="name another file"
            ) from error
        self._handler.setFormatter(_AsJson() if form == "json" else _AsText())
        # A logger of its own, which no library's lines reach: those may quote documents.
        self._logger = logging.Logger("fedloom")
        self._logger.addHandler(self._handler)
        self._phases: dict[str, str] = {}
        self._private = False

    def show_step(self, what: str, detail: str) -> None:
        self._write(logging.WARNING if what in WARNED else logging.INFO, what, detail)

    def show_plan(self, plan: Plan) -> None:
        self._private = bool(plan.privacy)
        for name, value in describe_plan(plan).items():
            self.show_step("plan", f"{name}: {value}")
        for warning in plan.warnings:
            self.show_step("note", warning)

    def show_folder(self, folder: Path) -> None:
        self.show_step("run", str(folder))

    def show_clients(self, phases: Mapping[str, str]) -> None:
        for name, phase in phases.items():
            if self._phases.get(name) != phase:
                level = logging.WARNING if phase in WARNED else logging.INFO
                self._write(level, "client", f"{name}: {phase}")
        self._phases = dict(phases)

    def show_round(self, record: RoundRecord) -> None:
        columns = PRIVATE_COLUMNS if self._private else COLUMNS
        cells = zip(columns, round_cells(record), strict=True)
        told = ", ".join(f"{name} {cell}" for (name, _), cell in cells if cell and name != "round")
        self._write(logging.INFO, "round", f"{record['round']}: {told}", scalars(record))
        for what, why in explain_losses(record):
            self.show_step(what, why)

    def show_end(self, run: Run, report: Path) -> None:
        if why := run.status.get("stopped_early"):
            self.show_step("stopped", f"early: {why}")
        self.show_step("done", str(report))

    def show_pass(self, names: Sequence[str], plans: Sequence[Plan]) -> None:
        self.show_step("pass", ", ".join(names))

    def show_trial(self, name: str, record: RoundRecord) -> None:
        self._write(logging.INFO, "round", f"{record['round']} of {name}", scalars(record))

    def show_sweep_end(self, ranked: Sequence[tuple[str, float, float, int]], folder: Path) -> None:
        self.show_step("done", str(folder))

    def show_next(self, folder: Path | None) -> None:
        self._phases = {}

    def show_failure(self, state: Literal["failed", "interrupted"], why: str) -> None:
        self._write(logging.ERROR if state == "failed" else logging.WARNING, state, why)

    def close(self) -> None:
        with suppress(OSError):
            self._handler.close()

    def _write(self, level: int, what: str, text: str, numbers: Mapping[str, float] | None = None) -> None:
        one_line = hide_secrets(show_controls(" ".join(text.split())))
        self._logger.log(level, "%s", one_line, extra={"what": show_controls(what), "numbers": numbers})


class _RotatedFile(RotatingFileHandler):
    """A file that goes on without the lines that can't be written."""

    def __init__(self, file: Path, say: Say) -> None:
        self._say: Say | None = say
        super().__init__(file, maxBytes=MOST_BYTES, backupCount=FILES_KEPT, encoding="utf-8", errors="replace")

    def _open(self) -> TextIOWrapper:
        """Open the file for its owner alone, whatever the umask: it names clients, and has an owner's own losses."""
        opener = partial(os.open, mode=0o600)
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=opener)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the library's name)
        error = sys.exc_info()[1]
        # What lies in its buffer would fail again with each line; the next line opens the file anew.
        with suppress(OSError):
            if self.stream:
                self.stream.close()
        self.stream = None
        say, self._say = self._say, None
        if say:
            why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            say("log", f"can't be written ({why}); the run goes on")


class _AsText(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = vars(record)
        return f"{_time(record)} {record.levelname:<8}{told['what']:<9} {record.getMessage()}"


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = vars(record)
        line = {"time": _time(record), "level": record.levelname.lower(), "what": told["what"]}
        line["text"] = record.getMessage()
        return json.dumps(line | ({"numbers": told["numbers"]} if told["numbers"] else {}))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
