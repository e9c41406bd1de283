"""Texts that share a block: both engines learn of each what they learn of it alone, and a leak is caught."""

from typing import Any

import pytest
import torch
from support.tiny import (
    make_adapted,
    make_job,
    make_parts,
    make_recipe,
    switch_off_dropout,
    updates_of,
)
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import ModelError
from fedloom.evaluation.held_out import evaluate
from fedloom.model import attention
from fedloom.model.unpadding import RealRow
from fedloom.training.assumptions import check_packing
from fedloom.training.batched import BatchedEngine
from fedloom.training.engines import open_engine
from fedloom.training.jobs import ClientUpdate
from fedloom.training.memory import trace_step
from fedloom.training.reference import ReferenceEngine


def train(build: Any, adapted: AdaptedModel, parts: list[TokenBlocks], **changes: Any) -> list[ClientUpdate]:
    """One step of each client on all that it has."""
    start = adapted.read()
    told = {"batch_size": 64, "epochs": 1, "optimizer": "sgd", "max_gradient_norm": None, **changes}
    jobs = [make_job(part, start, client=client, **told) for client, part in enumerate(parts)]
    found = sorted(updates_of(build(adapted).train(jobs)), key=lambda update: update.client)
    adapted.load(start)
    return found


def packed(parts: list[TokenBlocks], width: int = 24) -> list[TokenBlocks]:
    """Blocks of up to `width` tokens, with several texts in most."""
    found = []
    for part in parts:
        room = torch.zeros(len(part), width - part.tokens_NT.shape[1], dtype=torch.int64)
        wide = TokenBlocks(
            torch.cat([part.tokens_NT, room], 1), part.lengths_N, torch.cat([part.counted_NT, room.bool()], 1)
        )
        found.append(pack_blocks(wide))
    assert all(len(one) < len(other) for one, other in zip(found, parts, strict=True))
    return found


def distance(ours: list[ClientUpdate], theirs: list[ClientUpdate], adapted: AdaptedModel) -> float:
    start_P = adapted.read().weights_P
    return max(
        float((our.adapter.weights_P - their.adapter.weights_P).norm() / (their.adapter.weights_P - start_P).norm())
        for our, their in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("build", [ReferenceEngine, BatchedEngine])
def test_a_step_on_packed_texts_is_the_step_on_them_apart(build: Any, shape: str) -> None:
    adapted, parts = make_adapted(shape, "float64"), make_parts(16)
    switch_off_dropout(adapted)
    apart, together = train(build, adapted, parts), train(build, adapted, packed(parts))
    assert distance(together, apart, adapted) < 1e-9
    for one, other in zip(together, apart, strict=True):
        assert one.report.loss_first == pytest.approx(other.report.loss_first, rel=1e-12)
        assert one.report.tokens == other.report.tokens


@pytest.mark.parametrize("twin", ["see_own_text", "positions_in_text"])
def test_a_twin_that_leaks_is_caught(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # To rotated positions, only the distance of two tokens matters: to see the mistake takes learnt ones.
    adapted, parts = make_adapted("tiny-gpt2", "float64"), make_parts(16)
    switch_off_dropout(adapted)
    # A row needs no mask: its texts are cut apart.
    adapted.unpads = twin != "see_own_text"
    apart = train(BatchedEngine, adapted, parts)

    def all_to_the_left(texts_BT: Tensor) -> Tensor:
        return torch.ones(len(texts_BT), 1, *texts_BT.shape[1:] * 2, dtype=torch.bool).tril()

    def places_in_block(texts_BT: Tensor) -> Tensor:
        return torch.arange(texts_BT.shape[1]).expand_as(texts_BT)

    monkeypatch.setattr(attention, twin, all_to_the_left if twin == "see_own_text" else places_in_block)
    assert distance(train(BatchedEngine, adapted, packed(parts)), apart, adapted) > 1e-3
    with pytest.raises(ModelError, match=r"a text is another one behind a text that shares its block"):
        check_packing(adapted, 32)


def test_a_row_that_takes_a_sequence_for_a_text_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(RealRow):
        def __init__(self, places_M: Tensor, shape: tuple[int, ...], texts_BT: Tensor | None = None) -> None:
            super().__init__(places_M, shape, None)

    adapted, parts = make_adapted(dtype="float64"), make_parts(16)
    switch_off_dropout(adapted)
    apart = train(BatchedEngine, adapted, parts)
    monkeypatch.setattr(attention, "RealRow", Whole)
    assert distance(train(BatchedEngine, adapted, packed(parts)), apart, adapted) > 1e-3


def test_engines_agree_on_packed_texts_and_the_clients_beside_them(shape: str) -> None:
    adapted, parts = make_adapted(shape, "float64"), make_parts(16)
    switch_off_dropout(adapted)
    # One client with texts of its own in each block, as a single client's may all be long.
    told = [*packed(parts[:2]), pack_blocks(parts[2])]
    changes = {"batch_size": 2, "epochs": 2, "optimizer": "adamw", "proximal_mu": 0.1, "max_gradient_norm": 1.0}
    ours, theirs = (train(build, adapted, told, **changes) for build in (BatchedEngine, ReferenceEngine))
    assert distance(ours, theirs, adapted) < 1e-9


def test_every_model_served_here_keeps_texts_apart(shape: str) -> None:
    for dtype in ("float64", "float32", "bfloat16"):
        adapted = make_adapted(shape, dtype)
        switch_off_dropout(adapted)
        check_packing(adapted, 32)


def test_an_engine_tries_it_where_texts_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "positions_in_text", lambda texts_BT: torch.zeros_like(texts_BT))
    adapted = make_adapted()
    for window in ("truncate", "pack"):
        data = make_recipe(data={"window": window}).data
        if window == "pack":
            with pytest.raises(ModelError, match="shares its block"):
                open_engine("batched", adapted, data, lambda _: None, lambda *_: None)
        else:
            open_engine("batched", adapted, data, lambda _: None, lambda *_: None)


def test_scores_of_packed_blocks_are_those_of_their_texts(shape: str) -> None:
    adapted, (part, *_) = make_adapted(shape, "float64"), make_parts(16)
    apart, together = (evaluate(adapted, adapted.read(), one, batch_size=3) for one in (part, *packed([part])))
    assert together.loss_sum == pytest.approx(apart.loss_sum, rel=1e-12)
    assert (together.correct, together.num_targets) == (apart.correct, apart.num_targets)


def test_the_prediction_knows_of_the_mask() -> None:
    training = make_recipe(training={"batch_size": 8}).training
    device = torch.device("cpu")

    def trace(packed: bool) -> int:
        return trace_step(make_adapted(device="meta"), training, 2, 64, device, packed=packed)

    assert trace(packed=True) > trace(packed=False)
