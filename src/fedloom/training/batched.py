"""All clients in one forward and backward pass over one frozen base model.

Each client's result is what it would be alone: its own batch order, dropout, loss, clipping, schedule and optimizer.
The loss of a client is its own token mean, and the sum over clients is what is differentiated, so the number of
clients scales no gradient. A client that has finished makes room; one that waits takes its place.

Letters: K clients at once, B sequences of a client, T tokens, M rows that count, P adapter parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.adapters.adapter import AdaptedModel, Adapter
from fedloom.adapters.stacked import Stack
from fedloom.data.tokens import IGNORED, Batch, take_batch
from fedloom.progress import Progress, Watch, ignore
from fedloom.randomness import derive_seed
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.jobs import ClientJob, ClientUpdate, TrainClients, WorkLog, draw_batches
from fedloom.training.memory import free_bytes, measure_step
from fedloom.training.objective import add_proximal_gradient, clip_gradient, learning_rate, next_token_targets
from fedloom.training.stacked_optimizers import STACKED_OPTIMIZERS, StackedOptimizer

if TYPE_CHECKING:
    from fedloom.recipe import Training


@dataclass
class Worker:
    """A client at work: its steps, what it has written down, and where its dropout stands."""

    log: WorkLog
    batches: list[Tensor]
    dropout: torch.Generator
    step: int = 0

    @property
    def job(self) -> ClientJob:
        return self.log.job

    @property
    def finished(self) -> bool:
        return self.step == len(self.batches)


def build_batched_engine(
    adapted: AdaptedModel,
    training: Training,
    *,
    rounds: int,
    seed: int,
    watch: Watch = ignore,
) -> TrainClients:
    """An engine bound to a model: `rounds` is what a schedule of scope `run` stretches over."""
    stack = Stack(adapted)

    @cache
    def clients_that_fit(max_length: int) -> int:
        tokens = training.batch_size * max_length
        step = measure_step(adapted, stack, tokens=tokens, optimizer=training.optimizer)
        return step.clients_that_fit(free_bytes(adapted.device))

    def train_clients(adapter: Adapter, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        widest = max(job.blocks.tokens_NT.shape[1] for job in jobs)
        at_once = min(len(jobs), training.clients_at_once or clients_that_fit(widest))
        crew = Crew(adapted, stack, training, adapter, at_once)
        waiting = deque(jobs)
        while waiting or crew.workers:
            while waiting and crew.has_room:
                crew.admit(waiting.popleft(), seed=seed)
            for worker, batch in crew.step(rounds):
                watch(Progress("train", batch.num_tokens, worker.job.round, worker.job.client))
            yield from crew.retire()

    return train_clients


class Crew:
    """The clients that train at once: slot k of every buffer is the k-th worker's."""

    def __init__(
        self,
        adapted: AdaptedModel,
        stack: Stack,
        training: Training,
        adapter: Adapter,
        num_slots: int,
    ) -> None:
        self._adapted, self._stack, self._training = adapted, stack, training
        self._adapter = adapter
        self._global_P = adapter.weights_P.to(adapted.device)
        self._weights_KP = self._global_P.expand(num_slots, -1).clone()
        self._gradient_KP = torch.zeros_like(self._weights_KP)
        self._optimizer: StackedOptimizer = STACKED_OPTIMIZERS[training.optimizer](self._weights_KP, training)
        self.workers: list[Worker] = []

    @property
    def has_room(self) -> bool:
        return len(self.workers) < len(self._weights_KP)

    def admit(self, job: ClientJob, *, seed: int) -> None:
        """Give a waiting client a slot, with the global weights and its own optimizer state."""
        slot, training = len(self.workers), self._training
        batches = draw_batches(
            len(job.blocks), training.batch_size, training.epochs, seed=seed, round=job.round, client=job.client
        )
        dropout = torch.Generator(self._adapted.device)
        dropout.manual_seed(derive_seed(seed, "dropout", job.round, job.client))
        self.workers.append(Worker(WorkLog(job, training.proximal_mu), batches, dropout))
        self._weights_KP[slot] = self._global_P
        self._optimizer.load(slot, job.optimizer_state)
        self._bind()

    def step(self, rounds: int) -> list[tuple[Worker, Batch]]:
        """One step of every worker.

        Raises:
            TrainingError: a client's loss is no longer a number.
        """
        training, workers = self._training, self.workers
        batches = [take_batch(worker.job.blocks, worker.batches[worker.step]) for worker in workers]
        weights_KP, gradient_KP = self._weights_KP[: len(workers)], self._gradient_KP[: len(workers)]

        gradient_KP.zero_()
        with self._stack.installed():
            loss_K = self._loss(batches)
            loss_K.sum().backward()

        with torch.no_grad():
            offset_KP = weights_KP - self._global_P
            facts = torch.stack([loss_K.detach().to(weights_KP.dtype), offset_KP.norm(dim=1), gradient_KP.norm(dim=1)])
            add_proximal_gradient(gradient_KP, offset_KP, training.proximal_mu)
            clip_gradient(gradient_KP, training.max_gradient_norm)
            self._optimizer.step(gradient_KP, self._rates(rounds))

        for worker, batch, (loss, drift, gradient_norm) in zip(workers, batches, facts.T.tolist(), strict=True):
            worker.log.add_step(loss, drift, gradient_norm, batch.num_tokens)
            worker.step += 1
        return list(zip(workers, batches, strict=True))

    def retire(self) -> Iterator[ClientUpdate]:
        """Yield the updates of the workers that have finished, and close the ranks."""
        for slot in reversed(range(len(self.workers))):
            worker = self.workers[slot]
            if not worker.finished:
                continue
            weights_P = self._weights_KP[slot]
            report = worker.log.finish(drift=(weights_P - self._global_P).norm().item())
            update = ClientUpdate(
                report,
                replace(self._adapter, weights_P=weights_P.to("cpu", copy=True)),
                self._optimizer.read(slot),
            )
            last = len(self.workers) - 1
            self._weights_KP[slot] = self._weights_KP[last]
            self._optimizer.move(last, slot)
            self.workers[slot] = self.workers[last]
            self.workers.pop()
            self._bind()
            yield update

    def _bind(self) -> None:
        count = len(self.workers)
        if count:
            self._stack.bind(self._weights_KP[:count], self._gradient_KP[:count])

    def _rates(self, rounds: int) -> Tensor:
        rates = [
            learning_rate(self._training, worker.step, len(worker.batches), worker.job.round, rounds)
            for worker in self.workers
        ]
        return torch.tensor(rates, dtype=torch.float64, device=self._adapted.device)

    def _loss(self, batches: Sequence[Batch]) -> Tensor:
        """Each client's mean over its own counted tokens, [K]."""
        tokens_KBT, labels_KBT = pad_together(batches)
        device = self._adapted.device
        tokens = tokens_KBT.flatten(0, 1).to(device)
        targets_KM = next_token_targets(labels_KBT.flatten(0, 1)).view(len(batches), -1).to(device)
        counted_KM = targets_KM != IGNORED
        rows = counted_KM.flatten().nonzero()[:, 0]
        targets_M = targets_KM.flatten()[rows]
        model = self._stack.model
        model.train()
        sizes = [(len(batch.tokens_BT), batch.tokens_BT.shape[1]) for batch in batches]
        with ClientDropout([worker.dropout for worker in self.workers], sizes):
            losses_M = self._adapted.readout.losses(tokens, rows, targets_M)
        model.eval()
        sums_K = losses_M.new_zeros(len(batches)).index_add(0, rows // targets_KM.shape[1], losses_M)
        return sums_K / counted_KM.sum(1)


def pad_together(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Clients' batches as [K, B, T] tokens and labels: short ones padded with what counts for nothing."""
    num_sequences, num_tokens = (max(sizes) for sizes in zip(*(b.tokens_BT.shape for b in batches), strict=True))
    tokens_KBT = torch.zeros(len(batches), num_sequences, num_tokens, dtype=torch.int64)
    labels_KBT = torch.full_like(tokens_KBT, IGNORED)
    for client, batch in enumerate(batches):
        sequences, width = batch.tokens_BT.shape
        tokens_KBT[client, :sequences, :width] = batch.tokens_BT
        labels_KBT[client, :sequences, :width] = batch.labels_BT
    return tokens_KBT, labels_KBT
