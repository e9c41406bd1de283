"""A step as one CUDA graph: at two short sequences a client, launching its 2,500 kernels takes longer than they run.

`torch.cuda.graph` records the kernels of a step once and launches them all with one call. It needs shapes and buffers
that stay the same, and nothing fetched from the GPU in between (PyTorch documentation, "CUDA Graphs"). Dropout asks no
generator, which a recording would have to know: the keys of its masks are inputs of the step. What differs from step
to step, the step itself finds on the GPU (`stretches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from fedloom.host.garbage import leave_garbage
from fedloom.model.shortage import is_shortage

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


def places_of(tensors: Iterable[Tensor]) -> list[tuple[int, torch.Size]]:
    """Return where tensors lie, and their shapes: a recording reads its own there for as long as it is kept."""
    return [(value.data_ptr(), value.shape) for value in tensors]


class StepGraph:
    """Step on a GPU that finds its inputs, and leaves its results, where they were: a few times as it is, then a graph.

    `beside` finds another recording, if there is one by then, whose memory this one shares: they are never at work
    together, and neither reads what the other left there.
    """

    def __init__(
        self, step: Callable[[], None], device: torch.device, beside: Callable[[], StepGraph | None] = lambda: None
    ) -> None:
        self._step = step
        self._device = device
        self._stream = recording_stream(device)
        self._beside = beside
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_recorded(self) -> bool:
        """Return whether there is a recording."""
        return self._graph is not None

    def __call__(self) -> None:
        """Take one step.

        Raises:
            NotRecordableError: an operation of this model can't be recorded.
            RuntimeError: memory ran out.
        """
        # Kernels go to the GPU that their tensors are on, but a recording is of the current one.
        with torch.cuda.device(self._device):
            self._steps += 1
            if self._steps <= WARM_UP:
                self._step_on_the_recording_stream()
                return
            self._graph = self._graph or self._record()
            self._graph.replay()

    def _step_on_the_recording_stream(self) -> None:
        # PyTorch asks that what is recorded later be warmed up on another stream than the usual one. The two wait for
        # each other, so that nothing is read before it is written.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        beside = self._beside()
        pool = beside._graph.pool() if beside and beside._graph else None
        del beside
        # The device's own generator takes part in each recording, whether it is asked for numbers or not.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.get_state()
        try:
            # A recording computes nothing: the replay that follows is the step. To free an older one meanwhile, which
            # is garbage, breaks it (pytorch/pytorch#161037). And one that breaks leaves its own stream the current one.
            here = torch.cuda.stream(torch.cuda.current_stream())
            with here, leave_garbage(), torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._step()
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
