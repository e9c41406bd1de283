"""Numbers of a run, computed from its records and from nothing else; every number that a report shows comes from here.

Losses are in nats per token, times in seconds, sizes in bytes.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from fedloom.progress import Stage
from fedloom.records.run import Record, Run, judged_loss, overfitting_onset
from fedloom.text import count

SAME = 1.0005
"""Ratio of two probabilities below which they are called the same."""
ENOUGH = 20
"""Documents from which on a verdict is given: by a sign test at 5 %, 15 of 20 are beyond a coin's, 12 of 16 are not."""
PHASES = {"training": "train_seconds", "aggregation": "aggregate_seconds", "evaluation": "evaluate_seconds"}
"""Phases of a round, with the key of their seconds in its record."""
SHARED_PASS = "Trained in one pass with other runs: of its time each has an equal part."
"""Words on a run whose clock is not its own."""
OUTLIER_SPREADS, OUTLIER_SHARE = 5.0, 1.15
"""Thresholds of an unusually long round: median absolute deviations above the median, and times the median."""
OUTLIER_SECONDS = 1.0
"""Seconds above the median that are worth a word."""


@dataclass(frozen=True)
class Rise:
    """The round from which the judged loss rose, never again as low as its best, and what that is called."""

    round: int
    kind: str
    """`overfitting` where the training loss fell meanwhile, `divergence` where it did not, else `rise`."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over rounds."""

    mean: float
    deviation: float


