"""Comparisons of runs side by side: the differences between their recipes, and between their results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.errors import RunError
from fedloom.host.files import LOCK, is_held
from fedloom.records.run import MEND, Run, flatten, read_run
from fedloom.records.sweep_folder import is_done, is_sweep, list_runs
from fedloom.report import figures
from fedloom.report.arms_section import (
    NOT_SETTINGS,
    Arms,
    compare_arms,
    group_runs,
    loss_after,
    note_arms,
    shared_rounds,
    show_arms,
    spread_by_round,
    tabulate_arms,
)
from fedloom.report.cost_section import show_convergence, show_cost
from fedloom.report.document import Block, Bullets, Document, Figure, Section, Table, Text, to_lines
from fedloom.report.fairness import OVER_SEEDS, mixes_seeds, settings_of, unfairness, unfairness_in_tables
from fedloom.report.observations import SHOWN, the_weight
from fedloom.report.plots import Line, Plot
from fedloom.report.run_report import LOSS_AXIS, write_document
from fedloom.report.setup_section import STATES
from fedloom.report.tasks_section import compare_tasks
from fedloom.report.worth_section import show_worth_over_seeds
from fedloom.text import format_bytes, quote_path

LITTLE = 0.05
"""Share by which the bytes of updates must differ before a sentence says so: less is `1.0 times`."""
NOTICEABLE = 0.1
"""Share by which two figures must differ before a sentence says so."""
MOST_IN_TITLE = 3
"""Runs whose names stand in the title."""


def write_comparison(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    by: Sequence[str] = (),
    against: str | None = None,
    say: Callable[[str], object] | None = None,
) -> Path:
    """Compare runs in `OUT/comparison.md` and `OUT/comparison.html`; return the page's path.

    `by` names keys of the recipe that make arms of them, each set against the arm `against`, or the first. A sweep's
    folder stands for its finished runs. `say` is told the short of it, line by line.

    Raises:
        RunError: a folder is no run directory, or a damaged one, there are fewer than two, or one has no finished
            round; no round was evaluated in all of them; or there are no such arms.
    """
    runs = [read_run(run) for folder in folders for run in runs_in(Path(folder))]
    if len(runs) < 2:
        raise _too_few(folders)
    for run in runs:
        if [record["round"] for record in run.rounds] != list(range(len(run.rounds))):
            raise RunError("its rounds are not one after another", where=str(run.folder / "rounds.jsonl"), mend=MEND)
        if not figures.judged_series(run)[1]:
            awaited = is_held(run.folder / LOCK)
            mend = "wait for the first evaluation" if awaited else "leave it out, or see what is: fedloom fsck RUN"
            raise RunError("no round of it has a loss on record", where=str(run.folder), mend=mend)
    arms = group_runs(runs, by, against) if by else None
    page = write_document(build_comparison(runs, arms), Path(out), "comparison")
    if say:
        for line in summarize(runs, arms):
            say(line)
    return page


def runs_in(folder: Path) -> list[Path]:
    """Return the finished runs of a sweep, in its order; of any other folder, the folder itself."""
    folder = folder.expanduser()
    if not is_sweep(folder):
        return [folder]
    return [folder / name for name in list_runs(folder) if is_done(folder / name)]


def _too_few(folders: Sequence[str | Path]) -> RunError:
    """Return the error of fewer than two runs; of a sweep it says how many are finished."""
    what, another = "a comparison needs two runs or more", "add another run directory"
    for sweep in filter(is_sweep, (Path(folder).expanduser() for folder in folders)):
        finished, asked = len(runs_in(sweep)), len(list_runs(sweep))
        if finished < asked:
            mend = f"finish them: fedloom status {quote_path(sweep)} says how; or {another}"
            return RunError(f"{what}, and {finished} of {asked} are finished", where=str(sweep), mend=mend)
    return RunError(what, where="fedloom compare", mend=another)


def summarize(runs: Sequence[Run], arms: Arms | None) -> list[str]:
    """Return the short of a comparison as lines: a row for each run, or for each arm, and what differs."""
    told = [OVER_SEEDS] if mixes_seeds(runs) else []
    if arms:
        return [*to_lines(tabulate_arms(arms)), "", *told, *note_arms(arms), *compare_arms(arms, unfairness)]
    names = _names(runs)
    rows = [
        [
            name,
            f"{figures.completed(run)} of {run.recipe['federation']['rounds']}",
            f"{min(losses):.4f} in {rounds[losses.index(min(losses))]}",
            f"{losses[-1]:.4f} in {rounds[-1]}",
            format_bytes(figures.update_bytes(run)),
            f"{figures.total_seconds(run):,.1f} s{', its part' if figures.shares_a_pass(run) else ''}",
        ]
        for name, run in zip(names, runs, strict=True)
        for _, rounds, losses in [figures.judged_series(run)]
    ]
    header = ["Run", "Rounds", "Best loss", "Last loss", "An update", "All rounds"]
    return [*to_lines(Table(header, rows)), "", *told, *unfairness_in_tables(runs, names), *conclude(runs, names)]


def build_comparison(runs: Sequence[Run], arms: Arms | None = None) -> Document:
    """Build a comparison of two runs or more, each with at least one round."""
    names = _names(runs)
    groups = _group_by_seeds(runs, names)
    told = [Text(OVER_SEEDS)] if mixes_seeds(runs) else []
    title = _title(runs, names)
    return Document(
        title=f"Comparison: {title}",
        subtitle=f"{len(runs)} runs" + ("" if title == ", ".join(names) else f": {', '.join(names)}"),
        state=", ".join(sorted({STATES.get(run.status.get("state", ""), "unknown") for run in runs})),
        sections=[
            *([Section("Arms", [*told, *show_arms(arms, unfairness)])] if arms else []),
            Section("What differs", [*([] if arms else told), *_differences(runs, names)]),
            Section("Loss", _losses(runs, names, groups)),
            *([Section("Was it worth it?", blocks)] if (blocks := show_worth_over_seeds(groups)) else []),
            Section("Convergence", show_convergence(runs, names)),
            *([Section("Tasks", blocks)] if (blocks := compare_tasks(runs, names)) else []),
            Section("Cost", show_cost(runs, names)),
            Section("In words", [Bullets(conclude(runs, names))]),
        ],
    )


def _title(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the name of the sweep that all runs are of, their own names where they are few, or their recipe's."""
    homes, recipes = {run.folder.resolve().parent for run in runs}, {run.recipe["name"] for run in runs}
    if len(homes) == 1 and is_sweep(home := homes.pop()):
        return home.name
    if len(runs) <= MOST_IN_TITLE:
        return ", ".join(names)
    return f"{recipes.pop()}, {len(runs)} runs" if len(recipes) == 1 else f"{len(runs)} runs"


