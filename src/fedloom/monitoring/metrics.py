"""Metrics of a run in Prometheus' text format, and a health address beside them, for whoever asks.

No name of a client stands in them unless that is asked for: neither address asks for a token.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, get_args

from fedloom.monitoring.board import SERIES, Board, State
from fedloom.monitoring.web import Answer, Answering, Web, is_loopback, is_named_here
from fedloom.progress import Say
from fedloom.text import show_controls

KIND = "text/plain; version=0.0.4; charset=utf-8"
PATH, HEALTH = "/metrics", "/health"
SECONDS = {"train": "train_seconds", "aggregate": "aggregate_seconds", "evaluate": "evaluate_seconds"}
"""Phases of a round, each with its key in the record."""
DIRECTIONS = {"up": "bytes_up", "down": "bytes_down"}
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

Sample = tuple[Mapping[str, str], float]
"""Labels and a value."""


class Metric(NamedTuple):
    """A metric with its samples; the name of a counter ends in _total."""

    name: str
    help: str
    samples: Sequence[Sample]


class Metrics(Answering):
    """Metrics and health of a board, at an address, until it is closed."""

    def __init__(self, board: Board, address: tuple[str, int], say: Say, *, names: bool = False) -> None:
        """Answer at a host and port; with `names`, clients are told apart by theirs."""
        self._board, self._names = board, names
        self._is_local = is_loopback(address[0])
        self._web = Web("metrics", address, self._respond, say)

    def _respond(self, path: str, headers: Mapping[str, str]) -> Answer | None:
        if self._is_local and not is_named_here(headers.get("host", "")):
            return Answer("ask by localhost or an address\n", status=HTTPStatus.MISDIRECTED_REQUEST)
        if path == PATH:
            return Answer(to_text(measure(self._board, names=self._names)), KIND)
        if path == HEALTH:
            return Answer(json.dumps({"state": self._board.state}) + "\n", "application/json")
        return None


def measure(board: Board, *, names: bool = False) -> Iterator[Metric]:
    """Yield the metrics of a run. Counters are those of the whole run, rounds of before it was stopped included."""
    work, records = board.work, [record for _, record in sorted(board.rounds.items())]
    yield Metric("fedloom_state", "1 for the state of the run.", _one_of(board.state, get_args(State)))
    yield Metric("fedloom_queue", "Runs of a service's queue by state.", _by("state", _states_of(board)))
    trained = [record for record in records if record["round"]]
    yield Metric("fedloom_rounds_total", "Complete rounds.", [({}, len(trained))])
    yield Metric("fedloom_rounds_planned", "Rounds that the run will have.", _known(work.rounds))
    yield Metric("fedloom_seconds_left", "Seconds that the rest of the run will take.", _known(work.seconds_left))
    phases = Counter(phase for phase, _ in work.clients.values())
    yield Metric("fedloom_clients", "Clients elsewhere by what they do.", _by("phase", phases))
    if names:
        told = [({"client": name, "phase": phase}, 1.0) for name, (phase, _) in sorted(work.clients.items())]
        yield Metric("fedloom_client_phase", "1 for what a client does.", told)
    seconds = {phase: sum(_values(records, key)) for phase, key in SECONDS.items()}
    yield Metric("fedloom_phase_seconds_total", "Seconds of complete rounds by phase.", _by("phase", seconds))
    sizes = {way: sum(_values(records, key)) for way, key in DIRECTIONS.items()}
    yield Metric("fedloom_bytes_total", "Bytes of adapters from clients (up) and to them (down).", _by("way", sizes))
    yield Metric(
        "fedloom_refusals_total",
        "Updates that did not count and clients turned away, by reason, since the process began.",
        _by("reason", board.refusals),
    )
    losses = {name: values[-1] for name, key in SERIES.items() if (values := _values(records, key))}
    yield Metric("fedloom_loss", "Last loss, in nats a token.", _by("of", losses))
    yield Metric("fedloom_epsilon", "Privacy spent so far.", _known(board.spent))


def _states_of(board: Board) -> Counter[str]:
    return Counter(run["state"] for run in board.queue)


def to_text(metrics: Iterable[Metric]) -> str:
    """Write metrics in Prometheus' text format; those without a sample are left out."""
    lines = []
    for metric in metrics:
        if metric.samples:
            kind = "counter" if metric.name.endswith("_total") else "gauge"
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {kind}"]
            lines += [f"{metric.name}{_labels(labels)} {float(value)!r}" for labels, value in metric.samples]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Mapping[str, str]) -> str:
    told = ",".join(f'{name}="{show_controls(value).translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{told}}}" if told else ""


def _values(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if key in record]


def _by(label: str, values: Mapping[str, float]) -> list[Sample]:
    return [({label: name}, value) for name, value in sorted(values.items())]


def _known(value: float | None) -> list[Sample]:
    return [] if value is None else [({}, value)]


def _one_of(value: str, values: Iterable[str]) -> list[Sample]:
    return [({"state": one}, float(one == value)) for one in values]
