"""Who takes part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedloom.randomness import derive_seed


def sample_clients(clients: Sequence[int], fraction: float, *, seed: int, round: int) -> list[int]:
    """A share of the clients drawn for this round, in ascending order."""
    generator = random.Random(derive_seed(seed, "sampling", round))
    return sorted(generator.sample(list(clients), cohort_size(len(clients), fraction)))


def cohort_size(clients: int, fraction: float) -> int:
    """How many clients a share of them is: the nearest number, half upwards, and at least one."""
    return max(1, int(fraction * clients + 0.5))
