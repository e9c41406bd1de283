"""Stretches of steps: one transfer, one launch a step, one look; and recordings that outlast a round.

On a processor a recording is stood for by its operations, run again on the tensors that they had (`support.tape`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.little_memory import assert_same
from support.marks import first
from support.tape import BY_TAPE_AND_GRAPH, Launched, TapeGraph, record_steps
from support.tiny import make_adapted, make_blocks, make_job, updates_of

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.lora import Residual, lora_pairs
from fedloom.evaluation.held_out import evaluate
from fedloom.training import stretches
from fedloom.training.batched import BatchedEngine, ClientBatch
from fedloom.training.client_slots import Room
from fedloom.training.jobs import ClientFailure, ClientJob, ClientUpdate
from fedloom.training.reference import ReferenceEngine
from fedloom.training.stacked_step import StepInputs
from fedloom.training.stretches import Lines, Stretch, Stretches, line_bytes


def make_jobs(
    adapted: AdaptedModel, round: int = 1, sizes: Sequence[int] = (12, 9, 12), **told: Any
) -> list[ClientJob]:
    """Clients of 12, 10 and 12 steps."""
    settings = {"epochs": 2, "batch_size": 2, "proximal_mu": 0.1, "optimizer_state": "keep", **told}
    return [
        replace(make_job(make_blocks(size, seed=client), adapted.read(), client=client, **settings), round=round)
        for client, size in enumerate(sizes)
    ]


def train_rounds(engine: Any, adapted: AdaptedModel, rounds: int = 3) -> list[list[ClientUpdate]]:
    return [list(updates_of(engine.train(make_jobs(adapted, round)))) for round in range(1, rounds + 1)]


def assert_equal(found: list[ClientUpdate], expected: list[ClientUpdate]) -> None:
    """To the bit."""
    assert [update.client for update in found] == [update.client for update in expected]
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.adapter.weights_P, its.adapter.weights_P)
        assert replace(mine.report, seconds=0) == replace(its.report, seconds=0)


@pytest.mark.parametrize("device", BY_TAPE_AND_GRAPH)
@pytest.mark.parametrize("shape", first(["tiny-llama", "tiny-gpt2"]))
def test_recordings_of_the_first_round_do_for_all_to_the_bit(
    shape: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(shape, dropout=0.3, device=device)
    with monkeypatch.context() as patch:
        record_steps(patch, Launched)
        expected = [list(updates_of(BatchedEngine(adapted).train(make_jobs(adapted, round)))) for round in (1, 2, 3)]
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)
    monkeypatch.setattr(stretches, "STRETCH", 5)
    for round, theirs in enumerate(expected, 1):
        assert_equal(list(updates_of(engine.train(make_jobs(adapted, round)))), theirs)
    # Three clients, then two whose place of the third stands empty: one shape.
    assert len(made) == 1
    assert made[0].plays == 3 * 12 - 4, "three steps to warm up, and one that is recorded"


@pytest.mark.parametrize("device", BY_TAPE_AND_GRAPH)
def test_a_round_sends_once_a_stretch_and_looks_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, did = make_adapted(device=device), []
    send, read, one = Lines.send, Stretch.read, Stretch.launch
    monkeypatch.setattr(Lines, "send", lambda self, count: (did.append(f"send {count}"), send(self, count))[1])
    monkeypatch.setattr(Stretch, "read", lambda self, count: (did.append(f"read {count}"), read(self, count))[1])
    monkeypatch.setattr(Stretch, "launch", lambda self, layout: (did.append("step"), one(self, layout))[1])
    record_steps(monkeypatch)
    list(updates_of(BatchedEngine(adapted).train(make_jobs(adapted, sizes=(12, 12)))))
    assert did == ["send 12", *12 * ["step"], "read 12", "read 0"]
    did.clear()
    monkeypatch.setattr(stretches, "STRETCH", 5)
    list(updates_of(BatchedEngine(adapted).train(make_jobs(adapted, sizes=(12, 12)))))
    assert did == [did for n in (5, 5, 2) for did in (f"send {n}", *n * ["step"], f"read {n}")] + ["read 0"]


def test_a_line_has_every_bit_of_a_steps_inputs() -> None:
    generator = torch.Generator().manual_seed(1)

    def inputs(positions: int) -> StepInputs:
        return StepInputs(
            tokens_NT=torch.randint(2**40, (3, 5), generator=generator),
            keys_N=torch.randint(-(2**63), 2**63 - 1, (3,), generator=generator),
            rows_M=None,
            targets_M=torch.randint(300, (positions,), generator=generator),
            clients_M=None,
            shares_M=torch.rand(positions, generator=generator),
            rates_K=torch.rand(3, dtype=torch.float64, generator=generator),
            mus_K=torch.rand(3, dtype=torch.float64, generator=generator),
            real_R=torch.randperm(15, generator=generator)[:positions] if positions < 6 else None,
        )

    given = [inputs(positions) for positions in (7, 3, 7, 5, 7, 2, 1)]
    assert line_bytes(given[0]) == 8 * (15 + 3 + 7 + 4 + 3 + 3), "28 bytes of shares take 32"
    assert line_bytes(given[3]) == 8 * (15 + 3 + 5 + 3 + 3 + 3 + 5)
    lines = Lines(8 * 37, torch.device("cpu"))
    for begin, count in ((0, 4), (4, 3)):
        layouts = [lines.write(place, given[begin + place]) for place in range(count)]
        lines.send(count)
        for place, layout in enumerate(layouts):
            for found, there in zip(lines.take(layout), given[begin + place], strict=True):
                assert found is there is None or torch.equal(found, there)
    with pytest.raises(AssertionError, match="wider than a line"):
        lines.write(0, given[3]._replace(keys_N=given[0].tokens_NT))


def residual_of(adapted: AdaptedModel, seed: int) -> Residual:
    generator, start = torch.Generator().manual_seed(seed), adapted.read()
    tensors = start.layout.split(start.weights_P)
    return Residual({
        layer: (
            torch.rand(len(tensors[b]), 1, generator=generator),
            torch.rand(1, tensors[a].shape[1], generator=generator),
        )
        for layer, (a, b) in lora_pairs(start.layout.names).items()
    })  # fmt: skip


def with_residuals(adapted: AdaptedModel, jobs: list[ClientJob], round: int) -> list[ClientJob]:
    if round == 3:
        return jobs
    start = replace(jobs[0].adapter, residual=residual_of(adapted, round))
    return [replace(job, adapter=start) for job in jobs]


def move_weights(engine: BatchedEngine) -> None:
    """As if buffers were made anew: the engine goes on with these, and a recording with those that it knows."""
    assert engine._batch is not None
    step = engine._batch._step
    step.weights_KP = step.weights_KP.clone()
    step.optimizer._weights_KP = step.weights_KP
    engine._batch._in_use = 0


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("moved", first(["residual", "weights"]))
def test_a_buffer_that_moved_is_recorded_anew(moved: str, is_checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not looked at, as in the twin, a recording would go on with what was there before."""
    # What lies there by then, a GPU's allocator decides.
    adapted = make_adapted(residuals=True, **({} if is_checked else {"device": "cpu"}))
    rounds = [make_jobs(adapted, round) for round in (1, 2, 3)]
    if moved == "residual":
        rounds = [with_residuals(adapted, jobs, round) for round, jobs in enumerate(rounds, 1)]
    with monkeypatch.context() as patch:
        record_steps(patch, Launched)
        expected = [list(updates_of(BatchedEngine(adapted).train(jobs))) for jobs in rounds]
    made = record_steps(monkeypatch)
    if not is_checked:
        monkeypatch.setattr(stretches, "places_of", lambda tensors: [])
    engine = BatchedEngine(adapted)
    for jobs, theirs in zip(rounds, expected, strict=True):
        found = list(updates_of(engine.train(jobs)))
        if is_checked or jobs is rounds[0]:
            assert_equal(found, theirs)
        else:
            assert not torch.equal(found[0].adapter.weights_P, theirs[0].adapter.weights_P)
            return
        if moved == "weights":
            move_weights(engine)
    assert len(made) == 3
    assert all(graph.plays for graph in made)


