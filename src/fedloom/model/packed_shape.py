"""Shape of a base model that bitsandbytes packs, for the prediction of memory: neither its values nor the package.

A packed layer takes the bytes of its blocks and unpacks them in each pass: all that counts in a step's memory.

Letters: I and O features in and out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fedloom.recipe.sections import QuantizationOptions

BITS = ("4bit", "8bit")
"""Packings by bitsandbytes."""
BLOCK, SCALES = 64, 256
"""Weights of 4 bits that share a scale, and scales that share one of their own."""


def pack_shape(model: PreTrainedModel, quantization: str, options: QuantizationOptions | None = None) -> None:
    """Put stand-ins in the place of the layers that bitsandbytes packs; `model` is on the meta device."""
    options = options or QuantizationOptions()
    spared = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    # A list first: the loop changes the modules that it walks over.
    for path, layer in [*model.named_modules()]:
        if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and should_convert_module(path, spared):
            model.set_submodule(path, PackedShape(layer, quantization, options))


class PackedShape(nn.Linear):
    """Linear layer over weights without values: `weight` has the bytes that a layer of this size takes packed."""

    def __init__(self, layer: nn.Linear | Conv1D, quantization: str, options: QuantizationOptions) -> None:
        # Not nn.Linear's own, which would make the [O, I] weights that are not to exist.
        nn.Module.__init__(self)
        self.in_features, self.out_features = (
            (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape
        )
        count = self.in_features * self.out_features
        size = count_bytes_of_4(count, options.double) if quantization == "4bit" else count + 4 * self.out_features
        packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.stored_dtype: torch.dtype = layer.weight.dtype
        # 8 bits are computed in the dtype of what comes in.
        self.compute_dtype = getattr(torch, options.compute_dtype) if quantization == "4bit" else None
        self.keeps_inputs = quantization == "8bit"

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the weights, [O, I]: unpacked in the dtype that they had, then in that which is computed in."""
        stored = torch.empty(self.out_features, self.in_features, dtype=self.stored_dtype, device=self.weight.device)
        return stored.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return a product of the right shape, [..., O], for `x` of [..., I], in its dtype."""
        given = x.to(self.compute_dtype or x.dtype)
        product: Tensor = _UnpackedProduct.apply(given, self)  # type: ignore[no-untyped-call]
        product = product.to(x.dtype)
        return product if self.bias is None else product + self.bias


class _UnpackedProduct(torch.autograd.Function):
    """Product that unpacks the weights in each pass; between the two, one of 8 bits keeps what came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedShape) -> Tensor:
        ctx.layer, ctx.kept = layer, x if layer.keeps_inputs else None
        return functional.linear(x, layer.unpack(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpack(grad.dtype), None


def count_bytes_of_4(count: int, double: bool) -> int:
    """Return the bytes of so many weights of 4 bits with their scales, which may be packed as well."""
    scales = math.ceil(count / BLOCK)
    return math.ceil(count / 2) + (scales + 4 * math.ceil(scales / SCALES) if double else 4 * scales)
