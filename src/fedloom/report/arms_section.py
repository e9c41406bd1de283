"""The comparison's section on arms: runs grouped by keys of their recipes, over seeds, with paired differences.

Runs of two arms are a pair where all else that varies within an arm, the seed first of all, is equal.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.errors import RunError
from fedloom.records.run import Run, flatten
from fedloom.report import figures
from fedloom.report.document import Block, Bullets, Figure, Table, Text
from fedloom.report.paired import Difference, compare_pairs, least_flipped_p
from fedloom.report.plots import Line, Plot
from fedloom.text import count, format_bytes, nearest

NOT_SETTINGS = {"name", "description"}
"""Keys of a recipe that have no effect on a run."""
LEAST_PAIRS = 6
"""Pairs from which the sign-flip test can have a p below 0.05."""

Warn = Callable[[Sequence[Run], Sequence[str]], list[str]]
"""A function that says, of runs and their names, why their losses can't be compared."""


@dataclass(frozen=True)
class Arm:
    """Runs that agree on the keys that were asked for."""

    name: str
    runs: Mapping[str, Run]
    """Each run by all else that varies within an arm: what its partners in other arms have alike."""
    round: int
    """Round after which its losses are compared: the last that all runs have that they are compared with."""

    @property
    def last_losses(self) -> list[float]:
        """Return the judged loss of each run after the arm's round."""
        return [loss_after(run, self.round) for run in self.runs.values()]

    @property
    def last_drifts(self) -> list[float]:
        """Return how far clients moved from the global adapter in the arm's round, of the runs that tell it."""
        return [drift for run in self.runs.values() if (drift := drift_in(run, self.round)) is not None]


@dataclass(frozen=True)
class Arms:
    """Arms in their order, and the number of the one that the others are set against."""

    arms: Sequence[Arm]
    reference: int
    beside: Sequence[str]
    """Keys that differ from one arm to another, and not within one, beside those that were asked for."""
    within: Sequence[str]
    """Keys other than the seed that vary within an arm."""


ROUNDS = "federation.rounds"
"""Key by which arms are meant to end in different rounds."""


def loss_after(run: Run, round: int) -> float:
    """Return the judged loss of a run after a round that it was evaluated in."""
    _, rounds, losses = figures.judged_series(run)
    return losses[list(rounds).index(round)]


def drift_in(run: Run, round: int) -> float | None:
    """Return how far clients moved from the global adapter in a round; None where it is not on record."""
    rounds, drifts = figures.series(run, "drift")
    return dict(zip(rounds, drifts, strict=True)).get(round)


def shared_rounds(runs: Sequence[Run]) -> list[int]:
    """Return the rounds after which all runs were judged.

    Raises:
        RunError: there are none.
    """
    found = sorted(set.intersection(*(set(figures.judged_series(run)[1]) for run in runs)))
    if not found:
        mend = "leave out a run: " + ", ".join(str(run.folder) for run in runs)
        raise RunError("no round was evaluated in all of the runs", where="fedloom compare", mend=mend)
    return found


def group_runs(runs: Sequence[Run], by: Sequence[str], against: str | None = None) -> Arms:
    """Group runs into arms by dotted keys of their recipes; `against` is the arm that the others are set against.

    It is named as the tables name it, or by its value alone; the first if left out. All are compared after the last
    round that all have, but for arms by their number of rounds, which are compared at their ends.

    Raises:
        RunError: no recipe has such a key, all runs are of one arm, two runs of an arm are alike, no such arm, or no
            round was evaluated in all of them.
    """
    flat = [{k: v for k, v in flatten(run.recipe).items() if k not in NOT_SETTINGS} for run in runs]
    known = list(dict.fromkeys(itertools.chain.from_iterable(flat)))
    for key in by:
        if key not in known:
            raise RunError(f"no run has a key `{key}`", where="--by", mend=nearest(key, known))
    found: dict[str, list[int]] = {}
    for number in sorted(range(len(runs)), key=lambda number: [_rank(flat[number].get(key)) for key in by]):
        found.setdefault(name_arm({key: flat[number].get(key) for key in by}), []).append(number)
    if len(found) < 2:
        raise RunError(f"all runs have {next(iter(found))}", where="--by", mend="name a key in which they differ")
    varies = [key for key in known if any(len({_text(flat[n].get(key)) for n in of}) > 1 for of in found.values())]
    beside = [key for key in known if key not in (*by, *varies) and len({_text(f.get(key)) for f in flat}) > 1]
    pairing = [key for key in dict.fromkeys(("seed", *varies)) if key not in by]
    arms = []
    for name, numbers in found.items():
        alike = {_text([flat[n].get(key) for key in pairing]): runs[n] for n in numbers}
        if len(alike) < len(numbers):
            raise RunError(f"two runs with {name} are alike", where="fedloom compare", mend="name each run once")
        last = shared_rounds([runs[n] for n in numbers] if ROUNDS in by else runs)[-1]
        arms.append(Arm(name, alike, last))
    return Arms(arms, _find_reference(list(found), against), beside, [key for key in varies if key != "seed"])


