"""Stretches of steps on a GPU: what it is told at once, and asked about at once.

The inputs of up to `STRETCH` steps are written to pinned memory while the GPU is at work, and sent in one transfer. A
counter on the device finds them, and a place for what each step tells: so a step is one launch, in which the processor
has no part, and nothing is waited for until the stretch ends.

Letters: E steps of a stretch, W bytes of a step's inputs, K clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from fedloom.training.client_slots import Room, Taken
from fedloom.training.cuda_graph import NotRecordableError, StepGraph, places_of
from fedloom.training.stacked_step import StackedStep, StepInputs

STRETCH = 64
"""Steps of a stretch at most. A look at a GPU costs as much as a hundredth of a step, and people wait for it to be told
how far training is."""
KEPT = 8
"""Shapes whose steps are kept. In a round there are as many as clients that finish apart, at most."""
Launch = Callable[[], None]
"""A step that finds its inputs, and leaves what it tells."""
Draw = Callable[[int], tuple[Taken, Sequence[StepInputs]]]
"""The next step's clients with what they learn from, and the inputs of its one part in memory; or those of a step so
many later."""
ALIGNED = 8
"""Bytes of the widest number in a step's inputs, at whose multiples each of them begins."""


def line_bytes(inputs: StepInputs) -> int:
    """Return the bytes that the inputs of a step take as a line."""
    return sum(_aligned(value.numel() * value.element_size()) for value in inputs if value is not None)


class Lines:
    """Inputs of steps to come, each a line of bytes, with the shapes and dtypes of `inputs`.

    There are two rooms for them in the processor's memory, which is written to by turns, and one on the device.
    """

    def __init__(self, inputs: StepInputs, device: torch.device) -> None:
        self._kinds = [None if value is None else (value.dtype, value.shape) for value in inputs]
        size = STRETCH, line_bytes(inputs)
        self._sent_EW = torch.zeros(size, dtype=torch.uint8, device=device)
        # Out of pinned memory alone a GPU fetches by itself.
        pinned = device.type == "cuda"
        self._written_EW, self._spare_EW = (
            torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        )  # fmt: skip
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of the line that comes next."""

    def write(self, place: int, inputs: StepInputs) -> None:
        """Write the inputs of a step, which lie in the processor's memory, to a line of the next stretch."""
        for room, value in zip(self._parts(self._written_EW[place]), inputs, strict=True):
            assert (room is None) == (value is None), "inputs of another kind"
            if room is not None and value is not None:
                assert room.shape == value.shape, "inputs of another shape"
                room.copy_(value)

    def send(self, count: int) -> None:
        """Send the first lines to the device, to be taken from the first on; the next ones are written elsewhere."""
        # What was sent before has arrived: since then, the facts of its steps were waited for.
        self._sent_EW[:count].copy_(self._written_EW[:count], non_blocking=True)
        self._written_EW, self._spare_EW = self._spare_EW, self._written_EW
        self.place_1.zero_()

    def take(self) -> StepInputs:
        """Return the next line's inputs, on the device; no number goes there for it."""
        line_W = self._sent_EW.index_select(0, self.place_1)[0]
        self.place_1 += 1
        return self._parts(line_W)

    def _parts(self, line_W: Tensor) -> StepInputs:
        """Return a line's bytes as inputs, which share its memory."""
        parts: list[Tensor | None] = []
        first = 0
        for kind in self._kinds:
            if kind is None:
                parts.append(None)
                continue
            dtype, shape = kind
            size = prod(shape) * dtype.itemsize
            parts.append(line_W[first : first + size].view(dtype).view(shape))
            first += _aligned(size)
        return StepInputs._make(parts)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Stretch:
    """Steps of one shape, that of `inputs`: lines of those to come, what others told, and their recording, if any."""

    def __init__(
        self, step: StackedStep, inputs: StepInputs, device: torch.device, graph: Callable[[Launch], StepGraph] | None
    ) -> None:
        self._step = step
        self.lines = Lines(inputs, device)
        self._facts_E3K = step.weights_KP.new_zeros(STRETCH, 3, len(inputs.rates_K))
        self._places_E11 = torch.arange(STRETCH, device=device)[:, None, None]
        self.graph = graph(self._take) if graph else None

    def launch(self) -> None:
        """Take the step whose line comes next, and leave its facts at the same place.

        Raises:
            NotRecordableError: an operation of this model can't be recorded.
            RuntimeError: memory ran out.
        """
        self.graph() if self.graph else self._take()

    def read(self, count: int) -> list[Tensor]:
        """Return the facts, [3, K], of the first steps once they are done, in the processor's memory."""
        return list(self._facts_E3K[:count].cpu())

    def _take(self) -> None:
        is_here_E11 = self._places_E11 == self.lines.place_1
        facts_3K = self._step(self.lines.take())
        torch.where(is_here_E11, facts_3K, self._facts_E3K, out=self._facts_E3K)


