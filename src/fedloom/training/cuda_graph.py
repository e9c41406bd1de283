"""A step as one CUDA graph: at two short sequences a client, launching its 2,500 kernels takes longer than they run.

`torch.cuda.graph` records the kernels of a step once and launches them all with one call. It needs shapes and buffers
that stay the same, nothing fetched from the GPU in between, and every generator registered (PyTorch documentation,
"CUDA Graphs").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedloom.errors import ModelError
from fedloom.training.stacked_step import StepInputs

WARM_UP = 3
"""Steps before one is recorded: real ones, in which libraries set up what they can't set up in a recording."""


class StepGraph:
    """Steps of one shape on a GPU: the first few are run as they are, the rest as a graph."""

    def __init__(self, step: Callable[[StepInputs], Tensor], generators: Sequence[torch.Generator]) -> None:
        self._step = step
        self._generators = generators
        self._stream = torch.cuda.Stream()
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Take one step, and return its facts, [3, K].

        Raises:
            ModelError: an operation of this model can't be recorded.
        """
        self._steps += 1
        if self._steps <= WARM_UP:
            return self._on_a_stream_of_its_own(inputs)
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None
        # The graph reads its inputs where they were when it was recorded, so new ones are copied there.
        for held, given in zip(self._held, inputs, strict=True):
            if held is not None and given is not None:
                held.copy_(given, non_blocking=True)
        self._graph.replay()
        # A copy: the next replay writes its facts to the same memory.
        return self._facts_3K.clone()

    def _on_a_stream_of_its_own(self, inputs: StepInputs) -> Tensor:
        # PyTorch asks that what is recorded later be warmed up on a stream of its own. The two streams wait for each
        # other, so that nothing is read before it is written.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            facts_3K = self._step(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return facts_3K

    def _record(self, inputs: StepInputs) -> None:
        graph = torch.cuda.CUDAGraph()
        # A recording refuses a generator that is not registered; a registered one moves on with every replay.
        for generator in self._generators:
            graph.register_generator_state(generator)
        self._held = inputs.each(torch.clone)
        try:
            # A recording computes nothing: the replay that follows is the step.
            with torch.cuda.graph(graph, stream=self._stream):
                self._facts_3K = self._step(self._held)
        except RuntimeError as error:
            # Streams, generators and the allocator are left in the middle of a recording, so training can't go on
            # without the graph.
            raise ModelError(
                f"a step of this model can't be recorded as a CUDA graph ({str(error).splitlines()[0]})",
                where="training.cuda_graph",
                mend="set it to false",
            ) from error
        self._graph = graph
