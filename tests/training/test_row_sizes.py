"""Rows of several sizes in a round: each step by its own, in one stretch, from recordings that take turns."""

import itertools
import random
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.little_memory import assert_same
from support.marks import CI, first
from support.rows import EXACT, distance, let_rows_pay, make_jobs, make_mixed, train
from support.tape import BY_TAPE_AND_GRAPH, Launched, TapeGraph, record_steps
from support.tiny import make_adapted, updates_of

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.packing import pack_blocks
from fedloom.host.garbage import leave_garbage
from fedloom.training import client_slots, stretches
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.client_slots import choose_sizes
from fedloom.training.cuda_graph import WARM_UP, NotRecordableError
from fedloom.training.jobs import ClientJob
from fedloom.training.objective import is_needed, next_token_targets
from fedloom.training.stacked_step import StepInputs
from fedloom.training.stretches import Layout, Lines, Stretch, layout_of


@pytest.fixture(autouse=True)
def _several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of an eighth, and recordings that pay after half a step."""
    let_rows_pay(monkeypatch, SIZES=8, RECORDING=0.5)


def cost_of(sizes: tuple[int, ...], needs: list[int], places: int, added: float) -> float:
    """Steps and recordings in tokens, by what the sizes are for."""
    costs = [size + (added if size < places else 0) for size in sizes]
    steps = sum(next(cost for size, cost in zip(sizes, costs, strict=True) if size >= need) for need in needs)
    return float(steps + client_slots.RECORDING * len(sizes) * max(costs))


@pytest.mark.parametrize("seed", range(40))
def test_the_sizes_are_the_cheapest_of_all_that_there_could_be(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    for name, value in {"WIDTHS": draw.choice([1, 4]), "SIZES": 6, "RECORDING": draw.choice([0.3, 3, 20])}.items():
        monkeypatch.setattr(client_slots, name, value)
    places, added = draw.choice([48, 100]), draw.choice([0.0, 5.0, 30.0, 200.0])
    needs = [draw.randint(0, draw.choice([places // 2, places])) for _ in range(draw.choice([1, 10, 60]))]
    found = choose_sizes(needs, places, added)
    unit = client_slots.fill_up(-(-places // 6))
    rows = [size for size in range(unit, places, unit) if size + added <= places]
    top = min((size for size in [*rows, places] if size >= max(needs)), default=places)
    smaller = [size for size in rows if size < top]
    every = [
        (*chosen, top) for count in range(len(smaller) + 1) for chosen in itertools.combinations(smaller, count)
    ]  # fmt: skip
    assert found in every
    assert cost_of(found, needs, places, added) == pytest.approx(
        min(cost_of(sizes, needs, places, added) for sizes in every)
    )


def test_few_steps_have_one_size_and_many_have_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_slots, "RECORDING", 40)
    needs = [900, 100, 100, 120]
    assert choose_sizes(needs, 1024, 50.0) == (1024,), "what the largest needs is too much for a row"
    assert choose_sizes(30 * needs, 1024, 50.0) == (128, 1024)
    assert choose_sizes(30 * needs, 1024, 1000.0) == (1024,), "no row pays"
    assert choose_sizes([500, *99 * [100]], 1024, 50.0) == (128, 512)


def test_an_h100s_steps_are_rows_where_it_was_faster_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # Milliseconds of OPT-350M's, padded to 1,024 tokens a client and as rows.
    monkeypatch.undo()
    padded, rows = {1: 9.6, 3: 19.5}, {1: {640: 10.96, 768: 11.6, 896: 12.0}, 3: {640: 17.2, 768: 19.2, 896: 21.4}}
    for clients, of_size in rows.items():
        added = client_slots.ROW_LAUNCHES / (clients * 1024) + client_slots.ROW_TRAFFIC * 1024
        for size, milliseconds in of_size.items():
            assert choose_sizes(500 * [size], 1024, added) == ((size if milliseconds < padded[clients] else 1024),)


def rounds_of(adapted: AdaptedModel, packed: bool = False, **changes: Any) -> list[list[ClientJob]]:
    """Jobs of three rounds, in which clients end at steps of their own."""
    parts = make_mixed((14, 8, 18))
    jobs = make_jobs(adapted, [pack_blocks(part) for part in parts] if packed else parts, batch_size=2, **changes)
    return [[replace(job, round=round) for job in jobs] for round in (1, 2, 3)]


@pytest.mark.parametrize("device", BY_TAPE_AND_GRAPH)
@pytest.mark.parametrize("packed", first([False, True], rest=CI))
def test_recordings_of_several_sizes_are_the_launched_steps_to_the_bit(
    shape: str, packed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(shape, "float64", dropout=0.3, device=device)
    rounds = rounds_of(adapted, packed, epochs=3)
    with monkeypatch.context() as patch:
        record_steps(patch, Launched)
        expected = [train(adapted, jobs) for jobs in rounds]
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)
    for name, value in {"STRETCH": 5, "KEPT": 100}.items():
        monkeypatch.setattr(stretches, name, value)
    steps: Counter[tuple[Stretch, Layout]] = Counter()
    of_rounds = []
    launch = Stretch.launch
    monkeypatch.setattr(
        Stretch, "launch", lambda self, layout: (steps.update([(self, layout)]), launch(self, layout))[1]
    )
    for jobs, (theirs, seen) in zip(rounds, expected, strict=True):
        before = Counter(steps)
        found, inputs = train(adapted, jobs, engine)
        for one, other in zip(found, theirs, strict=True):
            assert torch.equal(one.adapter.weights_P, other.adapter.weights_P)
        assert [*map(layout_of, inputs)] == [*map(layout_of, seen)]
        of_rounds.append(len(steps - before))
    assert len(steps) > len({stretch for stretch, _ in steps}), "several sizes in a room"
    assert len(made) == len(steps) < sum(of_rounds), "a recording for each size, which rounds share"
    plays = [max(0, count - WARM_UP - 1) for count in steps.values()]
    assert sorted(graph.plays for graph in made) == sorted(plays)
    assert sum(plays)


@pytest.mark.parametrize("launches", first([8 * 32 * 3, 0]))
def test_updates_are_those_of_padded_steps(shape: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_slots, "ROW_LAUNCHES", launches)
    adapted = make_adapted(shape, "float64", dropout=0.2)
    jobs = rounds_of(adapted)[0]
    record_steps(monkeypatch)
    found, seen = train(adapted, jobs)
    adapted.unpads = False
    padded, _ = train(adapted, jobs)
    assert distance(found, padded, jobs[0].adapter.weights_P) < EXACT
    computed = {computed_of(inputs) for inputs in seen}
    assert len(computed) >= 2
    assert (None in computed) == bool(launches), "of padded steps some are left where rows have to pay for much"


def computed_of(inputs: StepInputs) -> int | None:
    """Tokens of each client in the row of a step; None where it is padded."""
    return None if inputs.real_R is None else inputs.real_R.shape[1]


def test_each_step_has_the_least_size_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    sizes, needs = [], []
    right = ClientBatch._make_room

    def look(self: ClientBatch) -> Any:
        room = right(self)
        sizes.append(room.sizes)
        return room

    monkeypatch.setattr(ClientBatch, "_make_room", look)
    monkeypatch.setattr(client_slots, "RECORDING", 0.1)
    whole = ClientBatch._collect

    def count(self: ClientBatch, batches: Any, *given: Any) -> StepInputs:
        inputs = whole(self, batches, *given)
        if given[-1] is None:
            most = max(int(is_needed(next_token_targets(one.labels_BT)).sum()) for one in batches if one is not None)
            needs.append((most, sizes[-1], computed_of(inputs) or 2 * 32))
        return inputs

    monkeypatch.setattr(ClientBatch, "_collect", count)
    train(adapted, rounds_of(adapted)[0])
    assert len({computed for _, _, computed in needs}) > 2
    for most, of_room, computed in needs:
        assert computed == min(size for size in of_room if size >= most)


@pytest.mark.parametrize("device", BY_TAPE_AND_GRAPH)
def test_steps_of_several_sizes_are_sent_and_read_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, did = make_adapted(device=device), []
    (part,) = make_mixed((24,))
    send, read = Lines.send, Stretch.read
    monkeypatch.setattr(Lines, "send", lambda self, count: (did.append(f"send {count}"), send(self, count))[1])
    monkeypatch.setattr(Stretch, "read", lambda self, count: (did.append(f"read {count}"), read(self, count))[1])
    record_steps(monkeypatch)
    _, seen = train(adapted, make_jobs(adapted, [part, part], batch_size=2))
    assert len({*map(layout_of, seen)}) >= 2
    assert did == ["send 24", "read 24", "read 0"]


@pytest.mark.long
def test_a_round_computes_what_it_would_in_a_run_that_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    record_steps(monkeypatch)
    adapted = make_adapted("tiny-gpt2", dropout=0.3, device="cpu")
    first, second, _ = rounds_of(adapted)
    wide = make_jobs(adapted, make_mixed((14, 8, 18), width=48), batch_size=2)
    engine = BatchedEngine(adapted)
    for jobs in (wide, first):
        train(adapted, jobs, engine)
    ours, seen = train(adapted, second, engine)
    fresh, expected = train(adapted, second)
    assert [*map(layout_of, seen)] == [*map(layout_of, expected)]
    for one, other in zip(ours, fresh, strict=True):
        assert torch.equal(one.adapter.weights_P, other.adapter.weights_P)


def test_recordings_share_memory_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_slots, "RECORDING", 0.1)
    adapted = make_adapted(device="cpu")
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)

    def kept_after(width: int, most: int) -> int:
        monkeypatch.setattr(stretches, "KEPT", most)
        train(adapted, make_jobs(adapted, make_mixed((24, 24), width), batch_size=2), engine)
        assert engine._batch is not None
        assert engine._batch._stretches is not None
        return len(engine._batch._stretches._recordings)

    assert kept_after(20, 100) + 2 <= kept_after(32, 100) == len(made)
    assert len([graph for graph in made if graph.is_recorded and graph.shares is None]) == 1, "the first of all"
    for width in (48, 20, 32):
        assert 2 <= kept_after(width, 5) <= 5


def test_what_is_given_back_is_free_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not once Python looks for garbage: a GPU has no memory until then.
    adapted = make_adapted(device="cpu")
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)
    with leave_garbage():
        train(adapted, rounds_of(adapted)[0], engine)
        made.clear()
        assert engine._batch is not None
        assert engine._batch._stretches is not None
        kept = [weakref.ref(one) for one in engine._batch._stretches._kept.values()]
        batch = weakref.ref(engine._batch)
        assert engine.give_back()
        assert kept
        assert not any(one() for one in kept)
        assert batch() is None, "the buffers too"


@pytest.mark.parametrize("recorded", first([0, 1]))
def test_a_size_that_can_not_be_recorded_has_all_launched(recorded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class CantRecord(TapeGraph):
        def __call__(self) -> None:
            if self._steps == WARM_UP and sum(graph.is_recorded for graph in made) == recorded:
                raise NotRecordableError("it asks the GPU")
            super().__call__()

    adapted = make_adapted(dtype="float64", dropout=0.2, device="cpu")
    jobs = rounds_of(adapted)[0]
    with monkeypatch.context() as patch:
        record_steps(patch, Launched)
        expected, _ = train(adapted, jobs)
    made = record_steps(monkeypatch, CantRecord)
    told: list[tuple[str, str]] = []
    engine = BatchedEngine(adapted, say=lambda *words: told.append(words))
    assert_same(sorted(updates_of(engine.train(jobs)), key=lambda update: update.client), expected)
    assert told == [("graph", "none, each step is launched by itself: it asks the GPU")]
    assert sum(graph.is_recorded for graph in made) == recorded


@pytest.mark.long
def test_memory_that_runs_out_at_the_second_size_halves_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(TapeGraph):
        def __call__(self) -> None:
            clients = self._step.func.__self__._facts_E3K.shape[-1]  # type: ignore[attr-defined]
            if self._steps == WARM_UP and clients > 1 and any(graph.is_recorded for graph in made):
                raise RuntimeError("CUDA error: out of memory")
            super().__call__()

    adapted = make_adapted(dtype="float64", device="cpu")
    jobs = rounds_of(adapted)[0]
    expected, _ = train(adapted, jobs)
    made = record_steps(monkeypatch, Short)
    engine = BatchedEngine(adapted)
    assert_same(sorted(updates_of(engine.train(jobs)), key=lambda update: update.client), expected)
    assert engine.lowered_to == 1
