"""Attacks as they are recorded: a name, a word for what was found, the figures behind it, and what bounds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.audit.statistics import NOT_TRIED, Array, Interval, Word
from fedloom.data.tokens import Batch, TokenBlocks
from fedloom.evaluation.batches import in_batches, targets_of
from fedloom.progress import Watch, ignore

AT_ONCE = 8
"""Blocks that are read at once."""
Figure = float | int | Sequence[float]


@dataclass(frozen=True)
class Attack:
    """Outcome of one attack."""

    name: str
    word: Word
    found: Mapping[str, Figure] = field(default_factory=dict)
    bound: Mapping[str, float] = field(default_factory=dict)
    """Largest values that any attack could reach, under differential privacy; empty where nothing bounds it."""
    why: str = ""
    """Reason why it was not tried."""

    def to_json(self) -> dict[str, Any]:
        """Return the record, without what is empty."""
        told = {"found": dict(self.found), "bound": dict(self.bound), "why": self.why}
        return {"name": self.name, "word": self.word, **{key: value for key, value in told.items() if value}}


def not_tried(name: str, why: str) -> Attack:
    """Return an attack that there was no way to try."""
    return Attack(name, NOT_TRIED, why=why)


class Sent(NamedTuple):
    """An adapter that training began with, and its change: what whoever saw both knows."""

    start: Adapter
    change_P: Tensor


def interval(name: str, found: Interval) -> dict[str, float]:
    """Return an interval as figures of an attack."""
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


class Reading(NamedTuple):
    """A model's reading of blocks."""

    sums: Array
    """Losses summed over each block's counted tokens, in nats."""
    means: Array
    """Mean loss of a counted token of each block, in nats."""
    matched: list[int]
    """Tokens in a row, from the first counted one at or behind `prompt`, that were the likeliest: greedy writing would
    have written them."""


def read_blocks(
    adapted: AdaptedModel, adapter: Adapter, blocks: TokenBlocks, *, prompt: int = 0, watch: Watch = ignore
) -> Reading:
    """Read blocks with an adapter: their losses, and how many tokens behind the first `prompt` would be written."""
    adapted.load(adapter)
    sums, means = np.zeros(len(blocks)), np.zeros(len(blocks))
    matched = [0] * len(blocks)

    def read(rows: Tensor, batch: Batch) -> None:
        device, width = adapted.device, batch.tokens_BT.shape[1]
        counted_M, targets_M = targets_of(batch)
        told = batch.to(device)
        with torch.inference_mode():
            losses_M, likeliest_M = adapted.loss_head.read_rows(
                told.tokens_BT, counted_M.to(device), targets_M.to(device), told.mask_BT
            )
        losses_M, likeliest_M = losses_M.double().cpu(), likeliest_M.cpu()
        # A row predicts the token to its right.
        behind_M = counted_M % width + 1 >= prompt
        for number, row in enumerate(rows.tolist()):
            own_M = counted_M // width == number
            sums[row], means[row] = float(losses_M[own_M].sum()), float(losses_M[own_M].mean())
            matched[row] = int(likeliest_M[own_M & behind_M].long().cumprod(0).sum())

    for _ in in_batches(adapted, blocks, read, AT_ONCE, watch=watch):
        pass
    # What is no number is the same for all, and so tells of none.
    return Reading(np.nan_to_num(sums, nan=0.0), np.nan_to_num(means, nan=0.0), matched)
