"""The document's claims, judged by the records: a verdict follows from numbers by a rule, not from a reader's mood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from records import REAL_LOSS, Tier

from fedloom.records.run import Record, Run, overfitting_onset
from fedloom.report import figures
from fedloom.report.paired import Difference, compare_pairs
from fedloom.text import format_bytes

Measure = Callable[[Run], float]

NOTICEABLE = 0.01
"""Nats a token below which a difference of losses is none for a reader: a tenth of what the small runs learn in all."""
SMALL_DRIFT = 0.05
"""Share of the drift below which a change of it is none for a reader."""
CALM = 0.01
"""Share of a loss' movement that goes up, below which there is nothing that could be made steadier."""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict, and what was measured, in words."""

    claim: str
    verdict: str
    because: str


def judge(found: Difference, least: float = NOTICEABLE) -> str:
    """Return the verdict on "this is lower": confirmed, refuted or undecided.

    Confirmed where the 95 % interval is below 0. Refuted where it is above 0, or where it holds 0 and nothing as large
    as `least`: then there is no difference that anybody would notice.
    """
    if found.is_seen:
        return "confirmed" if found.mean < 0 else "refuted"
    return "refuted" if max(-found.low, found.high) < least else "undecided"


def pair(
    one: Sequence[Run],
    other: Sequence[Run],
    measure: Measure,
    of_other: Measure | None = None,
    *,
    relative: bool = False,
) -> Difference:
    """Compare runs of two arms, seed by seed: the differences of a measure, or what share of the other's they are.

    Raises:
        ValueError: they have not the same seeds, each once.
    """
    first = {run.recipe["seed"]: measure(run) for run in one}
    second = {run.recipe["seed"]: (of_other or measure)(run) for run in other}
    if first.keys() != second.keys() or len(first) < len(one) or len(second) < len(other):
        seeds = [sorted(run.recipe["seed"] for run in runs) for runs in (one, other)]
        raise ValueError(f"seeds {seeds[0]} and {seeds[1]} make no pairs")
    return compare_pairs([(first[seed] - second[seed]) / (second[seed] if relative else 1) for seed in first])


def show(found: Difference, digits: int = 3) -> str:
    """Write a difference with its interval: `-0.045 (95 % interval -0.051 to -0.039, 3 pairs)`."""
    return _write(found, lambda value: f"{value:+.{digits}f}")


def show_share(found: Difference) -> str:
    """Write a relative difference as `show` does, in per cent."""
    return _write(found, lambda value: f"{100 * value:+.1f} %")


def _write(found: Difference, number: Callable[[float], str]) -> str:
    if found.p is None:
        return f"{number(found.mean)} (a single pair)"
    if found.low == found.high:
        return f"{number(found.mean)} in each of {found.pairs} pairs"
    interval = f"{number(found.low)} to {number(found.high)}"
    return f"{number(found.mean)} (95 % interval {interval}, {found.pairs} pairs)"


def loss_after(round: int) -> Measure:
    """Return what gives a run's central loss after a round; -1 is the last."""
    return lambda run: figures.judged_series(run)[2][round]


def fall(first: int, last: int) -> Measure:
    """Return what gives the change of a run's central loss from one round to another: negative where it falls."""
    return lambda run: loss_after(last)(run) - loss_after(first)(run)


def drift(run: Run) -> float:
    """Return how far clients moved from the global adapter in a round, the mean over the rounds."""
    return figures.spread(figures.series(run, "drift")[1]).mean


def best_loss(run: Run) -> float:
    """Return the lowest central loss of a run."""
    return min(figures.judged_series(run)[2])


def real_loss(run: Run) -> float:
    """Return the last central loss over real tokens alone, whatever the run itself counted."""
    counted = run.recipe["data"]["pad_in_loss"]
    return figures.series(run, REAL_LOSS)[1][-1] if counted else loss_after(-1)(run)


