"""Clients that carry out tasks: the Fleet protocol, and the fleet that is this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import ClientBlocks
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Asked, Score
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
from fedloom.training.objective import MEND_INFINITE

Item = TypeVar("Item")


@dataclass(frozen=True)
class Scorer:
    """Whoever scores adapters, each on blocks of its own."""

    score: Callable[[Sequence[Asked]], Sequence[Score]]
    """A function that scores each adapter on the blocks beside it."""
    at_once: int = 1
    """Most adapters that are scored in one pass."""


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

    def foresee(self, tasks: Sequence[ClientTask]) -> Mapping[int, ClientSize]:
        """Return the units and tokens that each client will have trained on by these tasks, where that is known."""
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
    def away(self) -> Mapping[int, float]:
        """Seconds for which each client that was away was waited for, since training last began."""
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
        scorer: Scorer,
        scored_clients: Sequence[int] | None = None,
        own: OwnParts | None = None,
        rations: Callable[[ClientTask], Ration] | None = None,
    ) -> None:
        self._rations = rations
        # A client with nothing to train on is never asked to.
        self.clients: Sequence[int] = [client for client, held in enumerate(data) if len(held.train)]
        self._data = data
        self._train_clients = train_clients
        self._scorer = scorer
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
    def away(self) -> Mapping[int, float]:
        """Nobody: clients of this process are always there."""
        return {}

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

    def foresee(self, tasks: Sequence[ClientTask]) -> Mapping[int, ClientSize]:
        """Return the blocks and tokens that each client will have trained on by these tasks, as it will report them."""
        jobs = [self._job(task) for task in tasks]
        return {job.client: ClientSize(len(job.blocks), job.count_tokens()) for job in jobs}

    def train(self, tasks: Sequence[ClientTask]) -> Iterator[ClientResult]:
        """Train the clients of these tasks with the engine; yield each result, scored, when it is there.

        Where they can be scored in one pass, as many wait for each other as train at once.
        """
        at_once = 1
        if tasks and self.scores:
            at_once = min(self._scorer.at_once, tasks[0].training.clients_at_once or len(tasks))
        waiting: list[ClientResult] = []
        for result in self._train_clients(self.jobs(tasks)):
            waiting.append(result)
            if len(waiting) == at_once:
                yield from self.finish(waiting)
                waiting = []
        yield from self.finish(waiting)

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

    def finish(self, results: Sequence[ClientResult]) -> list[ClientResult]:
        """Keep what clients keep, and score each one's own adapter on its hold-out, beside the global one's score."""
        results = [_refuse_state(result) for result in results]
        for result in results:
            self._keep(result)
        able = [one for one in results if isinstance(one, ClientUpdate) and one.client in self.scores]
        if not able:
            return list(results)
        started = time.perf_counter()
        after = self._scorer.score([(update.adapter, self._data[update.client].holdout) for update in able])
        seconds = (time.perf_counter() - started) / len(able)
        scored = {
            id(update): replace(
                update,
                report=replace(
                    update.report,
                    holdout_loss_before=self.scores[update.client].loss,
                    holdout_loss_after=score.loss,
                    evaluate_seconds=seconds,
                ),
            )
            for update, score in zip(able, after, strict=True)
        }
        return [scored.get(id(result), result) for result in results]

    def _keep(self, result: ClientResult) -> None:
        client = result.client
        if isinstance(result, ClientFailure):
            # It may be what failed, and would fail again.
            self.optimizer_states.pop(client, None)
            return
        if self._own:
            self._own.keep(client, result.adapter)
        if result.optimizer_state:
            self.optimizer_states[client] = result.optimizer_state

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
        able = [client for client in self._scored_clients if len(self._data[client].holdout)]
        # Not all at once: where clients have parts of their own, each one's adapter takes memory of its own.
        asked = ((self.adapter_of(client, adapter), self._data[client].holdout) for client in able)
        found = (score for group in _in_groups(asked, self._scorer.at_once) for score in self._scorer.score(group))
        self.scores = dict(zip(able, found, strict=True))
        return self.scores


def _in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield items in groups of so many, each when all of its own are there."""
    left = iter(items)
    while group := list(islice(left, size)):
        yield group


def _refuse_state(result: ClientResult) -> ClientResult:
    """Return the failure of a client whose optimizer came to no number, else the result as it is."""
    if isinstance(result, ClientFailure):
        return result
    wrong = [name for name, value in result.optimizer_state.items() if not torch.isfinite(value).all()]
    if not wrong:
        return result
    report = result.report
    error = TrainingError(
        f"the optimizer's {wrong[0]} is not finite",
        round=report.round,
        client=report.client,
        stage="training",
        mend=MEND_INFINITE,
    )
    return ClientFailure(report.client, error, result.trial)
