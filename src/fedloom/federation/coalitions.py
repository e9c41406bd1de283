"""Coalitions: the federations that there would be without some of the clients, and what each client brings to them.

A client's Shapley value is the mean, over the orders in which clients could come in, of how much better the federation
is behind it than before it (Shapley 1953; sampled orders: Castro et al. 2009, doi 10.1016/j.cor.2008.04.004). The
values of all clients add up to what all of them bring together.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from fedloom.seeds import derive_seed

Coalition = frozenset[int]
"""Clients that train together."""
MOST_CLIENTS = 8
"""Clients up to which Shapley values are found: each further one takes more federations, of more clients."""
MOST_TO_ENUMERATE = 4
"""Clients up to which every order is looked at: 24 orders have 14 coalitions."""
ORDERS = 8
"""Orders that are drawn where there are more clients."""


class Estimate(NamedTuple):
    """A mean over orders, and its standard error: 0 where it is over all of them."""

    value: float
    standard_error: float


def without_each(clients: Sequence[int]) -> dict[int, Coalition]:
    """Return, for each client, all others."""
    return {client: frozenset(clients) - {client} for client in clients}


def draw_orders(clients: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Draw the orders in which clients come in: all of them where there are few, none where there are too many."""
    if len(clients) > MOST_CLIENTS:
        return []
    if len(clients) <= MOST_TO_ENUMERATE:
        return list(itertools.permutations(clients))
    generator = random.Random(derive_seed(seed, "coalitions"))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < ORDERS:
        drawn[tuple(generator.sample(list(clients), len(clients)))] = None
    return list(drawn)


def coalitions_to_train(clients: Sequence[int], orders: Sequence[Sequence[int]]) -> list[Coalition]:
    """List the coalitions that must be trained, each once: neither nobody nor everybody, who is the run itself."""
    of_orders = (frozenset(order[:size]) for order in orders for size in range(1, len(order)))
    found = dict.fromkeys([*without_each(clients).values(), *of_orders])
    return [coalition for coalition in found if 0 < len(coalition) < len(clients)]


def shapley_values(losses: Mapping[Coalition, float], orders: Sequence[Sequence[int]]) -> dict[int, Estimate]:
    """Return by how much each client lowers the loss, over these orders; `losses` has every coalition's."""
    steps: dict[int, list[float]] = {}
    for order in orders:
        for place, client in enumerate(order):
            before, behind = frozenset(order[:place]), frozenset(order[: place + 1])
            steps.setdefault(client, []).append(losses[before] - losses[behind])
    whole = len(orders) == math.factorial(len(steps))
    return {
        client: Estimate(fmean(found), 0.0 if whole else stdev(found) / math.sqrt(len(found)))
        for client, found in sorted(steps.items())
    }
