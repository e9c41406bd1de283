"""Loss, perplexity and next-token accuracy of an adapter on held-out blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import IGNORED, TokenBlocks, take_batch
from fedloom.progress import Progress, Watch, ignore
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
    adapted: AdaptedModel, adapter: Adapter, blocks: TokenBlocks, *, batch_size: int, watch: Watch = ignore
) -> Score:
    """Score an adapter on every block, in the model's dtype, without gradients or dropout; the model keeps the adapter.

    Neither the order of the blocks nor the batch size changes the sums beyond rounding.
    """
    adapted.load(adapter)
    adapted.model.eval()
    loss, correct, num_targets = 0.0, 0, 0
    # Blocks of similar lengths go together, so that little padding is computed. Stable, so that the sums are the same
    # in every run.
    by_length = torch.argsort(blocks.counted_N, stable=True)
    with torch.inference_mode():
        for rows in by_length.split(batch_size):
            batch = take_batch(blocks, rows).to(adapted.device)
            targets_M = next_token_targets(batch.labels_BT).flatten()
            counted_M = (targets_M != IGNORED).nonzero()[:, 0]
            batch_loss, batch_correct = adapted.loss_head.score(batch.tokens_BT, counted_M, targets_M[counted_M])
            # Reading the two numbers waits for a GPU, once a batch.
            loss, correct = loss + float(batch_loss), correct + int(batch_correct)
            num_targets += len(counted_M)
            watch(Progress("evaluate", batch.num_tokens, len(rows)))
    return Score(loss, correct, num_targets)