def test_a_client_whose_loss_is_no_number_fails_at_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()

    def explode() -> list[Any]:
        jobs = make_jobs(adapted, optimizer="sgd")
        wild = jobs[1].training.model_copy(update={"learning_rate": 1e25})
        return list(BatchedEngine(adapted).train([jobs[0], replace(jobs[1], training=wild), jobs[2]]))

    theirs = {result.client: result for result in explode()}
    record_steps(monkeypatch)
    for length in (64, 3, 2):
        monkeypatch.setattr(stretches, "STRETCH", length)
        ours = {result.client: result for result in explode()}
        failed, expected = ours.pop(1), theirs[1]
        assert isinstance(failed, ClientFailure)
        assert isinstance(expected, ClientFailure)
        assert str(failed.error) == str(expected.error)
        for client, update in ours.items():
            assert isinstance(update, ClientUpdate)
            torch.testing.assert_close(update.adapter.weights_P, theirs[client].adapter.weights_P)


def test_steps_written_for_a_client_that_failed_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stretches, "change_clients", lambda self: None)
    with pytest.raises((AssertionError, ValueError)):
        test_a_client_whose_loss_is_no_number_fails_at_its_own_step(monkeypatch)


def shapes_of(engine: BatchedEngine, jobs: list[ClientJob], monkeypatch: pytest.MonkeyPatch) -> list[Room]:
    """The shapes of a round's stretches."""
    seen, right = [], Stretches._find
    with monkeypatch.context() as patch:
        patch.setattr(Stretches, "_find", lambda self, room, draw: (seen.append(room), right(self, room, draw))[1])
        list(updates_of(engine.train(jobs)))
    return seen


