"""The run directory: what an execution leaves behind, written as it happens. No torch here.

Every record is a line of JSON, flushed when it is written; every other file is written under a temporary name and
renamed. A key whose value is not known is left out, never invented.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedloom.errors import RunError
from fedloom.host.failpoints import failpoint
from fedloom.host.files import hash_start, take_lock, write_json, write_text, writing

if TYPE_CHECKING:
    from fedloom.federation.rounds import RoundResult
    from fedloom.training.jobs import ClientReport

Record = dict[str, Any]

RECORDS = ("rounds.jsonl", "clients.jsonl")

PATIENCE = 2
"""Rises in a row, from the best round on, that are overfitting and not noise."""


@dataclass(frozen=True)
class Run:
    """A run directory, read. `recipe` is the resolved recipe; `status["state"]` is running, done, failed or
    interrupted."""

    folder: Path
    recipe: Record
    environment: Record
    plan: Record
    status: Record
    rounds: list[Record]
    clients: list[Record]
    baselines: Record

    @property
    def best_round(self) -> int | None:
        """The round whose adapter is `adapters/best`: of equal losses, the last."""
        best = min(reversed(self.rounds), key=judged_loss, default=None)
        return best["round"] if best else None


def judged_loss(record: Record) -> float:
    """What the best adapter is chosen by: the central loss, the clients' hold-out loss where there is none."""
    loss = record.get("central_loss", record.get("client_loss"))
    return math.inf if loss is None else float(loss)


def overfitting_onset(rounds: Sequence[int], losses: Sequence[float], patience: int = PATIENCE) -> int | None:
    """The first round, after the best, from which the loss rose `patience` times in a row; None where it did not."""
    if not losses:
        return None
    best = len(losses) - 1 - losses[::-1].index(min(losses))
    for start in range(best, len(losses) - patience):
        if all(low < high for low, high in pairwise(losses[start : start + patience + 1])):
            return rounds[start + 1]
    return None


def overfitting_onsets(rounds: Sequence[Record]) -> Record:
    """From which round the central loss, and each client's on its own hold-out, only rose; None where it did not."""
    clients = sorted({client for record in rounds for client in record.get("client_losses", {})}, key=int)
    central = [(record["round"], record["central_loss"]) for record in rounds if "central_loss" in record]
    own = {
        client: [(r["round"], r["client_losses"][client]) for r in rounds if client in r.get("client_losses", {})]
        for client in clients
    }
    return {
        "central": overfitting_onset(*_unzip(central)),
        "clients": {client: overfitting_onset(*_unzip(pairs)) for client, pairs in own.items()},
    }


def _unzip(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [round for round, _ in pairs], [loss for _, loss in pairs]


def read_run(folder: str | Path) -> Run:
    """Read a run that is done, failed or still going.

    Raises:
        RunError: the folder is no run, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "resolved.json").is_file():
        raise RunError("not a run directory: it has no resolved.json", where=str(folder))
    return Run(
        folder,
        **{
            name: _read_json(folder / file)
            for name, file in {
                "recipe": "resolved.json",
                "environment": "environment.json",
                "plan": "plan.json",
                "status": "status.json",
                "baselines": "baselines.json",
            }.items()
        },
        rounds=_read_lines(folder / "rounds.jsonl"),
        clients=_read_lines(folder / "clients.jsonl"),
    )


class RunWriter:
    """Writes one run directory, which nobody else writes meanwhile; makes it, and refuses one that is there.

    With `resume` it may be there. A killed writer leaves no lock behind.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        if not (resume and folder.is_dir()):
            check_free(folder)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise RunError(f"can't make the run directory: {error.strerror}", where=str(folder)) from error
        self.folder = folder
        self._lock = take_lock(folder)
        try:
            self._status: Record = _read_json(folder / "status.json") or {"started": now()}
            self._digests = {name: hash_start(folder / name) for name in RECORDS}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others write the run directory."""
        os.close(self._lock)

    @property
    def status(self) -> Record:
        """What `status.json` holds."""
        return self._status

    @property
    def record_bytes(self) -> dict[str, int]:
        """How long the records are."""
        paths = [self.folder / name for name in RECORDS]
        return {path.name: path.stat().st_size if path.is_file() else 0 for path in paths}

    @property
    def record_hashes(self) -> dict[str, str]:
        """SHA-256 of the records."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}

    def cut_records(self, sizes: Mapping[str, int]) -> None:
        """Take back what was recorded of a round that never was complete."""
        with writing(self.folder):
            for name, size in sizes.items():
                if (self.folder / name).is_file():
                    os.truncate(self.folder / name, size)
                self._digests[name] = hash_start(self.folder / name)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.folder / name, value)

    def write_status(self, state: str, **more: Any) -> None:
        """What the run is doing now, or how it ended."""
        if state == "running":
            self._status.pop("error", None)  # of an earlier try
        self._status |= {"state": state, **more, "updated": now()}
        self.write_json("status.json", self._status)

    def append_round(self, result: RoundResult, measured: Mapping[str, Any] = MappingProxyType({})) -> Record:
        """Add a round, with what telemetry measured in it, to the records, and return its record."""
        record = {**round_record(result), **measured}
        self._append("rounds.jsonl", record)
        failpoint("record.round")
        return record

    def append_client(self, report: ClientReport) -> None:
        """Add one client's work in a round."""
        self._append("clients.jsonl", _known(asdict(report)))
        failpoint("record.client")

    def _append(self, name: str, record: Record) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        path = self.folder / name
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._digests[name].update(line.encode())