def name_arm(values: Mapping[str, Any]) -> str:
    """Name an arm after the values of its keys: `proximal_mu=0.1, method=lora`."""
    return ", ".join(f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in values.items())


def _find_reference(names: Sequence[str], against: str | None) -> int:
    if against is None:
        return 0
    values = [", ".join(part.partition("=")[2] for part in name.split(", ")) for name in names]
    for known in (names, values):
        if against in known:
            return list(known).index(against)
    raise RunError(f'no arm is "{against}"', where="--against", mend=f"choose one of: {'; '.join(names)}")


def _rank(value: object) -> tuple[bool, float]:
    """Return what sorts arms: numbers by their size, and all else behind them as it came."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, float(value) if number else 0.0  # type: ignore[arg-type]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: object) -> str:
    return "left out" if value is None else value if isinstance(value, str) else _text(value)


def tabulate_arms(grouped: Arms) -> Table:
    """Return a row for each arm: its runs, losses, drift, and what an update and the whole run send."""
    rows = []
    for arm in grouped.arms:
        runs = list(arm.runs.values())
        judged = [figures.judged_series(run)[1:] for run in runs]
        best = [min(loss for round, loss in zip(*of, strict=True) if round <= arm.round) for of in judged]
        rows.append(
            [
                arm.name,
                str(len(runs)),
                _spread(arm.last_losses),
                _spread(best),
                _spread(arm.last_drifts),
                format_bytes(max(map(figures.update_bytes, runs))),
            ]
        )
    last, best_until = ("Last loss", "Best loss") if not _go_on(grouped) else ("Last shared loss", "Best until then")
    return Table(["Arm", "Runs", last, best_until, "Drift", "An update"], rows)


def _go_on(grouped: Arms) -> bool:
    """Return whether some runs have rounds behind the one after which they are compared."""
    return any(figures.judged_series(run)[1][-1] > arm.round for arm in grouped.arms for run in arm.runs.values())


def _spread(values: Sequence[float]) -> str:
    found = figures.spread(values) if values else None
    return "" if not found else f"{found.mean:.4f}" + (f" ± {found.deviation:.4f}" if len(values) > 1 else "")


def compare_arms(grouped: Arms, warn: Warn, *, limits: bool = True) -> list[str]:
    """Say of each arm, in a sentence, whether its loss differs from the reference's, by how much, how surely.

    With `limits`, it is said too what so few pairs, and so many comparisons, can't show.
    """
    reference = grouped.arms[grouped.reference]
    said, most = [], 0
    for arm in grouped.arms:
        if arm is reference:
            continue
        shared = [key for key in reference.runs if key in arm.runs]
        pairs = [(arm.runs[key], reference.runs[key]) for key in shared]
        reasons = [why for pair in pairs for why in warn(pair[::-1], [reference.name, arm.name])]
        if reasons:
            why = reasons[0].removeprefix(f"{arm.name}: ")
            said.append(f"{arm.name}: not compared with {reference.name}. {why[0].upper()}{why[1:]}")
        elif pairs:
            ends = (arm.round, reference.round)
            found = compare_pairs([loss_after(one, ends[0]) - loss_after(other, ends[1]) for one, other in pairs])
            said.append(_say(arm.name, reference.name, found))
            most = max(most, found.pairs)
        else:
            said.append(f"{arm.name}: not compared with {reference.name}. They have no seed in common.")
    return [*said, *(_limits(most, len(grouped.arms) - 1) if limits else ())]


def _say(name: str, reference: str, found: Difference) -> str:
    """Say of one arm how it differs, or that no difference was seen and which one is not excluded."""
    pairs, mean = count(found.pairs, "pair"), f"{found.mean:+.4f} nats a token"
    if found.p is None:
        return f"{name} against {reference}: {mean} in a single pair, which says nothing of chance."
    p = "p " + ("< 0.001" if found.p < 0.001 else f"= {found.p:.2g}") + " (paired t)"
    p += f", {found.flipped_p:.2g} (sign flips)" if found.flipped_p else ""
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}, {pairs}, {p}"
    if found.is_seen:
        return f"{name} against {reference}: {'lower' if found.mean < 0 else 'higher'}, by {mean} ({interval})."
    if found.low == found.high:
        return f"{name} against {reference}: no difference, in none of {pairs}."
    most = max(-found.low, found.high)
    return f"{name} against {reference}: no difference seen: {mean} ({interval}). One of {most:.4f} is not excluded."


def _limits(pairs: int, comparisons: int) -> Iterator[str]:
    """Say what so few pairs, and so many comparisons, can't show."""
    if 2 <= pairs < LEAST_PAIRS:
        yield (
            f"With {count(pairs, 'pair')} the sign-flip test has no p below {least_flipped_p(pairs):.3g}, whatever the"
            f" difference: it needs {LEAST_PAIRS} for 0.05. The interval takes the differences for normally"
            " distributed, which so few can't show."
        )
    if pairs >= 2 and comparisons > 1:
        yield (
            f"Each of {comparisons} comparisons stands by itself: where there is no difference at all, one in 20 shows"
            " one by chance."
        )


