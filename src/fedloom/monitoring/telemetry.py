"""Memory of each phase of a run, and the work of evaluating, measured. No torch here, unless there is a GPU.

RAM is sampled, of this process and its children; GPU memory is torch's own count of its peak. Both are told apart by
phase: loading, training, aggregation, evaluation. A recorded step's memory is taken all the time, though its tensors
count only while it is recorded: what a card must have is what torch keeps of it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil

from fedloom.monitoring.observer import Observer
from fedloom.progress import Progress

Item = TypeVar("Item")

SAMPLE_SECONDS = 0.05
CHILDREN_EVERY = 20
"""Samples between two looks for children: each thread has to be asked for its own."""


class Telemetry(Observer):
    """Measures until it is closed; `take` hands over what was found since the last time, for a round's record."""

    def __init__(self, *, gpu: bool = False) -> None:
        self._gpu = gpu
        self._phases = ["loading"]
        self._reset()
        self._children: list[psutil.Process] = []
        self._samples = 0
        self._closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Telemetry:
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._sampler.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to a phase; phases may lie inside each other."""
        self._note()
        self._phases.append(name)
        try:
            yield
        finally:
            self._note()
            self._phases.pop()

    def iterate(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """Yield items, and count each wait for the next one to a phase; what is done with an item is not."""
        while True:
            with self.phase(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def watch(self, progress: Progress) -> None:
        """Count an evaluated batch; steps are counted by the clients that take them."""
        if progress.phase == "evaluate":
            for what, number in (("tokens", progress.tokens), ("samples", progress.samples), ("steps", 1)):
                self._counts[f"evaluate_{what}"] += number

    def take(self) -> dict[str, Any]:
        """Return what was measured since the last time, as a round's record has it.

        `evaluate_tokens`, `evaluate_samples`, `evaluate_steps`; by phase `ram_peak_bytes` and, of a GPU, the bytes of
        tensors (`gpu_peak_bytes`) and all that torch keeps of it (`gpu_reserved_bytes`), recorded steps included.
        """
        self._note()
        taken: dict[str, Any] = {**self._counts, "ram_peak_bytes": dict(self._ram)}
        if self._gpu:
            taken["gpu_peak_bytes"] = dict(self._gpu_bytes)
            taken["gpu_reserved_bytes"] = dict(self._gpu_reserved)
        self._reset()
        return taken

    def _reset(self) -> None:
        self._counts: dict[str, int] = defaultdict(int)
        self._ram: dict[str, int] = {}
        self._gpu_bytes: dict[str, int] = {}
        self._gpu_reserved: dict[str, int] = {}

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            if self._samples % CHILDREN_EVERY == 0:
                self._children = find_children()
            self._samples += 1
            self._note_ram()

    def _note(self) -> None:
        """Before the phase changes: what it has taken until now is its own."""
        self._note_ram()
        if self._gpu:
            import torch

            self._keep_most(self._gpu_bytes, torch.cuda.max_memory_allocated())
            self._keep_most(self._gpu_reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def _note_ram(self) -> None:
        self._keep_most(self._ram, ram_bytes(self._children))

    def _keep_most(self, peaks: dict[str, int], size: int) -> None:
        phase = self._phases[-1]
        peaks[phase] = max(peaks.get(phase, 0), size)


def ram_bytes(children: Sequence[psutil.Process] = ()) -> int:
    """Return the memory that this process and these children of its hold now."""
    return sum(map(_resident, (psutil.Process(), *children)))


def find_children(process: int | None = None) -> list[psutil.Process]:
    """Return every process that this one has started, and those that they have; on Linux alone."""
    # psutil looks at every process of the machine for it, 45 µs each: with thousands of them, a tenth of a second.
    try:
        found = [
            int(child)
            for task in Path(f"/proc/{process or 'self'}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # no /proc, or a process that ended just now
        return []
    known = []
    for child in found:
        with suppress(psutil.Error):  # it ended just now
            known.append(psutil.Process(child))
    return known + [grandchild for child in found for grandchild in find_children(child)]


def _resident(process: psutil.Process) -> int:
    """Return 0 for a process that has ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
