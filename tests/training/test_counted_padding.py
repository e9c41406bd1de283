"""Losses over counted padding, in training and in evaluation, against transformers with its attention mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import count_padding, make_blocks, make_job, make_recipe, switch_off_dropout, updates_of
from torch.nn import functional

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation.held_out import evaluate
from fedloom.experiment.building import load_adapted_model
from fedloom.model.source import open_model
from fedloom.training.batched import BatchedEngine
from fedloom.training.reference import ReferenceEngine

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"targets": "all-linear"},
    "a head": {"targets": ["lm_head"]},
    "prompt_tuning": {"method": "prompt_tuning", "options": {"num_virtual_tokens": 4}},
    "prefix_tuning": {"method": "prefix_tuning", "options": {"num_virtual_tokens": 4}},
}
"""Models that are taken apart into body and head, and those that are not."""


def open_adapted(shape: str, **adapter: Any) -> AdaptedModel:
    whole = {"rank": None, "alpha": None} if "method" in adapter else {}
    recipe = make_recipe(
        model={"source": f"random:{shape}", "dtype": "float64"},
        adapter={**whole, **adapter},
        data={"pad_in_loss": True},
    )
    return load_adapted_model(recipe, open_model(recipe.model.source))


def transformers_loss(adapted: AdaptedModel, blocks: TokenBlocks) -> float:
    """The loss of a program that labels padding and masks it."""
    mask_NT = (torch.arange(blocks.tokens_NT.shape[1]) < blocks.lengths_N[:, None]).long()
    with torch.no_grad():
        output = adapted.model.eval()(input_ids=blocks.tokens_NT, attention_mask=mask_NT, use_cache=False)
    return token_mean(output.logits, blocks.tokens_NT)


def token_mean(logits: torch.Tensor, tokens_NT: torch.Tensor) -> float:
    predicted = logits[:, -tokens_NT.shape[1] : -1]
    return float(functional.cross_entropy(predicted.flatten(0, 1), tokens_NT[:, 1:].flatten()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_evaluation_is_under_the_mask(shape: str, name: str) -> None:
    adapted, blocks = open_adapted(shape, **ADAPTERS[name]), count_padding(make_blocks(7))
    score = evaluate(adapted, adapted.read(), blocks, batch_size=3)
    assert score.num_targets == 7 * 15
    assert score.loss == pytest.approx(transformers_loss(adapted, blocks), rel=1e-12)
    with torch.no_grad():
        unmasked = token_mean(adapted.logits(blocks.tokens_NT), blocks.tokens_NT)
    assert score.loss != pytest.approx(unmasked, rel=1e-9)


@pytest.mark.parametrize("build", [ReferenceEngine, BatchedEngine])
def test_every_step_is_under_the_mask(shape: str, build: Any) -> None:
    adapted = open_adapted(shape)
    switch_off_dropout(adapted)
    start, blocks = adapted.read(), count_padding(make_blocks(6))
    # A neighbour without padding and with fewer sequences: what fills its place up must not become NaN.
    beside = replace(count_padding(make_blocks(1)), lengths_N=torch.tensor([16]))
    jobs = [
        make_job(given, start, client=client, epochs=1, batch_size=6) for client, given in enumerate((blocks, beside))
    ]
    losses = {update.client: update.report.loss_first for update in updates_of(build(adapted).train(jobs))}
    adapted.load(start)
    expected = {client: transformers_loss(adapted, given) for client, given in enumerate((blocks, beside))}
    assert losses == pytest.approx(expected, rel=1e-12)
