"""Reasons why losses of runs can't be compared, and what a table says that has runs of several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.records.run import Run, flatten
from fedloom.report import figures
from fedloom.report.arms_section import NOT_SETTINGS

OVER_SEEDS = (
    "Each seed holds out other documents: what stands over several seeds, a mean with its ± or the cost of reaching a"
    " loss, is over other hold-outs. Losses are compared within a seed."
)
"""Words on tables that have runs of several seeds."""


def unfairness(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the reasons why the losses of these runs can't be compared, a sentence each; empty if they can."""
    hold_outs = [(run.plan["central_documents"], run.plan["central_tokens"], run.recipe["seed"]) for run in runs]
    found = [*_differ_in_plan(runs, names), *_differ("central hold-outs", hold_outs, names)]
    # Some methods begin elsewhere than at the base model: with a prompt that was drawn, say.
    alike = [run for run in runs if run.recipe["adapter"]["method"] == runs[0].recipe["adapter"]["method"]]
    starts = [figures.judged_series(run)[2][0] for run in alike]
    # Before any training the same tokens give the same loss, but for the rounding of another machine or batch size.
    if not found and max(starts) - min(starts) > 1e-3 * max(starts):
        found.append("The runs begin with different losses: they are not scored on the same tokens.")
    return found


def unfairness_in_tables(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return what tables of all runs warn of: where each setting has the same seed, runs of one seed are compared."""
    if not mixes_seeds(runs):
        return unfairness(runs, names)
    found = _differ_in_plan(runs, names)
    for seed in dict.fromkeys(run.recipe["seed"] for run in runs) if not found else ():
        numbers = [number for number, run in enumerate(runs) if run.recipe["seed"] == seed]
        found += unfairness([runs[number] for number in numbers], [names[number] for number in numbers])
    return found


def mixes_seeds(runs: Sequence[Run]) -> bool:
    """Return whether runs have several seeds, and one that all settings have."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(settings_of(run), set()).add(run.recipe["seed"])
    return len(set().union(*seeds.values())) > 1 and bool(set.intersection(*seeds.values()))


def settings_of(run: Run) -> str:
    """Return what runs have alike that differ only in their seed."""
    return repr({key: value for key, value in flatten(run.recipe).items() if key not in NOT_SETTINGS | {"seed"}})


def _differ_in_plan(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    what: dict[str, list[Any]] = {
        "base models": [(run.plan["model"], run.plan["model_revision"]) for run in runs],
        "dtypes": [run.plan["dtype"] for run in runs],
        "data": [(run.plan["data"], run.plan["data_revision"]) for run in runs],
        "tokens in a block": [
            (run.recipe["data"]["max_length"], run.recipe["data"]["window"], run.recipe["data"]["pad_in_loss"])
            for run in runs
        ],
    }
    return [sentence for name, values in what.items() for sentence in _differ(name, values, names)]


def _differ(what: str, values: Sequence[Any], names: Sequence[str]) -> list[str]:
    odd = [name for name, value in zip(names, values, strict=True) if value != values[0]]
    return [f"{', '.join(odd)}: other {what} than {names[0]}. Their losses can't be compared."] if odd else []
