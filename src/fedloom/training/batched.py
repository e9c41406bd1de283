"""All clients in one forward and backward pass over one frozen base model.

Each client's result is what it would be alone: its own batch order, dropout, loss, clipping, schedule and optimizer.
The loss of a client is its own token mean, and the sum over clients is what is differentiated, so the number of
clients scales no gradient. A client that has finished makes room; one that waits takes its place.

Letters: K clients at once, B sequences of a client, T tokens, M positions of a client, P adapter parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.tokens import IGNORED, Batch
from fedloom.errors import TrainingError
from fedloom.host.failpoints import failpoint
from fedloom.model.shortage import SHORT, is_shortage
from fedloom.progress import Progress, Say, Watch, ignore, say_nothing
from fedloom.training.client_slots import (
    NOTHING,
    ClientSlot,
    Room,
    Taken,
    count_tokens,
    draw_noise,
    needs_to_come,
    own_tokens,
    pad_together,
    room_for,
)
from fedloom.training.dropout_masks import sequence_keys
from fedloom.training.jobs import (
    ClientFailure,
    ClientJob,
    ClientResult,
    ClientUpdate,
    WorkLog,
    can_share_a_step,
    kind_of_step,
    too_large,
)
from fedloom.training.objective import count_targets, next_token_targets
from fedloom.training.positions import fill_room, look_up, targets_of_each
from fedloom.training.slower_ways import slower_ways
from fedloom.training.stacked_step import StackedStep, StepInputs
from fedloom.training.stretches import Stretches

READ_EVERY = 16
"""Steps between two looks at a GPU's results where it is told each by itself: a look waits for all that it was told."""


class BatchedEngine:
    """The engine `batched`, bound to a model. Jobs may differ in everything but what `can_share_a_step` compares.

    Where memory runs out, half as many clients train at once from then on, and those under way begin again: a job
    says all that decides what comes of it.
    """

    def __init__(self, adapted: AdaptedModel, watch: Watch = ignore, say: Say = say_nothing) -> None:
        self._adapted, self._watch, self._say = adapted, watch, say
        self._stack = Stack(adapted)
        self._batch: ClientBatch | None = None
        """The clients under way; once they have finished, the place of the next ones, if those are alike."""
        adapted.give_back = self.give_back
        self.lowered_to: int | None = None
        """Clients that train at once since memory ran out; None where it never did."""
        self._records = True
        """False once a step of this model could not be recorded."""
        self._told: set[str] = set()

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
                batch = self._open_batch(jobs, at_once)
                # A job is always in one place: it waits, it has a slot, or its result was yielded. So whatever is
                # interrupted here can begin again.
                while waiting or batch.slots:
                    while waiting and batch.has_room:
                        batch.admit(waiting[0])
                        waiting.popleft()
                    stepped = batch.step()
                    self._tell(batch)
                    for slot, taken in stepped:
                        job, samples = slot.job, sum(len(part.tokens_BT) for part in taken)
                        self._watch(Progress("train", count_tokens(taken), samples, job.round, job.client))
                    yield from batch.retire()
                self._stack.model.eval()
                # What the last ones held is not needed beside what comes next, an evaluation say.
                if not batch.is_kept:
                    self._batch = None
                    self._stack.let_go()
                return
            except SHORT as error:
                if not is_shortage(error):
                    raise
                waiting.extendleft(slot.job for slot in reversed(batch.slots if batch else []))
                failure = too_large(waiting[0], error) if at_once == 1 else None
            # Not in the handler above: the error that it holds keeps the memory of what was under way.
            self.give_back()
            batch = self._batch = None
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

    def give_back(self) -> bool:
        """Give back memory that is kept for the steps to come, which can be had again; return whether there was any."""
        if self._batch is None or not self._batch.forget():
            return False
        if not self._batch.slots:
            self._batch = None
        self._release()
        return True

    def _tell(self, batch: ClientBatch) -> None:
        """Say, once each, what takes longer on this GPU than on others, and why."""
        self._records = self._records and not batch.not_recordable
        for what, why in slower_ways(self._adapted.device, batch.not_recordable).items():
            if what not in self._told:
                self._told.add(what)
                self._say(what, why)

    def _open_batch(self, jobs: Sequence[ClientJob], at_once: int) -> ClientBatch:
        """Return the place of so many of the jobs: the one before, with what was recorded there, if it will do."""
        kept, self._batch = self._batch, None
        if kept is None or not kept.reopen(jobs, at_once):
            del kept  # with its memory
            kept = ClientBatch(self._adapted, self._stack, jobs, at_once, records=self._records)
        self._batch = kept
        return kept

    def _release(self) -> None:
        """Give back what the clients under way held."""
        self._stack.let_go()
        if self._adapted.device.type == "cuda":
            torch.cuda.empty_cache()


