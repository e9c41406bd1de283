"""All clients in one forward and backward pass over one frozen base model.

Each client's result is what it would be alone: its own batch order, dropout, loss, clipping, schedule and optimizer.
The loss of a client is its own token mean, and the sum over clients is what is differentiated, so the number of
clients scales no gradient. A client that has finished makes room; one that waits takes its place.

Letters: K clients at once, B sequences of a client, T tokens, M positions of a client, P adapter parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import IGNORED, Batch, take_batch
from fedloom.errors import TrainingError
from fedloom.host.failpoints import failpoint
from fedloom.progress import Progress, Watch, ignore
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.cuda_graph import StepGraph
from fedloom.training.jobs import (
    SHORT,
    ClientFailure,
    ClientJob,
    ClientResult,
    ClientUpdate,
    TrainClients,
    WorkLog,
    is_shortage,
    too_large,
)
from fedloom.training.objective import next_token_targets
from fedloom.training.stacked_step import StackedStep, StepInputs

READ_EVERY = 16
"""Steps between two looks at a GPU's results: each look waits until the GPU has done everything it was told."""
OF_ALL_CLIENTS = (
    "clients_at_once",
    "gradient_checkpointing",
    "cuda_graph",
    "optimizer",
    "weight_decay",
    "max_gradient_norm",
)
"""Settings of `Training` that a step has once; the others are each client's own."""


@dataclass
class Worker:
    """A client at work: its steps, and what it has written down."""

    log: WorkLog
    batches: list[Tensor]
    step: int = 0
    error: TrainingError | None = None

    @property
    def job(self) -> ClientJob:
        return self.log.job

    @property
    def finished(self) -> bool:
        return self.error is not None or self.step == len(self.batches)

    @property
    def largest_batch(self) -> tuple[int, int]:
        """Sequences and tokens."""
        return len(self.batches[0]), self.job.blocks.tokens_NT.shape[1]


