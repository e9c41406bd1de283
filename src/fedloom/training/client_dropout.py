"""Dropout of the adapters and the base model that is each client's own, whichever clients train beside it.

Within `ClientDropout`, every call of torch's dropout, and attention with dropout, takes each sequence's mask from the
key of that sequence, the number of the call, and the place in the sequence. So a mask does not depend on how many
clients there are, how wide their batches are, what of them is computed, and by which engine. In a private step a
document's key is made of the document alone.

Letters: N sequences of all clients, T tokens, M real tokens, D features, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedloom.errors import ModelError
from fedloom.model.attention import plain_attention, repeat_heads
from fedloom.model.unpadding import current_row
from fedloom.training.dropout_masks import Mask, split
from fedloom.training.dropping import Dropped


class ClientDropout(TorchFunctionMode):
    """Dropout in one forward pass over sequences of these keys, [N].

    Values are [N, T, D], [N, H, T, T] or, as some models have these, [N·H, T, T], or of real tokens alone [M, D], with
    whatever dimensions between or before them. Where all sequences are one client's, as `alone` says, they may be any.
    """

    def __init__(self, keys_N: Tensor, *, alone: bool = False) -> None:
        super().__init__()
        self._keys_N, self._alone = keys_N, alone
        self._calls = 0
        self._places: dict[tuple[int, bool], Tensor] = {}

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed layer's two passes: the second drops what the first dropped."""
        # Only the second is entered outside this mode, in the backward pass, when all calls are counted.
        return nullcontext(), self._again(self._calls)

    @contextmanager
    def _again(self, calls: int) -> Iterator[None]:
        self._calls = calls
        with self:
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace dropout, and attention with dropout; let every other function of torch through."""
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        # The fused kernels draw one mask for the whole batch, from torch's own generator.
        if func is functional.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        if p == 1:
            return x * 0
        sequences = len(self._keys_N)
        if x.ndim == 3 and x.shape[1] == x.shape[2] and len(x) != sequences and len(x) % sequences == 0:
            by_heads = x.view(sequences, -1, *x.shape[1:])
            return self._dropout(by_heads, p).view_as(x)
        heads = x.shape[1] if x.ndim == 4 else 1
        mask = Mask(self._find_places(x), self._calls, heads, dropped=min(round(p * 65536), 65535))
        self._calls += heads
        dropped: Tensor = Dropped.apply(x, mask)  # type: ignore[no-untyped-call]
        return dropped

    def _find_places(self, x: Tensor) -> Tensor:
        """Return the key of each token that values are of, [N, T], or [M] where they are of real tokens alone."""
        row = current_row()
        if row is not None and x.ndim != 4 and row.holds(x):
            return self._place(row.width, row.places_M)
        rows = x.numel() // (x.shape[1] * x.shape[3]) if x.ndim == 4 else x.numel() // x.shape[-1]
        if rows % len(self._keys_N) == 0 and (x.ndim != 4 or len(x) == len(self._keys_N)):
            return self._place(rows // len(self._keys_N))
        if not self._alone:
            raise ModelError(
                f"the model has dropout on values of shape {list(x.shape)}, which are no sequences'",
                where="training.engine",
                mend='use "reference"',
            )
        places = split(self._keys_N[0], torch.arange(rows, device=x.device))
        return places.view(-1, x.shape[2] if x.ndim == 4 else rows)

    def _place(self, width: int, chosen_M: Tensor | None = None) -> Tensor:
        """Return the keys of the tokens of sequences of a width, all or the chosen ones; each is made once."""
        found = self._places.get((width, chosen_M is None))
        if found is None:
            places_NT = split(self._keys_N[:, None], torch.arange(width, device=self._keys_N.device))
            found = places_NT if chosen_M is None else places_NT.flatten()[chosen_M]
            self._places[width, chosen_M is None] = found
        return found

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = repeat_heads(key, value, query.shape[1] // key.shape[1])
        drop = partial(self._dropout, p=dropout_p)
        return plain_attention(query, key, value, drop=drop, scale=scale, mask=attn_mask)