def padding_share(run: Run) -> float:
    """Return the share of padding in the blocks of the central hold-out."""
    return 1 - float(run.plan["central_tokens"] / (run.plan["central_documents"] * run.recipe["data"]["max_length"]))


def lora_error(run: Run) -> float:
    """Return the error of averaging LoRA's factors in the last round, as a share of the mean update."""
    return figures.series(run, "lora_error")[1][-1]


def roughness(run: Run) -> float:
    """Return the share of the central loss' movement that went up: 0 where it only fell."""
    return figures.roughness(figures.judged_series(run)[2])


def onset(run: Run) -> int | None:
    """Return the round from which the central loss only rose, or None."""
    return overfitting_onset(*figures.judged_series(run)[1:])


def say_onsets(runs: Sequence[Run]) -> str:
    """Say from which round each run overfits."""
    found = [onset(run) for run in runs]
    if not any(found):
        return f"no round, in {len(found)} runs"
    return ", ".join("no round" if round is None else f"round {round}" for round in found)


def fall_share(run: Run) -> float:
    """Return the share of the central loss before training that is gone after the last round."""
    return -fall(0, -1)(run) / loss_after(0)(run)


def mean(runs: Sequence[Run], measure: Measure) -> float:
    """Return the mean of a measure over runs."""
    return figures.spread([measure(run) for run in runs]).mean


def judge_claims(tier: Tier, plans: Record) -> list[Judged]:
    """Judge the document's claims, in its order, by a tier's runs; none whose runs are not on record."""
    experiment, plain = tier.mixed(), tier.mixed(0.0)
    half = tier.arm("documents")
    full = tier.arm("full-model", training__learning_rate=experiment[0].recipe["training"]["learning_rate"])
    lora, whole = plans["opt350m-lora-fedprox-6k"], plans["opt350m-fedprox-full-6k"]
    early, last = pair(experiment, half, fall(0, 10)), pair(experiment, half, loss_after(-1))
    same_work = pair(experiment, half, loss_after(10), loss_after(20))
    moved, moved_apart = (pair(of(), of(0.0), drift, relative=True) for of in (tier.mixed, tier.natural))
    share = 100 * lora["trainable_parameters"] / lora["parameters"]
    sent = whole["payload_bytes"] / lora["payload_bytes"]
    memory = whole["peak_bytes"] / lora["peak_bytes"]
    return [
        Judged(
            "More documents make the early descent steeper",
            judge(early),
            f"central loss of rounds 0 to 10 against half the documents: {show(early)} nats",
        ),
        Judged(
            "More documents reach a lower loss",
            judge(last),
            f"after the last round {show(last)} nats; after the same number of steps {show(same_work)} nats",
        ),
        Judged(
            "LoRA trains 0.47 % of the weights",
            "confirmed" if f"{share:.2f}" == "0.47" else "refuted",
            f"{lora['trainable_parameters']:,} of {lora['parameters']:,} of OPT-350M: {share:.2f} %",
        ),
        Judged(
            "That halves the memory",
            "confirmed" if 1.5 < memory < 2.5 else "refuted",
            f"OPT-350M in float32, one client at a time, as predicted: {format_bytes(lora['peak_bytes'])} with LoRA,"
            f" {format_bytes(whole['peak_bytes'])} with all weights: a cut of {memory:.1f} times, not of 2",
        ),
        Judged(
            "That halves what is sent",
            "confirmed" if 1.5 < sent < 2.5 else "refuted",
            f"{format_bytes(lora['payload_bytes'])} against {format_bytes(whole['payload_bytes'])} an update: a cut of"
            f" {sent:.0f} times, not of 2",
        ),
        Judged(
            "μ = 0.1 keeps clients near the global model",
            judge(moved, least=SMALL_DRIFT),
            f"drift, the mean over the rounds, against μ = 0: {show_share(moved)} where files are mixed,"
            f" {show_share(moved_apart)} where each client has whole packages",
        ),
        Judged(
            "μ = 0.1 makes training stable",
            judge_steadier(experiment, plain),
            f"share of the loss' movement that goes up: {mean(experiment, roughness):.3f}, and"
            f" {mean(plain, roughness):.3f} at μ = 0: a loss that only falls can't be made steadier. It costs"
            f" {show(pair(experiment, plain, loss_after(-1)))} nats at the end",
        ),
        Judged(
            "No overfitting until round 20 with LoRA",
            judge_onsets(experiment, overfits=False),
            f"the central loss rises from: {say_onsets(experiment)}",
        ),
        Judged(
            "The full model overfits on the way there",
            judge_onsets(full, overfits=True),
            f"at the same learning rate the central loss rises from: {say_onsets(full)}. The document says 6 or 7; its"
            " own losses rise from round 5",
        ),
    ]


