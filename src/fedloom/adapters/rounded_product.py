"""Product of each client's rows with its own LoRA factors in the frozen layer's dtype, as mixed precision has it.

A GPU multiplies bfloat16 several times as fast as float32, and a step of small batches is as long as its kernels are
many: beside a base in bfloat16, the adapters' products in float32, with all that is converted for them there and back,
were nearly half of both (docs/log.md). So factors are kept, clipped and stepped in float32, and rounded once a step for
the products, whose sums are float32; what is added to their gradients is not rounded. Torch's autocast does the same.

Letters: K clients, M rows of all clients, P adapter parameters, I and O features in and out, R rank, G gradients, X
and Y two of a product's sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fedloom.adapters.peft_config import reason_of
from fedloom.model.shortage import is_shortage


@dataclass(frozen=True)
class RoundedFactors:
    """A layer's A, and s·B with its scale s, rounded for products; and what their gradients are added to."""

    a_KRI: Tensor
    scaled_b_KOR: Tensor
    gradient_a_GRI: Tensor
    gradient_b_GOR: Tensor
    scale: float


class RoundedWeights(NamedTuple):
    """Clients' weights as products have them, and by what each weight is multiplied for that."""

    values_KP: Tensor
    scales_P: Tensor

    def write(self, weights_KP: Tensor) -> None:
        """Round these weights in the place of the first clients' before."""
        torch.mul(weights_KP, self.scales_P, out=self.values_KP[: len(weights_KP)])


class RoundedProduct(torch.autograd.Function):
    """A frozen layer's result plus s·B_k A_k x, whose backward pass adds to the factors' gradients in place.

    The result is written over: nothing of a product of a frozen layer's is needed to differentiate it. `trained` is any
    tensor that is differentiated for: a first layer has no other.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x_MI: Tensor, trained: Tensor, factors: RoundedFactors) -> Tensor:
        # Not saved as tensors of the graph: the next step writes them anew, in place.
        ctx.factors = factors
        b_KOR = factors.scaled_b_KOR
        hidden_KMR = torch.bmm(cut(x_MI, len(b_KOR)), factors.a_KRI.mT)
        # Another tensor over the same memory, not the same one marked as changed: it is mostly a view of a matrix,
        # whose gradient autograd would copy three times.
        summed = result.data
        summed.view(len(b_KOR), -1, b_KOR.shape[1]).baddbmm_(hidden_KMR, b_KOR.mT)
        ctx.save_for_backward(x_MI, hidden_KMR)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_MI, hidden_KMR = ctx.saved_tensors
        factors: RoundedFactors = ctx.factors
        b_KOR = factors.scaled_b_KOR
        grad_MO = grad.reshape(-1, grad.shape[-1])
        grad_KMR = torch.bmm(cut(grad_MO, len(b_KOR)), b_KOR)
        # Views of the step's flat gradients (`Stack.bind`), so this writes where the optimizer reads.
        add_products(factors.gradient_b_GOR, grad_MO, hidden_KMR.flatten(0, 1), factors.scale)
        add_products(factors.gradient_a_GRI, grad_KMR.flatten(0, 1), x_MI)
        # The first adapted layer's input has no trained part below it.
        grad_MI = torch.bmm(grad_KMR, factors.a_KRI).view_as(x_MI) if ctx.needs_input_grad[1] else None
        return grad, grad_MI, None, None


def add_products(sums_GXY: Tensor, left_MX: Tensor, right_MY: Tensor, scale: float = 1.0) -> None:
    """Add, for each client or piece of one, the sum over its rows of the products of left and right, in place.

    The sums are in float32, what is multiplied in fewer bits.
    """
    left_GXM, right_GMY = cut(left_MX, len(sums_GXY)).mT, cut(right_MY, len(sums_GXY))
    # A trace of memory has nothing to compute, and torch says nothing of this operation's shapes.
    if isinstance(sums_GXY, FakeTensor):
        return
    # Torch has it for fewer bits alone, and for a GPU alone.
    if sums_GXY.is_cuda and left_MX.dtype != sums_GXY.dtype:
        torch.ops.aten.baddbmm.dtype_out(sums_GXY, left_GXM, right_GMY, sums_GXY.dtype, alpha=scale, out=sums_GXY)
    else:
        sums_GXY.baddbmm_(left_GXM.to(sums_GXY.dtype), right_GMY.to(sums_GXY.dtype), alpha=scale)


_reasons: dict[torch.device, str] = {}


@cache
def sums_rounded(device: torch.device) -> bool:
    """Return whether a device adds products of bfloat16 to sums in float32: not every GPU does, so it is tried once.

    Raises:
        RuntimeError: memory ran out, which says nothing of the device; it is tried again when asked next.
    """
    # Whoever asks first may be tracing a step, in which nothing is computed.
    with unset_fake_temporarily():
        # Whole numbers, whose products and sums float32 has exactly and bfloat16 has not; as many as a layer may have.
        left_MX, right_MY = (torch.arange(64.0 * size, device=device).view(64, size) % 13 for size in (16, 48))
        sums_GXY = torch.ones(2, 16, 48, device=device)
        wanted_GXY = sums_GXY + 0.5 * cut(left_MX, 2).mT @ cut(right_MY, 2)
        try:
            add_products(sums_GXY, left_MX.bfloat16(), right_MY.bfloat16(), 0.5)
        except RuntimeError as error:
            if is_shortage(error):
                raise
            _reasons[device] = reason_of(error)
            return False
        if torch.equal(sums_GXY, wanted_GXY):
            return True
        _reasons[device] = "it gives other sums"
        return False


def why_not_rounded(device: torch.device) -> str:
    """Return why a device's products are not of bfloat16; empty where they are, or it was not asked for them."""
    return _reasons.get(device, "")


def cut(rows_MX: Tensor, pieces: int) -> Tensor:
    """Return clients' rows as so many equal pieces, in their order."""
    return rows_MX.reshape(pieces, -1, rows_MX.shape[-1])
