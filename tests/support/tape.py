"""A CUDA graph on a processor: a step's operations, run again on the very tensors that they had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedloom.training import stretches
from fedloom.training.batched import ClientBatch
from fedloom.training.cuda_graph import WARM_UP

ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Kinds of operations that fetch a number from the device, or the shape of what they give."""


def asks(func: Any, args: Any) -> bool:
    """Return whether an operation waits for the device."""
    # Taking values by their numbers gives as many as there are numbers; by a mask, as many as it says.
    by_number = func is torch.ops.aten.index.Tensor and all(
        numbers is None or numbers.dtype == torch.int64 for numbers in args[1]
    )
    return bool(ASKS & {*func.tags}) and not by_number


class Tape(TorchDispatchMode):
    """Operations with what they were given and what they gave: as a recording, it knows memory and no names."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not asks(func, args), f"a recorded step asks the device: {func}"
        found = func(*args, **(kwargs or {}))
        # Views are there as soon as what they show is.
        if not any(given.alias_info and not given.alias_info.is_write for given in func._schema.returns):
            self.operations.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, before in self.operations:
            found = func(*args, **kwargs)
            for there, value in zip(tree_leaves(before), tree_leaves(found), strict=True):
                if isinstance(value, Tensor) and value.data_ptr() != there.data_ptr():
                    there.copy_(value)


class TapeGraph:
    """Stands for `StepGraph`. The step that is recorded is taken meanwhile."""

    def __init__(self, step: Callable[[], None], device: torch.device, beside: TapeGraph | None = None) -> None:
        assert beside is None or beside.is_recorded
        self._step, self._tape, self._steps = step, Tape(), 0
        self.plays = 0

    @property
    def is_recorded(self) -> bool:
        return self._steps > WARM_UP

    def __call__(self) -> None:
        if self.is_recorded:
            self._tape.play()
            self.plays += 1
            return
        self._steps += 1
        if not self.is_recorded:
            self._step()
            return
        with self._tape:
            self._step()


def record_on_a_processor(monkeypatch: pytest.MonkeyPatch, graph: Any = TapeGraph) -> list[Any]:
    """Have steps recorded here as on a GPU, by what stands for a graph; return those, as they are made."""
    plain, made = ClientBatch.__init__, []

    def begin(self: ClientBatch, *args: Any, records: bool = True, **named: Any) -> None:
        plain(self, *args, records=records, **{**named, "fixed_shapes": True})
        if self._stretches:
            self._stretches.records = records

    def make(*given: Any) -> Any:
        made.append(graph(*given))
        return made[-1]

    monkeypatch.setattr(ClientBatch, "__init__", begin)
    monkeypatch.setattr(stretches, "StepGraph", make)
    return made
