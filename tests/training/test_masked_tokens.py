"""Losses over a part of the tokens, in both engines and in evaluation, against transformers with labels."""

from typing import Any

import pytest
import torch
from support.tiny import (
    make_adapted,
    make_blocks,
    make_job,
    make_parts,
    switch_off_dropout,
    updates_of,
)
from torch.nn import functional

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks, take_batch
from fedloom.evaluation.held_out import evaluate
from fedloom.training.batched import BatchedEngine
from fedloom.training.reference import ReferenceEngine


def transformers_loss(adapted: AdaptedModel, blocks: TokenBlocks) -> tuple[float, int]:
    labels_NT = blocks.tokens_NT.masked_fill(~blocks.counted_NT, -100)
    with torch.no_grad():
        logits = adapted.model.eval()(
            input_ids=blocks.tokens_NT, attention_mask=blocks.is_real.long(), use_cache=False
        ).logits
    # By hand, as transformers computes its own loss in float32.
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels_NT[:, 1:].flatten())
    return float(loss), int((labels_NT[:, 1:] != -100).sum())


def train(build: Any, adapted: AdaptedModel, start: Adapter, parts: list[TokenBlocks], **changes: Any) -> list[Any]:
    jobs = [make_job(part, start, client=client, **changes) for client, part in enumerate(parts)]
    return sorted(updates_of(build(adapted).train(jobs)), key=lambda update: update.client)


def test_an_evaluation_is_over_what_counts(shape: str) -> None:
    adapted, (blocks, *_) = make_adapted(shape, "float64"), make_parts(16)
    score = evaluate(adapted, adapted.read(), blocks, batch_size=3)
    loss, number = transformers_loss(adapted, blocks)
    assert (score.loss, score.num_targets) == (pytest.approx(loss, rel=1e-12), number)


@pytest.mark.parametrize("changes", [{"batch_size": 2, "epochs": 2}, {"batch_size": 64, "epochs": 1}], ids=str)
def test_engines_agree_on_what_counts(shape: str, changes: dict[str, Any]) -> None:
    adapted, parts = make_adapted(shape, "float64"), make_parts(16)
    switch_off_dropout(adapted)
    start = adapted.read()
    engines = ReferenceEngine, BatchedEngine
    found = [train(build, adapted, start, parts, proximal_mu=0.1, **changes) for build in engines]
    for their, our in zip(*found, strict=True):
        moved = (their.adapter.weights_P - start.weights_P).norm()
        assert (our.adapter.weights_P - their.adapter.weights_P).norm() / moved < 1e-9
        assert our.report.loss_mean == pytest.approx(their.report.loss_mean, rel=1e-9)
        assert our.report.tokens == their.report.tokens == changes["epochs"] * parts[our.client].num_tokens
    unmasked = [make_blocks(size, 16, seed=size) for size in (7, 4, 9)]
    other = train(BatchedEngine, adapted, start, unmasked, proximal_mu=0.1, **changes)
    assert all(
        (one.adapter.weights_P - two.adapter.weights_P).norm() > 1e-4 for one, two in zip(other, found[0], strict=True)
    ), "a mask without effect would be caught"


@pytest.mark.parametrize("build", [ReferenceEngine, BatchedEngine])
def test_the_first_loss_is_transformers(build: Any, shape: str) -> None:
    adapted, parts = make_adapted(shape, "float64"), make_parts(16)
    switch_off_dropout(adapted)
    expected = [transformers_loss(adapted, part)[0] for part in parts]
    found = train(build, adapted, adapted.read(), parts, batch_size=64, epochs=1)
    assert [update.report.loss_first for update in found] == pytest.approx(expected, rel=1e-10)


def test_what_stands_behind_the_last_token_that_counts_is_not_computed() -> None:
    blocks = make_blocks(4, 16, seed=1)
    early = TokenBlocks(blocks.tokens_NT, blocks.lengths_N, blocks.is_real & (torch.arange(16) < 5))
    batch = take_batch(early, torch.arange(4))
    assert batch.tokens_BT.shape == (4, 5)
    assert batch.num_tokens == 20
