"""Numbers of a run, computed from its records and from nothing else: every figure that a report shows comes from here.

Losses are nats per token, times seconds, sizes bytes.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fedloom.records.run import Record, Run

PHASES = {"training": "train_seconds", "aggregation": "aggregate_seconds", "evaluation": "evaluate_seconds"}
"""Phase -> its key in a round's record."""
OUTLIER_SPREADS, OUTLIER_SHARE = 5.0, 1.15
"""A round stands out by so many median deviations, and is so much longer than the median round."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over rounds."""

    mean: float
    deviation: float


def series(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Rounds that have a number on record under `key`, and the numbers."""
    found = [(record["round"], record[key]) for record in run.rounds if record.get(key) is not None]
    return [round for round, _ in found], [value for _, value in found]


def client_series(run: Run, client: int) -> tuple[list[int], list[float]]:
    """A client's hold-out loss under the global adapter, by round."""
    found = [
        (r["round"], r["client_losses"][str(client)]) for r in run.rounds if str(client) in r.get("client_losses", {})
    ]
    return [round for round, _ in found], [value for _, value in found]


def judged_series(run: Run) -> tuple[str, list[int], list[float]]:
    """The loss that adapters are chosen by: central, or the clients' where nothing is held out centrally."""
    for name, key in (("central", "central_loss"), ("clients' hold-out", "client_loss")):
        rounds, losses = series(run, key)
        if losses:
            return name, rounds, losses
    return "central", [], []


def trained_rounds(run: Run) -> list[Record]:
    """Every round but round 0."""
    return [record for record in run.rounds if record["round"] > 0]


def round_seconds(record: Record) -> float:
    return sum(float(record[key]) for key in PHASES.values())


def total_seconds(run: Run) -> float:
    """In rounds: of training, aggregation and evaluation."""
    return sum(map(round_seconds, run.rounds))


def elapsed_seconds(run: Run) -> float | None:
    """From the start of the run to the last that was heard of it."""
    started, updated = run.status.get("started"), run.status.get("updated")
    if not started or not updated:
        return None
    return (datetime.fromisoformat(updated) - datetime.fromisoformat(started)).total_seconds()


def phase_shares(run: Run) -> dict[str, float]:
    """Of all seconds in rounds, each phase's part."""
    total = total_seconds(run)
    return {phase: sum(r[key] for r in run.rounds) / total if total else 0.0 for phase, key in PHASES.items()}


def client_work(run: Run, round: int) -> tuple[int, int, int]:
    """Samples, steps and tokens that the clients trained on in a round."""
    epochs = run.recipe["training"]["epochs"]
    reports = [report for report in run.clients if report["round"] == round]
    samples, steps, tokens = (sum(report[key] for report in reports) for key in ("examples", "steps", "tokens"))
    return samples * epochs, steps, tokens


def throughput(run: Run, phase: str) -> dict[str, Spread]:
    """Samples, steps and tokens a second in a phase, over the rounds in which it took place."""
    rates: dict[str, list[float]] = {"samples/s": [], "steps/s": [], "tokens/s": []}
    for record in run.rounds:
        seconds = record[PHASES[phase]]
        if phase == "training":
            work: Sequence[float] = client_work(run, record["round"])
        else:
            work = [record.get(f"evaluate_{what}", 0) for what in ("samples", "steps", "tokens")]
        if seconds > 0 and any(work):
            for name, amount in zip(rates, work, strict=True):
                rates[name].append(amount / seconds)
    return {name: spread(values) for name, values in rates.items() if values}


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def outliers(run: Run) -> list[tuple[int, str, float, float]]:
    """Round, phase, its seconds and the median's, where a phase took much longer than in the other rounds."""
    found = []
    for phase, key in PHASES.items():
        values = [(record["round"], record[key]) for record in trained_rounds(run)]
        if len(values) < 5:
            continue
        median = statistics.median(seconds for _, seconds in values)
        deviation = statistics.median(abs(seconds - median) for _, seconds in values)
        for round, seconds in values:
            if seconds > max(median + OUTLIER_SPREADS * deviation, OUTLIER_SHARE * median) and seconds - median > 0.1:
                found.append((round, phase, seconds, median))
    return sorted(found)


def peak_memory(run: Run, kind: str) -> dict[str, int]:
    """The most bytes of `ram` or `gpu` that each phase held, over all rounds."""
    peaks: dict[str, int] = {}
    for record in run.rounds:
        for phase, size in record.get(f"{kind}_peak_bytes", {}).items():
            peaks[phase] = max(peaks.get(phase, 0), size)
    return peaks


def full_model_bytes(run: Run) -> int:
    """What one copy of the whole model would be on the wire, in float32 as adapters are."""
    return 4 * int(run.plan["parameters"] - run.plan["trainable_parameters"])


def bytes_moved(run: Run) -> int:
    """Payload, down and up, over all rounds."""
    return sum(int(record["bytes_up"] + record["bytes_down"]) for record in run.rounds)


def reach(run: Run, loss: float) -> dict[str, float] | None:
    """Rounds, tokens, seconds and bytes until the judged loss was at most `loss`; None if it never was."""
    _, rounds, losses = judged_series(run)
    first = next((round for round, value in zip(rounds, losses, strict=True) if value <= loss), None)
    if first is None:
        return None
    until = [record for record in run.rounds if record["round"] <= first]
    return {
        "rounds": first,
        "tokens": sum(record["train_tokens"] for record in until),
        "seconds": sum(map(round_seconds, until)),
        "bytes": sum(record["bytes_up"] + record["bytes_down"] for record in until),
    }


def roughness(losses: Sequence[float]) -> float:
    """The share of all movement that went up: 0 for a curve that only falls."""
    moves = [after - before for before, after in itertools.pairwise(losses)]
    whole = sum(map(abs, moves))
    return sum(move for move in moves if move > 0) / whole if whole else 0.0


def completed(run: Run) -> int:
    """Rounds on record, round 0 left out."""
    return len(trained_rounds(run))
