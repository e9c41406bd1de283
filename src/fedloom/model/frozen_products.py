"""Products of frozen weights in float32 on a processor, by oneDNN where it is faster than what torch takes by itself.

Torch multiplies by Intel's MKL, which oneDNN outruns by a seventh on AMD's processors with AVX-512, from weights as
they lie: nothing is packed or kept beside them (docs/log.md). Which one is taken follows from the processor and the
weight alone, never from the rows, so a row's result does not depend on what is computed beside it.

Letters: I and O features in and out.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from fedloom.host.machine import is_amd_with_avx512

WORTH_ONEDNN = 2**18
"""Elements of a weight from which on oneDNN's call, which takes 10 µs more, is made up for by few rows."""


@cache
def onednn_is_faster() -> bool:
    """Return whether products go to oneDNN on this machine."""
    return torch.backends.mkldnn.is_available() and is_amd_with_avx512()


def choose_products(model: nn.Module) -> None:
    """Have a model's linear layers multiply by `multiply_frozen` from now on, where that changes anything."""
    for layer in model.modules() if onednn_is_faster() else ():
        # What has a forward pass of its own, of a subclass or of a hook, keeps it.
        if type(layer) is nn.Linear and "forward" not in vars(layer) and layer.weight.numel() >= WORTH_ONEDNN:
            layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def multiply_frozen(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return `functional.linear` of the same, up to rounding; differentiable with respect to `x`, however often.

    A weight or a bias that is trained, and what oneDNN is no faster for, is left to torch.
    """
    served = (
        x.dtype == weight_OI.dtype == torch.float32
        and x.device.type == weight_OI.device.type == "cpu"
        and weight_OI.numel() >= WORTH_ONEDNN
        and onednn_is_faster()
        and not weight_OI.requires_grad
        and not (bias_O is not None and bias_O.requires_grad)
        # In a trace of memory nothing is multiplied.
        and not isinstance(x, FakeTensor)
    )
    if not served:
        return functional.linear(x, weight_OI, bias_O)
    product: Tensor = _FrozenProduct.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return product


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return multiply_frozen(x, layer.weight, layer.bias)


class _FrozenProduct(torch.autograd.Function):
    """Product x Wᵀ + b; its gradient is one more such product, with W in the place of Wᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight_OI, bias_O, "none", [], "")
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return _FrozenProduct.apply(grad, weight_OI.mT, None), None, None  # type: ignore[no-untyped-call]
