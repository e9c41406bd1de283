"""Clients that carry out tasks: the Fleet protocol, and the fleet that is this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import ClientBlocks, TokenBlocks
from fedloom.evaluation.held_out import Score
from fedloom.evaluation.task_counts import OwnAnswers
from fedloom.federation.admission import ClientSize
from fedloom.federation.own_parts import OwnParts
from fedloom.privacy.ration import Ration
from fedloom.training.jobs import (
    ClientFailure,
    ClientJob,
    ClientResult,
    ClientTask,
    ClientUpdate,
    OptimizerState,
    TrainClients,
)

EvaluateBlocks = Callable[[Adapter, TokenBlocks], Score]
"""A function that scores an adapter on held-out blocks."""


@dataclass(frozen=True)
class ClientPreview:
    """Preview of an update that comes again once all of a round are there, so that they can be judged together."""

    update: ClientUpdate

    @property
    def client(self) -> int:
        """Id of the client."""
        return self.update.client


class Fleet(Protocol):
    """Clients by their ids, wherever they are."""

    @property
    def clients(self) -> Sequence[int]:
        """Ids of all clients that can train, in ascending order."""
        ...

    @property
    def sizes(self) -> dict[int, ClientSize]:
        """The blocks and tokens that each client has to train on, where that is known."""
        ...

    @property
    def optimizer_states(self) -> dict[int, OptimizerState]:
        """Optimizer states that clients keep between rounds, as far as they are the server's to keep."""
        ...

    @property
    def scores(self) -> dict[int, Score]:
        """Each client's score of the last adapter that was evaluated."""
        ...

    @property
    def own_parts(self) -> dict[int, Tensor]:
        """Each client's own part of the adapter, where it has one, as far as it is the server's to keep."""
        ...

    @property
    def examined(self) -> Sequence[int]:
        """Ids of the clients that hold tasks of their own, and tell how many are right."""
        ...

    def ask_tasks(self, adapter: Adapter, *, base: bool) -> dict[int, OwnAnswers]:
        """Have those clients ask an adapter their own tasks, and the base model too; who does not tell is left out."""
        ...

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult | ClientPreview]:
        """Have each client carry out its task; yield what comes of it as they finish.

        A fleet whose clients may say anything yields a preview of each update before the first update.
        """
        ...

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Return each client's score of an adapter on its own hold-out; clients without one are left out."""
        ...

    def forget_scores(self) -> None:
        """Forget the scores: there is a new adapter, which nobody evaluates."""
        ...

    def restore(
        self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score], own_parts: dict[int, Tensor]
    ) -> None:
        """Take on what the fleet of an earlier part of the same run kept."""
        ...


class LocalFleet:
    """All clients in this process. It keeps what real clients would keep: data, optimizer state, their own parts.

    `scored_clients` are those on whose hold-outs adapters are scored; all if left out. With `own`, each client trains
    and is scored with its own part in the place of the global adapter's. `rations` gives what bounds the answer to a
    task, where something does.
    """

    def __init__(
        self,
        data: Sequence[ClientBlocks],
        train_clients: TrainClients,
        evaluate_blocks: EvaluateBlocks,
        scored_clients: Sequence[int] | None = None,
        own: OwnParts | None = None,
        rations: Callable[[ClientTask], Ration] | None = None,
    ) -> None:
        self._rations = rations
        # A client with nothing to train on is never asked to.
        self.clients: Sequence[int] = [client for client, held in enumerate(data) if len(held.train)]
        self._data = data
        self._train_clients = train_clients
        self._evaluate_blocks = evaluate_blocks
        self._scored_clients = range(len(data)) if scored_clients is None else scored_clients
        self._own = own
        self.optimizer_states: dict[int, OptimizerState] = {}
        self.scores: dict[int, Score] = {}
        """Each client's score of the last adapter that was evaluated."""

    @property
    def own_parts(self) -> dict[int, Tensor]:
        """Each client's own part of the adapter; empty where all of it is shared."""
        return self._own.parts if self._own else {}

    @property
    def examined(self) -> Sequence[int]:
        """Nobody: clients of this process have no owner who would hold tasks."""
        return ()

    def ask_tasks(self, adapter: Adapter, *, base: bool) -> dict[int, OwnAnswers]:
        """Ask nobody."""
        return {}

    def adapter_of(self, client: int, adapter: Adapter) -> Adapter:
        """Return the adapter as a client has it: with its own part, where it has one."""
        return self._own.adapter_of(client, adapter) if self._own else adapter

    @property
    def sizes(self) -> dict[int, ClientSize]:
        """The units and tokens that each client has to train on."""
        held = {client: self._data[client].train for client in self.clients}
        return {client: ClientSize(blocks.num_units, blocks.num_tokens) for client, blocks in held.items()}

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Train the clients of these tasks with the engine; yield each result, scored, when it is there."""
        for result in self._train_clients(self.jobs(tasks)):
            yield self.finish(result)

    def jobs(self, tasks: Sequence[ClientTask]) -> list[ClientJob]:
        """Return each client's task with the data that the client holds for it."""
        return [self._job(replace(task, adapter=self.adapter_of(task.client, task.adapter))) for task in tasks]

    def _job(self, task: ClientTask) -> ClientJob:
        return ClientJob(
            **vars(task),
            blocks=self._data[task.client].train,
            optimizer_state=self.optimizer_states.get(task.client),
            ration=self._rations and self._rations(task),
        )

    def finish(self, update: ClientResult) -> ClientResult:
        """Keep what the client keeps, and score its own adapter on its hold-out, beside the global one's score."""
        client = update.client
        if isinstance(update, ClientFailure):
            # It may be what failed, and would fail again.
            self.optimizer_states.pop(client, None)
            return update
        if self._own:
            self._own.keep(client, update.adapter)
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

    def forget_scores(self) -> None:
        """Forget the scores: a client whose adapter was not scored before training is not scored after it."""
        self.scores = {}

    def restore(
        self, optimizer_states: dict[int, OptimizerState], scores: dict[int, Score], own_parts: dict[int, Tensor]
    ) -> None:
        """Take on what the clients kept before this run was stopped, and how its adapter did."""
        self.optimizer_states, self.scores = optimizer_states, scores
        if self._own:
            self._own.restore(own_parts)

    def evaluate(self, adapter: Adapter) -> dict[int, Score]:
        """Score an adapter on the scored clients' hold-outs."""
        self.scores = {
            client: self._evaluate_blocks(self.adapter_of(client, adapter), self._data[client].holdout)
            for client in self._scored_clients
            if len(self._data[client].holdout)
        }
        return self.scores
