"""The runs of the study: each tier's sweeps, as the `[sweep]` table that goes behind the tier's recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Axes = Mapping[str, Any]
"""Values by key, or by key a table of values that bring keys of their own, as in `[sweep]`."""

SEEDS = {"nano": [1, 2, 3], "small": [1, 2, 3], "card": [1, 2, 3], "full": [1, 2, 3]}
MIXED: Axes = {"iid": {}, "natural": {"data.partition.by": "package"}}
AS_RUN: Axes = {
    "training.proximal_mu": 0.0,
    "training.optimizer_state": "keep",
    "training.schedule": "linear",
    "training.schedule_scope": "round",
    "training.max_gradient_norm": 1.0,
    "data.duplicates": "report",
}
"""What the published program did beside counting padding, as far as it differs from its document."""


def list_sweeps(tier: str, documents: int, rate: float) -> dict[str, Axes]:
    """Return the axes of each of a tier's sweeps, for clients with so many documents each and this learning rate.

    The first sweep has the experiment itself in it, which all others are set against.
    """
    seeds = {"seed": SEEDS[tier]}

    def times(factor: float) -> float:
        return float(f"{factor * rate:.6g}")  # as a person would write it

    whole: dict[str, Axes] = {
        "proximal": {"data.partition.kind": MIXED, "training.proximal_mu": [0.0, 0.01, 0.1, 1.0, 10.0]},
        "documents": {"data.documents_per_client": [documents // 2]},
        "full-model": {"adapter.method": {"full": {}}, "training.learning_rate": [times(0.1), rate]},
        "as-run": {"data.pad_in_loss": {"true": AS_RUN}},
        "rates": {"training.learning_rate": [times(0.3), times(3)], "training.proximal_mu": [0.0, 0.1, 1.0]},
        "ranks": {"adapter.rank": {"4": {"adapter.alpha": 8}, "64": {"adapter.alpha": 128}}},
        "clients": {
            "data.clients": {str(number): {"data.documents_per_client": 3 * documents // number} for number in (10, 30)}
        },
        "methods": {
            "adapter.method": {"ia3": {}, "vera": {}, "prompt_tuning": {"adapter.options.num_virtual_tokens": 16}},
            "training.learning_rate": [times(10)],
        },
        "dora": {"adapter.dora": [True]},
        "momentum": {"federation.strategy.kind": {"fedavgm": {}}},
        "rules": {"federation.lora_rule": ["ffa", "rolora", "svd", "fedex"]},
    }
    if tier == "nano":  # documents of a few lines, in blocks of which they fill most, and about half
        whole["padding"] = {
            "data.max_length": {str(length): {"data.source": "first-lines"} for length in (64, 128)},
            "data.pad_in_loss": [False, True],
            "federation.rounds": [10],
        }
    if tier == "small":  # as far as hours go: all weights, and the adapter on one seed, over mixed files and packages
        return {
            "mixed": {"data.partition.kind": {"iid": {}}, "seed": SEEDS[tier][:1]},
            "natural": {"data.partition.kind": {"natural": MIXED["natural"]}, "seed": SEEDS[tier][:1]},
            "full-model": {**whole["full-model"], **seeds},
        }
    if tier == "card":  # what one pass of many adapters gives; all weights are trained launch by launch, so not here
        few: dict[str, Axes] = {
            "proximal": {"data.partition.kind": MIXED, "training.proximal_mu": [0.0, 0.1, 10.0]},
            "documents": whole["documents"],
            "rates": {"training.learning_rate": [times(5)], "training.proximal_mu": [0.0, 0.1]},
        }
        return {name: {**axes, **seeds} for name, axes in few.items()}
    return {name: {**axes, **seeds} for name, axes in whole.items()}


def count_runs(sweeps: Mapping[str, Axes]) -> int:
    """Return how many runs sweeps have: every combination of each."""
    return sum(math.prod(map(len, axes.values())) for axes in sweeps.values())
