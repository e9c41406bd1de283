"""Batches without their padding: a model computes the real tokens alone, in one row.

Every layer but attention treats a token by itself, so padding there is work for nothing; what needs to know which token
belongs to which sequence (attention, clients' adapters, their dropout) cuts the row into pieces. Attention with
dropout, whose masks are of whole sequences, spreads it over the batch and gathers it again; so does all attention of an
even row, whose shapes say nothing of its tokens. The same is done to BERT by Zeng et al. 2022 (arXiv 2208.08124,
section 4.2).

Letters: B sequences of T tokens, M tokens in the row, of the B·T, K clients with R each in an even row, X whatever a
token has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedloom.model.devices import without_sorting


def see_own_text(texts_BT: Tensor) -> Tensor:
    """Return which token sees which, [B, 1, T, T]: those of its own text up to itself, by the numbers of the texts."""
    same_BTT = texts_BT[:, :, None] == texts_BT[:, None, :]
    return same_BTT.tril()[:, None]


class Row(ABC):
    """Tokens of a batch of `shape` [B, T] that stand for it, [M].

    `places_M` are their places in the flattened batch, each one once; `texts_BT` the numbers of the texts that share a
    sequence, None where each has one.
    """

    texts: list[int] | None = None
    """Tokens of each text, in order; None where they are not known before."""

    def __init__(self, places_M: Tensor, shape: tuple[int, ...], texts_BT: Tensor | None = None) -> None:
        self.places_M, self._texts_BT = places_M, texts_BT
        self.sequences, self.width = shape

    @abstractmethod
    def share(self, parts: int) -> list[int] | None:
        """Return how many of the tokens are of each of so many equal parts of the batch's sequences; None: as many."""

    @cached_property
    def seen(self) -> Tensor | None:
        """Return which token of the batch sees which, [B, 1, T, T], once for all layers; None: all to its left."""
        return None if self._texts_BT is None else see_own_text(self._texts_BT)

    def take(self, values_BT: Tensor) -> Tensor:
        """Return the values of the row's tokens, [1, M]."""
        return values_BT.flatten()[self.places_M][None]

    def holds(self, values: Tensor) -> bool:
        """Return whether these are values of the row's tokens, [1, M, X] or [M, X], and not of the whole batch."""
        return values.numel() == len(self.places_M) * values.shape[-1]

    def spread(self, rows_MX: Tensor) -> Tensor:
        """Return the values of the whole batch, [B·T, ...], of those of the row's tokens, [M, ...]; 0 elsewhere."""
        grid: Tensor = _Spread.apply(rows_MX, self.places_M, self.sequences * self.width)  # type: ignore[no-untyped-call]
        return grid

    def gather(self, grid_NX: Tensor) -> Tensor:
        """Return the values of the row's tokens, [M, ...], of those of the whole batch, [B·T, ...]."""
        rows: Tensor = _Gather.apply(grid_NX, self.places_M)  # type: ignore[no-untyped-call]
        return rows


class EvenRow(Row):
    """Row in which each of K clients has equally many tokens, `places_KR`.

    All its real tokens are among a client's; what it has fewer of than others is padding of its own. So every shape is
    known before, and no number is asked of the device, as a recorded step needs it.
    """

    def __init__(self, places_KR: Tensor, shape: tuple[int, ...], texts_BT: Tensor | None = None) -> None:
        super().__init__(places_KR.flatten(), shape, texts_BT)
        self._parts = len(places_KR)

    def share(self, parts: int) -> list[int] | None:
        """Return None: clients have equally many."""
        assert parts == self._parts, "a client's sequences have unequal parts of an even row"
        return None


class RealRow(Row):
    """Row of a batch's real tokens, and they alone, in order; their numbers are asked of the device."""

    def __init__(self, places_M: Tensor, shape: tuple[int, ...], texts_BT: Tensor | None = None) -> None:
        super().__init__(places_M, shape, texts_BT)
        sequences_M = places_M // self.width
        self._lengths = torch.bincount(sequences_M, minlength=self.sequences).tolist()
        owners = sequences_M[None] if texts_BT is None else torch.stack([sequences_M, self.take(texts_BT)[0]])
        self.texts: list[int] = torch.unique_consecutive(owners, dim=1, return_counts=True)[1].tolist()

    def share(self, parts: int) -> list[int]:
        """Return how many of the tokens are of each of so many equal parts of the batch's sequences."""
        each = self.sequences // parts
        return [sum(self._lengths[each * part : each * (part + 1)]) for part in range(parts)]


_current: Row | None = None


def current_row() -> Row | None:
    """Return the row that stands for the batch under way; None where padding is computed."""
    return _current


@contextmanager
def in_a_row(row: Row | None) -> Iterator[None]:
    """Have models compute a row in a batch's place inside: forward, and backward where layers are computed again."""
    global _current
    before, _current = _current, row
    try:
        yield
    finally:
        _current = before


# Each is the other's gradient. Autograd's own for a gather would add, in an order that a GPU does not keep: here no
# place is taken twice.
class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MX: Tensor, places_M: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places_M)
        return _put(rows_MX, places_M, size)

    @staticmethod
    def backward(ctx: Any, grad_NX: Tensor) -> tuple[Tensor, None, None]:
        return grad_NX.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grid_NX: Tensor, places_M: Tensor) -> Tensor:
        ctx.save_for_backward(places_M)
        ctx.size = len(grid_NX)
        return grid_NX.index_select(0, places_M)

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None]:
        (places_M,) = ctx.saved_tensors
        return _put(grad_MX, places_M, ctx.size), None


def _put(rows_MX: Tensor, places_M: Tensor, size: int) -> Tensor:
    """Return so many rows of zeros, but for these rows at their places, which are different ones."""
    grid_NX = rows_MX.new_zeros(size, *rows_MX.shape[1:])
    with without_sorting():
        return grid_NX.index_copy_(0, places_M, rows_MX)
