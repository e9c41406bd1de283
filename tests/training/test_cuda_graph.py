"""Recorded steps: what happens where one can't be recorded, shown on a processor; recordings themselves on a GPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.little_memory import assert_same
from support.marks import first
from support.tape import TapeGraph, needs_graphs, record_steps
from support.tiny import make_adapted, make_blocks, make_job, updates_of

from fedloom.adapters.lora import Residual, lora_pairs
from fedloom.model.shortage import is_shortage
from fedloom.training import client_slots, cuda_graph
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.cuda_graph import WARM_UP, NotRecordableError, StepGraph, recording_stream
from fedloom.training.jobs import ClientJob, ClientResult
from fedloom.training.reference import ReferenceEngine
from fedloom.training.stretches import Layout, Stretch


class CantRecord(TapeGraph):
    """Stands for a step that can't be recorded."""

    def __call__(self) -> None:
        if self._steps == WARM_UP:
            raise NotRecordableError("it asks the GPU")
        super().__call__()


def make_jobs(adapted: Any) -> list[ClientJob]:
    start = adapted.read()
    return [make_job(make_blocks(12, seed=client), start, client=client, epochs=2) for client in range(3)]


def test_what_can_not_be_recorded_is_launched_to_the_same_end(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted(dtype="float64", device="cpu", dropout=0.3)
    jobs = make_jobs(adapted)
    record_steps(monkeypatch, CantRecord)
    launching = BatchedEngine(adapted)
    launching._records = False
    expected = list(updates_of(launching.train(jobs)))
    told: list[tuple[str, str]] = []
    engine = BatchedEngine(adapted, say=lambda *words: told.append(words))
    for _ in range(2):
        assert_same(list(updates_of(engine.train(jobs))), expected)
    assert told == [("graph", "none, each step is launched by itself: it asks the GPU")], "said once, tried once"


def test_a_recording_has_the_masks_of_steps_that_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted("tiny-gpt2", dtype="float64", dropout=0.3)
    jobs = make_jobs(adapted)
    record_steps(monkeypatch)
    launching = BatchedEngine(adapted)
    launching._records = False
    expected = list(updates_of(launching.train(jobs)))
    assert_same(list(updates_of(BatchedEngine(adapted).train(jobs))), expected)


def make_uneven_jobs(adapted: Any) -> list[ClientJob]:
    """Jobs of 2, 6, 3, 5 and 4 steps an epoch, the widest texts where there are fewest."""
    start, sizes = adapted.read(), {0: (4, 60), 1: (12, 24), 2: (6, 24), 3: (9, 24), 4: (8, 24)}
    return [
        make_job(make_blocks(size, width, seed=client), start, client=client, epochs=2, batch_size=2)
        for client, (size, width) in sizes.items()
    ]


@pytest.mark.parametrize(("steps_that_cost_as_much", "recordings"), first([(1000, 1), (0, 5)]))
def test_clients_that_finish_leave_their_places_in_a_recording_empty(
    steps_that_cost_as_much: int, recordings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(dtype="float64", dropout=0.3)
    jobs = make_uneven_jobs(adapted)
    expected = list(updates_of(BatchedEngine(adapted).train(jobs)))
    made = record_steps(monkeypatch)
    monkeypatch.setattr(client_slots, "RECORDING", steps_that_cost_as_much)
    assert_same(list(updates_of(BatchedEngine(adapted).train(jobs))), expected)
    assert len(made) == recordings


def test_who_takes_an_empty_place_is_what_he_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted(dtype="float64", dropout=0.3)
    jobs = [
        replace(job, training=job.training.model_copy(update={"clients_at_once": 3}))
        for job in make_uneven_jobs(adapted)
    ]
    expected = list(updates_of(ReferenceEngine(adapted).train(jobs)))
    record_steps(monkeypatch)
    assert_same(list(updates_of(BatchedEngine(adapted).train(jobs))), expected)


def test_a_place_that_stands_empty_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    # What has become no number could reach others through whatever a model does over its whole batch.
    adapted = make_adapted(dtype="float64")
    jobs = make_uneven_jobs(adapted)[::-1]  # the first to finish has the last place
    seen: list[bool] = []

    right = Stretch.launch

    def look(self: Stretch, layout: Layout) -> None:
        seen.append(bool(self._step.weights_KP.isfinite().all()))
        right(self, layout)

    whole = ClientBatch._result

    def spoil(self: ClientBatch, place: int) -> ClientResult:
        result = whole(self, place)
        self._step.weights_KP[place] = torch.nan
        return result

    record_steps(monkeypatch)
    monkeypatch.setattr(Stretch, "launch", look)
    monkeypatch.setattr(ClientBatch, "_result", spoil)
    results = list(BatchedEngine(adapted).train(jobs))
    assert len(results) == len(jobs)
    assert all(seen)


def test_memory_that_runs_out_while_recording_halves_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(TapeGraph):
        def __call__(self) -> None:
            if self._steps == WARM_UP and len(self._step.func.__self__._facts_E3K[0, 0]) > 1:  # type: ignore[attr-defined]
                raise RuntimeError("CUDA error: out of memory")
            super().__call__()

    adapted = make_adapted(dtype="float64", device="cpu")
    jobs = make_jobs(adapted)
    expected = list(updates_of(BatchedEngine(adapted).train(jobs)))
    record_steps(monkeypatch, Short)
    engine = BatchedEngine(adapted)
    assert_same(list(updates_of(engine.train(jobs))), expected)
    assert engine.lowered_to == 1


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED"]
)
def test_every_library_of_a_gpu_has_its_own_words_for_a_shortage(words: str) -> None:
    assert is_shortage(RuntimeError(words))


def test_a_residual_that_is_loaded_stays_where_it_is() -> None:
    # A recorded step reads it there, and a client is scored between two steps.
    adapted = make_adapted(residuals=True)
    start = adapted.read()
    tensors = start.layout.split(start.weights_P)
    factors = {
        layer: (torch.ones(len(tensors[b]), 1), torch.ones(1, tensors[a].shape[1]))
        for layer, (a, b) in lora_pairs(start.layout.names).items()
    }
    with_residual = type(start)(start.layout, start.weights_P, Residual(factors))
    # On a GPU each load would make copies: here `copy=True` stands for the way there.
    adapted.load(with_residual)
    rooms = [room for room in adapted.model.modules() if type(room).__name__ == "ResidualLayer"]
    loads: list[object] = []
    for room in rooms:
        room.load = lambda factors, device: loads.append(factors)  # type: ignore[assignment, method-assign]
    adapted.load(with_residual)
    assert not loads
    adapted.load(start)
    assert loads == [None] * len(rooms)


def test_widths_are_those_of_the_texts() -> None:
    # A GPU pads to fixed shapes: to what the client's texts need, not to the longest text that a recipe allows.
    blocks = make_blocks(5, 60, seed=1)
    lengths_N = blocks.lengths_N.clamp(max=20)
    blocks = type(blocks)(blocks.tokens_NT, lengths_N, torch.arange(60) < lengths_N[:, None])
    adapted = make_adapted()
    batch = ClientBatch(adapted, BatchedEngine(adapted)._stack, [make_job(blocks, adapted.read())], fixed_shapes=True)
    batch.admit(make_job(blocks, adapted.read()))
    assert batch.slots[0].largest_batch[1] == 32


@needs_graphs
def test_a_gpu_has_one_stream_for_all_recordings() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert recording_stream(device) is recording_stream(device)


class _Here:
    """What a recording asks of a GPU, where there is none."""

    def get_state(self) -> None:
        return None


def _stand_in(monkeypatch: pytest.MonkeyPatch, record: Callable[..., Any]) -> None:
    """Put what is needed of a GPU in its place; `record` is the recording's context."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Here)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "default_generators", [_Here()])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


def test_a_recording_that_breaks_leaves_the_stream_that_was_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["usual"]

    @contextmanager
    def switch(stream: str) -> Iterator[None]:
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    class Breaks:
        """As torch's own: where the recording's end raises, the stream stays the recording's."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> None:
            current[0] = "recording"

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_graph, "recording_stream", lambda device: "recording")
    monkeypatch.setattr(cuda_graph, "_take_back", lambda *_: None)
    _stand_in(monkeypatch, Breaks)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", switch)
    with pytest.raises(NotRecordableError, match="previous error"):
        StepGraph(lambda: None, torch.device("cpu"))._record()
    assert current == ["usual"]


