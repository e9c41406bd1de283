"""Likelihoods of choices: which of some texts a model would sooner write behind a prompt.

Letters: N blocks, a choice behind its prompt each; M pairs of a position that counts and a block that it counts for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import Batch, TokenBlocks
from fedloom.evaluation.batches import in_batches, targets_of
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

    Blocks that differ in their last token alone, as letters behind a question do, are computed once for all of them.

    Raises:
        ModelError: memory runs out with a single block.
    """
    groups = _group_twins(blocks)
    last_N = blocks.tokens_NT.gather(1, blocks.lengths_N[:, None] - 1)[:, 0].tolist()

    def score(rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        counted, targets = targets_of(batch)
        width, pairs = batch.tokens_BT.shape[1], []
        for place, target in zip(counted.tolist(), targets.tolist(), strict=True):
            twins = groups[int(rows[place // width])]
            pairs += [(place, last_N[twin] if len(twins) > 1 else target, twin) for twin in twins]
        places_M, targets_M, blocks_M = torch.tensor(pairs).T
        told, device = batch.to(adapted.device), adapted.device
        losses_M = adapted.loss_head.score_rows(told.tokens_BT, places_M.to(device), targets_M.to(device), told.mask_BT)
        return blocks_M, losses_M.double().cpu()

    found_N = torch.zeros(len(blocks), dtype=torch.float64)
    firsts = blocks.take(torch.tensor([group[0] for group in groups], dtype=torch.int64))
    with torch.inference_mode():
        for _, (blocks_M, losses_M) in in_batches(adapted, firsts, score, batch_size, watch=watch, lower=lower):
            # Added up on the processor, where the order is always the same.
            found_N.index_add_(0, blocks_M, -losses_M)
    return found_N


def _group_twins(blocks: TokenBlocks) -> list[list[int]]:
    """Group the numbers of blocks that have the same tokens but for the last, which alone counts in them."""
    groups: dict[bytes | int, list[int]] = {}
    counts_N = blocks.counted_NT.sum(1)
    for number, length in enumerate(blocks.lengths_N.tolist()):
        alone = counts_N[number] == 1 and bool(blocks.counted_NT[number, length - 1])
        key = blocks.tokens_NT[number, : length - 1].numpy().tobytes() if alone else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())
