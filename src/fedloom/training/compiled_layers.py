"""Decoder layers of a model through `torch.compile`: a layer's many small operations become a few.

Each layer is compiled by itself, forward and backward, and layers that are alike share what was compiled: of thirty
layers two are, since nothing below the first one is trained. Products, attention, clients' adapters and dropout by
counter stay what they are; what lies between them is fused. Shapes are fixed: each shape of a step is compiled once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily
from transformers.modeling_layers import GradientCheckpointingLayer

from fedloom.adapters.peft_config import reason_of
from fedloom.training.client_dropout import ClientDropout

SHAPES = 64
"""Shapes, with kinds of layers, that are compiled at most. Torch's own limit of 8 is for shapes that differ by mistake;
here a step's places are kept (`Room.holds`)."""

BACKEND: str | Callable[..., Any] = "inductor"
"""Compiler of what torch traces: torch's own."""


class CompiledLayers:
    """Decoder layers of a model, compiled where they are called inside `installed`; `reason` says why they are not."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = _outermost(model)
        self.reason = "" if self._layers else "it has no layers of a kind that is known"
        """Reason why layers are called as they are; empty while they are compiled."""
        # No mode but the default one: "reduce-overhead" records CUDA graphs of its own, inside of which, or of whose
        # making, a step can't be recorded (`cuda_graph`). Warm-up steps compile, and the recording finds it done.
        # Shapes that are not fixed took ten times as long to compile (docs/log.md).
        self._call = torch.compile(_call_layer, fullgraph=True, dynamic=False, backend=BACKEND)

    @contextmanager
    def installed(self, dropout: ClientDropout) -> Iterator[None]:
        """Have the model's layers compiled inside."""
        if self.reason:
            yield
            return
        for layer in self._layers:
            layer.forward = partial(self._forward, layer, dropout)
        try:
            # More than the limit is an error, where it would otherwise go on uncompiled.
            with torch._dynamo.config.patch(recompile_limit=SHAPES), warnings.catch_warnings():
                # Torch looks for a gradient at every tensor that a layer gets, and warns of its own look.
                warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
                yield
        finally:
            for layer in self._layers:
                del layer.forward

    def give_up(self, error: Exception) -> None:
        """Call the layers as they are from now on, because of an error."""
        # Torch's own words for a compiler's error say no more than that there was one.
        self.reason = reason_of(getattr(error, "inner_exception", error))

    def _forward(self, layer: nn.Module, dropout: ClientDropout, *args: Any, **kwargs: Any) -> Any:
        # A number, were it no tensor, would be compiled in, and each layer has another one.
        calls = torch.tensor(dropout.calls)
        with _pop_mode_temporarily() as mode:
            assert mode is dropout, "another mode over torch's functions"
            found, count = self._call(layer, dropout.keys_N, calls, *args, **kwargs)
        dropout.calls += count
        return found


def _call_layer(layer: nn.Module, keys_N: Tensor, calls: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """Return what a layer gives, and how many calls of dropout it made; so many, `calls`, were made before."""
    dropout = ClientDropout(keys_N, before=calls)
    with dropout:
        found = type(layer).forward(layer, *args, **kwargs)
    return found, dropout.calls


def _outermost(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model that none of its others has inside."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    inside = [name for name in layers if any(name.startswith(f"{other}.") for other in layers)]
    return [layer for name, layer in layers.items() if name not in inside and "forward" not in vars(layer)]
