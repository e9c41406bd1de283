"""The cost of a sweep, told before it starts: runs, passes, steps, memory, and a rough time where a rate is known.

Rounds that are on record cost nothing more, and say how fast the others will be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fedloom.errors import RunError
from fedloom.experiment.preparation import Prepared
from fedloom.progress import Stage, add_stages
from fedloom.records.run import Run, read_run
from fedloom.report.figures import seconds_at_rate
from fedloom.text import count, format_bytes, format_seconds
from fedloom.training.memory import share_of_each


@dataclass(frozen=True)
class Cost:
    """Work that is left of a sweep: the stages of each pass, in order. What tasks take is not counted."""

    runs: int
    models: int
    passes: tuple[tuple[Stage, ...], ...]
    peak_bytes: int | None
    """Bytes of the largest pass, by prediction; None where none was predicted."""
    seconds: float | None
    """Seconds at the rate of the rounds on record; None where there is none."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of all passes, one after another."""
        return (*chain.from_iterable(self.passes),)


def count_cost(folder: Path, models: Sequence[Sequence[Sequence[str]]], ready: Mapping[str, Prepared]) -> Cost:
    """Count what is left of a sweep in its folder: its runs by name, in the passes of each model."""
    passes = [together for model in models for together in model]
    left = tuple(count_left(folder, together, ready) for together in passes)
    peaks = [peak for together in passes if (peak := _peak([ready[name] for name in together])) is not None]
    return Cost(
        runs=sum(map(len, passes)),
        models=len(models),
        passes=left,
        peak_bytes=max(peaks, default=None),
        seconds=_seconds(folder, add_stages("rounds", [*chain.from_iterable(left)])),
    )


def count_left(
    folder: Path, together: Sequence[str], ready: Mapping[str, Prepared], ahead: Collection[str] = ()
) -> tuple[Stage, ...]:
    """Count what is left of a pass, of its runs by name: all rounds and all baselines, then what follows run by run.

    `ahead` are runs whose next round is trained, and not on record yet.
    """
    rounds, baselines, others = [], [], []
    for name in together:
        run = _read_begun(folder / name)
        ended = run is not None and bool(run.status.get("stopped_early"))
        records = run.rounds if run else []
        first, *later = ready[name].plan.stages_left(records, ended=ended, ahead=name in ahead)
        rounds.append(first)
        baselines += [stage for stage in later if stage.name == "baselines"]
        others += [stage for stage in later if stage.name != "baselines"]
    of_baselines = [add_stages("baselines", baselines)] if baselines else []
    return add_stages("rounds", rounds), *of_baselines, *others


def clients_at_once(together: Sequence[Prepared]) -> int:
    """Return how many clients of a pass train at once: as many as there is room for beside every one of its runs."""
    return min(prepared.capacity for prepared in together)


def _peak(together: Sequence[Prepared]) -> int | None:
    clients = sum(prepared.plan.clients_per_round for prepared in together)
    at_once = min(clients_at_once(together), share_of_each(clients, together[0].places))
    return max((one.memory.peak_bytes(at_once) for one in together if one.memory), default=None)


def _read_begun(folder: Path) -> Run | None:
    with suppress(RunError):  # it has not begun; what is damaged is told when it goes on
        return read_run(folder)
    return None


def _seconds(folder: Path, whole: Stage) -> float | None:
    """Return the seconds for so much work at the rate of all rounds in the sweep's folder; None without any."""
    runs = [_read_begun(path.parent) for path in sorted(folder.glob("*/rounds.jsonl"))]
    records = [record for run in runs if run for record in run.rounds]
    return seconds_at_rate(records, whole)


def describe_cost(cost: Cost) -> list[str]:
    """Return the cost in sentences, one a line."""
    work = f"{count(cost.runs, 'run')} in {len(cost.passes):,} pass{'' if len(cost.passes) == 1 else 'es'}"
    whole = add_stages("rounds", cost.stages)
    tokens = f"{whole.train:,} tokens to train on, {whole.evaluate:,} to score"
    peak = "not predicted" if cost.peak_bytes is None else f"{format_bytes(cost.peak_bytes)} predicted at most"
    time = (
        "not known before the first steps"
        if cost.seconds is None
        else f"about {format_seconds(cost.seconds)}, at the rate of the rounds on record"
    )
    return [
        f"{work}, the base model loaded {count(cost.models, 'time')}",
        f"{count(whole.steps, 'step')}, {tokens}",
        f"memory: {peak}; time: {time}",
    ]