def note_arms(grouped: Arms) -> list[str]:
    """Say what a reader of the tables has to know: what else differs between arms or within one, and where runs end."""
    notes = []
    if grouped.beside:
        notes.append(f"Arms differ in this, too: {', '.join(grouped.beside)}.")
    if grouped.within:
        notes.append(f"Within an arm these differ beside the seed: {', '.join(grouped.within)}.")
    ends = [figures.judged_series(run)[1][-1] for arm in grouped.arms for run in arm.runs.values()]
    compared = sorted({arm.round for arm in grouped.arms})
    if _go_on(grouped):
        after = f"round {compared[0]}" if len(compared) == 1 else "the last round that all runs of an arm have"
        last = ", the last that all have" if len(compared) == 1 else ""
        notes.append(f"Runs end after round {min(ends)} to {max(ends)}: they are compared after {after}{last}.")
    elif len(compared) > 1:
        notes.append(f"The last losses are of different rounds: {compared[0]} to {compared[-1]}.")
    return notes


def show_arms(grouped: Arms, warn: Warn) -> list[Block]:
    """Show arms as a table, what differs between them in words, and their figures."""
    return [
        Text("Mean and standard deviation over the runs of an arm; differences are those of pairs, seed by seed."),
        *(Text(note, note=True) for note in note_arms(grouped)),
        tabulate_arms(grouped),
        Bullets(compare_arms(grouped, warn)),
        *draw_arms(grouped.arms),
    ]


def draw_arms(arms: Sequence[Arm]) -> list[Figure]:
    """Return the figures: loss by round, last loss by arm, and the last loss against drift and against payload."""
    runs = [run for arm in arms for run in arm.runs.values()]
    loss = "last loss (nats per token)"
    found = [
        Figure(
            "arms-loss",
            "The judged loss of each arm, by round: the mean of its runs, with one standard deviation.",
            Plot([_curve(arm) for arm in arms], x_label="round", y_label="loss (nats per token)"),
        ),
        Figure(
            "arms-last",
            "The last loss of each arm: the mean with one standard deviation, and each run as a small point.",
            Plot(_last(arms), x_label="arm", y_label=loss, ticks=[arm.name for arm in arms]),
        ),
    ]
    if all(len(arm.last_drifts) == len(arm.runs) for arm in arms):
        found.append(
            Figure(
                "arms-drift",
                "The last loss against the drift of the last round: a point for each run.",
                Plot(
                    _scatter(arms, [arm.last_drifts for arm in arms]),
                    x_label="drift from the global adapter (norm)",
                    y_label=loss,
                ),
            )
        )
    if len({figures.update_bytes(run) for run in runs}) > 1:
        found.append(
            Figure(
                "arms-payload",
                "The last loss against the bytes of an update, on a logarithmic scale: a point for each run.",
                Plot(
                    _scatter(arms, [[*map(figures.update_bytes, arm.runs.values())] for arm in arms]),
                    x_label="bytes of an update",
                    y_label=loss,
                    log_x=True,
                ),
            )
        )
    return found


def _curve(arm: Arm) -> Line:
    rounds, spreads = spread_by_round(list(arm.runs.values()))
    return Line(
        arm.name,
        rounds,
        [s.mean for s in spreads],
        low=[s.mean - s.deviation for s in spreads],
        high=[s.mean + s.deviation for s in spreads],
    )


def spread_by_round(runs: Sequence[Run]) -> tuple[list[int], list[figures.Spread]]:
    """Return the rounds whose judged loss all runs have, and its mean and spread over them."""
    by_round = [dict(zip(*figures.judged_series(run)[1:], strict=True)) for run in runs]
    rounds = shared_rounds(runs)
    return rounds, [figures.spread([of[round] for of in by_round]) for round in rounds]


def _last(arms: Sequence[Arm]) -> list[Line]:
    means = []
    for number, arm in enumerate(arms):
        found = figures.spread(arm.last_losses)
        low, high = [found.mean - found.deviation], [found.mean + found.deviation]
        means.append(Line(arm.name, [number], [found.mean], low=low, high=high, joined=False))
    places = [float(number) for number, arm in enumerate(arms) for _ in arm.runs]
    losses = [loss for arm in arms for loss in arm.last_losses]
    return [*means, Line("a run", places, losses, faint=True, joined=False)]


def _scatter(arms: Sequence[Arm], places: Sequence[Sequence[float]]) -> list[Line]:
    return [Line(arm.name, of, arm.last_losses, joined=False) for arm, of in zip(arms, places, strict=True)]
