"""All clients in one forward and backward pass over one frozen base model.

Each client's result is what it would be alone: its own batch order, dropout, loss, clipping, schedule and optimizer.
The loss of a client is its own token mean, and the sum over clients is what is differentiated, so the number of
clients scales no gradient. A client that has finished makes room; one that waits takes its place.

Letters: K clients at once, B sequences of a client, T tokens, M positions of a client, P adapter parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import IGNORED, Batch
from fedloom.errors import TrainingError
from fedloom.host.failpoints import failpoint
from fedloom.progress import Progress, Say, Watch, ignore, say_nothing
from fedloom.training.client_slots import NOTHING, ClientSlot, Room, count_tokens, own_tokens, pad_together, room_for
from fedloom.training.cuda_graph import NotRecordableError, StepGraph
from fedloom.training.dropout_masks import sequence_keys
from fedloom.training.dropping import why_no_kernel
from fedloom.training.jobs import (
    SHORT,
    ClientFailure,
    ClientJob,
    ClientResult,
    ClientUpdate,
    WorkLog,
    is_shortage,
    too_large,
)
from fedloom.training.objective import count_targets, find_real, next_token_targets
from fedloom.training.stacked_step import Noise, StackedStep, StepInputs

READ_EVERY = 16
"""Steps between two looks at a GPU's results: each look waits until the GPU has done everything it was told."""
OF_ALL_CLIENTS = (
    "clients_at_once",
    "gradient_checkpointing",
    "cuda_graph",
    "optimizer",
    "gradient_accumulation",
    "weight_decay",
    "max_gradient_norm",
)
"""Settings of `Training` that a step has once; the others are each client's own."""


class BatchedEngine:
    """The engine `batched`, bound to a model. Jobs may differ in everything but what `can_share_a_step` compares.

    Where memory runs out, half as many clients train at once from then on, and those under way begin again: a job
    says all that decides what comes of it.
    """

    def __init__(self, adapted: AdaptedModel, watch: Watch = ignore, say: Say = say_nothing) -> None:
        self._adapted, self._watch, self._say = adapted, watch, say
        self._stack = Stack(adapted)
        self.lowered_to: int | None = None
        """Clients that train at once since memory ran out; None where it never did."""
        self._records = True
        """False once a step of this model could not be recorded."""
        self._told = False
        """True once it was said that the GPU has no kernel for dropout."""

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        """Carry out every job, as many at once as there is room for; yield each result when it is there."""
        if not jobs:
            return
        assert all(can_share_a_step(job, jobs[0]) for job in jobs), "jobs that can't share a step"
        self._adapted.load_residual(jobs[0].adapter)
        waiting = deque(jobs)
        while waiting:
            asked = jobs[0].training.clients_at_once or len(jobs)
            at_once = min(len(waiting), asked, self.lowered_to or asked)
            batch: ClientBatch | None = None
            try:
                batch = ClientBatch(self._adapted, self._stack, jobs, at_once, records=self._records)
                # A job is always in one place: it waits, it has a slot, or its result was yielded. So whatever is
                # interrupted here can begin again.
                while waiting or batch.slots:
                    while waiting and batch.has_room:
                        batch.admit(waiting[0])
                        waiting.popleft()
                    stepped = batch.step()
                    if batch.not_recordable and self._records:
                        self._records = False
                        self._say("graph", f"none, each step is launched by itself: {batch.not_recordable}")
                    if (reason := why_no_kernel(self._adapted.device)) and not self._told:
                        self._told = True
                        self._say("dropout", f"each mask takes many kernels in place of one: {reason}")
                    for slot, taken in stepped:
                        job, samples = slot.job, sum(len(part.tokens_BT) for part in taken)
                        self._watch(Progress("train", count_tokens(taken), samples, job.round, job.client))
                    yield from batch.retire()
                # What the last ones held is not needed beside what comes next, an evaluation say.
                self._stack.let_go()
                return
            except SHORT as error:
                if not is_shortage(error):
                    raise
                waiting.extendleft(slot.job for slot in reversed(batch.slots if batch else []))
                failure = too_large(waiting[0], error) if at_once == 1 else None
            # Not in the handler above: the error that it holds keeps the memory of what was under way.
            batch = None
            self._release()
            if failure:
                job = waiting.popleft()
                yield ClientFailure(job.client, failure, job.trial)
                continue
            self.lowered_to = at_once // 2
            self._say(
                "memory",
                f"not enough: {self.lowered_to} at once from now on; the clients under way begin their round again",
            )

    def _release(self) -> None:
        """Give back what the clients under way held."""
        self._stack.let_go()
        if self._adapted.device.type == "cuda":
            torch.cuda.empty_cache()


