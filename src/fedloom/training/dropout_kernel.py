"""Dropout by counter as one kernel of a GPU: `Mask.compute` line by line, in Triton, which comes with torch for CUDA.

To the bit what `Mask.compute` gives, interpreted in tests and run on an H100 with Triton 3.6. `dropping` tries it on
each GPU before it is used, since no other was seen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedloom.training.dropout_masks import GAMMA, MIX, Mask

STEP = tl.constexpr(GAMMA)
SHIFT_1, SHIFT_2, SHIFT_3 = (tl.constexpr(shift) for shift, _ in MIX)
FACTOR_1, FACTOR_2, _ = (tl.constexpr(factor) for _, factor in MIX)
BLOCK = 1024
"""Values of a row that a program has at most."""


@triton.jit
def _mix(words):  # type: ignore[no-untyped-def]
    words = (words ^ (words >> SHIFT_1)) * FACTOR_1
    words = (words ^ (words >> SHIFT_2)) * FACTOR_2
    return words ^ (words >> SHIFT_3)


# Not made anew for a call whose number is a multiple of 16, say: a recorded step must find what was warmed up.
@triton.jit(do_not_specialize=["call", "dropped"])  # type: ignore[untyped-decorator]
def _drop(values, out, places, call, dropped, scale, heads, length, features, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    sequence, head = row // (heads * length), row // length % heads
    place = tl.load(places + sequence * length + row % length).to(tl.uint64)
    key = _mix(place + (call + head + 1).to(tl.uint64) * STEP)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    words = _mix(key + (feature // 4 + 1).to(tl.uint64) * STEP)
    pieces = (words >> (feature % 4 * 16).to(tl.uint64)) & 0xFFFF
    # Unsigned here, signed there: the topmost bit is the other way round.
    stays = (pieces ^ 0x8000).to(tl.int32) >= dropped
    inside = feature < features
    given = tl.load(values + row * features + feature, mask=inside).to(tl.float32)
    tl.store(out + row * features + feature, given * tl.where(stays, scale, 0.0), mask=inside)


def drop(values: Tensor, mask: Mask) -> Tensor:
    """Return values under a mask, of 32 bits or fewer each, as `Mask.compute` does."""
    values = values.contiguous()
    out = torch.empty_like(values)
    features = values.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(features))
    grid = (values.numel() // features, triton.cdiv(features, block))
    sizes = (mask.heads, mask.places.shape[-1], features)
    _drop[grid](values, out, mask.places, mask.call, mask.dropped, mask.scale, *sizes, block)
    return out