def recipe_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return every key of the resolved recipes that differs between runs, with each run's value."""
    flat = [flatten(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe if key not in NOT_SETTINGS)
    values = {key: [recipe.get(key) for recipe in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def conclude(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Say in sentences what the tables show; each sentence only if it is true of these runs."""
    first_shared, *later = shared_rounds(runs)
    last_shared = later[-1] if later else first_shared
    shared = {name: loss_after(run, last_shared) for name, run in zip(names, runs, strict=True)}
    sentences = []
    ahead, behind = min(shared, key=shared.__getitem__), max(shared, key=shared.__getitem__)
    comparable = not unfairness(runs, names)
    gap = shared[behind] - shared[ahead]
    if comparable and gap >= SHOWN:
        sentences.append(
            f"After round {last_shared}, the last that all runs have, {ahead} is ahead: {shared[ahead]:.4f},"
            f" {gap:.4f} nats a token below {behind}."
        )
    elif comparable and gap > 0:
        sentences.append(f"After round {last_shared}, the last that all have, none is ahead by 0.0001 nats a token.")
    # Where not all rounds are evaluated, the first fall of one run may be that of more rounds than another's.
    falls = {
        name: loss_after(run, first_shared) - loss_after(run, later[0])
        for name, run in zip(names, runs, strict=True)
        if later
    }
    if comparable and falls:
        first, other = max(falls, key=falls.__getitem__), min(falls, key=falls.__getitem__)
        if falls[first] > 0 and falls[first] - falls[other] > NOTICEABLE * falls[first]:
            begin = "its first round" if later[0] - first_shared == 1 else f"its first {later[0] - first_shared} rounds"
            sentences.append(
                f"{first} falls fastest at first: {falls[first]:.4f} in {begin}, {other} {falls[other]:.4f}."
            )
    late: dict[str, list[str]] = {"overfitting": []}
    for name, run in zip(names, runs, strict=True):
        if rise := figures.find_rise(run):
            late.setdefault(rise.kind, []).append(f"{name} from round {rise.round}")
    sentences += [f"{kind.capitalize()}: {', '.join(which)}." for kind, which in late.items() if which]
    sentences += ["No run overfits in the rounds on record."] * (not late["overfitting"])
    payloads = {name: figures.update_bytes(run) for name, run in zip(names, runs, strict=True)}
    small, large = min(payloads, key=payloads.__getitem__), max(payloads, key=payloads.__getitem__)
    if payloads[large] > (1 + LITTLE) * payloads[small]:
        sentences.append(
            f"{large} sends {payloads[large] / payloads[small]:.1f} times the bytes of {small} in an update."
        )
    seconds = {
        name: fmean(map(figures.round_seconds, rounds))
        for name, run in zip(names, runs, strict=True)
        if (rounds := figures.trained_rounds(run))
    }
    if len(seconds) > 1:
        fast, long = min(seconds, key=seconds.__getitem__), max(seconds, key=seconds.__getitem__)
        if seconds[long] > (1 + NOTICEABLE) * seconds[fast]:
            sentences.append(
                f"A round of {long} takes {seconds[long]:.1f} s, {seconds[long] / seconds[fast]:.1f} times one of"
                f" {fast}."
            )
    for name, run in zip(names, runs, strict=True):
        if weight := the_weight(run):
            sentences.append(f"{name}: {weight}")
    return sentences


def _differences(runs: Sequence[Run], names: Sequence[str]) -> list[Block]:
    differences = recipe_differences(runs)
    rows = [[key, *("" if value is None else str(value) for value in values)] for key, values in differences.items()]
    blocks: list[Block] = [Text(warning, note=True) for warning in unfairness_in_tables(runs, names)]
    if not rows:
        return [*blocks, Text("Their recipes are the same.")]
    return [*blocks, Table(["Key", *names], rows, text_columns=1 + len(runs))]


def _losses(runs: Sequence[Run], names: Sequence[str], groups: Mapping[str, Sequence[Run]]) -> list[Block]:
    curves = [figures.judged_series(run) for run in runs]
    shared = shared_rounds(runs)
    first, last = shared[0], shared[-1]
    rises = [figures.find_rise(run) for run in runs]
    by_round = [dict(zip(rounds, losses, strict=True)) for _, rounds, losses in curves]
    rows = [
        ["Judged by", *(name for name, _, _ in curves)],
        [f"Loss, round {first} → {last}", *(f"{of[first]:.4f} → {of[last]:.4f}" for of in by_round)],
        [f"Δ loss ({first} → {last})", *(f"{of[last] - of[first]:+.4f}" for of in by_round)],
        [
            "Best loss",
            *(f"{min(losses):.4f} in round {rounds[losses.index(min(losses))]}" for _, rounds, losses in curves),
        ],
        ["Last loss", *(f"{losses[-1]:.4f} in round {rounds[-1]}" for _, rounds, losses in curves)],
        ["Loss rises", *(f"{rise.kind} from round {rise.round}" if rise else "no" for rise in rises)],
        ["Stability: movement that went up", *(f"{100 * figures.roughness(losses):.1f} %" for _, _, losses in curves)],
    ]
    gaps = [f"{gap[1]:+.4f} in round {gap[0]}" if (gap := figures.train_gap(run)) else "" for run in runs]
    if any(gaps):
        rows.append(["Held-out above training loss", *gaps])
    lines = [Line(name, rounds, losses) for name, (_, rounds, losses) in zip(names, curves, strict=True)]
    blocks: list[Block] = [
        Table(["", *names], rows),
        Figure(
            "comparison-loss",
            "The judged loss of each run, by round.",
            Plot(lines, x_label="round", y_label=LOSS_AXIS),
        ),
    ]
    return blocks + _over_seeds(groups)


def _group_by_seeds(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[Run]]:
    """Return the runs that differ only in their seed, by a title for all of them."""
    groups: dict[str, list[Run]] = defaultdict(list)
    named: dict[str, list[str]] = defaultdict(list)
    for run, name in zip(runs, names, strict=True):
        groups[settings_of(run)].append(run)
        named[settings_of(run)].append(name)
    return {
        f"{named[key][0]} and {len(members) - 1} more": members
        for key, members in groups.items()
        if len({run.recipe["seed"] for run in members}) > 1
    }


def _over_seeds(groups: Mapping[str, Sequence[Run]]) -> list[Block]:
    """Show runs that differ only in their seed as one: their mean and its spread; nothing if there are none."""
    rows, lines = [], []
    ends = [{figures.judged_series(run)[1][-1] for run in members} for members in groups.values()]
    alike = all(len(rounds) == 1 for rounds in ends)
    last, best = ("Last loss", "Best mean loss") if alike else ("Last shared loss", "Best mean until then")
    for title, members in groups.items():
        rounds, spreads = spread_by_round(members)
        means, deviations = [s.mean for s in spreads], [s.deviation for s in spreads]
        lines.append(
            Line(
                title,
                rounds,
                means,
                low=[m - d for m, d in zip(means, deviations, strict=True)],
                high=[m + d for m, d in zip(means, deviations, strict=True)],
            )
        )
        seeds = ", ".join(str(run.recipe["seed"]) for run in members)
        rows.append([title, seeds, f"{means[-1]:.4f} ± {deviations[-1]:.4f}", f"{min(means):.4f}"])
    if not rows:
        return []
    return [
        Text("Runs that differ only in their seed, taken together: mean and standard deviation over seeds."),
        Table(["Runs", "Seeds", last, best], rows, text_columns=2),
        Figure(
            "comparison-seeds",
            "Mean over seeds, with one standard deviation.",
            Plot(lines, x_label="round", y_label=LOSS_AXIS),
        ),
    ]


def _names(runs: Sequence[Run]) -> list[str]:
    """Name each run after its recipe, after its folder if two have that recipe, with a number if that is not enough."""
    recipes = [run.recipe["name"] for run in runs]
    folders = [run.folder.resolve().name for run in runs]
    names = [name if recipes.count(name) == 1 else folder for name, folder in zip(recipes, folders, strict=True)]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]
