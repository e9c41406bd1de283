"""Ways that a GPU has to take because it lacks a faster one: what takes longer, and why."""

from __future__ import annotations

import torch

from fedloom.adapters.rounded_product import why_not_rounded
from fedloom.training.dropping import why_no_kernel


def slower_ways(device: torch.device, not_recordable: str) -> dict[str, str]:
    """Return what takes longer on this device than on others, and why; `not_recordable` is why steps are no graphs."""
    found = {
        "graph": ("none, each step is launched by itself", not_recordable),
        "dropout": ("each mask takes many kernels in place of one", why_no_kernel(device)),
        "products": ("those of adapters are in float32 in place of bfloat16", why_not_rounded(device)),
    }
    return {what: f"{slower}: {why}" for what, (slower, why) in found.items() if why}
