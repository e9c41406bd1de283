"""Batches of held-out blocks, by their tokens: the widest blocks first, and fewer at a time where memory runs out.

A lane is what one adapter is scored on. Where a model holds several adapters at once, a batch has blocks of several
lanes, lane by lane.

Letters: B blocks of a batch, T tokens, M positions that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import IGNORED, Batch, TokenBlocks, take_batch
from fedloom.errors import ModelError
from fedloom.model.shortage import SHORT, is_shortage
from fedloom.progress import Progress, Watch, ignore
from fedloom.training.client_slots import fill_up
from fedloom.training.objective import next_token_targets

TOKENS_ON_GPU = 16_384
"""Tokens of a batch that fill a GPU; smaller ones leave it waiting for the processor."""
Found = TypeVar("Found")


def tokens_at_once(batch_size: int, width: int, device: torch.device) -> int:
    """Return the most tokens of a batch: of `batch_size` blocks of full width, and on a GPU as many as fill it."""
    return max(batch_size * width, TOKENS_ON_GPU if device.type == "cuda" else 0)


def widest_of(lanes: Sequence[TokenBlocks]) -> int:
    """Return the width of the widest lane."""
    return max(blocks.tokens_NT.shape[1] for blocks in lanes)


def width_for(width: int, widest: int, device: torch.device) -> int:
    """Return the width of a batch whose blocks are at most so wide, where no block of all is wider than `widest`.

    A GPU's is a multiple of `WIDTHS` where it can be: some kernels are chosen anew for every width, which takes longer
    than a batch.
    """
    return min(fill_up(width), widest) if device.type == "cuda" else width


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

    The model is as it is now, without dropout. A batch has the tokens of `batch_size` blocks of full width, or more on
    a GPU. Where memory runs out in a batch, it is tried again without what an engine keeps for its next round; then it
    and those after it are halved, and `lower` is told their tokens.

    Raises:
        ModelError: memory runs out with a single block.
    """

    def score_lane(taken: Mapping[int, Tensor], batches: Sequence[Batch]) -> Found:
        return score(taken[0], batches[0])

    most = tokens_at_once(batch_size, blocks.tokens_NT.shape[1], adapted.device)
    for taken, found in in_lanes(adapted, [blocks], score_lane, most, watch=watch, lower=lower):
        yield taken[0], found


def in_lanes(
    adapted: AdaptedModel,
    lanes: Sequence[TokenBlocks],
    score: Callable[[Mapping[int, Tensor], Sequence[Batch]], Found],
    most_tokens: int,
    *,
    at_once: int = 1,
    watch: Watch = ignore,
    lower: Callable[[int], object] = int,
) -> Iterator[tuple[Mapping[int, Tensor], Found]]:
    """Yield the rows of each lane in a batch, and what `score` finds by them and their batches, until all are scored.

    Up to `at_once` lanes share a batch, as many as can within `most_tokens`, padding counted; a lane that has ended
    makes room for the next. Memory that runs out is dealt with as in `in_batches`.

    Raises:
        ModelError: memory runs out with a single block.
    """
    adapted.model.eval()
    # Blocks of similar widths go together, so that little padding is computed; the widest first, so that where memory
    # runs out, it does so at once. Stable, so that the sums are the same in every run.
    left = [torch.argsort(blocks.widths, stable=True, descending=True) for blocks in lanes]
    # Never walked whole for a batch: there may be a lane for each of ten thousand clients.
    waiting, widest = {lane: None for lane, rows in enumerate(left) if len(rows)}, widest_of(lanes)
    while waiting:
        taken = _take(lanes, left, [*islice(waiting, at_once)], most_tokens, widest, adapted.device)
        batches = [take_batch(lanes[lane], rows) for lane, rows in taken.items()]
        num_blocks = sum(map(len, taken.values()))
        try:
            found = [score(taken, batches)]
        except SHORT as error:
            if not is_shortage(error):
                raise
            found = []
        # Not in the handler above: the error that it holds keeps the memory of what was under way.
        if not found:
            if adapted.give_back():
                continue
            fewer = halve(num_blocks, adapted.device, "score a single block", mend="lower data.max_length")
            size, width = (max(sizes) for sizes in zip(*(batch.tokens_BT.shape for batch in batches), strict=True))
            width = width_for(width, widest, adapted.device)
            most_tokens = len(batches) * size * width * fewer // num_blocks
            lower(most_tokens)
            continue
        for lane, rows in taken.items():
            left[lane] = left[lane][len(rows) :]
            if not len(left[lane]):
                del waiting[lane]
        yield taken, found[0]
        watch(Progress("evaluate", sum(batch.num_tokens for batch in batches), num_blocks))


def _take(
    lanes: Sequence[TokenBlocks],
    left: Sequence[Tensor],
    waiting: Sequence[int],
    most_tokens: int,
    widest: int,
    device: torch.device,
) -> dict[int, Tensor]:
    """Return the next rows of as many lanes as there is room for, equally many of each: of one lane, one at least."""
    chosen, width = 0, 1
    for lane in waiting:
        wider = max(width, width_for(int(lanes[lane].widths[left[lane][0]]), widest, device))
        if chosen and (chosen + 1) * wider > most_tokens:
            break
        chosen, width = chosen + 1, wider
    size = max(1, most_tokens // (chosen * width))
    return {lane: left[lane][:size] for lane in waiting[:chosen]}


def targets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the rows of a batch that count, [M] of its B·T, and their targets, [M]: on the processor."""
    # A GPU would have to be waited for.
    targets_M = next_token_targets(batch.labels_BT).flatten()
    counted_M = (targets_M != IGNORED).nonzero()[:, 0]
    return counted_M, targets_M[counted_M]


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the processor's memory on a device, without a wait for what a GPU was told before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


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
