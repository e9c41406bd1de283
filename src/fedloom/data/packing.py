"""Packing: short texts of one client share a block, so that hardly any padding is computed.

Each text is learnt as if it stood alone: the mask tells texts apart, so that no token sees another text's
(`fedloom.model.attention`), positions begin anew with each, and its first token is no label.

Letters: N blocks, T tokens in a block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace

import torch

from fedloom.data.tokens import TokenBlocks


def pack_blocks(blocks: TokenBlocks) -> TokenBlocks:
    """Return the texts in as few blocks as best fit finds for them: the longest first, each into the fullest it fits.

    That takes at most 11/9 of the fewest blocks possible, and one more (best fit decreasing: Johnson et al. 1974, SIAM
    Journal on Computing 3, theorem 3.2). What was left out stays on record.
    """
    width = blocks.tokens_NT.shape[1]
    packed = _best_fit(blocks.lengths_N.tolist(), width)
    shape = (len(packed), width)
    tokens_NT, texts_NT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    counted_NT = torch.zeros(shape, dtype=torch.bool)
    lengths_N = torch.zeros(len(packed), dtype=torch.int64)
    for block, rows in enumerate(packed):
        begin = 0
        for text, row in enumerate(rows, start=1):
            length = int(blocks.lengths_N[row])
            place = slice(begin, begin + length)
            tokens_NT[block, place] = blocks.tokens_NT[row, :length]
            counted_NT[block, place] = blocks.counted_NT[row, :length]
            texts_NT[block, place] = text
            begin += length
        lengths_N[block] = begin
    return replace(blocks, tokens_NT=tokens_NT, lengths_N=lengths_N, counted_NT=counted_NT, texts_NT=texts_NT)


def _best_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Return the rows of each block."""
    packed: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each block, in order
    # Sorting is stable, so the same rows are packed in the same way everywhere.
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if (place := bisect_left(room, (lengths[row], 0))) < len(room):
            free, block = room.pop(place)
        else:
            free, block = width, len(packed)
            packed.append([])
        packed[block].append(row)
        insort(room, (free - lengths[row], block))
    return packed