def can_share_a_step(one: ClientJob, other: ClientJob) -> bool:
    """Return whether two jobs can train at once: they agree in what a step has once for all its clients."""
    mine, its = one.training, other.training
    alike = one.adapter.residual is other.adapter.residual and max_norm_of(one) == max_norm_of(other)
    return alike and all(getattr(mine, name) == getattr(its, name) for name in OF_ALL_CLIENTS)


def max_norm_of(job: ClientJob) -> float | None:
    """Return the norm to which a document's gradient is scaled down; None where none is."""
    return job.ration.terms.max_norm if job.ration else None


class ClientBatch:
    """The clients that train at once: slot k of every buffer is the k-th client's.

    With `fixed_shapes`, as a CUDA graph needs them, every batch is padded to the largest of all steps to come, and as
    many positions have logits as count in one at most; without, to the largest of the step. A graph is kept while its
    shape has room for the clients that are left: the places of those that have finished stand empty.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        stack: Stack,
        jobs: Sequence[ClientJob],
        num_slots: int | None = None,
        fixed_shapes: bool | None = None,
        records: bool = True,
    ) -> None:
        self._training = training = jobs[0].training
        num_slots = num_slots or min(len(jobs), training.clients_at_once or len(jobs))
        self._device = adapted.device
        self._fixed_shapes = self._device.type == "cuda" if fixed_shapes is None else fixed_shapes
        # Of all jobs, those that wait too: a recorded step has a mask always or never.
        self._masked = any(job.blocks.needs_mask for job in jobs)
        self._unpads = adapted.unpads and not self._fixed_shapes
        self._readout_apart = adapted.loss_head.is_apart
        partly = any(job.trains_P is not None for job in jobs)
        self._max_norm = max_norm_of(jobs[0])
        self._step = StackedStep(
            adapted, stack, training, num_slots, self._device, partly=partly, max_norm=self._max_norm
        )
        self._num_slots = num_slots
        whole = not training.gradient_checkpointing and training.gradient_accumulation == 1 and self._max_norm is None
        self._records = records and self._device.type == "cuda" and training.cuda_graph and whole
        self.not_recordable = ""
        """Reason why this model's steps can't be recorded, once that was found."""
        self._launch: StepGraph | None = None
        self._room: Room | None = None
        self._in_use = 0
        self._unread: list[tuple[list[tuple[ClientSlot, list[Batch]]], Tensor]] = []
        self.slots: list[ClientSlot] = []

    @property
    def has_room(self) -> bool:
        return len(self.slots) < self._num_slots

    def admit(self, job: ClientJob) -> None:
        """Give a waiting client a slot, with the weights that it starts from and its own optimizer state."""
        place, step = len(self.slots), self._step
        slot = ClientSlot(WorkLog(job), job.draw_batches())
        step.start_KP[place] = job.adapter.weights_P.to(self._device)
        step.weights_KP[place] = step.start_KP[place]
        if step.trains_KP is not None:
            step.trains_KP[place] = True if job.trains_P is None else job.trains_P.to(self._device)
        step.optimizer.load(place, job.optimizer_state)
        self.slots.append(slot)

    def step(self) -> list[tuple[ClientSlot, list[Batch]]]:
        """Take one step of every client; return each with the batch, or the micro-batches, it has learnt from.

        One whose loss is no longer a number has failed, and is finished. On a GPU, up to `READ_EVERY` steps later.
        """
        slots = self.slots
        if self._fixed_shapes:
            self._make_room()
        taken = [slot.take_batches() for slot in slots]
        totals = [sum(count_targets(part.labels_BT) for part in parts) for parts in taken]
        # A client that has fewer micro-batches than another waits while that has its last ones.
        rounds = [*zip_longest(*taken)] or [(NOTHING,) * len(slots)]
        parts = [self._inputs(batches, totals, number) for number, batches in enumerate(rounds)]
        if len(parts) > 1 or self._max_norm is not None:
            facts_3K = self._accumulate(parts)
        else:
            (inputs,) = parts
            try:
                facts_3K = self._prepare(inputs)(inputs)
            except NotRecordableError as error:
                self._stop_recording(error)
                facts_3K = self._prepare(inputs)(inputs)
        failpoint("training.stepped")

        stepped = list(zip(slots, taken, strict=True))
        self._unread.append((stepped, facts_3K))
        for slot in slots:
            slot.step += 1
        # Reading waits until a GPU has done all that it was told: so not after every step.
        if self._device.type != "cuda" or len(self._unread) == READ_EVERY:
            self._read()
        return stepped

    def retire(self) -> Iterator[ClientResult]:
        """Yield the updates, or the failures, of the clients that have finished; the others close the ranks."""
        if any(slot.finished for slot in self.slots):
            self._read()
        # From the last to the first: a slot is filled from the end, where nobody who is finished is left then.
        for place in reversed(range(len(self.slots))):
            if not self.slots[place].finished:
                continue
            result = self._result(place)
            last = len(self.slots) - 1
            self._step.move(last, place)
            self.slots[place] = self.slots[last]
            self.slots.pop()
            self._step.vacate(last)
            yield result

    def _result(self, place: int) -> ClientResult:
        """Return the update, or the failure, of the client in a slot."""
        slot, step = self.slots[place], self._step
        job, weights_P = slot.job, step.weights_KP[place]
        try:
            if slot.error:
                raise slot.error
            report = slot.log.finish(drift=(weights_P - step.start_KP[place]).norm().item())
        except TrainingError as error:
            return ClientFailure(job.client, error, job.trial)
        state = step.optimizer.read(place) if job.training.optimizer_state == "keep" else {}
        # A copy: the slot's next client writes over it.
        adapter = replace(job.adapter, weights_P=weights_P.to("cpu", copy=True))
        return ClientUpdate(report, adapter, state, job.trial, own_losses=slot.log.own_losses)

    def _make_room(self) -> None:
        """Choose the shape of the step that comes: the one that is recorded, while it will do."""
        room = room_for(self.slots)
        left = max(len(slot.batches) - slot.step for slot in self.slots)
        if self._room and self._records and self._room.holds(room, left):
            return
        if room != self._room:
            self._room, self._launch = room, None

    def _inputs(self, batches: Sequence[Batch | None], totals: Sequence[int], number: int) -> StepInputs:
        """Return all clients' batches on the device, the step's with this number (from 0)."""
        if self._room:
            nobody = self._room.clients - len(batches)
            sizes = [(self._room.sequences, self._room.tokens)] * self._room.clients
            batches, totals = [*batches, *[None] * nobody], [*totals, *[1] * nobody]
        else:
            shapes = [(0, 0) if batch is None else batch.tokens_BT.shape for batch in batches]
            sizes = [(sequences, tokens) for sequences, tokens in shapes]
        collected = self._collect(batches, totals, sizes, number)
        # non_blocking has an effect on a GPU alone: the copies run while the processor goes on.
        return collected.each(lambda value: value.to(self._device, non_blocking=True))

    def _accumulate(self, parts: Sequence[StepInputs]) -> Tensor:
        """Take a step of more than one micro-batch, or of documents apart, which is launched by itself."""
        self._use_slots(len(self.slots))
        return self._step.accumulate(parts, self._draw_noise())

    def _use_slots(self, count: int) -> None:
        if self._in_use != count:
            self._step.use_slots(count)
        self._in_use = count

    def _dropout_keys(self, batches: Sequence[Batch | None], sequences: int, number: int) -> Tensor:
        """Return the key of each sequence's dropout, [K, B]: of its place in the step, or with rations of its text."""
        if self._max_norm is None:
            jobs, steps = [slot.job for slot in self.slots], [slot.step for slot in self.slots]
            firsts = [number * job.training.batch_size for job in jobs]
            own_KB = sequence_keys([job.dropout_seed for job in jobs], steps, firsts, sequences)
            return torch.cat([own_KB, own_KB.new_zeros(len(batches) - len(jobs), sequences)])
        keys_KB = torch.zeros(len(batches), sequences, dtype=torch.int64)
        for keys_B, slot, batch in zip(keys_KB, self.slots, batches, strict=True):
            for place, tokens_T in enumerate([] if batch is None else own_tokens(batch)):
                keys_B[place] = slot.job.ration.dropout_seed(slot.step, tokens_T) if slot.job.ration else 0
        return keys_KB

    def _draw_noise(self) -> Noise | None:
        """Return the noise of each client's step, where they have rations."""
        rations = [(slot.job.ration, slot.step) for slot in self.slots if slot.job.ration]
        if not rations:
            return None
        size = self._step.weights_KP.shape[1]
        noise_KP = torch.stack([ration.noise(step, size) for ration, step in rations])
        batches_K = torch.tensor([ration.terms.batch for ration, _ in rations])
        return Noise(noise_KP.to(self._device), batches_K.to(self._device))

    def _prepare(self, inputs: StepInputs) -> Callable[[StepInputs], Tensor]:
        """Return the step for these inputs: on a GPU recorded and launched whole while its shape stays."""
        self._use_slots(len(inputs.rates_K))
        if not self._records:
            return self._step
        if self._launch is None:
            self._launch = StepGraph(self._step, self._device)
        return self._launch

    def _stop_recording(self, error: NotRecordableError) -> None:
        """Launch each step by itself from now on, as the one that was to be recorded has not been taken."""
        self.not_recordable, self._records, self._launch = str(error), False, None

    def _read(self) -> None:
        """Write down the steps since the last look."""
        unread, self._unread = self._unread, []
        for stepped, facts_3K in unread:
            for (slot, taken), (loss, drift, gradient_norm) in zip(stepped, facts_3K.T.tolist(), strict=False):
                # With a ration each document has a gradient of its own, and what comes is the sum of their losses.
                if slot.job.ration and taken:
                    loss /= sum(len(part.tokens_BT) for part in taken)
                if slot.error is None:
                    try:
                        slot.log.add_step(loss, drift, gradient_norm, count_tokens(taken))
                    except TrainingError as error:
                        slot.error = error

    def _collect(
        self, batches: Sequence[Batch | None], totals: Sequence[int], sizes: Sequence[tuple[int, int]], number: int
    ) -> StepInputs:
        """Return all clients' batches as the inputs of a step, or of one of its parts, in the processor's memory.

        `totals` are the tokens that count in each client's whole step.
        """
        nobody = [0.0] * (len(batches) - len(self.slots))
        rates = [*(slot.job.rate(slot.step, len(slot.batches)) for slot in self.slots), *nobody]
        mus = [*(slot.job.training.proximal_mu for slot in self.slots), *nobody]
        tokens_KBT, labels_KBT, mask_KBT = pad_together(batches, sizes)
        targets_KM = next_token_targets(labels_KBT.flatten(0, 1)).view(len(batches), -1)
        counted_KM = targets_KM != IGNORED
        shares_KM = counted_KM / self._share_over(counted_KM, tokens_KBT.shape[1], totals)
        room = self._room
        rows = self._choose_positions(counted_KM, room.targets) if room else counted_KM.flatten().nonzero()[:, 0]
        chosen = slice(None) if rows is None else rows
        real_R = find_real(targets_KM.view(-1, tokens_KBT.shape[2])) if self._unpads else None
        return StepInputs(
            tokens_NT=tokens_KBT.flatten(0, 1),
            keys_N=self._dropout_keys(batches, tokens_KBT.shape[1], number).flatten(),
            rows_M=rows if rows is None or real_R is None else torch.searchsorted(real_R, rows),
            targets_M=targets_KM.flatten()[chosen].clamp(min=0),
            clients_M=None if room or rows is None else rows // targets_KM.shape[1],
            shares_M=shares_KM.flatten()[chosen],
            rates_K=torch.tensor(rates, dtype=torch.float64),
            mus_K=torch.tensor(mus, dtype=torch.float64),
            mask_NT=mask_KBT.flatten(0, 1) if self._masked else None,
            real_R=real_R,
        )

    def _share_over(self, counted_KM: Tensor, sequences: int, totals: Sequence[int]) -> Tensor:
        """Return the number of tokens that each position shares a mean with, [K, M]: its client's, or its sequence's.

        With rations, no document may have a part in another's gradient.
        """
        if self._max_norm is None:
            return torch.tensor(totals)[:, None].to(self._step.weights_KP.dtype)
        of_each_KB1 = counted_KM.view(len(counted_KM), sequences, -1).sum(-1, keepdim=True).clamp(min=1)
        own_KBT = of_each_KB1.expand(-1, -1, counted_KM.shape[1] // sequences)
        return own_KBT.flatten(1).to(self._step.weights_KP.dtype)

    def _choose_positions(self, counted_KM: Tensor, room: int) -> Tensor | None:
        """Return so many positions of each client, all that count among them; None where those are all."""
        if room >= counted_KM.shape[1] or not self._readout_apart:
            return None
        chosen_KR = counted_KM.long().sort(dim=1, descending=True, stable=True).indices[:, :room]
        return (chosen_KR + torch.arange(len(counted_KM))[:, None] * counted_KM.shape[1]).flatten()
