"""Writes a run directory, as it happens. No torch here.

Every record is a line of JSON, flushed when it is written; every other file is written under a temporary name and
renamed. A key whose value is not known is left out, never invented.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from fedloom.errors import RunError
from fedloom.host.failpoints import failpoint
from fedloom.host.files import flush, hash_start, open_own, take_lock, write_json, write_text, writing
from fedloom.records.run import Record, RoundRecord, read_record

if TYPE_CHECKING:
    from fedloom.federation.rounds import RoundResult
    from fedloom.training.client_report import ClientReport

RECORDS = ("rounds.jsonl", "clients.jsonl")


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
            self._status: Record = read_record(folder / "status.json") or {"started": now()}
            self._rests_since: str = self._status.get("updated", "")
            self._digests = {name: hash_start(folder / name) for name in RECORDS}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others write the run directory."""
        self._lock.close()

    @property
    def status(self) -> Record:
        """Content of `status.json`."""
        return self._status

    @property
    def record_bytes(self) -> dict[str, int]:
        """Lengths of the records, by name."""
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
                    with open(self.folder / name, "r+b", opener=open_own) as file:
                        file.truncate(size)
                self._digests[name] = hash_start(self.folder / name)

    def write_text(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.folder / name, value)

    def remove(self, name: str) -> None:
        """Remove a file that an earlier try may have left."""
        with writing(self.folder):
            (self.folder / name).unlink(missing_ok=True)

    def write_status(self, state: str, **more: Any) -> None:
        """Write down what the run is doing now, or how it ended; a value of None is left out."""
        if state == "running":
            for key in ("error", "stopped_early"):  # of an earlier try
                self._status.pop(key, None)
            # Until it had its model, and its clients were there, it was no more at work than before its start.
            if self._rests_since:
                self._status["paused"] = self._status.get("paused", 0.0) + seconds_since(self._rests_since)
                self._rests_since = ""
        self._status |= {"state": state, **_known(more)}
        self.note_work()

    def note_work(self) -> None:
        """Write down that the run is at work: what it did until now is no pause, whatever comes."""
        self._status["updated"] = now()
        self.write_json("status.json", self._status)

    def append_round(self, result: RoundResult, measured: Mapping[str, Any] = MappingProxyType({})) -> RoundRecord:
        """Add a round, with what telemetry measured in it, to the records, and return its record.

        Then it is on the disk, with its clients' lines.
        """
        record = cast(RoundRecord, {**round_record(result), **measured})
        self._append("rounds.jsonl", record)
        with writing(self.folder):
            for name in RECORDS:
                if (self.folder / name).is_file():
                    flush(self.folder / name)
        failpoint("record.round")
        return record

    def append_client(self, report: ClientReport) -> None:
        """Add one client's work in a round: its report, as a line of `clients.jsonl`."""
        self._append("clients.jsonl", _known(asdict(report)))
        failpoint("record.client")

    def _append(self, name: str, record: Mapping[str, object]) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        path = self.folder / name
        with writing(path), open(path, "a", encoding="utf-8", opener=open_own) as file:
            file.write(line)
        self._digests[name].update(line.encode())


def default_folder(name: str) -> Path:
    """Return the run directory of a run that was not told where to go."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def check_free(folder: Path) -> None:
    """Refuse a run directory that exists, or that can't be made.

    Raises:
        RunError
    """
    try:
        if folder.exists() or folder.is_symlink():  # to nothing, too
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


def round_record(result: RoundResult) -> RoundRecord:
    """Return one round as a line of `rounds.jsonl`."""
    reports, central = result.reports, result.central
    steps = sum(report.steps for report in reports)
    losses = [(report.loss_mean, report.steps) for report in reports if report.loss_mean is not None]
    record = {
        "round": result.round,
        "train_loss": sum(loss * taken for loss, taken in losses) / steps if losses else None,
        "client_loss": result.client_loss,
        "central_loss": central.loss if central else None,
        "central_perplexity": _finite(central.perplexity) if central else None,
        "central_accuracy": central.accuracy if central else None,
        "judged_loss": None if central or result.judged_loss == result.client_loss else result.judged_loss,
        "proximal_mu": result.proximal_mu,
        "proximal_loss": sum(r.proximal_loss * r.steps for r in reports) / steps if steps else None,
        "proximal_ratio": sum(r.proximal_ratio * r.steps for r in reports) / steps if steps else None,
        "drift": sum(r.drift for r in reports) / len(reports) if reports else None,
        "clients": [report.client for report in reports],
        "lost": sorted(result.lost),
        "lost_because": {str(client): why for client, why in result.lost.items()} or None,
        "unasked": list(result.unasked) or None,
        "refused": list(result.refused) or None,
        "shares": {str(client): share for client, share in result.shares.items()} or None,
        "capped": list(result.capped) or None,
        "scaled": {str(client): times for client, times in result.scaled.items()} or None,
        "away": {str(client): seconds for client, seconds in result.away.items()} or None,
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
    return cast(RoundRecord, _known(record))


def now() -> str:
    """Return the time as records have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def seconds_since(moment: str) -> float:
    """Return the seconds since a time as `now` writes it."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _known(record: Record) -> Record:
    return {key: value for key, value in record.items() if value is not None}
