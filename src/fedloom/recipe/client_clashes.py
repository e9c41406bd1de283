"""Settings that can't stand beside `privacy.unit = "client"`, each with why: what a recipe is then refused for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedloom.recipe.data_section import Data
from fedloom.recipe.sections import SERVER_OPTIMIZERS, Federation


class ClientClash(NamedTuple):
    """A setting that would tell more of one client than is accounted for, why, and how to mend it."""

    clashes: Callable[[Federation, Data], bool]
    where: str
    why: str
    mend: str


CLIENT_CLASHES = (
    ClientClash(
        lambda federation, data: federation.strategy.kind not in ("fedavg", *SERVER_OPTIMIZERS),
        "federation.strategy.kind",
        "it looks at each client's update, and only their noised sum may be seen; privacy.max_norm bounds each",
        f'use "fedavg", or a server\'s optimizer: {", ".join(SERVER_OPTIMIZERS)}',
    ),
    ClientClash(
        lambda federation, data: federation.strategy.weight_by != "equal",
        "federation.strategy.weight_by",
        "a client of a larger weight would move the sum by more than privacy.max_norm, and the noise covers no more",
        'set it to "equal"',
    ),
    ClientClash(
        lambda federation, data: federation.lora_rule in ("fedsa", "svd", "fedex"),
        "federation.lora_rule",
        "it keeps or multiplies the factors of each client, which no noise covers",
        'use "factors", "ffa" or "rolora"',
    ),
    ClientClash(
        lambda federation, data: federation.min_clients > 1,
        "federation.min_clients",
        "each client is drawn by itself, so a round has as many as it happens to have, or none",
        "leave it out",
    ),
    ClientClash(
        lambda federation, data: federation.max_share is not None,
        "federation.max_share",
        "every client counts the same already",
        "leave it out",
    ),
    ClientClash(
        lambda federation, data: federation.max_bytes is not None,
        "federation.max_bytes",
        "how many clients were drawn is secret, and the round that a run ends after would tell it",
        "leave it out, or lower federation.rounds",
    ),
    ClientClash(
        lambda federation, data: data.client_holdout > 0,
        "data.client_holdout",
        "what one client holds out is dropped from the training of others, so it would change more than its own update",
        "set it to 0, and hold documents out centrally",
    ),
)
"""Every such setting; the first that a recipe has is the one it is told."""
