"""Base models larger than the device that computes: the weights that don't fit lie in memory or in their files.

Accelerate brings a layer's weights to the device for the layer's own call, and takes them away again; between calls
they are on the meta device, with a shape and no values. Everything is computed on the one device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def spread_over(room: Mapping[int | str, int]) -> dict[str, Any]:
    """Return the arguments with which transformers loads a model so that places have no more bytes than `room` says."""
    # It tells of the meta device, and not of how much lies there.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    return {"device_map": "auto", "max_memory": dict(room)}


def bytes_elsewhere(model: nn.Module) -> int:
    """Return the bytes of a loaded model's weights that are brought to the device for each call."""
    return sum(value.numel() * value.element_size() for value in {*model.parameters()} if value.is_meta)


def at_hand(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Return a loaded model's tensor, given with its name, or its values from where they lie."""
    if not value.is_meta:
        return value
    path, _, own = name.rpartition(".")
    found: Tensor = model.get_submodule(path)._hf_hook.weights_map[own]  # type: ignore[union-attr, index]
    return found


@contextmanager
def with_stand_ins(model: PreTrainedModel) -> Iterator[None]:
    """Have zeros without memory stand for weights that are elsewhere inside: PEFT puts an adapter where they are.

    For adapters that read nothing of a weight but its shape and its dtype. Nothing changes where all of a model is on
    the meta device.
    """
    # PEFT would spread the model anew by it, and stop at weights that are on the meta device already.
    spread = vars(model).pop("hf_device_map", None)
    away = [
        (layer, name, value)
        for layer in model.modules()
        for name, value in layer._parameters.items()
        if value is not None and value.is_meta and model.device.type != "meta"
    ]
    for layer, name, value in away:
        zero = torch.zeros((), dtype=value.dtype, device=model.device)
        layer._parameters[name] = nn.Parameter(zero.expand(value.shape), requires_grad=False)
    try:
        yield
    finally:
        if spread is not None:
            model.hf_device_map = spread
        for layer, name, value in away:
            layer._parameters[name] = value
