"""Recorded steps for tests: CUDA graphs on a GPU; on a processor a step's operations, run again on the very tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedloom.training import batched, stretches
from fedloom.training.batched import ClientBatch
from fedloom.training.cuda_graph import WARM_UP, StepGraph

needs_graphs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for CUDA graphs")
BY_TAPE_AND_GRAPH = ["cpu", pytest.param("cuda", marks=needs_graphs)]
"""Devices of what is shown by a tape, and by CUDA graphs where there is a GPU."""
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
    """Operations with what they were given and what they gave: as a recording, it knows memory and no names.

    It sees what torch dispatches. A kernel that a GPU launches by itself, as that of dropout, it would leave out, and
    play the empty memory that the kernel filled.
    """

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

    def __init__(
        self, step: Callable[[], None], device: torch.device, beside: Callable[[], Any] = lambda: None
    ) -> None:
        assert device.type == "cpu", "a tape does not see what a GPU launches by itself"
        self._step, self._tape, self._steps, self._beside = step, Tape(), 0, beside
        self.plays = 0
        self.shares: TapeGraph | None = None
        """Recording whose memory this one shares."""

    @property
    def is_recorded(self) -> bool:
        return self._steps > WARM_UP

    def __call__(self) -> None:
        if self.is_recorded:
            self._tape.play()
            self.plays += 1
            return
        if self._steps < WARM_UP:
            self._steps += 1
            self._step()
            return
        self.shares = self._beside()
        self._steps += 1
        with self._tape:
            self._step()


class Launched:
    """Stands for `StepGraph`, in the same rooms, and launches each step by itself."""

    is_recorded = False

    def __init__(self, step: Callable[[], None], device: torch.device, beside: Callable[[], Any]) -> None:
        self._step = step

    def __call__(self) -> None:
        self._step()


class RealGraph(StepGraph):
    """CUDA graph that says how often it was launched, as a tape does: without the step that was recorded."""

    @property
    def plays(self) -> int:
        return max(0, self._steps - WARM_UP - 1)


def fix_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the batched engine's shapes stay, as a GPU's recorded steps need it."""
    monkeypatch.setattr(batched, "ClientBatch", partial(batched.ClientBatch, fixed_shapes=True))


def record_steps(monkeypatch: pytest.MonkeyPatch, graph: Any = None) -> list[Any]:
    """Have steps recorded: on a GPU as they are, on a processor on a tape; return the recordings, as they are made.

    `graph` is what stands for a recording in place of these.
    """
    plain, made = ClientBatch.__init__, []

    def begin(self: ClientBatch, *args: Any, records: bool = True, **named: Any) -> None:
        plain(self, *args, records=records, **{**named, "fixed_shapes": True})
        if self._stretches and self._device.type == "cpu":
            self._stretches.records = records

    def make(step: Callable[[], None], device: torch.device, beside: Any) -> Any:
        kind = graph or (RealGraph if device.type == "cuda" else TapeGraph)
        made.append(kind(step, device, beside))
        return made[-1]

    monkeypatch.setattr(ClientBatch, "__init__", begin)
    monkeypatch.setattr(stretches, "StepGraph", make)
    return made