def build_batched_engine(
    adapted: AdaptedModel, watch: Watch = ignore, lowered: Callable[[int], object] = int
) -> TrainClients:
    """An engine bound to a model. Its jobs may differ in everything but what `can_share_a_step` compares.

    Where memory runs out, half as many clients train at once from then on, and those under way begin again: a job
    says all that decides what comes of it. `lowered` is told how many.
    """
    stack = Stack(adapted)
    at_most: int | None = None

    def train_clients(jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        nonlocal at_most
        if not jobs:
            return
        assert all(can_share_a_step(job, jobs[0]) for job in jobs), "jobs that can't share a step"
        adapted.load_residual(jobs[0].adapter)
        waiting = deque(jobs)
        while waiting:
            asked = jobs[0].training.clients_at_once or len(jobs)
            at_once = min(len(waiting), asked, at_most or asked)
            crew: Crew | None = None
            try:
                crew = Crew(adapted, stack, jobs, at_once)
                yield from crew.carry_out(waiting, watch)
            except SHORT as error:
                if not is_shortage(error):
                    raise
                under_way = [worker.job for worker in crew.workers] if crew else []
                waiting.extendleft(reversed(under_way))
                failure = too_large(waiting[0], error) if at_once == 1 else None
            else:
                return
            # Not where the error is caught, which holds the memory of what was under way.
            crew = None
            stack.let_go()
            if adapted.device.type == "cuda":
                torch.cuda.empty_cache()
            if failure:
                job = waiting.popleft()
                yield ClientFailure(job.client, failure, job.arm)
                continue
            at_most = at_once // 2
            lowered(at_most)

    return train_clients


def can_share_a_step(one: ClientJob, other: ClientJob) -> bool:
    """Whether two jobs can train at once: what is one for all of a step's clients is the same."""
    mine, its = one.training, other.training
    return one.adapter.residual is other.adapter.residual and all(
        getattr(mine, name) == getattr(its, name) for name in OF_ALL_CLIENTS
    )


class Crew:
    """The clients that train at once: slot k is the k-th worker's.

    With `fixed_shapes`, as a CUDA graph needs them, every batch is padded to its client's largest; without, to the
    largest of the step.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        stack: Stack,
        jobs: Sequence[ClientJob],
        num_slots: int | None = None,
        fixed_shapes: bool | None = None,
    ) -> None:
        self._training = training = jobs[0].training
        num_slots = num_slots or min(len(jobs), training.clients_at_once or len(jobs))
        self._device = adapted.device
        self._fixed_shapes = self._device.type == "cuda" if fixed_shapes is None else fixed_shapes
        partly = any(job.trains_P is not None for job in jobs)
        self._slots = StackedStep(adapted, stack, training, num_slots, self._device, partly=partly)
        self._generators = [torch.Generator(self._device) for _ in range(num_slots)]
        self._launch: StepGraph | None = None
        self._sizes: Sequence[tuple[int, int]] = ()
        self._unread: list[tuple[list[tuple[Worker, Batch]], Tensor]] = []
        self.workers: list[Worker] = []

    def carry_out(self, waiting: deque[ClientJob], watch: Watch) -> Iterator[ClientResult]:
        """Take jobs from those that wait while there is room, until all are finished.

        A job is always in one place: it waits, it is a worker's, or what came of it was yielded.
        """
        while waiting or self.workers:
            while waiting and self.has_room:
                self.admit(waiting[0])
                waiting.popleft()
            for worker, batch in self.step():
                job, samples = worker.job, len(batch.tokens_BT)
                watch(Progress("train", batch.num_tokens, samples, job.round, job.client))
            yield from self.retire()

    @property
    def has_room(self) -> bool:
        return len(self.workers) < len(self._generators)

    def admit(self, job: ClientJob) -> None:
        """Give a waiting client a slot, with the weights that it starts from and its own optimizer state."""
        slot, slots = len(self.workers), self._slots
        worker = Worker(WorkLog(job), job.draw_batches())
        self._generators[slot].manual_seed(job.dropout_seed)
        slots.start_KP[slot] = job.adapter.weights_P.to(self._device)
        slots.weights_KP[slot] = slots.start_KP[slot]
        if slots.trains_KP is not None:
            slots.trains_KP[slot] = True if job.trains_P is None else job.trains_P.to(self._device)
        slots.optimizer.load(slot, job.optimizer_state)
        self.workers.append(worker)

    def step(self) -> list[tuple[Worker, Batch]]:
        """One step of every worker; returns each with what it has learnt from.

        One whose loss is no longer a number has failed, and is finished. On a GPU, up to `READ_EVERY` steps later.
        """
        workers = self.workers
        batches = [take_batch(worker.job.blocks, worker.batches[worker.step]) for worker in workers]
        rates = [worker.job.rate(worker.step, len(worker.batches)) for worker in workers]
        mus = [worker.job.training.proximal_mu for worker in workers]
        sizes = [
            worker.largest_batch if self._fixed_shapes else (batch.tokens_BT.shape[0], batch.tokens_BT.shape[1])
            for worker, batch in zip(workers, batches, strict=True)
        ]
        inputs = StepInputs(
            *(value.to(self._device, non_blocking=True) for value in self._collect(batches, sizes, rates, mus))
        )
        facts_3K = self._run(inputs, sizes)
        failpoint("training.stepped")

        stepped = list(zip(workers, batches, strict=True))
        self._unread.append((stepped, facts_3K))
        for worker in workers:
            worker.step += 1
        if self._device.type != "cuda" or len(self._unread) == READ_EVERY:
            self._read()
        return stepped

    def retire(self) -> Iterator[ClientResult]:
        """Yield the updates, or the failures, of the workers that have finished, and close the ranks."""
        if any(worker.finished for worker in self.workers):
            self._read()
        slots = self._slots
        for slot in reversed(range(len(self.workers))):
            worker = self.workers[slot]
            if not worker.finished:
                continue
            result = self._result(slot)
            last = len(self.workers) - 1
            slots.move(last, slot)
            self._generators[slot].set_state(self._generators[last].get_state())
            self.workers[slot] = self.workers[last]
            self.workers.pop()
            yield result

    def _result(self, slot: int) -> ClientResult:
        """What came of the worker in a slot."""
        worker, slots = self.workers[slot], self._slots
        job, weights_P = worker.job, slots.weights_KP[slot]
        try:
            if worker.error:
                raise worker.error
            report = worker.log.finish(drift=(weights_P - slots.start_KP[slot]).norm().item())
        except TrainingError as error:
            return ClientFailure(job.client, error, job.arm)
        state = slots.optimizer.read(slot) if job.training.optimizer_state == "keep" else {}
        return ClientUpdate(report, replace(job.adapter, weights_P=weights_P.to("cpu", copy=True)), state, job.arm)

    def _run(self, inputs: StepInputs, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """The step itself: on a GPU recorded and launched whole, for as long as its shape stays."""
        count = len(sizes)
        dropout = ClientDropout(self._generators[:count], sizes)
        if len(self._sizes) != count:
            self._slots.use_slots(count)
        if self._device.type != "cuda" or not self._training.cuda_graph or self._training.gradient_checkpointing:
            self._sizes = sizes
            return self._slots(inputs, dropout)
        if self._launch is None or self._sizes != sizes:
            self._launch = StepGraph(partial(self._slots, dropout=dropout), self._generators[:count])
            self._sizes = sizes
        return self._launch(inputs)

    def _read(self) -> None:
        """Write down what the steps since the last look were."""
        unread, self._unread = self._unread, []
        for stepped, facts_3K in unread:
            for (worker, batch), (loss, drift, gradient_norm) in zip(stepped, facts_3K.T.tolist(), strict=True):
                if worker.error is None:
                    try:
                        worker.log.add_step(loss, drift, gradient_norm, batch.num_tokens)
                    except TrainingError as error:
                        worker.error = error

    def _collect(
        self, batches: Sequence[Batch], sizes: Sequence[tuple[int, int]], rates: list[float], mus: list[float]
    ) -> StepInputs:
        """All clients' batches as one step's inputs, still in the memory of the processor."""
        tokens_KBT, labels_KBT = pad_together(batches, sizes)
        targets_KM = next_token_targets(labels_KBT.flatten(0, 1)).view(len(batches), -1)
        counted_KM = targets_KM != IGNORED
        shares_KM = counted_KM / counted_KM.sum(1, keepdim=True).to(self._slots.weights_KP.dtype)
        rows = counted_KM.flatten().nonzero()[:, 0]
        if self._fixed_shapes:
            rows = torch.arange(counted_KM.numel())
        return StepInputs(
            tokens_NT=tokens_KBT.flatten(0, 1),
            rows_M=rows,
            targets_M=targets_KM.flatten()[rows].clamp(min=0),
            clients_M=rows // targets_KM.shape[1],
            shares_M=shares_KM.flatten()[rows],
            rates_K=torch.tensor(rates, dtype=torch.float64),
            mus_K=torch.tensor(mus, dtype=torch.float64),
        )


def pad_together(batches: Sequence[Batch], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Clients' batches as [K, B, T] tokens and labels: short ones padded with what counts for nothing."""
    num_sequences, num_tokens = (max(size) for size in zip(*sizes, strict=True))
    tokens_KBT = torch.zeros(len(batches), num_sequences, num_tokens, dtype=torch.int64)
    labels_KBT = torch.full_like(tokens_KBT, IGNORED)
    for client, batch in enumerate(batches):
        sequences, width = batch.tokens_BT.shape
        tokens_KBT[client, :sequences, :width] = batch.tokens_BT
        labels_KBT[client, :sequences, :width] = batch.labels_BT
    return tokens_KBT, labels_KBT
