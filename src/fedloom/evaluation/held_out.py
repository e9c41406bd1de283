"""Loss, perplexity and next-token accuracy of an adapter on held-out blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import IGNORED, Batch, TokenBlocks, take_batch
from fedloom.errors import ModelError
from fedloom.host.failpoints import failpoint
from fedloom.progress import Progress, Watch, ignore
from fedloom.training.jobs import SHORT, is_shortage
from fedloom.training.objective import next_token_targets


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

    Neither the order of the blocks nor the batch size changes the sums beyond rounding. Where memory runs out in a
    batch, it and those after it are halved; `lower` is told the new size.

    Raises:
        ModelError: memory runs out with a single block.
    """
    adapted.load(adapter)
    adapted.model.eval()
    found, start, size = Score(0.0, 0, 0), 0, batch_size
    # Blocks of similar lengths go together, so that little padding is computed. Stable, so that the sums are the same
    # in every run.
    by_length = torch.argsort(blocks.counted_N, stable=True)
    while start < len(by_length):
        batch = take_batch(blocks, by_length[start : start + size])
        try:
            score = _score_batch(adapted, batch)
        except SHORT as error:
            if not is_shortage(error):
                raise
            score = None
        # Not in the handler above: the error that it holds keeps the memory of what was under way.
        if score is None:
            size = _halve(len(batch.tokens_BT), adapted.device)
            lower(size)
            continue
        found, start = found + score, start + size
        watch(Progress("evaluate", batch.num_tokens, len(batch.tokens_BT)))
    return found


def _score_batch(adapted: AdaptedModel, batch: Batch) -> Score:
    batch = batch.to(adapted.device)
    with torch.inference_mode():
        targets_M: Tensor = next_token_targets(batch.labels_BT).flatten()
        counted_M = (targets_M != IGNORED).nonzero()[:, 0]
        loss, correct = adapted.loss_head.score(batch.tokens_BT, counted_M, targets_M[counted_M], batch.mask_BT)
        failpoint("evaluation.scored")
        # Reading the two numbers waits for a GPU, once a batch.
        return Score(float(loss), int(correct), len(counted_M))


def _halve(size: int, device: torch.device) -> int:
    """Return half the size of a batch that there was no memory for, and give back what it held.

    Raises:
        ModelError: it was a single block.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if size == 1:
        raise ModelError(
            "there is not enough memory to score a single block", where="evaluation", mend="lower data.max_length"
        )
    return size // 2
