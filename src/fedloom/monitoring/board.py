"""Board of a run: what its observers were told, kept for whoever asks while it works: a page, metrics, a notice.

It learns nothing that the terminal does not. The run's thread writes, others read: what they read is replaced whole, or
copied in one step.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedloom.monitoring.display import COLUMNS, PRIVATE_COLUMNS, describe_plan, explain_losses, round_cells
from fedloom.monitoring.status import StatusFile
from fedloom.records.plan import Plan
from fedloom.records.privacy import explain_privacy
from fedloom.records.run import RoundRecord, Run
from fedloom.records.writer import now
from fedloom.text import show_controls

State = Literal["starting", "idle", "working", "waiting", "done", "failed", "interrupted"]
"""States of a run; `idle` is a service's that has none."""
SERIES = {"central": "central_loss", "clients": "client_loss", "train": "train_loss"}
"""Losses by the names of their columns, each with its key in a round's record."""
TROUBLES = ("refused", "expired", "gone", "unscored", "unasked")
"""Words of steps that say what went wrong with a client. What is lost of a round stands in its record."""
MISSED = ("late", "gone", "lost")
"""Phases of a client that gives no update."""
NOT_ADMITTED, TURNED_AWAY = "not admitted", "turned away"
MOST_CLIENTS, MOST_TROUBLES, MOST_POINTS, MOST_ROWS, MOST_LETTERS, MOST_RUNS = 200, 50, 500, 12, 500, 50
"""Bounds of what is handed out, however long a run is and however many clients it has."""


class Trouble(NamedTuple):
    """Update or client that was refused, lost or scaled down: when, and why."""

    when: str
    what: str
    why: str


class Board(StatusFile):
    """An observer that keeps what it hears of a run."""

    def __init__(self, command: str, folder: Path | None = None) -> None:
        super().__init__(command, None)
        self.refusals: Counter[str] = Counter()
        """Updates that did not count and clients that were turned away, by reason, since this process began."""
        self.queue: Sequence[Mapping[str, Any]] = ()
        """Runs of a service's queue."""
        self._home = folder
        self._begin("starting", folder)

    def _begin(self, state: State, folder: Path | None) -> None:
        """Forget the run of before."""
        self.state: State = state
        self.folder = folder
        self.error = ""
        """Words of what ended the run, where it failed."""
        self.plan: Plan | None = None
        self.rounds: dict[int, RoundRecord] = {}
        self.troubles: deque[Trouble] = deque(maxlen=MOST_TROUBLES)
        self._missed: dict[str, str] = {}

    def show_step(self, what: str, detail: str) -> None:
        super().show_step(what, detail)
        if what == "waiting":
            self.state = "waiting"
        if what in TROUBLES:
            self.troubles.append(Trouble(now(), what, detail))
            self.refusals[TURNED_AWAY] += what == "refused"

    def show_plan(self, plan: Plan) -> None:
        super().show_plan(plan)
        self.plan, self.state = plan, "working"

    def show_folder(self, folder: Path) -> None:
        super().show_folder(folder)
        self.folder = folder

    def show_clients(self, phases: Mapping[str, str]) -> None:
        super().show_clients(phases)
        self._missed |= {name: phase for name, phase in phases.items() if phase in MISSED}

    def show_round(self, record: RoundRecord) -> None:
        super().show_round(record)
        self.rounds[record["round"]] = record
        self.state = "working"
        self.troubles.extend(Trouble(record["finished"], *told) for told in explain_losses(record))
        names = dict(enumerate(self.plan.elsewhere if self.plan else ()))
        for client in record["lost"]:
            self.refusals[self._missed.get(names.get(client, ""), NOT_ADMITTED)] += 1
        self.refusals[NOT_ADMITTED] += len(record.get("refused", ()))
        # Who is away stays away without being told of again.
        self._missed = {name: phase for name, (phase, _) in self.work.clients.items() if phase in MISSED}

    def stop_after(self, record: RoundRecord) -> None:
        """Learn of the rounds that a run had before it was stopped; never stop one."""
        self.rounds.setdefault(record["round"], record)

    def show_end(self, run: Run, report: Path) -> None:
        super().show_end(run, report)
        self.state = "done"

    def show_sweep_end(self, ranked: Sequence[tuple[str, float, float, int]], folder: Path) -> None:
        self.state, self.folder = "done", folder

    def show_failure(self, state: Literal["failed", "interrupted"], why: str) -> None:
        self.state, self.error = state, why

    def show_next(self, folder: Path | None) -> None:
        super().show_next(folder)
        self._begin("starting" if folder else "idle", folder or self._home)

    def show_queue(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.queue = runs

    @property
    def spent(self) -> float | None:
        """Privacy spent so far, as ε; None where nothing is known of it."""
        told = [record["epsilon"] for _, record in sorted(self.rounds.items()) if "epsilon" in record]
        return told[-1] if told else None

    def document(self) -> dict[str, Any]:
        """Return what a page shows, for JSON: bounded, and each text without control characters."""
        work, plan, rounds = self.work, self.plan, sorted(self.rounds.items())
        records = [record for _, record in rounds]
        clients = sorted(work.clients.items())
        columns = PRIVATE_COLUMNS if plan and plan.privacy else COLUMNS
        return {
            "name": _shown(plan.name if plan else ""),
            "command": work.command,
            "since": work.since,
            "state": self.state,
            "doing": _shown(work.doing),
            "round": work.round if work.round is not None else (rounds[-1][0] if rounds else None),
            "rounds": work.rounds,
            "seconds_left": work.seconds_left,
            "clients": [
                {"name": _shown(name), "phase": phase, "seconds": max(time.time() - since, 0.0)}
                for name, (phase, since) in clients[:MOST_CLIENTS]
            ],
            "clients_not_shown": max(len(clients) - MOST_CLIENTS, 0),
            "columns": [name for name, _ in columns],
            "rows": [round_cells(record) for record in records[-MOST_ROWS:]],
            "losses": {name: _thin(records, key) for name, key in SERIES.items()},
            "troubles": [trouble._replace(why=_shown(trouble.why))._asdict() for trouble in reversed([*self.troubles])],
            "privacy": _shown(explain_privacy(plan.privacy)) if plan and plan.privacy else "",
            "spent": self.spent,
            "plan": {name: _shown(value) for name, value in describe_plan(plan).items()} if plan else {},
            "queue": [
                {key: _shown(value) if isinstance(value, str) else value for key, value in run.items()}
                for run in self.queue[-MOST_RUNS:][::-1]
            ],
        }


def _shown(text: str) -> str:
    """Return a text that others may have chosen, cut, and with its control characters written out."""
    return show_controls(text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}…")


def _thin(records: list[RoundRecord], key: str) -> list[tuple[int, float]]:
    """Return a loss by round: of many rounds every so many, and always the last."""
    points = [(record["round"], float(record[key])) for record in records if key in record]  # type: ignore[literal-required]
    every = 1 + len(points) // MOST_POINTS
    return points[::-every][::-1]
