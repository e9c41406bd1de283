"""The proximal term's μ over the rounds of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fedloom.training.objective import SCHEDULES

if TYPE_CHECKING:
    from fedloom.recipe.sections import Training

STEP = 0.1
FALLS = 5


def proximal_mu(training: Training, losses: Sequence[float], rounds: int) -> float:
    """μ of the next round, after rounds with these losses (round 0 first) of the `rounds` that a run has."""
    if training.proximal_schedule == "adaptive":
        return adapt_mu(training.proximal_mu, losses)
    return training.proximal_mu * SCHEDULES[training.proximal_schedule]((len(losses) - 1) / rounds)


def adapt_mu(mu: float, losses: Sequence[float]) -> float:
    """μ + 0.1 for every rise of the loss, μ − 0.1 for every five falls in a row, never below 0.

    FedProx (Li et al. 2020, arXiv 1812.06127, section 5.3).
    """
    falls = 0
    for before, after in pairwise(losses):
        falls = falls + 1 if after < before else 0
        if after > before:
            mu += STEP
        elif falls == FALLS:
            mu, falls = max(0.0, mu - STEP), 0
    return mu
