"""Rows of fixed shapes, as a GPU has them: the updates of padded steps, from fewer tokens, and nothing asked for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.marks import CI, first
from support.rows import EXACT, distance, let_rows_pay, make_jobs, make_mixed, train
from support.tape import BY_TAPE_AND_GRAPH, Launched, record_steps
from support.tiny import make_adapted, make_windowed, switch_off_dropout
from torch import nn

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.lora import Residual, lora_pairs
from fedloom.adapters.stacked_lora import Stack
from fedloom.data.packing import pack_blocks
from fedloom.federation.lora_rules import trained_part
from fedloom.model import attention, unpadding
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.training import client_slots, stretches
from fedloom.training.batched import ClientBatch
from fedloom.training.client_slots import Room, room_for
from fedloom.training.jobs import ClientJob


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    let_rows_pay(monkeypatch)


def both(adapted: AdaptedModel, jobs: Sequence[ClientJob]) -> float:
    """The distance of updates of rows from those of padded batches."""
    assert adapted.unpads
    alone, rows = train(adapted, jobs)
    adapted.unpads = False
    padded, batches = train(adapted, jobs)
    adapted.unpads = True
    assert len(rows) == len(batches)
    assert all(inputs.real_R is None for inputs in batches)
    for inputs in rows:
        assert inputs.real_R is not None
        assert inputs.real_R.ndim == 2
        assert inputs.real_R.numel() < inputs.tokens_NT.numel()
        assert len(inputs.real_R.unique()) == inputs.real_R.numel()
    for one, other in zip(alone, padded, strict=True):
        assert one.report.loss_first == pytest.approx(other.report.loss_first, rel=1e-12)
        assert one.report.tokens == other.report.tokens
        assert one.report.steps == other.report.steps
    return distance(alone, padded, jobs[0].adapter.weights_P)


@pytest.mark.parametrize(
    "changes",
    first(
        [
            {},
            {"gradient_checkpointing": True},
            {"gradient_accumulation": 2},
            {"batch_size": 1},
            {"clients_at_once": 2},
            {"optimizer": "sgd"},
        ],
        keep=3,
    ),
    ids=lambda changes: ",".join(changes) or "plain",
)
@pytest.mark.parametrize("dropout", first([0.2, 0.0]))
def test_updates_are_those_of_padded_steps(shape: str, changes: dict[str, Any], dropout: float) -> None:
    # OPT and GPT-2 have dropout of their own, GPT-2 on its attention too; each client ends at a step of its own.
    adapted = make_adapted(shape, "float64", dropout=dropout)
    if not dropout:
        switch_off_dropout(adapted)
    assert both(adapted, make_jobs(adapted, make_mixed(), **changes)) < EXACT


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_any_layer_can_be_adapted(targets: Any) -> None:
    adapted = make_adapted(dtype="float64", targets=targets, dropout=0.2)
    assert both(adapted, make_jobs(adapted, make_mixed())) < EXACT


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_packed_texts_stay_apart(shape: str, dropout: float) -> None:
    adapted = make_adapted(shape, "float64", dropout=dropout)
    wide = [replace(part, tokens_NT=nn.functional.pad(part.tokens_NT, (0, 16)),
                    counted_NT=nn.functional.pad(part.counted_NT, (0, 16))) for part in make_mixed()]  # fmt: skip
    packed = [pack_blocks(part) for part in wide]
    assert all(len(one) < len(other) for one, other in zip(packed, wide, strict=True))
    jobs = make_jobs(adapted, packed, batch_size=2)
    assert both(adapted, jobs) < EXACT
    # Of padding nobody is asked which text it is in, and it is in none.
    assert all(inputs.mask_NT is not None for inputs in train(adapted, jobs)[1])


def test_packed_texts_that_see_each_other_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted(dtype="float64")
    packed = [pack_blocks(part) for part in make_mixed()]
    jobs = make_jobs(adapted, packed, batch_size=2)
    right, _ = train(adapted, jobs)
    monkeypatch.setattr(unpadding, "see_own_text", lambda texts_BT: attention.see_own_text(texts_BT * 0))
    wrong, _ = train(adapted, jobs)
    assert distance(wrong, right, jobs[0].adapter.weights_P) > 1e-3


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_layers_with_windows_and_capped_scores_too(model_type: str) -> None:
    adapted = make_windowed(model_type)
    assert both(adapted, make_jobs(adapted, make_mixed())) < EXACT


def test_parts_and_residuals_too() -> None:
    adapted = make_adapted(dtype="float64", residuals=True)
    start, generator = adapted.read(), torch.Generator().manual_seed(2)
    tensors = start.layout.split(start.weights_P)
    residual = Residual({
        layer: (
            0.1 * torch.randn(len(tensors[b]), 4, generator=generator).double(),
            torch.randn(4, tensors[a].shape[1], generator=generator).double(),
        )
        for layer, (a, b) in lora_pairs(start.layout.names).items()
    })  # fmt: skip
    parts = [trained_part(start.layout, "rolora", 1), None, None]
    jobs = [
        replace(job, adapter=replace(start, residual=residual), trains_P=part)
        for job, part in zip(make_jobs(adapted, make_mixed()), parts, strict=True)
    ]
    assert both(adapted, jobs) < EXACT


def test_documents_with_gradients_of_their_own_are_padded() -> None:
    # Clients' products are cut into equal pieces, one for each document, and documents are not equally long.
    adapted, parts = make_adapted(dtype="float64"), make_mixed()
    jobs = [
        replace(job, ration=Ration(Terms(0.5, 0.4, 3, len(part), 6, 1e-3), derive_key(b"secret", str(job.client))))
        for job, part in zip(make_jobs(adapted, parts, max_gradient_norm=None), parts, strict=True)
    ]
    assert all(inputs.real_R is None for inputs in train(adapted, jobs)[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_other_dtypes_they_are_up_to_rounding(dtype: str) -> None:
    adapted = make_adapted("tiny-llama", dtype)
    jobs = make_jobs(adapted, make_mixed(), optimizer="sgd")
    alone, _ = train(adapted, jobs)
    adapted.unpads = False
    padded, _ = train(adapted, jobs)
    assert distance(alone, padded, jobs[0].adapter.weights_P) < (1e-4 if dtype == "float32" else 0.05)


def test_the_model_sees_as_many_tokens_of_each_client_as_one_has_at_most() -> None:
    adapted, parts = make_adapted(), make_mixed()
    rows: list[int] = []
    adapted.base.get_decoder().norm.register_forward_hook(
        lambda module, given, found: rows.append(found.numel() // found.shape[-1]) and None
    )
    train(adapted, make_jobs(adapted, parts, batch_size=64, epochs=1))
    widest = max(int(part.widths.max()) for part in parts)
    # Of each text, all but the last token, which predicts nothing.
    assert rows == [3 * max(int((part.widths - 1).sum()) for part in parts)]
    assert rows[0] < 0.75 * 3 * 9 * widest, "the row is not much shorter than the batch"


@pytest.mark.parametrize("device", BY_TAPE_AND_GRAPH)
@pytest.mark.parametrize("shape", first(["tiny-llama", "tiny-gpt2"], rest=CI))
@pytest.mark.parametrize("packed", first([True, False], rest=CI))
def test_recorded_rows_are_the_launched_ones_to_the_bit(
    shape: str, packed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tape, which is played for a recording, refuses whatever asks for a number."""
    adapted = make_adapted(shape, "float64", dropout=0.3, device=device)
    parts = make_mixed((14, 8, 18))
    jobs = make_jobs(adapted, [pack_blocks(part) for part in parts] if packed else parts, batch_size=2)
    with monkeypatch.context() as patch:
        record_steps(patch, Launched)
        launched, seen = train(adapted, jobs)
    assert all(inputs.real_R is not None for inputs in seen)
    made = record_steps(monkeypatch)
    monkeypatch.setattr(stretches, "STRETCH", 5)
    recorded, _ = train(adapted, jobs)
    assert len(made) == 1, "clients that finish leave their places empty"
    assert made[0].plays
    for one, other in zip(recorded, launched, strict=True):
        assert torch.equal(one.adapter.weights_P, other.adapter.weights_P)