class Stretches:
    """Stretches of clients' steps, in several shapes; `draw` returns the clients and the inputs of a step to come.

    Shapes are kept, with their recordings if `records` says so, for as long as all that a step reads is where it was:
    from one round to the next, too.
    """

    def __init__(self, step: StackedStep, device: torch.device, draw: Draw, *, records: bool) -> None:
        self._step, self._device, self._draw = step, device, draw
        self.records = records
        self.not_recordable = ""
        """Reason why this model's steps can't be recorded, once that was found."""
        self._kept: dict[Room, Stretch] = {}
        self._places: list[tuple[int, torch.Size]] = []
        self._now: Stretch | None = None
        self._length = 0
        self._sent: deque[Taken] = deque()
        """Steps that are not launched yet."""
        self._written: list[Taken] = []
        """Steps of the next stretch."""

    @property
    def has_ended(self) -> bool:
        """Return whether all steps that were sent are launched."""
        return not self._sent

    def launch(self, left: int, choose_room: Callable[[], Room]) -> Taken:
        """Launch the next step, and return whose it is; write one to come down while the GPU is at work.

        So many are `left` until a client ends, and others take part then. `choose_room` says the next ones' shape.
        """
        if self.has_ended:
            self._begin(left, choose_room)
        assert self._now is not None, "no stretch has begun"
        taken = self._sent.popleft()
        try:
            self._now.launch()
        except NotRecordableError as error:
            # Of the step that was to be recorded, nothing was done.
            self.not_recordable, self.records = str(error), False
            for stretch in self._kept.values():
                stretch.graph = None
            self._now.launch()
        if left > self._length:
            self._write(self._now, *self._draw(self._length))
        return taken

    def read(self, count: int) -> list[Tensor]:
        """Return the facts of the stretch's first steps, [3, K] each, once they are done."""
        return self._now.read(count) if self._now else []

    def change_clients(self) -> None:
        """Drop what is written of steps to come: others take part in them than was thought."""
        self._written = []

    def forget(self) -> bool:
        """Let go of all shapes; return whether there were any."""
        kept, self._kept, self._now = self._kept, {}, None
        return bool(kept)

    def _begin(self, left: int, choose_room: Callable[[], Room]) -> None:
        if not self._written:
            room = choose_room()
            taken, parts = self._draw(0)
            self._now = self._find(room, parts[0])
            self._write(self._now, taken, parts)
            for ahead in range(1, min(STRETCH, left)):
                self._write(self._now, *self._draw(ahead))
        assert self._now is not None, "written to no stretch"
        self._length = len(self._written)
        self._now.lines.send(self._length)
        self._sent, self._written = deque(self._written), []

    def _write(self, stretch: Stretch, taken: Taken, parts: Sequence[StepInputs]) -> None:
        (inputs,) = parts
        stretch.lines.write(len(self._written), inputs)
        self._written.append(taken)

    def _find(self, room: Room, inputs: StepInputs) -> Stretch:
        """Return the steps of a shape, that of `inputs`: those that are kept, or new ones."""
        # A recording would go on with what was there before, or with whatever lies there now.
        if (places := places_of(self._step.tensors)) != self._places:
            self._kept, self._places = {}, places
        found = self._kept.pop(room, None)
        if found is None:
            if len(self._kept) == KEPT:
                del self._kept[next(iter(self._kept))]
            found = Stretch(self._step, inputs, self._device, self._graph if self.records else None)
        self._kept[room] = found
        return found

    def _graph(self, step: Launch) -> StepGraph:
        graphs = (stretch.graph for stretch in self._kept.values())
        return StepGraph(step, self._device, next((graph for graph in graphs if graph and graph.is_recorded), None))
