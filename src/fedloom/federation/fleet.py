"""Whoever carries out tasks: the Fleet protocol, and the fleet that is this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import ClientBlocks, TokenBlocks
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import Holding
from fedloom.training.jobs import ClientFailure, ClientJob, ClientResult, ClientTask, OptimizerState, TrainClients

EvaluateBlocks = Callable[[Adapter, TokenBlocks], Score]


class Fleet(Protocol):
    """Clients by their ids, wherever they are."""

    @property
    def clients(self) -> Sequence[int]:
        """Ids of all clients, in ascending order."""
        ...

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Have each client carry out its task; yield what comes of it as they finish."""
        ...

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Each client's score of an adapter on its own hold-out; clients without one are left out."""
        ...


class LoyalFleet(Fleet, Protocol):
    """A fleet that can go on where another one of the same run was."""

    @property
    def optimizer_states(self) -> dict[int, OptimizerState]:
        """What clients keep between rounds, as far as it is the server's to keep."""
        ...

    @property
    def scores(self) -> dict[int, Score]:
        """Of the last adapter that was evaluated."""
        ...

    @property
    def holdings(self) -> dict[int, Holding]:
        """What each client has to train on."""
        ...

    def restore(self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score]) -> None:
        """Take on what that fleet kept."""
        ...


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
        # A client with nothing to train on is never asked to.
        self.clients: Sequence[int] = [client for client, held in enumerate(data) if len(held.train)]
        self._data = data
        self._train_clients = train_clients
        self._evaluate_blocks = evaluate_blocks
        self._judges = range(len(data)) if judges is None else judges
        self.optimizer_states: dict[int, OptimizerState] = {}
        self.scores: dict[int, Score] = {}
        """Of the last adapter that was evaluated."""

    @property
    def holdings(self) -> dict[int, Holding]:
        """What each client has to train on."""
        held = {client: self._data[client].train for client in self.clients}
        return {client: Holding(len(blocks), blocks.num_tokens) for client, blocks in held.items()}

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        return map(self.finish, self._train_clients(self.jobs(tasks)))

    def jobs(self, tasks: Sequence[ClientTask]) -> list[ClientJob]:
        """Each client's task with what it holds."""
        return [
            ClientJob(
                **vars(task),
                blocks=self._data[task.client].train,
                optimizer_state=self.optimizer_states.get(task.client),
            )
            for task in tasks
        ]

    def finish(self, update: ClientResult) -> ClientResult:
        """Keep what the client keeps, and score its own adapter on its hold-out, beside the global one's score."""
        client = update.client
        if isinstance(update, ClientFailure):
            self.optimizer_states.pop(client, None)  # it may be what failed, and would fail again
            return update
        if update.optimizer_state:
            self.optimizer_states[client] = update.optimizer_state
        if client not in self.scores:
            return update
        started = time.perf_counter()
        after = self._evaluate_blocks(update.adapter, self._data[client].holdout)
        report = replace(
            update.report,
            holdout_loss_before=self.scores[client].loss,
            holdout_loss_after=after.loss,
            evaluate_seconds=time.perf_counter() - started,
        )
        return replace(update, report=report)

    def restore(self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score]) -> None:
        """What the clients of another run of the same recipe kept, and how its adapter did."""
        self.optimizer_states, self.scores = optimizer_states, scores

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        self.scores = {
            client: self._evaluate_blocks(adapter, self._data[client].holdout)
            for client in self._judges
            if len(self._data[client].holdout)
        }
        return self.scores