def series(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Return the rounds that have a number on record under `key`, and those numbers."""
    found = [(record["round"], record[key]) for record in run.rounds if record.get(key) is not None]
    return [round for round, _ in found], [value for _, value in found]


def client_series(run: Run, client: int) -> tuple[list[int], list[float]]:
    """Return the rounds in which a client's hold-out was scored under the global adapter, and the losses."""
    found = [
        (r["round"], r["client_losses"][str(client)]) for r in run.rounds if str(client) in r.get("client_losses", {})
    ]
    return [round for round, _ in found], [value for _, value in found]


def judged_series(run: Run) -> tuple[str, list[int], list[float]]:
    """Return the loss that the best adapter is chosen by, as (name, rounds, losses).

    It is the central loss, or the clients' hold-out loss if nothing is held out centrally; of capped shares, what that
    was in round 0 and how far the middle client's has moved since.
    """
    if any("central_loss" in record for record in run.rounds):
        return "central", *series(run, "central_loss")
    found = [(record["round"], loss) for record in run.rounds if math.isfinite(loss := judged_loss(record))]
    name = "clients' middle hold-out" if judges_by_the_middle(run) else "clients' hold-out"
    return name if found else "central", [round for round, _ in found], [loss for _, loss in found]


def judges_by_the_middle(run: Run) -> bool:
    """Return whether the middle client decides which adapter is the best, and not the mean over clients' tokens."""
    return any("judged_loss" in record for record in run.rounds)


def describe_judge(run: Run) -> str:
    """Name the documents that decide which adapter is the best, and how they do."""
    if judged_series(run)[0] == "central":
        return "the central hold-out"
    scored = {client for record in run.rounds for client in record.get("client_losses", {})}
    able = sum(client.get("holdout_tokens", 0) > 0 for client in run.plan["clients"])
    whose = "all clients' hold-outs" if len(scored) >= able else f"the hold-outs of {len(scored)} of {able} clients"
    return f"how the middle one of {whose} moves" if judges_by_the_middle(run) else f"{whose} together"


def count_judges(run: Run) -> int:
    """Return the number of documents that decide which adapter is the best."""
    if judged_series(run)[0] == "central":
        return int(run.plan["central_documents"])
    scored = {client for record in run.rounds for client in record.get("client_losses", {})}
    return sum(run.plan["clients"][int(client)]["holdout_documents"] for client in scored)


def count_rounds(run: Run) -> dict[int, int]:
    """Return in how many rounds each client trained that has documents to train on."""
    counted = Counter(client for record in trained_rounds(run) for client in record["clients"])
    return {number: counted[number] for number, client in enumerate(run.plan["clients"]) if client.get("steps", 1)}


def largest_shares(run: Run) -> dict[int, float]:
    """Return each client's largest share of a round's weight, by its number; empty where none is on record."""
    largest: dict[int, float] = {}
    for record in run.rounds:
        for client, share in record.get("shares", {}).items():
            largest[int(client)] = max(share, largest.get(int(client), 0.0))
    return dict(sorted(largest.items()))


def trained_rounds(run: Run) -> list[Record]:
    """Return the records of all rounds but round 0, which only evaluates."""
    return [record for record in run.rounds if record["round"] > 0]


def phase_seconds(record: Record, phase: str) -> float:
    """Return the seconds of a phase of a round; of training in one pass with other runs, an equal part."""
    together = record.get("runs_together", 1) if phase == "training" else 1
    return float(record[PHASES[phase]]) / together


def seconds_at_rate(records: Sequence[Record], work: Stage) -> float | None:
    """Return the seconds for so much work at the rate of rounds on record; None where they tell none."""
    total = 0.0
    for phase, key, number in (("training", "train", work.train), ("evaluation", "evaluate", work.evaluate)):
        done = sum(record.get(f"{key}_tokens", 0) for record in records)
        took = sum(phase_seconds(record, phase) for record in records)
        if number and not (done and took):
            return None
        total += number * took / done if number else 0.0
    return total


def shares_a_pass(run: Run) -> bool:
    """Return whether a run was trained in one pass with others, of whose time it has an equal part."""
    return any("runs_together" in record for record in run.rounds)


def shared_with(run: Run) -> str:
    """Return words on seconds that are those of a whole pass; none for a run that had one to itself."""
    others = max((record.get("runs_together", 1) for record in run.rounds), default=1) - 1
    return f", shared with {count(others, 'other')} in one pass" if others else ""


def round_seconds(record: Record) -> float:
    """Return the seconds of a round: training, aggregation and evaluation."""
    return sum(phase_seconds(record, phase) for phase in PHASES)


def total_seconds(run: Run) -> float:
    """Return the seconds of all rounds, without loading and what lies between rounds."""
    return sum(map(round_seconds, run.rounds))


def elapsed_seconds(run: Run) -> float | None:
    """Return the seconds from the start of the run to the last update of its status; None if either is unknown.

    Those in which nobody was at work, between a stop and going on, are not counted.
    """
    started, updated = run.status.get("started"), run.status.get("updated")
    if not started or not updated:
        return None
    whole = (datetime.fromisoformat(updated) - datetime.fromisoformat(started)).total_seconds()
    return max(0.0, whole - float(run.status.get("paused", 0.0)))


def run_parts(run: Run) -> dict[str, float]:
    """Return the seconds of each part of a run; empty where they are not on record, or where the clock is not its own.

    Of a run that was stopped and went on, it is not on record when: there are the rounds and all else.
    """
    elapsed, rounds = elapsed_seconds(run), total_seconds(run)
    if elapsed is None or not run.rounds or shares_a_pass(run):
        return {}
    before = _seconds_between(run.status["started"], run.rounds[0].get("finished"))
    after = _seconds_between(run.rounds[-1].get("finished"), run.status["updated"])
    if run.status.get("resumed") or before is None or after is None:
        return {"rounds": rounds, "all else": max(0.0, elapsed - rounds)}
    # Times on record are whole seconds.
    before, after = max(0.0, before - round_seconds(run.rounds[0])), max(0.0, after)
    between = max(0.0, elapsed - before - rounds - after)
    return {"before the rounds": before, "rounds": rounds, "between rounds": between, "after the rounds": after}


def _seconds_between(start: str | None, end: str | None) -> float | None:
    try:
        return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() if start and end else None
    except (TypeError, ValueError):  # no time, or one with a time zone and one without
        return None


def phase_shares(run: Run) -> dict[str, float]:
    """Return each phase's share of the seconds of all rounds, from 0 to 1."""
    total = total_seconds(run)
    return {phase: sum(phase_seconds(r, phase) for r in run.rounds) / total if total else 0.0 for phase in PHASES}


def client_work(run: Run, round: int) -> tuple[int, int, int]:
    """Return the samples, steps and tokens that the clients trained on in a round."""
    # A report's steps and tokens count every epoch; its examples are those that a client holds.
    reports = [report for report in run.clients if report["round"] == round]
    samples = sum(_samples(report, run.recipe["training"]) for report in reports)
    steps, tokens = (sum(report[key] for report in reports) for key in ("steps", "tokens"))
    return samples, steps, tokens


def _samples(report: Record, training: Record) -> int:
    """Return the samples of a client's steps: those of whole epochs, and whole steps of one that was cut short."""
    examples, size = int(report["examples"]), training["batch_size"] * training.get("gradient_accumulation", 1)
    if not training.get("max_steps"):  # a branch has the examples of several clients, and the steps of the longest
        return int(examples * training["epochs"])
    # The last step of an epoch has what is left, so an epoch may have fewer samples than its steps have room for.
    epochs, steps = divmod(report["steps"], max(1, math.ceil(examples / size)))
    return int(min(examples * training["epochs"], examples * epochs + size * steps))


def throughput(run: Run, phase: str) -> dict[str, Spread]:
    """Return samples, steps and tokens a second of a phase, over the rounds in which it had work."""
    rates: dict[str, list[float]] = {"samples/s": [], "steps/s": [], "tokens/s": []}
    for record in run.rounds:
        seconds = phase_seconds(record, phase)
        if phase == "training":
            work: Sequence[float] = client_work(run, record["round"])
        else:
            work = [record.get(f"evaluate_{what}", 0) for what in ("samples", "steps", "tokens")]
        if seconds > 0 and any(work):
            for name, amount in zip(rates, work, strict=True):
                # What no client told, as its tokens in a private run, is unknown and not 0.
                if amount:
                    rates[name].append(amount / seconds)
    return {name: spread(values) for name, values in rates.items() if values}


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation, which is 0 for a single value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def outliers(run: Run) -> list[tuple[int, str, float, float]]:
    """Return (round, phase, its seconds, the median's seconds) of each phase that took far longer than in other rounds.

    The longest come first. Fewer than five rounds have no outliers, and OUTLIER_SECONDS or less is none.
    """
    found = []
    for phase in PHASES:
        values = [(record["round"], phase_seconds(record, phase)) for record in trained_rounds(run)]
        if len(values) < 5:
            continue
        median = statistics.median(seconds for _, seconds in values)
        deviation = statistics.median(abs(seconds - median) for _, seconds in values)
        for round, seconds in values:
            far = max(OUTLIER_SPREADS * deviation, (OUTLIER_SHARE - 1) * median, OUTLIER_SECONDS)
            if seconds - median > far:
                found.append((round, phase, seconds, median))
    return sorted(found, key=lambda one: one[3] - one[2])


def peak_memory(run: Run, kind: str) -> dict[str, int]:
    """Return the peak of each phase over all rounds, in bytes of `ram` or `gpu`."""
    peaks: dict[str, int] = {}
    for record in run.rounds:
        for phase, size in record.get(f"{kind}_peak_bytes", {}).items():
            peaks[phase] = max(peaks.get(phase, 0), size)
    return peaks


def full_model_bytes(run: Run) -> int:
    """Return the bytes of one copy of the whole model in float32, as adapters are sent."""
    plan = run.plan
    if "base_parameters" in plan:
        return 4 * int(plan["base_parameters"])
    # Plans of earlier versions: all that is trained is beside the base model, or it is the base model.
    beside = plan["trainable_parameters"] if plan["trainable_parameters"] < plan["parameters"] else 0
    return 4 * int(plan["parameters"] - beside)


def bytes_moved(run: Run) -> int:
    """Return the bytes of all adapters exchanged, both ways, over all rounds."""
    return sum(int(record["bytes_up"] + record["bytes_down"]) for record in run.rounds)


def transfers(run: Run, records: Iterable[Record]) -> int:
    """Return how often an adapter travelled in rounds: to each client, and back from those that are not lost."""
    times = 0
    for record in records:
        back, lost = len(record.get("clients", ())), len(record.get("lost", ()))
        # A round that lost too many ends there: it had been sent to all of its clients, but for those that were away.
        times += back + max(back + lost, run.plan["clients_per_round"] if lost else 0) - len(record.get("unasked", ()))
    return times


def update_bytes(run: Run) -> float:
    """Return the bytes of an adapter as it travelled, the mean over clients, rounds and both ways.

    Before any has, and in records that do not say who took part, those of the whole adapter.
    """
    times = transfers(run, run.rounds)
    whole: float = run.plan["payload_bytes"]
    return bytes_moved(run) / times if times else whole


def reach(run: Run, loss: float) -> dict[str, float] | None:
    """Return the rounds, tokens, seconds and bytes until the judged loss was at most `loss`; None if it never was."""
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


def are_alike(nats: float) -> bool:
    """Return whether two losses so many nats a token apart are told as alike: every verdict of a report goes by this.

    A loss is the mean of −log p, so p is exp(nats) times what it was, as a geometric mean over the text.
    """
    return abs(nats) < math.log(SAME)


def find_rise(run: Run) -> Rise | None:
    """Return from which round the judged loss is above its best to the end, and as what; None if it does not rise."""
    _, rounds, losses = judged_series(run)
    onset = overfitting_onset(rounds, losses)
    if onset is None:
        return None
    train = dict(zip(*series(run, "train_loss"), strict=True))
    # Round 0 trains nothing: after it, the first round's loss is that of the adapter as it began.
    before = [loss for round, loss in train.items() if round <= max(1, run.best_round or 0)]
    if not before or onset > max(train):
        return Rise(onset, "rise")
    return Rise(onset, "overfitting" if train[max(train)] < before[-1] else "divergence")


def train_gap(run: Run) -> tuple[int, float] | None:
    """Return the last round with both a judged and a training loss, and how far the training loss is below."""
    _, rounds, losses = judged_series(run)
    train = dict(zip(*series(run, "train_loss"), strict=True))
    both = [(round, loss - train[round]) for round, loss in zip(rounds, losses, strict=True) if round in train]
    return both[-1] if both else None


def roughness(losses: Sequence[float]) -> float:
    """Return the share of a curve's movement that goes up: 0 if it only falls, 1 if it only rises."""
    moves = [after - before for before, after in itertools.pairwise(losses)]
    whole = sum(map(abs, moves))
    return sum(move for move in moves if move > 0) / whole if whole else 0.0


def completed(run: Run) -> int:
    """Return the number of rounds on record, round 0 left out."""
    return len(trained_rounds(run))
