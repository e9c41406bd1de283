"""Who takes part in a round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.seeds import derive_seed

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation


def sample_clients(clients: Sequence[int], section: Federation, *, seed: int, round: int) -> list[int]:
    """The clients drawn for this round, in ascending order."""
    generator = random.Random(derive_seed(seed, "sampling", round))
    return sorted(generator.sample(list(clients), cohort_size(len(clients), section)))


def cohort_size(clients: int, section: Federation) -> int:
    """How many clients train in a round: the recipe's share of them, the nearest number (half upwards), or its least.

    There may be fewer clients than that least: then it is all of them.
    """
    return min(clients, max(section.min_clients, int(section.fraction * clients + 0.5)))
