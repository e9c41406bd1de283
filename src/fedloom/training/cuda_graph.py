"""A step as one CUDA graph: at two short sequences a client, launching its 2,500 kernels takes longer than they run.

`torch.cuda.graph` records the kernels of a step once and launches them all with one call. It needs shapes and buffers
that stay the same, and nothing fetched from the GPU in between (PyTorch documentation, "CUDA Graphs"). Dropout asks no
generator, which a recording would have to know: the keys of its masks are inputs of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fedloom.training.jobs import is_shortage
from fedloom.training.stacked_step import StepInputs

WARM_UP = 3
"""Steps before one is recorded: real ones, in which libraries set up what they can't set up in a recording."""


class NotRecordableError(Exception):
    """Reason why a step can't be a graph. Nothing of the step was done."""


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps of a GPU are warmed up and recorded, the same one for the process's life.

    cuBLAS keeps a workspace for each stream that it was ever used on, 32 MiB on Hopper: with a stream a recording, a
    long run would lose gigabytes.
    """
    return torch.cuda.Stream(device)


class StepGraph:
    """Steps of one shape on a GPU: the first few are run as they are, the rest as a graph."""

    def __init__(self, step: Callable[[StepInputs], Tensor], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._stream = recording_stream(device)
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Take one step, and return its facts, [3, K].

        Raises:
            NotRecordableError: an operation of this model can't be recorded.
            RuntimeError: memory ran out.
        """
        # Kernels go to the GPU that their tensors are on, but a recording is of the current one.
        with torch.cuda.device(self._device):
            self._steps += 1
            if self._steps <= WARM_UP:
                return self._on_the_recording_stream(inputs)
            if self._graph is None:
                self._graph = self._record(inputs)
            # The graph reads its inputs where they were when it was recorded, so new ones are copied there.
            for held, given in zip(self._held, inputs, strict=True):
                if held is not None and given is not None:
                    held.copy_(given, non_blocking=True)
            self._graph.replay()
            # A copy: the next replay writes its facts to the same memory.
            return self._facts_3K.clone()

    def _on_the_recording_stream(self, inputs: StepInputs) -> Tensor:
        # PyTorch asks that what is recorded later be warmed up on another stream than the usual one. The two wait for
        # each other, so that nothing is read before it is written.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            facts_3K = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return facts_3K

    def _record(self, inputs: StepInputs) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # The device's own generator takes part in each recording, whether it is asked for numbers or not.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.get_state()
        self._held = inputs.each(torch.clone)
        try:
            # A recording computes nothing: the replay that follows is the step.
            with torch.cuda.graph(graph, stream=self._stream):
                self._facts_3K = self._step(self._held)
        except RuntimeError as error:
            _take_back(generator, state)
            first = _first_of(error)
            if is_shortage(first) or is_shortage(error):
                raise
            raise NotRecordableError(str(first).splitlines()[0]) from error
        return graph


def _take_back(generator: torch.Generator, state: Tensor) -> None:
    """Give a generator a state again that no recording holds: after a broken one, it would refuse to draw."""
    free = torch.Generator(generator.device)
    free.set_state(state)
    generator.graphsafe_set_state(free)


def _first_of(error: BaseException) -> Exception:
    """Return the error that came first: the end of a broken recording raises another one, which says nothing."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    assert isinstance(error, Exception)
    return error