@pytest.mark.parametrize("begins_anew", [True, False])
def test_a_rounds_shapes_are_those_of_a_run_that_goes_on_there(
    begins_anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape that is left from wider texts would do, and round otherwise; the twin takes it."""
    record_steps(monkeypatch)
    adapted = make_adapted()
    wide = [make_job(make_blocks(6, 50), adapted.read(), client=client, epochs=1) for client in range(2)]
    narrow = [make_job(make_blocks(6, 20), adapted.read(), client=client, epochs=1) for client in range(2)]
    engine = BatchedEngine(adapted)
    list(updates_of(engine.train(wide)))
    if not begins_anew:
        monkeypatch.setattr(ClientBatch, "reopen", lambda self, jobs, num_slots: True)
    ours, fresh = (shapes_of(each, narrow, monkeypatch) for each in (engine, BatchedEngine(adapted)))
    assert (ours == fresh) == begins_anew


def test_the_shapes_that_are_kept_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)
    monkeypatch.setattr(stretches, "KEPT", 2)
    of_width = {
        width: [make_job(make_blocks(6, width), adapted.read(), client=client, epochs=1) for client in range(2)]
        for width in (20, 40, 55)
    }
    for width, recordings in ((20, 1), (40, 2), (20, 2), (55, 3), (20, 3), (40, 4), (20, 4)):
        list(updates_of(engine.train(of_width[width])))
        assert len(made) == recordings, "the one that was used last stays"
        assert engine._batch is not None
        assert engine._batch._stretches is not None
        assert len(engine._batch._stretches._kept) <= 2


@pytest.mark.long
def test_jobs_of_another_kind_get_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted("tiny-llama", "float64")
    record_steps(monkeypatch)
    engine = BatchedEngine(adapted)
    jobs = make_jobs(adapted)
    trains_P = torch.arange(adapted.layout.size) % 2 == 0
    rounds = [
        jobs,
        jobs[:2],
        make_jobs(adapted, optimizer="sgd"),
        make_jobs(adapted, max_gradient_norm=0.1),
        [replace(job, trains_P=trains_P) for job in jobs],
        make_jobs(adapted, gradient_accumulation=2),
        make_jobs(adapted, gradient_checkpointing=True),
        jobs,
    ]
    for each in rounds:
        assert_same(list(updates_of(engine.train(each))), list(updates_of(ReferenceEngine(adapted).train(each))))


def test_clients_left_in_the_middle_are_no_place_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted("tiny-llama", "float64")
    record_steps(monkeypatch)
    engine, jobs = BatchedEngine(adapted), make_jobs(adapted)
    expected = list(updates_of(BatchedEngine(adapted).train(jobs)))
    given_up = engine.train(jobs)
    next(given_up)
    given_up.close()
    assert_same(list(updates_of(engine.train(jobs))), expected)


def test_an_evaluation_that_runs_short_gets_what_is_kept_first(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)
    expected = train_rounds(BatchedEngine(adapted), adapted, 1)[0]
    made.clear()
    assert_equal(train_rounds(engine, adapted, 1)[0], expected)
    # The engine that was opened last is the one that the model knows.
    adapted.give_back = engine.give_back
    lowered: list[int] = []
    blocks = make_blocks(8)
    score = evaluate(adapted, adapted.read(), blocks, batch_size=8)
    right, asked = adapted.loss_head.read_rows, [0]

    def run_short(*given: Any) -> Any:
        asked[0] += 1
        if engine._batch is not None:
            raise MemoryError
        return right(*given)

    monkeypatch.setattr(adapted.loss_head, "read_rows", run_short)
    assert evaluate(adapted, adapted.read(), blocks, batch_size=8, lower=lowered.append) == score
    assert asked == [2]
    assert not lowered, "as many at once as before"
    assert not adapted.give_back(), "there is nothing more"
    monkeypatch.undo()
    assert len(made) == 1


def test_memory_given_back_while_clients_are_under_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted(dropout=0.2)
    jobs = make_jobs(adapted, sizes=(2, 9, 12, 5), clients_at_once=2)
    made, engine = record_steps(monkeypatch), BatchedEngine(adapted)
    expected = list(updates_of(engine.train(jobs)))
    kept = len(made)
    found = []
    for update in updates_of(engine.train(jobs)):
        found.append(update)
        adapted.give_back()
    assert_equal(found, expected)
    assert len(made) > kept


def test_a_processor_keeps_nothing_of_a_round() -> None:
    adapted = make_adapted(device="cpu")
    engine = BatchedEngine(adapted)
    list(updates_of(engine.train(make_jobs(adapted))))
    assert engine._batch is None
    assert not adapted.give_back()


def test_the_tape_holds_the_tensors_and_not_their_names() -> None:
    """What stands for a recording does what one does: it reads and writes the memory that it knew."""
    held, told = torch.ones(3), torch.zeros(3)

    def step() -> None:
        torch.mul(held + 1, 2, out=told)

    graph = TapeGraph(step, torch.device("cpu"))
    for _ in range(4):
        graph()
    held.fill_(4)
    graph()
    assert told.tolist() == [10, 10, 10]
    known, held = held, torch.zeros(3)
    graph()
    assert told.tolist() == [10, 10, 10], "not the new one"
    known.zero_()
    graph()
    assert told.tolist() == [2, 2, 2]
