"""Parts of an adapter that stay with their clients: each client has its own, and the server has none of them to change.

With `lora_rule = "fedsa"` that is B of each client, where A is shared (Guo et al. 2024, arXiv 2410.01463).

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedloom.adapters.adapter import Adapter


class OwnParts:
    """Each client's own part of the adapter, as it was after its last training, or as everybody's began."""

    def __init__(self, initial: Adapter, shared_P: Tensor) -> None:
        self._own_P = ~shared_P
        self._start = initial.weights_P[self._own_P]
        self.parts: dict[int, Tensor] = {}
        """Parts by client, of those that have trained; none is ever changed in place."""

    def adapter_of(self, client: int, adapter: Adapter) -> Adapter:
        """Return the client's adapter: what is shared of this one, and what is its own."""
        own = self.parts.get(client, self._start)
        return replace(adapter, weights_P=adapter.weights_P.masked_scatter(self._own_P, own))

    def keep(self, client: int, adapter: Adapter) -> None:
        """Keep a client's own part of the adapter that it trained."""
        self.parts[client] = adapter.weights_P[self._own_P]

    def restore(self, parts: Mapping[int, Tensor]) -> None:
        """Take on what the clients kept before the run was stopped."""
        self.parts = dict(parts)