class ClientBatch:
    """The clients that train at once: slot k of every buffer is the k-th client's.

    With `fixed_shapes`, as a CUDA graph needs them, every batch is padded to the largest of all steps to come, and as
    many positions have logits as count in one at most; without, to the largest of the step. Where much of that is
    padding, as many tokens of each client are computed as one of few sizes has that holds the step's. Graphs are kept
    while their room holds the clients that are left: the places of those that have finished stand empty. Steps of fixed
    shapes that are no more than one batch are taken in stretches, of the same clients.
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
        self._unpads, self._multiple = adapted.unpads, adapted.row_multiple
        self._readout_apart = adapted.loss_head.is_apart
        self._kind = kind = kind_of_step(jobs, num_slots)
        self._max_norm = kind.max_norm
        # Where each sequence has a gradient of its own, a client's products are cut into equal pieces, padding and all.
        rows = self._unpads and self._max_norm is None
        self._row_features = getattr(adapted.base.config.get_text_config(), "hidden_size", 0) if rows else 0
        self._step = StackedStep(
            adapted, stack, training, num_slots, self._device, partly=kind.partly, max_norm=kind.max_norm
        )
        whole = training.gradient_accumulation == 1 and self._max_norm is None
        on_gpu = self._device.type == "cuda" and not training.gradient_checkpointing
        records = records and on_gpu and training.cuda_graph
        ahead = self._fixed_shapes and whole
        self._stretches = Stretches(self._step, self._device, records=records) if ahead else None
        self.is_kept = ahead
        """True where buffers, and what is recorded, are kept for the next round's clients."""
        self._room: Room | None = None
        self._in_use = 0
        self._unread: list[Taken] = []
        self._facts: list[Tensor] = []
        """Facts of unread steps that were no part of a stretch."""
        self.slots: list[ClientSlot] = []

    @property
    def has_room(self) -> bool:
        return len(self.slots) < self._kind.clients

    @property
    def not_recordable(self) -> str:
        """Return why this model's steps can't be recorded, once that was found; empty before."""
        return self._stretches.not_recordable if self._stretches else ""

    def reopen(self, jobs: Sequence[ClientJob], num_slots: int) -> bool:
        """Be the place of so many of other jobs, as a new one is; return whether that can be."""
        # A shape of the round before could be larger than these jobs need, which would change how numbers are rounded.
        self._room = None
        if self.slots or self._kind != kind_of_step(jobs, num_slots):
            self.forget()
            return False
        return True

    def forget(self) -> bool:
        """Let go of recordings, which the next stretch makes anew; return whether there were any."""
        # Layers may lose what they were bound to.
        self._in_use = 0
        return self._stretches is not None and self._stretches.forget()

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

    def step(self) -> Taken:
        """Take one step of every client; return each with the batch, or the micro-batches, it has learnt from.

        One whose loss is no longer a number has failed, and is finished. On a GPU, a look at its results later.
        """
        if self._stretches:
            left = min(len(slot.batches) - slot.step for slot in self.slots)
            taken = self._stretches.launch(left, self._make_room, self._draw)
        else:
            if self._fixed_shapes:
                self._make_room()
            taken, parts = self._draw()
            # non_blocking has an effect on a GPU alone: the copies run while the processor goes on.
            parts = [part.each(lambda value: value.to(self._device, non_blocking=True)) for part in parts]
            self._use_slots(len(parts[0].rates_K))
            if len(parts) > 1 or self._max_norm is not None:
                self._facts.append(self._step.accumulate(parts, draw_noise(self.slots, self._step.weights_KP)))
            else:
                self._facts.append(self._step(parts[0]))
        failpoint("training.stepped")
        self._unread.append(taken)
        for slot in self.slots:
            slot.step += 1
        # Reading waits until a GPU has done all that it was told: so not after every step.
        looks = self._device.type != "cuda" or len(self._unread) == READ_EVERY
        if self._stretches.has_ended if self._stretches else looks:
            self._read()
        return taken

    def retire(self) -> Iterator[ClientResult]:
        """Yield the updates, or the failures, of the clients that have finished; the others close the ranks."""
        if any(slot.finished for slot in self.slots):
            self._read()
        # From the last to the first: a slot is filled from the end, where nobody who is finished is left then.
        for place in reversed(range(len(self.slots))):
            if not self.slots[place].finished:
                continue
            result = self._result(place)
            if self._stretches:
                self._stretches.change_clients()
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

    def _make_room(self) -> Room:
        """Return the shape of the step that comes: the one that is recorded, while it will do."""
        room = room_for(self.slots, self._row_features)
        records = self._stretches is not None and self._stretches.records
        if not (self._room and records and self._room.holds(room, needs_to_come(self.slots))):
            self._room = room
        self._use_slots(self._room.clients)
        return self._room

    def _draw(self, ahead: int = 0, need: int | None = None) -> tuple[Taken, list[StepInputs]]:
        """Return the batches of the next step, or of one so many later, and its parts' inputs in memory.

        `need` is as in `fill_room`.
        """
        taken = [slot.take_batches(ahead) for slot in self.slots]
        totals = [sum(count_targets(part.labels_BT) for part in parts) for parts in taken]
        # A client that has fewer micro-batches than another waits while that has its last ones.
        rounds = [*zip_longest(*taken)] or [(NOTHING,) * len(self.slots)]
        parts = [self._inputs(batches, totals, number, ahead, need) for number, batches in enumerate(rounds)]
        return list(zip(self.slots, taken, strict=True)), parts

    def _inputs(
        self, batches: Sequence[Batch | None], totals: Sequence[int], number: int, ahead: int, need: int | None
    ) -> StepInputs:
        """Return the inputs of a step's part with this number (from 0)."""
        if self._room:
            nobody = self._room.clients - len(batches)
            batches, totals = [*batches, *[None] * nobody], [*totals, *[1] * nobody]
        return self._collect(batches, totals, number, ahead, need)

    def _use_slots(self, count: int) -> None:
        if self._in_use != count:
            self._step.use_slots(count)
        self._in_use = count

    def _dropout_keys(self, batches: Sequence[Batch | None], sequences: int, number: int, ahead: int) -> Tensor:
        """Return the key of each sequence's dropout, [K, B]: of its place in the step, or with rations of its text."""
        if self._max_norm is None:
            jobs, steps = [slot.job for slot in self.slots], [slot.step + ahead for slot in self.slots]
            firsts = [number * job.training.batch_size for job in jobs]
            own_KB = sequence_keys([job.dropout_seed for job in jobs], steps, firsts, sequences)
            return torch.cat([own_KB, own_KB.new_zeros(len(batches) - len(jobs), sequences)])
        keys_KB = torch.zeros(len(batches), sequences, dtype=torch.int64)
        for keys_B, slot, batch in zip(keys_KB, self.slots, batches, strict=True):
            for place, tokens_T in enumerate([] if batch is None else own_tokens(batch)):
                keys_B[place] = slot.job.ration.dropout_seed(slot.step, tokens_T) if slot.job.ration else 0
        return keys_KB

    def _read(self) -> None:
        """Write down the steps since the last look."""
        unread, launched, self._unread, self._facts = self._unread, self._facts, [], []
        facts = self._stretches.read(len(unread)) if self._stretches else [told.T.tolist() for told in launched]
        for of_step, told in zip(unread, facts, strict=True):
            for (slot, taken), (loss, drift, gradient_norm) in zip(of_step, told, strict=False):
                # With a ration each document has a gradient of its own, and what comes is the sum of their losses.
                if slot.job.ration and taken:
                    loss /= sum(len(part.tokens_BT) for part in taken)
                if slot.error is None:
                    try:
                        slot.log.add_step(loss, drift, gradient_norm, count_tokens(taken))
                    except TrainingError as error:
                        slot.error = error

    def _collect(
        self, batches: Sequence[Batch | None], totals: Sequence[int], number: int, ahead: int, need: int | None
    ) -> StepInputs:
        """Return all clients' batches as the inputs of a step, or of one of its parts, in the processor's memory.

        `totals` are the tokens that count in each client's whole step.
        """
        nobody = [0.0] * (len(batches) - len(self.slots))
        rates = [*(slot.job.rate(slot.step + ahead, len(slot.batches)) for slot in self.slots), *nobody]
        mus = [*(slot.job.training.proximal_mu for slot in self.slots), *nobody]
        sizes = [(0, 0) if batch is None else (len(batch.tokens_BT), batch.tokens_BT.shape[1]) for batch in batches]
        if self._room:
            sizes = [(self._room.sequences, self._room.tokens)]
        tokens_KBT, labels_KBT, mask_KBT = pad_together(batches, sizes)
        targets_KM = next_token_targets(labels_KBT.flatten(0, 1)).view(len(batches), -1)
        sequences = tokens_KBT.shape[1]
        # With rations, no document may have a part in another's gradient.
        over = torch.tensor(totals)[:, None] if self._max_norm is None else targets_of_each(targets_KM, sequences)
        shares_KM = (targets_KM != IGNORED) / over.to(self._step.weights_KP.dtype)
        if self._room:
            positions = fill_room(targets_KM, shares_KM, self._room, need, readout_apart=self._readout_apart)
        else:
            positions = look_up(targets_KM, shares_KM, sequences, unpads=self._unpads, multiple=self._multiple)
        return StepInputs(
            tokens_NT=tokens_KBT.flatten(0, 1),
            keys_N=self._dropout_keys(batches, sequences, number, ahead).flatten(),
            rates_K=torch.tensor(rates, dtype=torch.float64),
            mus_K=torch.tensor(mus, dtype=torch.float64),
            mask_NT=mask_KBT.flatten(0, 1) if self._kind.masked else None,
            **positions._asdict(),
        )
