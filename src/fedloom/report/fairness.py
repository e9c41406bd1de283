"""Reasons why losses of runs can't be compared, and what a table says that has runs of several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.records.run import Record, Run, flatten
from fedloom.report import figures
from fedloom.report.arms_section import NOT_SETTINGS

OVER_SEEDS = (
    "Each seed holds out other documents: what stands over several seeds, a mean with its ± or the cost of reaching a"
    " loss, is over other hold-outs. Losses are compared within a seed."
)
"""Words on tables that have runs of several seeds."""
ROUNDING, COARSE = {"float32": 1e-4}, 1e-3
"""Part of itself by which a loss may differ by rounding: by the base model's dtype, and in any other."""


def unfairness(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the reasons why the losses of these runs can't be compared, a sentence each; empty if they can."""
    found = [*_differ_in_plan(runs, names), *_differ_in_hold_outs(runs, names)]
    # Some methods begin elsewhere than at the base model: with a prompt that was drawn, say.
    alike = [run for run in runs if run.recipe["adapter"]["method"] == runs[0].recipe["adapter"]["method"]]
    starts = zip(*(_starts(run) for run in alike), strict=True) if not found else ()
    # Before any training the same tokens give the same loss, but for the rounding of another machine or batch size.
    rounding = ROUNDING.get(runs[0].plan["dtype"], COARSE)
    if any(max(losses) - min(losses) > rounding * max(losses) for losses in starts):
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


def _differ_in_hold_outs(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the differences between what runs are judged on: which clients' documents, where none are central."""
    central = [figures.judged_series(run)[0] == "central" for run in runs]
    held = [
        _central_hold_out(run) if is_central else _scored_clients(run)
        for run, is_central in zip(runs, central, strict=True)
    ]
    found = _differ("central hold-outs" if all(central) else "hold-outs", held, names)
    # Where shares are capped, clients are judged by the median of how far their losses moved, and not by their mean.
    limits = [
        None if is_central else run.recipe["federation"].get("max_share")
        for run, is_central in zip(runs, central, strict=True)
    ]
    return found or _differ("measures of the loss (federation.max_share)", limits, names)


def _central_hold_out(run: Run) -> list[Any]:
    return [run.plan["central_documents"], run.plan["central_tokens"], run.recipe["seed"]]


def _scored_clients(run: Run) -> list[Any]:
    """Return which clients' hold-outs were scored, with what is on record of them, and how documents are divided."""
    scored = _first(run).get("client_losses", {})
    told = {number: client for number, client in enumerate(run.plan["clients"]) if str(number) in scored}
    sizes = {number: [of.get(f"holdout_{what}") for what in ("documents", "tokens")] for number, of in told.items()}
    return [sizes, run.recipe["data"]["partition"], run.recipe["seed"]]


def _starts(run: Run) -> list[float]:
    """Return the losses that a run begins with: each scored client's, where nothing is held out centrally."""
    name, _, losses = figures.judged_series(run)
    by_client = _first(run).get("client_losses", {}) if name != "central" else {}
    return [by_client[client] for client in sorted(by_client, key=int)] or losses[:1]


def _first(run: Run) -> Record:
    """Return the record of the first round that was evaluated."""
    first = figures.judged_series(run)[1][0]
    return next(record for record in run.rounds if record["round"] == first)


def _differ(what: str, values: Sequence[Any], names: Sequence[str]) -> list[str]:
    odd = [name for name, value in zip(names, values, strict=True) if value != values[0]]
    return [f"{', '.join(odd)}: other {what} than {names[0]}. Their losses can't be compared."] if odd else []