def test_no_garbage_is_collected_while_a_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    # What it frees may be a recording, and to free one breaks another that is under way.
    monkeypatch.setattr(cuda_graph, "recording_stream", lambda device: None)
    _stand_in(monkeypatch, lambda *given, **named: nullcontext())
    collects: list[bool] = []
    StepGraph(lambda: collects.append(gc.isenabled()), torch.device("cpu"))._record()
    assert collects == [False]
    assert gc.isenabled()


@needs_graphs
def test_a_recording_that_becomes_garbage_breaks_no_other_of_a_gpu() -> None:
    device, there = torch.device("cuda"), torch.zeros(1, device="cuda")

    def record(step: Callable[[], None]) -> StepGraph:
        graph = StepGraph(step, device)
        for _ in range(WARM_UP + 1):
            graph()
        return graph

    def add_one() -> None:
        there.add_(1)

    older = [record(add_one)]

    def lose_the_older() -> None:
        add_one()
        if torch.cuda.is_current_stream_capturing():
            ring: list[Any] = [older.pop()]
            ring.append(ring)
            del ring
            assert len([[] for _ in range(100_000)]) == 100_000, "as many as make Python look for garbage"

    assert record(lose_the_older).is_recorded
    assert there.item() == 2 * (WARM_UP + 1)


@needs_graphs
def test_a_model_that_asks_the_gpu_trains_without_a_graph() -> None:
    adapted = make_adapted(dtype="float32", device="cuda", dropout=0.3)
    jobs = make_jobs(adapted)
    launched = [job.__class__(**{**vars(job), "training": job.training.model_copy(update={"cuda_graph": False})})
                for job in jobs]  # fmt: skip
    expected = list(updates_of(BatchedEngine(adapted).train(launched)))
    layer = adapted.base.get_decoder().layers[0]
    layer.register_forward_hook(lambda module, given, found: float(found[0].detach().sum()) and None)
    told: list[tuple[str, str]] = []
    torch.manual_seed(3)
    drawn = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    found = list(updates_of(BatchedEngine(adapted, say=lambda *words: told.append(words)).train(jobs)))
    assert [what for what, _ in told] == ["graph"]
    assert torch.equal(torch.rand(4, device="cuda"), drawn), "the broken recording holds the GPU's own generator"
    for ours, theirs in zip(found, expected, strict=True):
        moved = (theirs.adapter.weights_P - jobs[0].adapter.weights_P).norm()
        assert (ours.adapter.weights_P - theirs.adapter.weights_P).norm() < 1e-3 * moved
