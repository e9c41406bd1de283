"""Notice of a run: a command of the operator's is run when it ends, fails or waits, and told the facts.

The facts are environment variables: no text of others becomes a part of the command. It has a time limit; its failure
is said, and is none of the run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fedloom.errors import RunError
from fedloom.monitoring.board import SERIES, Board
from fedloom.monitoring.observer import Observer
from fedloom.progress import Say
from fedloom.records.run import RoundRecord, Run
from fedloom.text import hide_secrets, show_controls

SECONDS = 30.0
"""Time that the command may take."""
MOST_LETTERS = 10_000
"""Longest fact: what starts a program takes no more than 128 KiB of one."""
GOES_ON = ("joining", "told")
"""Words of a client's steps after which it waits no more. A server's next complete round says so of it."""


class Notice(Observer):
    """A command that is run as a run ends, fails or waits for clients."""

    def __init__(self, command: str, board: Board, say: Say) -> None:
        """Take a command as it is typed, split into words as a shell does and run without one.

        The board, which hears of everything first, has the facts.

        Raises:
            RunError: it is no command of this machine.
        """
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise RunError(f"not a command ({error})", where="--notify", mend="close its quotes") from error
        if not self._command or shutil.which(self._command[0]) is None:
            what = f"no such command: {self._command[0] if self._command else 'it is empty'}"
            raise RunError(what, where="--notify", mend="name a program that can be run; for a shell: sh -c '...'")
        self._board, self._say = board, say
        self._threads: list[threading.Thread] = []
        self._waiting = False

    def show_step(self, what: str, detail: str) -> None:
        if what == "waiting" and not self._waiting:
            self._waiting = True
            self._tell("waiting", detail)
        elif what in GOES_ON:
            self._waiting = False

    def show_round(self, record: RoundRecord) -> None:
        self._waiting = False

    def show_end(self, run: Run, report: Path) -> None:
        self._tell("done", run.status.get("stopped_early", ""))

    def show_sweep_end(self, ranked: Sequence[tuple[str, float, float, int]], folder: Path) -> None:
        self._tell("done", "")

    def show_next(self, folder: Path | None) -> None:
        self._waiting = False

    def show_failure(self, state: Literal["failed", "interrupted"], why: str) -> None:
        self._tell(state, why)

    def close(self) -> None:
        """Wait for what is under way, as long as it may take."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _tell(self, state: str, why: str) -> None:
        # Beside the run, which does not wait for it; one after another, since the last word stays.
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        facts = facts_of(self._board, state, why)
        thread = threading.Thread(target=self._run, args=(facts, self._threads[-1:]), name="fedloom notify")
        try:
            thread.start()
        except RuntimeError:
            self._say("notify", "the command can't be run (no thread can be had)")
            return
        self._threads.append(thread)

    def _run(self, facts: Mapping[str, str], before: Sequence[threading.Thread]) -> None:
        for thread in before:
            thread.join()
        try:
            process = subprocess.Popen(
                self._command,
                env={**os.environ, **facts},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._say("notify", f"the command can't be run ({error.strerror})")
            return
        try:
            if code := process.wait(SECONDS):
                self._say("notify", f"the command ended with {code}")
        except subprocess.TimeoutExpired:
            # With all that it has started: it leads a session of its own.
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._say("notify", f"the command took more than {SECONDS:g} seconds, and was ended")


def facts_of(board: Board, state: str, why: str = "") -> dict[str, str]:
    """Return the facts of a run as environment variables; what is not known is left out."""
    work, records = board.work, [record for _, record in sorted(board.rounds.items())]
    last = records[-1] if records else None
    losses = {f"LOSS_{name.upper()}": last.get(key) for name, key in SERIES.items()} if last else {}
    facts = {
        "STATE": state,
        "WHY": hide_secrets(why) or None,
        "COMMAND": work.command,
        "RUN": board.folder and str(board.folder.absolute()),
        "NAME": board.plan.name if board.plan else _queued_name(board),
        "ROUND": last and last["round"],
        "ROUNDS": work.rounds,
        "EPSILON": board.spent,
        **losses,
    }
    return {f"FEDLOOM_{key}": _cut(show_controls(str(value))) for key, value in facts.items() if value is not None}


def _queued_name(board: Board) -> str | None:
    """Return the name of a service's run that has no plan yet."""
    at_work = [
        run for run in board.queue if run["state"] in ("running", "stopping") and run["run"] == str(board.folder)
    ]
    return at_work[-1]["name"] if at_work else None


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…"
