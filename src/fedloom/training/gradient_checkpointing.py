"""Gradient checkpointing: keep only each layer's input, and compute the rest again in the backward pass.

The method is by Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import noop_context_fn

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Maker of two contexts: one for a layer's first pass, one for its second in the backward pass."""


@contextmanager
def gradient_checkpointing(model: nn.Module, wanted: bool, contexts: Contexts = noop_context_fn) -> Iterator[None]:
    """Let a transformers model checkpoint its layers inside the block, if `wanted`."""
    if not wanted:
        yield
        return
    # Only torch's non-reentrant checkpointing takes contexts.
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})  # type: ignore[operator]
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]
