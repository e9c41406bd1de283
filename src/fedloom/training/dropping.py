"""Values under a mask of dropout, and the way to have them: a GPU's own kernel where it has one that is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fedloom.adapters.peft_config import reason_of
from fedloom.model.shortage import is_shortage
from fedloom.training.dropout_masks import Mask, split

OF_KERNEL = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the GPU's kernel takes."""

Kernel = Callable[[Tensor, Mask], Tensor]
"""A way to have values under a mask, `Mask.compute` or another that gives the same."""


class Dropped(torch.autograd.Function):
    """Values under a mask, whose gradient is under the same one, which is computed again and not kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Mask) -> Tensor:
        ctx.mask = mask
        return _drop(values, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _drop(gradient, ctx.mask), None


def _drop(values: Tensor, mask: Mask) -> Tensor:
    if not values.is_cuda or values.dtype not in OF_KERNEL:
        return mask.compute(values)
    # In a trace of memory there is nothing to launch.
    if isinstance(values, FakeTensor):
        return torch.empty_like(values)
    kernel = kernel_of(values.device)
    return kernel(values, mask) if kernel else mask.compute(values)


_reasons: dict[torch.device, str] = {}


@cache
def kernel_of(device: torch.device) -> Kernel | None:
    """Return a GPU's own kernel; None where it can't be had, or gives something else than `Mask.compute` here.

    Raises:
        RuntimeError: memory ran out, which says nothing of the kernel; it is tried again when asked next.
    """
    places_NT = split(torch.arange(2, device=device)[:, None], torch.arange(3, device=device))
    mask = Mask(places_NT, call=15, heads=2, dropped=6554)
    values = torch.linspace(-3, 3, 12 * 1030, device=device).view(2, 2, 3, 1030)
    try:
        from fedloom.training.dropout_kernel import drop

        given = [values.to(dtype) for dtype in OF_KERNEL]
        if all(torch.equal(drop(those, mask), mask.compute(those)) for those in given):
            return drop
        _reasons[device] = "it gives other masks"
    # Triton is missing, or the compiler that it builds its launcher with, or it does not know this GPU.
    except Exception as error:
        if is_shortage(error):
            raise
        _reasons[device] = reason_of(error)
    return None


def why_no_kernel(device: torch.device) -> str:
    """Return why dropout goes without a kernel of its own on a GPU; empty where it has one, or has not asked for it."""
    return _reasons.get(device, "")
