"""When a run stops before its last round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.recipe.sections import EarlyStop


def stop_early(early_stop: EarlyStop | None, losses: Sequence[float]) -> str | None:
    """Why a run should stop after these losses (round 0 first), or None: no new best for too many rounds."""
    if early_stop is None or not losses:
        return None
    best_round, best = 0, losses[0]
    for round, loss in enumerate(losses):
        if loss < best - early_stop.min_delta:
            best_round, best = round, loss
    waited = len(losses) - 1 - best_round
    if waited < early_stop.patience:
        return None
    better = f"better than round {best_round}'s {best:.4f} by more than {early_stop.min_delta:g}"
    return f"no loss {better} in {waited} rounds"
