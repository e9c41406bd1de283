"""Loss, perplexity and next-token accuracy of an adapter on held-out blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import IGNORED, Batch, TokenBlocks, take_batch
from fedloom.errors import ModelError
from fedloom.host.failpoints import failpoint
from fedloom.model.attention import without_padding
from fedloom.progress import Progress, Watch, ignore
from fedloom.training.jobs import SHORT, is_shortage
from fedloom.training.objective import find_real, next_token_targets

TOKENS_ON_GPU = 16_384
"""Tokens of a batch that fill a GPU; smaller ones leave it waiting for the processor."""
Found = TypeVar("Found")
_BatchScore = tuple[Tensor, Tensor, int]
"""Loss and right answers of a batch, still on its device, and how many targets it has."""


@dataclass(frozen=True)
class Score:
    """Sums over counted tokens; the sum of two scores is the score of both sets of blocks together."""

    loss_sum: float
    """Negative log-likelihood of all targets, in nats."""
    correct: int
    """Number of targets that the model thought the likeliest token."""
    num_targets: int

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.num_targets + other.num_targets)

    @property
    def loss(self) -> float:
        """Return the mean negative log-likelihood, in nats per token."""
        return self.loss_sum / self.num_targets

    @property
    def perplexity(self) -> float:
        """Return exp(loss), or infinity if that is more than a float can hold."""
        # exp(709.8) is the largest that a float holds; beyond, math.exp raises.
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def accuracy(self) -> float:
        """Return the share of next tokens that the model thought likeliest, 0 to 1."""
        return self.correct / self.num_targets


def evaluate(
    adapted: AdaptedModel,
    adapter: Adapter,
    blocks: TokenBlocks,
    *,
    batch_size: int,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> Score:
    """Score an adapter on every block, in the model's dtype, without gradients or dropout; the model keeps the adapter.

    Neither the order of the blocks nor the batch size changes the sums beyond rounding; a GPU gets larger batches than
    `batch_size`, as many as fill it. Where memory runs out in a batch, it and those after it are halved; `lower` is
    told the new size.

    Raises:
        ModelError: memory runs out with a single block.
    """
    adapted.load(adapter)
    score = partial(_score_batch, adapted)
    found = [one for _, one in in_batches(adapted, blocks, score, batch_size, watch=watch, lower=lower)]
    # Reading numbers waits for a GPU: once, at the end.
    read = (Score(float(loss), int(correct), num_targets) for loss, correct, num_targets in found)
    return sum(read, Score(0.0, 0, 0))


def in_batches(
    adapted: AdaptedModel,
    blocks: TokenBlocks,
    score: Callable[[Tensor, Batch], Found],
    batch_size: int,
    *,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> Iterator[tuple[Tensor, Found]]:
    """Yield the numbers of a batch's blocks, and what `score` finds of them by both, until all blocks are scored.

    The model is as it is now, without dropout. A GPU gets batches that fill it. Where memory runs out in a batch, it
    and those after it are halved; `lower` is told the new size.

    Raises:
        ModelError: memory runs out with a single block.
    """
    adapted.model.eval()
    start, size = 0, batch_size
    if adapted.device.type == "cuda":
        size = max(size, TOKENS_ON_GPU // max(1, blocks.tokens_NT.shape[1]))
    # Blocks of similar lengths go together, so that little padding is computed. Stable, so that the sums are the same
    # in every run.
    by_length = torch.argsort(blocks.widths, stable=True)
    while start < len(by_length):
        rows = by_length[start : start + size]
        batch = take_batch(blocks, rows)
        try:
            found = [score(rows, batch)]
        except SHORT as error:
            if not is_shortage(error):
                raise
            found = []
        # Not in the handler above: the error that it holds keeps the memory of what was under way.
        if not found:
            size = halve(len(batch.tokens_BT), adapted.device, "score a single block", mend="lower data.max_length")
            lower(size)
            continue
        yield rows, found[0]
        start += size
        watch(Progress("evaluate", batch.num_tokens, len(batch.tokens_BT)))


def targets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the rows of a batch that count, [M] of its B·T, and their targets, [M]: on the processor."""
    # A GPU would have to be waited for.
    targets_M = next_token_targets(batch.labels_BT).flatten()
    counted_M = (targets_M != IGNORED).nonzero()[:, 0]
    return counted_M, targets_M[counted_M]


def _score_batch(adapted: AdaptedModel, _: Tensor, batch: Batch) -> _BatchScore:
    device = adapted.device
    with torch.inference_mode():
        counted_M, targets_M = targets_of(batch)
        told = batch.to(device)
        real_R = find_real(next_token_targets(batch.labels_BT)) if adapted.unpads else None
        rows_M = counted_M if real_R is None else torch.searchsorted(real_R, counted_M)
        with without_padding(real_R, told.tokens_BT.shape, told.mask_BT):
            loss, correct = adapted.loss_head.score(
                told.tokens_BT, rows_M.to(device), targets_M.to(device), told.mask_BT
            )
        failpoint("evaluation.scored")
        return loss, correct, len(counted_M)


def halve(size: int, device: torch.device, what: str, *, mend: str) -> int:
    """Return half the size of a batch that there was no memory for, and give back what it held.

    Raises:
        ModelError: it was a single one; `what` says what there was no memory to do.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if size == 1:
        raise ModelError(f"there is not enough memory to {what}", where="evaluation", mend=mend)
    return size // 2