def test_a_row_that_asks_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted("tiny-llama", "float64", device="cpu")
    jobs = make_jobs(adapted, make_mixed((14, 8, 18)), batch_size=2)
    record_steps(monkeypatch)
    monkeypatch.setattr(
        attention, "EvenRow", lambda places_KR, *others: unpadding.RealRow(places_KR.flatten().sort().values, *others)
    )
    with pytest.raises(AssertionError, match="a recorded step asks the device"):
        train(adapted, jobs)


@pytest.mark.parametrize(("steps_that_cost_as_much", "rooms"), [(1000, 1), (0, 3)])
def test_rows_shrink_with_the_clients_that_are_left(
    steps_that_cost_as_much: int, rooms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(dtype="float64", dropout=0.3)
    jobs = make_jobs(adapted, make_mixed((4, 12, 24)), batch_size=2)
    adapted.unpads = False
    padded, _ = train(adapted, jobs)
    adapted.unpads = True
    record_steps(monkeypatch)
    monkeypatch.setattr(client_slots, "RECORDING", steps_that_cost_as_much)
    found, seen = train(adapted, jobs)
    assert distance(found, padded, jobs[0].adapter.weights_P) < EXACT
    assert len({len(inputs.rates_K) for inputs in seen}) == rooms


def test_a_row_is_kept_for_clients_who_are_too_few_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last client alone would be padded: what is recorded has its places, and goes on.
    adapted = make_adapted(dtype="float64")
    jobs = make_jobs(adapted, make_mixed((4, 12, 24)), batch_size=2)
    spared = spared_by(adapted, jobs)
    monkeypatch.setattr(client_slots, "ROW_LAUNCHES", int(2.5 * spared * 32))
    made = record_steps(monkeypatch)
    _, seen = train(adapted, jobs)
    assert all(inputs.real_R is not None for inputs in seen)
    assert len(made) == 1


def spared_by(adapted: AdaptedModel, jobs: Sequence[ClientJob]) -> int:
    """Tokens of each client that a row of these leaves out."""
    room = room_of(adapted, jobs)
    return room.places - room.largest


def room_of(adapted: AdaptedModel, jobs: Sequence[ClientJob], features: int = 1024) -> Room:
    batch = ClientBatch(adapted, Stack(adapted), jobs)
    for job in jobs:
        batch.admit(job)
    return room_for(batch.slots, features)


def test_a_row_has_to_pay_for_its_kernels_and_its_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    jobs = make_jobs(adapted, make_mixed((6, 6, 6)), batch_size=3)
    spared = spared_by(adapted, jobs)
    places = 3 * room_of(adapted, jobs).tokens
    assert 0 < spared < places
    assert not room_of(adapted, jobs, features=0).has_rows, "a model that does not say, or whose padding counts"
    for launches, traffic, is_row in (
        (3 * 1024 * spared, 0.0, True),
        (3 * 1024 * spared + 1, 0.0, False),
        (0, spared / places - 0.001, True),
        (0, spared / places + 0.001, False),
    ):
        monkeypatch.setattr(client_slots, "ROW_LAUNCHES", launches)
        monkeypatch.setattr(client_slots, "ROW_TRAFFIC", traffic)
        assert room_of(adapted, jobs).has_rows == is_row
    monkeypatch.setattr(client_slots, "ROW_LAUNCHES", 3 * 1024 * spared)
    assert not room_of(adapted, jobs, features=1023).has_rows, "narrower models win less by a token"


def test_rows_come_in_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of many rounds with other batches, so that one recording does for most.
    monkeypatch.setattr(client_slots, "WIDTHS", 4)
    monkeypatch.setattr(client_slots, "SIZES", 8)
    adapted, (part,) = make_adapted(), make_mixed((40,))
    jobs = [replace(job, round=round) for round in range(1, 30) for job in make_jobs(adapted, [part], epochs=1)]
    rooms = {room_of(adapted, [job]) for job in jobs}
    assert {(room.largest % 12, room.sequences, room.tokens) for room in rooms} == {(0, 3, 32)}
    assert 1 < len(rooms) <= 4
    largest = {max(slot_real(adapted, job) for job in [one]) for one in jobs}
    assert len(largest) > 2 * len(rooms), "as many sizes as there are largest batches"


def slot_real(adapted: AdaptedModel, job: ClientJob) -> int:
    batch = ClientBatch(adapted, Stack(adapted), [job])
    batch.admit(job)
    return max(batch.slots[0].needs)


def test_the_real_tokens_of_every_micro_batch_are_in_the_row() -> None:
    adapted, (part,) = make_adapted(), make_mixed((11,))
    (job,) = make_jobs(adapted, [part], gradient_accumulation=2, batch_size=3, epochs=1)
    batch = ClientBatch(adapted, Stack(adapted), [job])
    batch.admit(job)
    needed = [
        int((micro.labels_BT != -100).long().mul(torch.arange(micro.labels_BT.shape[1])).amax(1).sum())
        for step in range(len(batch.slots[0].batches))
        for micro in batch.slots[0].take_batches(step)
    ]
    assert len(needed) == 4
    assert batch.slots[0].needs == [max(needed[:2]), max(needed[2:])]


def test_a_room_that_is_too_small_for_a_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_slots.ClientSlot, "needs", [3] * 6)
    adapted = make_adapted()
    with pytest.raises(AssertionError, match="more positions than the room has"):
        train(adapted, make_jobs(adapted, make_mixed()))


@pytest.mark.parametrize("texts", [False, True])
def test_an_even_row_asks_for_nothing_of_a_document_alone(texts: bool) -> None:
    row = unpadding.EvenRow(
        torch.tensor([[0, 1, 4], [8, 9, 10]]), (4, 4), torch.ones(4, 4, dtype=torch.int64) if texts else None
    )
    assert row.share(2) is None
    assert row.texts is None
    assert (row.seen is None) == (not texts)
    with pytest.raises(AssertionError, match="unequal parts"):
        row.share(4)
    values_MX = torch.arange(12.0).view(6, 2).requires_grad_()
    grid = row.spread(values_MX)
    assert grid.sum().equal(values_MX.sum())
    assert grid[[0, 1, 4, 8, 9, 10]].equal(values_MX)
    assert row.gather(grid).equal(values_MX)
    assert row.take(torch.arange(16).view(4, 4)).tolist() == [[0, 1, 4, 8, 9, 10]]
