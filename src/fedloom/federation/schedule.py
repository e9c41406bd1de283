"""Choices that change over the rounds of a run: who takes part, the proximal term's μ, and when it stops."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from fedloom.seeds import derive_seed
from fedloom.training.objective import SCHEDULES

if TYPE_CHECKING:
    from fedloom.recipe.sections import EarlyStop, Evaluation, Federation
    from fedloom.recipe.training_section import Training


def sample_clients(clients: Sequence[int], section: Federation, *, seed: int, round: int) -> list[int]:
    """Draw the clients of this round, in ascending order; the same for the same seed and round."""
    generator = random.Random(derive_seed(seed, "sampling", round))
    return sorted(generator.sample(list(clients), cohort_size(len(clients), section)))


def cohort_size(clients: int, section: Federation) -> int:
    """Return how many clients train in a round: the share `fraction` of them, rounded, but at least `min_clients`.

    Halves are rounded up. If there are fewer clients than `min_clients`, all of them train.
    """
    return min(clients, max(section.min_clients, int(section.fraction * clients + 0.5)))


def choose_scored_clients(
    holdout_blocks: Sequence[int], section: Evaluation, *, seed: int, private: bool
) -> Sequence[int]:
    """Draw the clients whose hold-outs are scored, once for all rounds, so that rounds can be compared."""
    # A client's loss tells of its documents: in a private run none is asked for.
    able = [client for client, blocks in enumerate(holdout_blocks) if blocks and not private]
    wanted = section.clients or len(able)
    # The purpose's word is older than the name: another one would draw other clients.
    return sorted(random.Random(derive_seed(seed, "judges")).sample(able, min(wanted, len(able))))


STEP = 0.1
"""Change of an adaptive μ."""
FALLS = 5
"""Number of rounds in a row whose loss must fall before an adaptive μ does."""


def is_evaluated(round: int, rounds: int, every: int) -> bool:
    """Return whether the adapter is evaluated after a round: after round 0, every N-th, and the last."""
    return round % every == 0 or round == rounds


def count_evaluated(rounds: int, every: int) -> int:
    """Return after how many rounds the adapter is evaluated, round 0 left out; 0 stands for every one."""
    return 0 if every == 1 else sum(is_evaluated(round, rounds, every) for round in range(1, rounds + 1))


def proximal_mu(training: Training, losses: Sequence[float | None], rounds: int) -> float:
    """Return μ for the next round, after these losses (round 0 first), in a run of `rounds` rounds.

    A loss is None after a round that was not evaluated, and an adaptive μ passes it by.
    """
    if training.proximal_schedule == "adaptive":
        return adapt_mu(training.proximal_mu, [loss for loss in losses if loss is not None])
    return training.proximal_mu * SCHEDULES[training.proximal_schedule]((len(losses) - 1) / rounds)


def adapt_mu(mu: float, losses: Sequence[float]) -> float:
    """Return μ + 0.1 for every rise of the loss and − 0.1 for every five falls in a row, never below 0.

    The rule is from FedProx (Li et al. 2020, arXiv 1812.06127, section 5.3).
    """
    falls = 0
    for before, after in pairwise(losses):
        falls = falls + 1 if after < before else 0
        if after > before:
            mu += STEP
        elif falls == FALLS:
            mu, falls = max(0.0, mu - STEP), 0
    return mu


def stop_early(early_stop: EarlyStop | None, losses: Sequence[float | None]) -> str | None:
    """Return why a run should stop after these losses (round 0 first), or None: no new best for too many rounds.

    A round that was not evaluated, whose loss is None, counts as waited for, and stops no run.
    """
    if early_stop is None or not losses or losses[-1] is None:
        return None
    best_round, best = 0, math.inf
    for round, loss in enumerate(losses):
        if loss is not None and (round == 0 or loss < best - early_stop.min_delta):
            best_round, best = round, loss
    waited = len(losses) - 1 - best_round
    if waited < early_stop.patience:
        return None
    better = f"better than round {best_round}'s {best:.4f} by more than {early_stop.min_delta:g}"
    return f"no loss {better} in {waited} rounds"
