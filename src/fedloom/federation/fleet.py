"""Whoever carries out jobs: the Fleet protocol, and the fleet that is this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation import Score
from fedloom.training.jobs import ClientJob, ClientUpdate, OptimizerState, TrainClients

EvaluateBlocks = Callable[[Adapter, TokenBlocks], Score]


class Fleet(Protocol):
    """Clients by their ids, wherever they are."""

    @property
    def clients(self) -> Sequence[int]:
        """Ids of all clients, in ascending order."""
        ...

    def train(self, round: int, cohort: Sequence[int], adapter: Adapter) -> Iterator[ClientUpdate]:
        """Have each client of the cohort train from the global adapter; yield updates as they finish."""
        ...

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Each client's score of an adapter on its own hold-out; clients without one are left out."""
        ...


@dataclass(frozen=True)
class ClientBlocks:
    """What one client holds."""

    train: TokenBlocks
    holdout: TokenBlocks


class LocalFleet:
    """All clients in this process. It keeps what real clients would keep: data and optimizer state.

    `judges` are the clients whose hold-outs adapters are scored on; all if left out.
    """

    def __init__(
        self,
        data: Sequence[ClientBlocks],
        train_clients: TrainClients,
        evaluate_blocks: EvaluateBlocks,
        judges: Sequence[int] | None = None,
    ) -> None:
        self.clients: Sequence[int] = range(len(data))
        self._data = data
        self._train_clients = train_clients
        self._evaluate_blocks = evaluate_blocks
        self._judges = self.clients if judges is None else judges
        self._optimizer_states: dict[int, OptimizerState] = {}
        self._evaluated: tuple[Adapter, dict[int, Score]] | None = None

    def train(self, round: int, cohort: Sequence[int], adapter: Adapter) -> Iterator[ClientUpdate]:
        before = self.evaluate(adapter)
        jobs = [
            ClientJob(round, client, self._data[client].train, self._optimizer_states.get(client)) for client in cohort
        ]
        for update in self._train_clients(adapter, jobs):
            client = update.report.client
            if update.optimizer_state:
                self._optimizer_states[client] = update.optimizer_state
            if client in before:
                started = time.perf_counter()
                after = self._evaluate_blocks(update.adapter, self._data[client].holdout)
                report = replace(
                    update.report,
                    holdout_loss_before=before[client].loss,
                    holdout_loss_after=after.loss,
                    evaluate_seconds=time.perf_counter() - started,
                )
                update = replace(update, report=report)
            yield update

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        # The round loop has the new global adapter evaluated, and training starts from that same adapter.
        if self._evaluated is None or self._evaluated[0] is not adapter:
            scores = {
                client: self._evaluate_blocks(adapter, self._data[client].holdout)
                for client in self._judges
                if len(self._data[client].holdout)
            }
            self._evaluated = adapter, scores
        return self._evaluated[1]
