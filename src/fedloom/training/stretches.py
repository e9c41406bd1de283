"""Stretches of steps on a GPU: what it is told at once, and asked about at once.

The inputs of up to `STRETCH` steps are written to pinned memory while the GPU is at work, and sent in one transfer. A
counter on the device finds them, and a place for what each step tells: so a step is one launch, in which the processor
has no part, and nothing is waited for until the stretch ends. Steps of several sizes follow each other in a stretch:
each is laid out, and recorded, by shapes of its own.

Letters: E steps of a stretch, W bytes of a step's inputs, K clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from fedloom.training.client_slots import Room, Taken
from fedloom.training.cuda_graph import NotRecordableError, StepGraph, places_of
from fedloom.training.stacked_step import StackedStep, StepInputs

STRETCH = 64
"""Steps of a stretch at most. A look at a GPU costs as much as a hundredth of a step, and people wait for it to be told
how far training is."""
KEPT = 16
"""Recordings that are kept, of all rooms. In a round there are as many rooms as clients that finish apart, at most."""
Launch = Callable[[], None]
"""A step that finds its inputs, and leaves what it tells."""
Draw = Callable[[int, int | None], tuple[Taken, Sequence[StepInputs]]]
"""The next step's clients with what they learn from, and the inputs of its one part in memory; or those of a step so
many later. With a second number, the inputs are those of a step that needs so many tokens of a client."""
Facts = list[tuple[float, float, float]]
"""Facts of a step, of each of its K clients: loss, drift and gradient norm."""
Layout = tuple[tuple[torch.dtype, torch.Size] | None, ...]
"""Dtype and shape of each of a step's inputs; None for what it goes without."""
ALIGNED = 8
"""Bytes of the widest number in a step's inputs, at whose multiples each of them begins."""


def line_bytes(inputs: StepInputs) -> int:
    """Return the bytes that the inputs of a step take as a line."""
    return sum(_aligned(value.numel() * value.element_size()) for value in inputs if value is not None)


def layout_of(inputs: StepInputs) -> Layout:
    """Return how the inputs of a step are laid out."""
    return tuple(None if value is None else (value.dtype, value.shape) for value in inputs)


class Lines:
    """Inputs of steps to come, each a line of `width` bytes, laid out by shapes of its own.

    There are two rooms for them in the processor's memory, which is written to by turns, and one on the device.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        size = STRETCH, width
        self._sent_EW = torch.zeros(size, dtype=torch.uint8, device=device)
        # Out of pinned memory alone a GPU fetches by itself.
        pinned = device.type == "cuda"
        self._written_EW, self._spare_EW = (
            torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        )  # fmt: skip
        self.place_1 = torch.zeros(1, dtype=torch.int64, device=device)
        """Number of the line that comes next."""

    def write(self, place: int, inputs: StepInputs) -> Layout:
        """Write the inputs of a step, which lie in the processor's memory, to a line of the next stretch."""
        assert line_bytes(inputs) <= self._written_EW.shape[1], "inputs wider than a line"
        layout = layout_of(inputs)
        for room, value in zip(_parts(self._written_EW[place], layout), inputs, strict=True):
            if room is not None and value is not None:
                room.copy_(value)
        return layout

    def send(self, count: int) -> None:
        """Send the first lines to the device, to be taken from the first on; the next ones are written elsewhere."""
        # What was sent before has arrived: since then, the facts of its steps were waited for.
        self._sent_EW[:count].copy_(self._written_EW[:count], non_blocking=True)
        self._written_EW, self._spare_EW = self._spare_EW, self._written_EW
        self.place_1.zero_()

    def take(self, layout: Layout) -> StepInputs:
        """Return the next line's inputs, on the device; no number goes there for it."""
        line_W = self._sent_EW.index_select(0, self.place_1)[0]
        self.place_1 += 1
        return _parts(line_W, layout)


def _parts(line_W: Tensor, layout: Layout) -> StepInputs:
    """Return a line's bytes as inputs, which share its memory."""
    parts: list[Tensor | None] = []
    first = 0
    for kind in layout:
        if kind is None:
            parts.append(None)
            continue
        dtype, shape = kind
        size = prod(shape) * dtype.itemsize
        parts.append(line_W[first : first + size].view(dtype).view(shape))
        first += _aligned(size)
    return StepInputs._make(parts)


class Stretch:
    """Steps of one room: lines of `width` bytes of those to come, what others told, and recordings, one for each size.

    `graph` makes a recording of a step; without, each is launched by itself.
    """

    def __init__(
        self,
        step: StackedStep,
        width: int,
        clients: int,
        device: torch.device,
        graph: Callable[[Launch], StepGraph] | None,
    ) -> None:
        self._step, self._graph = step, graph
        self.lines = Lines(width, device)
        self._facts_E3K = step.weights_KP.new_zeros(STRETCH, 3, clients)
        self._places_E11 = torch.arange(STRETCH, device=device)[:, None, None]
        self.recordings: dict[Layout, StepGraph] = {}

    def launch(self, layout: Layout) -> None:
        """Take the step whose line comes next, which is laid out so, and leave its facts at the same place.

        Raises:
            NotRecordableError: an operation of this model can't be recorded.
            RuntimeError: memory ran out.
        """
        if self._graph and layout not in self.recordings:
            self.recordings[layout] = self._graph(partial(self._take, layout))
        recording = self.recordings.get(layout)
        recording() if recording else self._take(layout)

    def read(self, count: int) -> list[Facts]:
        """Return the facts of the first steps once they are done."""
        found: list[Facts] = self._facts_E3K[:count].mT.tolist()
        return found

    def forget(self) -> None:
        """Let go of the recordings, which hold this stretch themselves, and make none any more."""
        self.recordings.clear()
        self._graph = None

    def _take(self, layout: Layout) -> None:
        is_here_E11 = self._places_E11 == self.lines.place_1
        facts_3K = self._step(self.lines.take(layout))
        torch.where(is_here_E11, facts_3K, self._facts_E3K, out=self._facts_E3K)


