"""A client under way in the engine `batched`, and clients' batches put beside each other.

Letters: K clients at once, B sequences of a client, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.data.tokens import IGNORED, Batch, take_batch
from fedloom.errors import TrainingError
from fedloom.training.jobs import ClientJob, WorkLog
from fedloom.training.objective import next_token_targets
from fedloom.training.stacked_step import Noise

WIDTHS = 32
"""Widths of batches with fixed shapes are multiples of it: clients of similar texts then share a recording."""
NOTHING = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), IGNORED), None, 0)
"""Batch of a step in which nobody drew a document: noise alone moves the weights."""
RECORDING = 40
"""Steps that take as long as recording one: 48 to 85 were measured on an H100, fewer where a launch is fast."""


def fill_up(tokens: int) -> int:
    """Return the next multiple of `WIDTHS`."""
    return -(-tokens // WIDTHS) * WIDTHS


class Room(NamedTuple):
    """Shape of a step: what is recorded as a CUDA graph is for one alone, and a client that needs less is padded."""

    clients: int
    sequences: int
    """Sequences of each client."""
    tokens: int
    """Tokens of each sequence."""
    targets: int
    """Tokens of each client whose loss counts, at most."""

    def holds(self, needed: Room, left: int) -> bool:
        """Return whether there is as much room, and another recording would not make the steps that are left faster.

        Those with places that stand empty take longer.
        """
        if any(here < there for here, there in zip(self, needed, strict=True)):
            return False
        return left * (1 - needed.positions / self.positions) < RECORDING

    @property
    def positions(self) -> int:
        """Return the number of all clients' tokens, padding too."""
        return self.clients * self.sequences * self.tokens


@dataclass
class ClientSlot:
    """A client under way: its job, its batches in order, and what its steps were."""

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

    @cached_property
    def largest_batch(self) -> tuple[int, int]:
        """Sequences and tokens of the client's largest batch, the tokens as a multiple of `WIDTHS` where it can be."""
        blocks = self.job.blocks
        # The first one is not always the largest: a round that goes on with a pass may begin with its uneven end.
        sequences = min(max(map(len, self.batches)), self.job.training.batch_size)
        return sequences, min(fill_up(int(blocks.widths.max())), blocks.tokens_NT.shape[1])

    @cached_property
    def most_targets(self) -> int:
        """Tokens that count in the client's largest micro-batch at most, as a multiple of `WIDTHS`."""
        blocks = self.job.blocks
        targets_NT = next_token_targets(take_batch(blocks, torch.arange(len(blocks))).labels_BT)
        of_each, sequences = (targets_NT != IGNORED).sum(1), self.largest_batch[0]
        return fill_up(int(of_each.topk(sequences).values.sum()))

    def take_batches(self, ahead: int = 0) -> list[Batch]:
        """Return the batch of the next step, or of one so many later, or its micro-batches."""
        rows = self.batches[self.step + ahead].split(self.job.training.batch_size)
        return [take_batch(self.job.blocks, part) for part in rows if len(part)]


Taken = list[tuple[ClientSlot, list[Batch]]]
"""The clients of a step, each with the batch, or the micro-batches, that it learns from."""


def room_for(slots: Sequence[ClientSlot]) -> Room:
    """Return the room that these clients need for every step of theirs."""
    sequences, tokens = (max(sizes) for sizes in zip(*(slot.largest_batch for slot in slots), strict=True))
    return Room(len(slots), sequences, tokens, max(slot.most_targets for slot in slots))


def count_tokens(batches: Sequence[Batch]) -> int:
    """Return the real tokens of a step's micro-batches."""
    return sum(batch.num_tokens for batch in batches)


def own_tokens(batch: Batch) -> list[Tensor]:
    """Return each sequence's tokens, [T], up to the last that counts: as it is in a batch without others."""
    places_T = torch.arange(1, batch.labels_BT.shape[1] + 1)
    widths = ((batch.labels_BT != IGNORED) * places_T).amax(1).tolist()
    return [tokens_T[:width] for tokens_T, width in zip(batch.tokens_BT, widths, strict=True)]


def draw_noise(slots: Sequence[ClientSlot], like_KP: Tensor) -> Noise | None:
    """Return the noise of each client's step, where they have rations, for weights as these and on their device."""
    rations = [(slot.job.ration, slot.step) for slot in slots if slot.job.ration]
    if not rations:
        return None
    noise_KP = torch.stack([ration.noise(step, like_KP.shape[1]) for ration, step in rations])
    batches_K = torch.tensor([ration.terms.batch for ration, _ in rations])
    return Noise(noise_KP.to(like_KP.device), batches_K.to(like_KP.device))


def targets_of_each(counted_KM: Tensor, sequences: int) -> Tensor:
    """Return, for each of a client's positions, how many of its own sequence count, [K, M], and 1 where none does."""
    of_each_KB1 = counted_KM.view(len(counted_KM), sequences, -1).sum(-1, keepdim=True).clamp(min=1)
    return of_each_KB1.expand(-1, -1, counted_KM.shape[1] // sequences).flatten(1)


def choose_positions(counted_KM: Tensor, room: int) -> Tensor | None:
    """Return so many positions of each client, all that count among them; None where those are all."""
    if room >= counted_KM.shape[1]:
        return None
    chosen_KR = counted_KM.long().sort(dim=1, descending=True, stable=True).indices[:, :room]
    return (chosen_KR + torch.arange(len(counted_KM))[:, None] * counted_KM.shape[1]).flatten()


def pad_together(batches: Sequence[Batch | None], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Clients' batches as [K, B, T] tokens, labels and mask: short ones padded with what counts for nothing.

    So is the place of a client that has none.
    """
    num_sequences, num_tokens = (max(size) for size in zip(*sizes, strict=True))
    tokens_KBT = torch.zeros(len(batches), num_sequences, num_tokens, dtype=torch.int64)
    labels_KBT = torch.full_like(tokens_KBT, IGNORED)
    # What fills up is not masked: nobody who counts sees it, and to see nothing at all means nothing to attention.
    mask_KBT = torch.ones_like(tokens_KBT)
    for client, batch in enumerate(batches):
        if batch is None:
            continue
        sequences, width = batch.tokens_BT.shape
        tokens_KBT[client, :sequences, :width] = batch.tokens_BT
        labels_KBT[client, :sequences, :width] = batch.labels_BT
        if batch.mask_BT is not None:
            mask_KBT[client, :sequences, :width] = batch.mask_BT
    return tokens_KBT, labels_KBT, mask_KBT
