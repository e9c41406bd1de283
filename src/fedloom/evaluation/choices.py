"""Likelihoods of choices: which of some texts a model would sooner write behind a prompt.

Letters: N blocks, a choice behind its prompt each; M positions that count, in a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import Batch, TokenBlocks
from fedloom.evaluation.held_out import in_batches, targets_of
from fedloom.progress import Watch, ignore


def log_likelihoods(
    adapted: AdaptedModel,
    blocks: TokenBlocks,
    *,
    batch_size: int,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> Tensor:
    """Return the log-likelihood of what counts in each block, [N], in nats, under the model as it is now.

    Raises:
        ModelError: memory runs out with a single block.
    """

    def score(batch: Batch) -> Tensor:
        counted_M, targets_M = targets_of(batch)
        device = adapted.device
        told = batch.to(device)
        losses_M = adapted.loss_head.score_rows(
            told.tokens_BT, counted_M.to(device), targets_M.to(device), told.mask_BT
        )
        # Added up on the processor, where the order is always the same.
        losses_M, of_block_M = losses_M.double().cpu(), counted_M // batch.tokens_BT.shape[1]
        return -losses_M.new_zeros(len(batch.tokens_BT)).index_add(0, of_block_M, losses_M)

    found_N = torch.zeros(len(blocks), dtype=torch.float64)
    with torch.inference_mode():
        for rows, scores in in_batches(adapted, blocks, score, batch_size, watch=watch, lower=lower):
            found_N[rows] = scores
    return found_N
