"""What averaging LoRA's factors apart leaves out, kept as factors of its own beside a frozen layer.

It is the same for every client and never trained: W x + s·B_r A_r x stands where W x stood. A base model, packed or
quantised, is never written to.

Letters: I and O features in and out, R rank of the adapter, S rank of the residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def lora_pairs(names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Layer -> the names of its A and its B, of the layers that have both."""
    pairs = {
        name.removesuffix(A_SUFFIX): (name, name.replace(A_SUFFIX, B_SUFFIX))
        for name in names
        if name.endswith(A_SUFFIX)
    }
    return {layer: (a, b) for layer, (a, b) in pairs.items() if b in names}


@dataclass(frozen=True)
class Residual:
    """Layer -> B [O, S] and A [S, I] on the CPU; the layer's own scale α/r applies to their product too."""

    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(factor.numel() * factor.element_size() for pair in self.factors.values() for factor in pair)

    def widen(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The adapter's tensors with the residual as more ranks of theirs, the same number in every layer.

        B A + B_r A_r = [B, B_r] [A; A_r]; layers with fewer are filled with zeros.
        """
        widest = max((a_SI.shape[0] for _, a_SI in self.factors.values()), default=0)
        widened = dict(tensors)
        for layer, (b_OS, a_SI) in self.factors.items():
            missing = widest - a_SI.shape[0]
            a, b = layer + A_SUFFIX, layer + B_SUFFIX
            widened[a] = torch.cat([tensors[a], a_SI.to(tensors[a]), a_SI.new_zeros(missing, a_SI.shape[1])])
            widened[b] = torch.cat([tensors[b], b_OS.to(tensors[b]), b_OS.new_zeros(b_OS.shape[0], missing)], dim=1)
        return widened, widest

    @staticmethod
    def split(tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> tuple[dict[str, Tensor], Residual]:
        """Undo `widen`: `ranks` has each layer's own rank."""
        narrow, factors = dict(tensors), {}
        for layer, rank in ranks.items():
            a, b = layer + A_SUFFIX, layer + B_SUFFIX
            narrow[a], narrow[b] = tensors[a][:rank].contiguous(), tensors[b][:, :rank].contiguous()
            own = int(tensors[a][rank:].any(dim=1).sum())  # the rest was filled with zeros
            factors[layer] = tensors[b][:, rank : rank + own].contiguous(), tensors[a][rank : rank + own].contiguous()
        return narrow, Residual(factors)


class ResidualLayer(nn.Module):
    """A frozen layer with the residual's product added to what it gives."""

    def __init__(self, frozen: nn.Module, scaling: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scaling = scaling
        self._factors: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer, for whoever asks its dtype or device."""
        weight: Tensor = self.frozen.weight  # type: ignore[assignment]
        return weight

    def load(self, factors: tuple[Tensor, Tensor] | None) -> None:
        self._factors = None if factors is None else tuple(factor.to(self.weight.device) for factor in factors)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.frozen(x)
        if self._factors is None:
            return result
        b_OS, a_SI = self._factors
        return (result + self.scaling * (x.to(a_SI.dtype) @ a_SI.mT) @ b_OS.mT).to(result.dtype)


def make_room_for_residuals(model: nn.Module) -> dict[str, ResidualLayer]:
    """Put a `ResidualLayer` below each of a model's LoRA layers; by the layers' names in PEFT's files."""
    rooms = {}
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            rooms[name] = ResidualLayer(layer.get_base_layer(), layer.scaling["default"])
            layer.base_layer = rooms[name]
    return rooms