class Stretches:
    """Stretches of clients' steps, in several rooms.

    They are kept, with their recordings if `records` says so, for as long as all that a step reads is where it was:
    from one round to the next, too.
    """

    def __init__(self, step: StackedStep, device: torch.device, *, records: bool) -> None:
        self._step, self._device = step, device
        self.records = records
        self.not_recordable = ""
        """Reason why this model's steps can't be recorded, once that was found."""
        self._kept: dict[tuple[Room, bool], Stretch] = {}
        self._places: list[tuple[int, torch.Size]] = []
        self._now: Stretch | None = None
        self._length = 0
        self._sent: deque[tuple[Taken, Layout]] = deque()
        """Steps that are not launched yet."""
        self._written: list[tuple[Taken, Layout]] = []
        """Steps of the next stretch."""

    @property
    def has_ended(self) -> bool:
        """Return whether all steps that were sent are launched."""
        return not self._sent

    def launch(self, left: int, choose_room: Callable[[], Room], draw: Draw) -> Taken:
        """Launch the next step, and return whose it is; write one to come down while the GPU is at work.

        So many are `left` until a client ends, and others take part then. `choose_room` says the next ones' shapes, and
        `draw` their clients and inputs.
        """
        if self.has_ended:
            self._begin(left, choose_room, draw)
        assert self._now is not None, "no stretch has begun"
        taken, layout = self._sent.popleft()
        try:
            self._now.launch(layout)
        except NotRecordableError as error:
            # Of the step that was to be recorded, nothing was done.
            self.not_recordable, self.records = str(error), False
            for stretch in self._kept.values():
                stretch.forget()
            self._now.launch(layout)
        if left > self._length:
            self._write(self._now, *draw(self._length, None))
        return taken

    def read(self, count: int) -> list[Facts]:
        """Return the facts of the stretch's first steps, once they are done."""
        return self._now.read(count) if self._now else []

    def change_clients(self) -> None:
        """Drop what is written of steps to come: others take part in them than was thought."""
        self._written = []

    def forget(self) -> bool:
        """Let go of all rooms; return whether there were any."""
        kept, self._kept, self._now = self._kept, {}, None
        for stretch in kept.values():
            stretch.forget()
        return bool(kept)

    def _begin(self, left: int, choose_room: Callable[[], Room], draw: Draw) -> None:
        if not self._written:
            self._now = self._find(choose_room(), draw)
            for ahead in range(min(STRETCH, left)):
                self._write(self._now, *draw(ahead, None))
        assert self._now is not None, "written to no stretch"
        self._length = len(self._written)
        self._now.lines.send(self._length)
        self._sent, self._written = deque(self._written), []

    def _write(self, stretch: Stretch, taken: Taken, parts: Sequence[StepInputs]) -> None:
        (inputs,) = parts
        self._written.append((taken, stretch.lines.write(len(self._written), inputs)))

    def _find(self, room: Room, draw: Draw) -> Stretch:
        """Return the steps of a room: those that are kept, or new ones."""
        # A recording would go on with what was there before, or with whatever lies there now.
        if (places := places_of(self._step.tensors)) != self._places:
            self.forget()
            self._places = places
        # Smaller sizes come and go from round to round, and find those of theirs that were recorded.
        key = room._replace(sizes=room.sizes[-1:]), room.has_rows
        found = self._kept.pop(key, None)
        if found is None:
            _, (inputs,) = draw(0, room.largest)
            if room.has_rows:
                # A smaller row takes no more bytes than the largest size, if that were a row.
                inputs = inputs._replace(real_R=inputs.tokens_NT.new_empty(room.clients, room.largest))
            graph = self._graph if self.records else None
            found = Stretch(self._step, line_bytes(inputs), room.clients, self._device, graph)
        while len(self._kept) >= KEPT:
            self._drop_the_oldest()
        self._kept[key] = found
        return found

    def _drop_the_oldest(self) -> None:
        self._kept.pop(next(iter(self._kept))).forget()

    def _graph(self, step: Launch) -> StepGraph:
        """Return a recording of the room that was found last, and make place for it among those that are kept."""
        while len(self._kept) > 1 and len(self._recordings) >= KEPT:
            self._drop_the_oldest()
        return StepGraph(step, self._device, self._find_recorded)

    def _find_recorded(self) -> StepGraph | None:
        return next((graph for graph in self._recordings if graph.is_recorded), None)

    @property
    def _recordings(self) -> list[StepGraph]:
        return [graph for stretch in self._kept.values() for graph in stretch.recordings.values()]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
