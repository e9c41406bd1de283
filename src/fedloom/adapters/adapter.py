"""An adapter: named tensors over one flat vector.

The flat vector makes all work on an adapter plain arithmetic: averaging, distance, clipping, the optimizer and the
bytes on the wire need no names.

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fedloom.adapters.lora import Residual
from fedloom.host.files import hash_pieces


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an adapter's tensors in the order in which they lie in the flat vector.

    The names are those of the saved files: PEFT's, `base_model.model.….q_proj.lora_A.weight`, or the model's own.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def size(self) -> int:
        """Return P, the number of weights."""
        return sum(shape.numel() for shape in self.shapes)

    def describe(self) -> str:
        """Return the names and shapes as a text, which hashes are made of."""
        return repr((self.names, [tuple(shape) for shape in self.shapes]))

    def split(self, weights_P: Tensor) -> dict[str, Tensor]:
        """Return each tensor as a view of the flat vector: a change of one is a change of the other."""
        return dict(zip(self.names, (view[0] for view in self.split_stacked(weights_P[None])), strict=True))

    def split_stacked(self, weights_KP: Tensor) -> list[Tensor]:
        """Return each tensor of K adapters as a view of theirs, [K, *shape], in the order of the names."""
        ends = accumulate((shape.numel() for shape in self.shapes), initial=0)
        views = (weights_KP[:, start:end] for start, end in pairwise(ends))
        return [view.unflatten(1, shape) for view, shape in zip(views, self.shapes, strict=True)]


@dataclass(frozen=True)
class Adapter:
    """Adapter outside any model: on the CPU, never changed in place, so that many may hold the same one."""

    layout: Layout
    weights_P: Tensor
    residual: Residual | None = None
    """Factors that belong to the model beside the adapter; only `lora_rule = "fedex"` makes them."""

    @property
    def num_bytes(self) -> int:
        """Return the bytes that travel to a client or back."""
        beside = self.residual.num_bytes if self.residual else 0
        return self.weights_P.numel() * self.weights_P.element_size() + beside

    def sha256(self) -> str:
        """Return the SHA-256, in hexadecimal, over names, shapes, weights and residual."""

        def pieces() -> Iterator[bytes | memoryview]:
            yield self.layout.describe().encode()
            yield self.weights_P.contiguous().numpy().data
            for layer, pair in self.residual.factors.items() if self.residual else ():
                for factor in pair:
                    yield f"{layer}{tuple(factor.shape)}".encode()
                    yield factor.contiguous().numpy().data

        return hash_pieces(pieces())