def default_folder(name: str) -> Path:
    """Where a run goes that was not told where."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def check_free(folder: Path) -> None:
    """Refuse a run directory that exists, or that can't be made.

    Raises:
        RunError
    """
    try:
        if folder.exists():
            raise RunError("the run directory exists", where=str(folder), mend="name another with --out, or remove it")
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        usable = parent.is_dir() and os.access(parent, os.W_OK)
    except (OSError, ValueError) as error:
        raise RunError(
            "not a possible run directory", where=str(folder)[:120], mend="name another with --out"
        ) from error
    if not usable:
        raise RunError(
            f"can't make the run directory: {parent} is no folder that can be written to",
            where=str(folder),
            mend="name another with --out",
        )


def round_record(result: RoundResult) -> Record:
    """One round as a line of `rounds.jsonl`."""
    reports, client_score = result.reports, result.client_score
    steps = sum(report.steps for report in reports)
    record = {
        "round": result.round,
        "train_loss": sum(r.loss_mean * r.steps for r in reports) / steps if steps else None,
        "client_loss": client_score.loss if client_score else None,
        "central_loss": result.central.loss if result.central else None,
        "central_perplexity": _finite(result.central.perplexity) if result.central else None,
        "central_accuracy": result.central.accuracy if result.central else None,
        "proximal_mu": result.proximal_mu,
        "proximal_loss": sum(r.proximal_loss * r.steps for r in reports) / steps if steps else None,
        "proximal_ratio": sum(r.proximal_ratio * r.steps for r in reports) / steps if steps else None,
        "drift": sum(r.drift for r in reports) / len(reports) if reports else None,
        "clients": [report.client for report in reports],
        "lost": sorted(result.lost),
        "lost_because": {str(client): why for client, why in result.lost.items()} or None,
        "refused": list(result.refused) or None,
        "train_seconds": result.train_seconds,
        "aggregate_seconds": result.aggregate_seconds,
        "evaluate_seconds": result.evaluate_seconds,
        "train_tokens": sum(report.tokens for report in reports),
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "client_losses": {str(client): score.loss for client, score in result.clients.items()},
        "adapter_sha256": result.adapter.sha256(),
        "finished": now(),
    }
    return _known(record)


def now() -> str:
    """The time as records have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _known(record: Record) -> Record:
    return {key: value for key, value in record.items() if value is not None}


def _read_json(path: Path) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RunError("not a JSON object: the file is damaged", where=str(path))
    return value


def _read_lines(path: Path) -> list[Record]:
    """Every whole line; the last may have been cut by a crash while it was written."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                continue
            record = None
        if not isinstance(record, dict):
            raise RunError("not a JSON object: the line is damaged", where=f"{path}:{number}")
        records.append(record)
    return records
