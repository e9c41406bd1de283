"""Gradient checkpointing: keep each layer's input alone, and compute the rest again in the backward pass.

Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import noop_context_fn

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Around a layer's first pass, and around the one that is computed again."""


@contextmanager
def gradient_checkpointing(model: nn.Module, wanted: bool, contexts: Contexts = noop_context_fn) -> Iterator[None]:
    """Let a transformers model checkpoint its layers inside the block, if that is wanted."""
    if not wanted:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})  # type: ignore[operator]
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]
