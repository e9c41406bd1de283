"""The loss is exactly that of one pass over all tokens, whatever the batch size."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quick_runs import Said
from support.tiny import make_adapted, make_blocks, make_recipe
from torch import Tensor
from torch.nn import functional

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import IGNORED, TokenBlocks
from fedloom.errors import ModelError
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.experiment.run import run
from fedloom.host import failpoints
from fedloom.monitoring.observer import Observer


def one_pass(adapted: AdaptedModel, blocks: TokenBlocks) -> tuple[float, float]:
    """Loss and accuracy from one forward pass over everything, padding and all."""
    width = torch.arange(blocks.tokens_NT.shape[1])
    labels = blocks.tokens_NT.masked_fill(width >= blocks.lengths_N[:, None], IGNORED)[:, 1:].to(adapted.device)
    with torch.no_grad():
        logits = adapted.model.eval()(input_ids=blocks.tokens_NT.to(adapted.device)).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item()
    right = (logits.argmax(-1) == labels)[labels != IGNORED]
    return loss, right.float().mean().item()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_the_batch_size_does_not_change_the_result(shape: str, batch_size: int) -> None:
    adapted, blocks = make_adapted(shape, "float64"), make_blocks(8)
    adapter = replace(adapted.read(), weights_P=torch.randn(adapted.layout.size, dtype=torch.float64) * 0.1)
    score = evaluate(adapted, adapter, blocks, batch_size=batch_size)
    loss, accuracy = one_pass(adapted, blocks)
    assert score.loss == pytest.approx(loss, rel=1e-12)
    assert score.accuracy == pytest.approx(accuracy)
    assert score.perplexity == pytest.approx(math.exp(loss))
    assert score.num_targets == int(blocks.lengths_N.sum()) - len(blocks)


def test_the_mean_is_over_tokens_not_over_batches() -> None:
    adapted, blocks = make_adapted(), make_blocks(5)
    per_block = [evaluate(adapted, adapted.read(), blocks.take(torch.tensor([row])), batch_size=1) for row in range(5)]
    whole = evaluate(adapted, adapted.read(), blocks, batch_size=2)
    assert whole.loss == pytest.approx(sum(s.loss_sum for s in per_block) / sum(s.num_targets for s in per_block))
    assert whole.loss != pytest.approx(sum(s.loss for s in per_block) / 5, rel=1e-9)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    adapted, blocks = make_adapted(), make_blocks()
    padding = torch.arange(blocks.tokens_NT.shape[1]) >= blocks.lengths_N[:, None]
    other = replace(blocks, tokens_NT=blocks.tokens_NT.masked_fill(padding, 99))
    first, second = (evaluate(adapted, adapted.read(), b, batch_size=4) for b in (blocks, other))
    assert first == second


def test_dropout_is_off() -> None:
    adapted, blocks = make_adapted("tiny-opt", dropout=0.9), make_blocks()
    adapter = replace(adapted.read(), weights_P=torch.ones(adapted.layout.size))
    adapted.model.train()
    assert evaluate(adapted, adapter, blocks, batch_size=4) == evaluate(adapted, adapter, blocks, batch_size=4)


def test_scores_add_up() -> None:
    assert Score(2.0, 1, 4) + Score(4.0, 2, 4) == Score(6.0, 3, 8)
    assert (Score(2.0, 1, 4) + Score(4.0, 2, 4)).loss == 0.75


@pytest.mark.parametrize(
    ("failing", "tokens"), [([0], [64]), ([0, 1, 2], [64, 32, 16]), ([1], [56]), ([0, 4], [64, 30])]
)
def test_memory_that_runs_out_halves_the_batches_and_changes_nothing(
    failing: list[int], tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, blocks = make_adapted(dtype="float64"), make_blocks(19)
    whole = evaluate(adapted, adapted.read(), blocks, batch_size=8)
    passed, lowered, watched, read = [], [], [], adapted.loss_head.read_rows

    def run_short(*asked: Any) -> tuple[Tensor, Tensor]:
        passed.append(len(asked[0]))
        if len(passed) - 1 in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return read(*asked)

    monkeypatch.setattr(adapted.loss_head, "read_rows", run_short)
    found = evaluate(
        adapted,
        adapted.read(),
        blocks,
        batch_size=8,
        watch=lambda step: watched.append(step.samples),
        lower=lowered.append,
    )
    assert lowered == tokens
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    assert (found.correct, found.num_targets) == (whole.correct, whole.num_targets)
    assert sum(watched) == 19, "progress counts each block once"


def test_memory_for_not_even_one_block_is_an_error_that_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()

    def run_short(*asked: Any) -> tuple[Tensor, Tensor]:
        raise MemoryError

    monkeypatch.setattr(adapted.loss_head, "read_rows", run_short)
    with pytest.raises(ModelError, match=r"not enough memory to score a single block; lower data\.max_length"):
        evaluate(adapted, adapted.read(), make_blocks(), batch_size=4)


def test_another_error_is_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    monkeypatch.setattr(adapted.loss_head, "read_rows", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        evaluate(adapted, adapted.read(), make_blocks(), batch_size=4)


@pytest.mark.long
def test_a_run_goes_on_with_smaller_batches_and_says_so(tmp_path: Path) -> None:
    recipe = make_recipe(evaluation={"batch_size": 4})
    whole, said = run(recipe, tmp_path / "whole", Observer()), Said()
    failpoints.arm("evaluation.scored=memory@2")
    try:
        found = run(recipe, tmp_path / "run", said)
    finally:
        failpoints.arm("")
    assert [step for step in said.steps if step.startswith("memory")] == [
        "memory: not enough: evaluation takes 32 tokens at once from now on"
    ], "the last batch of the central hold-out has 2 blocks of 32; said once"
    for mine, its in zip(found.rounds, whole.rounds, strict=True):
        assert mine["central_loss"] == pytest.approx(its["central_loss"], rel=1e-6)
        assert mine["evaluate_tokens"] == its["evaluate_tokens"]