def judge_steadier(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Return the verdict on "these losses are steadier than the others'": undecided where the others' hardly rise."""
    found = pair(runs, others, roughness)
    return judge(found, CALM) if mean(others, roughness) >= CALM else "undecided"


def judge_onsets(runs: Sequence[Run], *, overfits: bool) -> str:
    """Return the verdict on whether runs overfit: one that all of them share, else undecided."""
    found = {onset(run) is not None for run in runs}
    return "undecided" if len(found) > 1 else "confirmed" if found == {overfits} else "refuted"


def list_moves(tier: Tier) -> list[tuple[str, Difference]]:
    """Return what settings move the last central loss by, each alone, from the experiment as it is: the most first."""
    experiment = tier.mixed()
    rate = experiment[0].recipe["training"]["learning_rate"]

    def rates(factor: float) -> list[Run]:
        wanted = tier.arm("rates", training__proximal_mu=0.1)
        return [run for run in wanted if abs(run.recipe["training"]["learning_rate"] / (factor * rate) - 1) < 0.01]

    others = {
        "μ 0.1 → 0": tier.mixed(0.0),
        "μ 0.1 → 1": tier.mixed(1.0),
        "whole packages at each client": tier.natural(),
        "a third of the learning rate": rates(0.3),
        "three times the learning rate": rates(3),
        "rank 16 → 4, with α": tier.arm("ranks", adapter__rank=4),
        "rank 16 → 64, with α": tier.arm("ranks", adapter__rank=64),
        "10 clients, the same documents": tier.arm("clients", data__clients=10),
        "30 clients, the same documents": tier.arm("clients", data__clients=30),
        "half the documents": tier.arm("documents"),
        "all weights": tier.arm("full-model", training__learning_rate=rate),
        "DoRA": tier.arm("dora"),
        "FedAvgM": tier.arm("momentum"),
        "FFA: one factor of LoRA trained": tier.arm("rules", federation__lora_rule="ffa"),
    }
    found = [(name, pair(runs, experiment, loss_after(-1))) for name, runs in others.items()]
    return sorted(found, key=lambda move: -abs(move[1].mean))


def all_seconds(runs: Sequence[Run]) -> float:
    """Return the seconds of all rounds of runs."""
    return sum(map(figures.total_seconds, runs))


def evaluation_share(run: Run) -> float:
    """Return the share of evaluation in the seconds of all rounds."""
    return figures.phase_shares(run)["evaluation"]


def say_machines(runs: Sequence[Run]) -> str:
    """Say on what machine, with which versions and at which commits runs were made, each machine once."""
    commits: dict[str, dict[str, None]] = {}
    for run in runs:
        there, versions = run.environment, run.environment["versions"]
        processors = ", ".join([f"{there['processor']}, {there['cores']} cores", *there["gpus"]])
        packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
        machine = f"{processors}, Python {there['python']}, {packages}"
        commits.setdefault(machine, {})[there["commit"]] = None
    return "; ".join(f"{machine}, commit {' and '.join(of)}" for machine, of in commits.items())
