"""Loss, perplexity and next-token accuracy of an adapter on held-out blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedloom.adapters.adapter import AdaptedModel, Adapter
from fedloom.data.tokens import IGNORED, TokenBlocks, take_batch
from fedloom.progress import Progress, Watch, ignore
from fedloom.training.objective import next_token_targets, token_loss_sum


@dataclass(frozen=True)
class Score:
    """Sums over counted tokens: adding two scores is evaluating both sets in one pass."""

    loss_sum: float
    correct: int
    num_targets: int

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.num_targets + other.num_targets)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.loss_sum / self.num_targets

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return math.exp(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of next tokens that the model thought likeliest."""
        return self.correct / self.num_targets


def evaluate(
    adapted: AdaptedModel, adapter: Adapter, blocks: TokenBlocks, *, batch_size: int, watch: Watch = ignore
) -> Score:
    """Score an adapter on every block, in the model's dtype, without gradients or dropout.

    Batches are of similar lengths, so that little padding is computed; neither that nor the batch size changes the
    sums beyond rounding.
    """
    adapted.load(adapter)
    adapted.model.eval()
    score = Score(0.0, 0, 0)
    by_length = torch.argsort(blocks.counted_N, stable=True)
    with torch.inference_mode():
        for rows in by_length.split(batch_size):
            batch = take_batch(blocks, rows).to(adapted.device)
            logits_BTV = adapted.model(input_ids=batch.tokens_BT, use_cache=False).logits
            targets_BT = next_token_targets(batch.labels_BT)
            correct_BT = logits_BTV.argmax(-1) == targets_BT  # never true where nothing counts
            score += Score(
                loss_sum=token_loss_sum(logits_BTV, targets_BT).item(),
                correct=int(correct_BT.sum()),
                num_targets=int((targets_BT != IGNORED).sum()),
            )
            watch(Progress("evaluate", batch.num_tokens))
    return score
