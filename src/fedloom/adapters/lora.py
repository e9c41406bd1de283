"""LoRA's names in PEFT's files and models, and the residual: what averaging LoRA's factors apart leaves out.

The residual is kept as factors of its own beside a frozen layer. It is the same for every client and never trained:
W x + s·B_r A_r x stands where W x stood. A base model, packed or quantised, is never written to.

Letters: I and O features in and out, R rank of the adapter, S rank of the residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

PREFIX = "base_model.model."
"""Start of a tensor's name in PEFT's files: what follows is a layer's path in the base model."""
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of a layer's A [R, I] and B [O, R] in PEFT's files."""
ADAPTER_NAME = "default"
"""Name of the trained adapter inside a PEFT model; files leave it out."""
A_PARAMETER = f".lora_A.{ADAPTER_NAME}.weight"
"""End of the name of a layer's A inside a PEFT model."""


def lora_pairs(names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Return layer -> the names of its A and its B, for the layers that have both."""
    pairs = {
        name.removesuffix(A_SUFFIX): (name, name.replace(A_SUFFIX, B_SUFFIX))
        for name in names
        if name.endswith(A_SUFFIX)
    }
    return {layer: (a, b) for layer, (a, b) in pairs.items() if b in names}


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name in PEFT's files into its layer's path in the base model and `A_SUFFIX` or `B_SUFFIX`."""
    suffix = A_SUFFIX if name.endswith(A_SUFFIX) else B_SUFFIX
    assert name.endswith(suffix), f"{name} is no LoRA weight"
    return name.removeprefix(PREFIX).removesuffix(suffix), suffix


@dataclass(frozen=True)
class Residual:
    """Factors that belong to the model beside an adapter, on the CPU."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Layer -> B [O, S] and A [S, I]; the layer's own scale α/r applies to their product too."""

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the factors take, in memory and on the wire."""
        return sum(factor.numel() * factor.element_size() for pair in self.factors.values() for factor in pair)

    def widen(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return the adapter's tensors with the residual as further ranks, and how many ranks were added.

        B A + B_r A_r = [B, B_r] [A; A_r]. Every layer gets as many ranks as the widest residual has: PEFT's
        configuration has one rank for all. What a layer lacks is filled with zeros.
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
        """Undo `widen`: return the adapter's own tensors and the residual; `ranks` has each layer's own rank."""
        narrow, factors = dict(tensors), {}
        for layer, rank in ranks.items():
            a, b = layer + A_SUFFIX, layer + B_SUFFIX
            narrow[a], narrow[b] = tensors[a][:rank].contiguous(), tensors[b][:, :rank].contiguous()
            # `widen` fills up with rows of zeros; a residual's own A has none.
            own = int(tensors[a][rank:].any(dim=1).sum())
            factors[layer] = tensors[b][:, rank : rank + own].contiguous(), tensors[a][rank : rank + own].contiguous()
        return narrow, Residual(factors)


class ResidualLayer(nn.Module):
    """Frozen layer whose result has the residual's product added to it."""

    def __init__(self, frozen: nn.Module, scaling: float) -> None:
        super().__init__()
        self.frozen = frozen
        self.scaling = scaling
        self.factors: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """Return the frozen layer's weight: PEFT asks for its dtype and device."""
        weight: Tensor = self.frozen.weight  # type: ignore[assignment]
        return weight

    def load(self, factors: tuple[Tensor, Tensor] | None, device: torch.device) -> None:
        """Add the product of B [O, S] and A [S, I] from now on, computed on this device; None adds nothing."""
        self.factors = None if factors is None else tuple(factor.to(device) for factor in factors)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + s·B_r A_r x, [..., O], in the dtype of the frozen layer's result."""
        result: Tensor = self.frozen(x)
        if self.factors is None:
            return result
        b_OS, a_SI = self.factors
        return (result + self.scaling * (x.to(a_SI.dtype) @ a_SI.mT) @ b_OS.mT).to(result.dtype)


def make_room_for_residuals(model: nn.Module) -> dict[str, ResidualLayer]:
    """Put a `ResidualLayer` below each LoRA layer of a model, and return them by the layers' names in PEFT's files."""
    rooms = {}
    # A list first: the loop changes the modules that it walks over.
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            rooms[name] = ResidualLayer(layer.get_base_layer(), layer.scaling[ADAPTER_NAME])
            layer.base_layer = rooms[name]
    return rooms
