"""A client under way in the engine `batched`, and clients' batches put beside each other.

Letters: K clients at once, B sequences of a client, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from fedloom.data.tokens import IGNORED, Batch, take_batch
from fedloom.errors import TrainingError
from fedloom.training.jobs import ClientJob, WorkLog
from fedloom.training.objective import count_needed, next_token_targets
from fedloom.training.stacked_step import Noise

WIDTHS = 32
"""Widths of batches with fixed shapes are multiples of it: clients of similar texts then share a recording."""
NOTHING = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), IGNORED), None, 0)
"""Batch of a step in which nobody drew a document: noise alone moves the weights."""
RECORDING = 40
"""Steps that take as long as recording one: 48 to 85 were measured on an H100, fewer where a launch is fast."""
SIZES = 8
"""Sizes of a row for each width of texts, at most: rounds whose batches are alike then share recordings."""
ROW_LAUNCHES = 640 * 1024
"""Tokens that a row must leave out, times a token's features, to pay for the kernels that it adds.

Fitted, with the next, to steps of OPT-350M, of 1,024 features, on an H100 with K = 1 and 3 (docs/log.md, "rows of
several sizes"): a row adds about 2.5 ms, and saves 4.2 to 5 µs a token.
"""
ROW_TRAFFIC = 0.04
"""Share of all places that a row must leave out to pay for what it moves: queries, keys, values and heads go to their
places and back. Fitted to the same figures, which are of 1,024 and 3,072 places; of more nothing was measured."""


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
    sizes: tuple[int, ...]
    """Tokens of each client that are computed, ascending: in a step, the least that hold what it needs.

    As a row (`EvenRow`) without most of the padding, or, as many as there are places, with all of it.
    """

    def holds(self, needed: Room, needs: Sequence[int]) -> bool:
        """Return whether there is as much room, and other recordings would not make the steps to come faster.

        Those with places that stand empty take longer. `needs` are the tokens of a client that each step to come has to
        compute; what is needed may be no row, since fewer clients would not be worth one.
        """
        if self.largest < max(needs) or any(here < there for here, there in zip(self[:4], needed[:4], strict=True)):
            return False
        return len(needs) * (1 - needed.count(needs) / self.count(needs)) < RECORDING * len(needed.sizes)

    def size_for(self, need: int) -> int:
        """Return the tokens of each client that a step computes in which one needs so many."""
        assert need <= self.largest, "more positions than the room has"
        return self.sizes[bisect_left(self.sizes, need)]

    def count(self, needs: Sequence[int]) -> int:
        """Return the tokens that steps of these needs compute, all clients' together."""
        return self.clients * sum(map(self.size_for, needs))

    @property
    def largest(self) -> int:
        """Return the most tokens of each client that a step computes."""
        return self.sizes[-1]

    @property
    def places(self) -> int:
        """Return the tokens of each client with all padding."""
        return self.sequences * self.tokens

    @property
    def has_rows(self) -> bool:
        """Return whether there are steps that leave padding out."""
        return self.sizes[0] < self.places


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
        # The first one is not always the largest: a round that goes on with a pass may begin with its uneven end. A
        # private round may draw no document at all, and its steps have the room of one then.
        sequences = min(max(map(len, self.batches)), self.job.training.batch_size)
        return max(1, sequences), min(fill_up(int(blocks.widths.max())), blocks.tokens_NT.shape[1])

    @cached_property
    def most_targets(self) -> int:
        """Tokens that count in the client's largest micro-batch at most, as a multiple of `WIDTHS`."""
        counted_N, _ = self._counts
        return fill_up(int(counted_N.topk(self.largest_batch[0]).values.sum()))

    @cached_property
    def needs(self) -> list[int]:
        """Tokens that each step needs for what counts in it: of its largest micro-batch, where it has several."""
        # As Python's numbers: of a few tokens a step, each operation of torch would take longer than all of this.
        needed = self._counts[1].tolist()
        size = self.job.training.batch_size
        return [
            max(sum(needed[row] for row in rows[first : first + size]) for first in range(0, max(1, len(rows)), size))
            for rows in (rows.tolist() for rows in self.batches)
        ]

    @cached_property
    def _counts(self) -> tuple[Tensor, Tensor]:
        """Tokens of each block that count, [N], and that are needed for these, [N]."""
        blocks = self.job.blocks
        targets_NT = next_token_targets(take_batch(blocks, torch.arange(len(blocks))).labels_BT)
        return (targets_NT != IGNORED).sum(1), count_needed(targets_NT)

    def take_batches(self, ahead: int = 0) -> list[Batch]:
        """Return the batch of the next step, or of one so many later, or its micro-batches."""
        rows = self.batches[self.step + ahead].split(self.job.training.batch_size)
        return [take_batch(self.job.blocks, part) for part in rows if len(part)]


Taken = list[tuple[ClientSlot, list[Batch]]]
"""The clients of a step, each with the batch, or the micro-batches, that it learns from."""


def room_for(slots: Sequence[ClientSlot], row_features: int = 0) -> Room:
    """Return the room that these clients need for every step of theirs that is to come.

    Its steps are rows where that is faster on a GPU; `row_features` are a token's in this model, and 0 where padding
    has to be computed.
    """
    sequences, tokens = (max(sizes) for sizes in zip(*(slot.largest_batch for slot in slots), strict=True))
    places, targets = sequences * tokens, max(slot.most_targets for slot in slots)
    sizes: tuple[int, ...] = (places,)
    if row_features:
        added = ROW_LAUNCHES / (len(slots) * row_features) + ROW_TRAFFIC * places
        sizes = choose_sizes(needs_to_come(slots), places, added)
    return Room(len(slots), sequences, tokens, targets, sizes)


def needs_to_come(slots: Sequence[ClientSlot]) -> list[int]:
    """Return the tokens of a client that each step to come has to compute: what the one needs that needs most."""
    return [max(needs) for needs in zip_longest(*(slot.needs[slot.step :] for slot in slots), fillvalue=0)]


def choose_sizes(needs: Sequence[int], places: int, added: float) -> tuple[int, ...]:
    """Return the sizes of rows, ascending, with which steps of these needs take least, their recordings included.

    Each is one of `SIZES`, and `places` is a padded step. A row takes as long as its tokens and so many `added` ones. A
    recording is counted in every round: what a round computes must not depend on those before it.
    """
    unit = fill_up(-(-places // SIZES))
    steps = Counter(
        size if size + added <= places else places for size in (max(1, -(-need // unit)) * unit for need in needs)
    )
    costs = {size: size if size >= places else size + added for size in sorted(steps)}
    recording = RECORDING * max(costs.values())
    # The cheapest choice for all steps up to a size, of those that have it for their largest.
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for number, (size, cost) in enumerate(costs.items(), 1):
        counts = [steps[smaller] for smaller in costs][:number]
        best.append(
            min(
                (best[first][0] + recording + cost * sum(counts[first:]), (*best[first][1], size))
                for first in range(number)
            )
        )
    return best[-1][1]


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
    # From pinned memory a GPU fetches by itself; for any other the processor waits until it has done what it was told.
    noise_KP = torch.empty(len(rations), like_KP.shape[1], dtype=torch.float64, pin_memory=like_KP.is_cuda)
    for noise_P, (ration, step) in zip(noise_KP, rations, strict=True):
        noise_P.copy_(ration.noise(step, len(noise_P)))
    batches_K = torch.tensor([ration.terms.batch for ration, _ in rations])
    return Noise(*(value.to(like_KP.device, non_blocking=True) for value in (noise_KP, batches_K)))


def pad_together(batches: Sequence[Batch | None], sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Clients' batches as [K, B, T] tokens, labels and mask: short ones padded with what counts for nothing.

    So is the place of a client that has none. What fills up is a text's first token, as in a batch.
    """
    num_sequences, num_tokens = (max(size) for size in zip(*sizes, strict=True))
    filling = next((int(batch.tokens_BT[0, 0]) for batch in batches if batch is not None), 0)
    tokens_KBT = torch.full((len(batches), num_sequences, num_tokens), filling)
    labels_KBT = torch.full_like(tokens_KBT, IGNORED)
    # What fills up is not masked: nobody who counts sees it, and to see nothing at all means nothing to attention.
    mask_KBT = torch.ones_like(tokens_KBT)
    for client, batch in enumerate(batches):
        if batch is None:
            continue
        sequences, width = batch.tokens_BT.shape
        tokens_KBT[client, :sequences, width:] = batch.tokens_BT[:, :1]
        tokens_KBT[client, :sequences, :width] = batch.tokens_BT
        labels_KBT[client, :sequences, :width] = batch.labels_BT
        if batch.mask_BT is not None:
            mask_KBT[client, :sequences, :width] = batch.mask_BT
    return tokens_KBT, labels_KBT, mask_KBT
