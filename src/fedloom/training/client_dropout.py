"""Dropout of the adapters and the base model that is each client's own, whichever clients train beside it.

Within `ClientDropout`, every call of torch's dropout, and attention with dropout, draws each client's mask from that
client's generator, in the shape that the client's own batch has. So a client's masks do not depend on how many
clients there are, nor on how wide their batches are. In a private step each document stands for a client.

Letters: K clients, B sequences of a client, T tokens, D features, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedloom.model.attention import plain_attention, repeat_heads
from fedloom.model.unpadding import current_row


class ClientDropout(TorchFunctionMode):
    """Dropout in one forward pass over [K·B, T] tokens.

    `sizes` has each client's own (sequences, tokens), at most (B, T). Beyond them lies padding, which is not dropped.
    """

    def __init__(self, generators: Sequence[torch.Generator], sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._generators = generators
        self._sizes = sizes
        self._num_sequences = max(sequences for sequences, _ in sizes)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed layer's two passes: the second drops what the first dropped."""
        # Only the second is entered outside this mode, in the backward pass, and with generators that have moved on.
        return nullcontext(), self._again([generator.get_state() for generator in self._generators])

    @contextmanager
    def _again(self, states: Sequence[Tensor]) -> Iterator[None]:
        now = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        try:
            with ClientDropout(self._generators, self._sizes):
                yield
        # Torch leaves the layer by an exception once it has recomputed what it needs.
        finally:
            for generator, state in zip(self._generators, now, strict=True):
                generator.set_state(state)

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
        # States are [K·B, T, D] or, flattened, [K·B·T, D] or [K, B·T, D]; probabilities of attention [K·B, H, T, T].
        # Of real tokens alone, [1, M, D] or [M, D], the whole batch's mask is drawn, and theirs is taken from it.
        row = current_row()
        whole = None if row is None or x.ndim == 4 or not row.holds(x) else row
        num_clients = len(self._generators)
        by_client = (num_clients, self._num_sequences, -1, x.shape[-1])
        if x.ndim == 4:
            by_client = (num_clients, self._num_sequences, *x.shape[1:])
        size = x.shape if whole is None else (whole.sequences * whole.width, x.shape[-1])
        mask = x.new_full(size, 1 - p).reshape(by_client)  # which makes padding 1 below
        for client, (generator, (sequences, tokens)) in enumerate(zip(self._generators, self._sizes, strict=True)):
            own = mask[client, :sequences]
            own = own[:, :, :tokens, :tokens] if x.ndim == 4 else own[:, :tokens]
            # Drawn in the shape of the client's own batch: a wider neighbour would change how the numbers fall.
            if own.is_contiguous():
                own.bernoulli_(1 - p, generator=generator)
            else:
                own.copy_(torch.empty(own.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator))
        mask.div_(1 - p)
        return x * (mask if whole is None else whole.gather(mask.view(size))).view_as(x)

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
