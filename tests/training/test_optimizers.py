"""Optimizers of the reference engine: built as their libraries have them, or refused."""

from typing import Any

import pytest
import torch
from support.tiny import make_adapted, make_recipe
from transformers.optimization import Adafactor

from fedloom.errors import RecipeError
from fedloom.recipe.recipe import Recipe
from fedloom.training.engines import choose_engine
from fedloom.training.optimizers import check_optimizer, load_state, open_optimizer, read_state, state_shapes


def gradient_of(size: int, step: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    ("optimizer", "build"),
    [
        ("adamw", lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)),
        (
            {"kind": "adamw", "betas": [0.8, 0.99], "eps": 1e-4},
            lambda weights: torch.optim.AdamW(weights, lr=1e-2, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1),
        ),
        (
            {"kind": "sgd", "momentum": 0.9},
            lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, weight_decay=0.1),
        ),
        (
            "adafactor",
            lambda weights: Adafactor(weights, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False),
        ),
    ],
    ids=["adamw", "adamw, its own settings", "sgd", "adafactor"],
)
def test_the_flat_adapter_is_stepped_as_its_tensors_would_be(optimizer: Any, build: Any) -> None:
    adapted = make_adapted()
    training = make_recipe(training={"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1}).training
    # What anybody would write: a parameter for each tensor.
    theirs = {name: torch.nn.Parameter(part.clone()) for name, part in adapted.layout.split(adapted.weights_P).items()}
    expected = build([*theirs.values()])
    ours = open_optimizer(training, adapted.weights_P, adapted.gradient_P, adapted.layout)
    for step in range(5):
        gradient_P = gradient_of(adapted.layout.size, step)
        adapted.gradient_P.copy_(gradient_P)
        for tensor, part in zip(theirs.values(), adapted.layout.split(gradient_P).values(), strict=True):
            tensor.grad = part.clone()
        ours.step()
        expected.step()
        if step == 2:  # it goes on from its state alone, which is read and given to a new one
            state = read_state(ours, training)
            kept = training.model_copy(update={"optimizer_state": "keep"})
            assert {name: value.shape for name, value in state.items()} == state_shapes(kept, adapted.layout)
            dtypes = {value.dtype for name, value in state.items() if name != "step"}
            assert (dtypes, state.get("step", torch.zeros(())).dtype) == ({adapted.weights_P.dtype}, torch.float32)
            assert not state_shapes(training, adapted.layout), "none where it is not kept"
            ours = open_optimizer(training, adapted.weights_P, adapted.gradient_P, adapted.layout)
            load_state(ours, training, state)
    for name, found in adapted.layout.split(adapted.weights_P).items():
        assert torch.equal(found, theirs[name]), name


def test_eight_bits_are_for_a_gpu_with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    training = make_recipe(training={"optimizer": "adamw_8bit"}).training
    check_optimizer(make_recipe().training, cpu)
    with pytest.raises(RecipeError, match="adamw_8bit needs a GPU"):
        check_optimizer(training, cpu)
    monkeypatch.setattr("fedloom.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="bitsandbytes is not installed"):
        check_optimizer(training, gpu)
    monkeypatch.setattr("fedloom.training.optimizers.find_spec", lambda name: object())
    check_optimizer(training, gpu)


def engine_of(recipe: Recipe) -> str:
    return choose_engine(recipe.adapter, recipe.training, recipe.model)


def test_eight_bits_are_the_reference_engines() -> None:
    assert engine_of(make_recipe(training={"optimizer": "adamw_8bit"})) == "reference"
    assert engine_of(make_recipe(training={"optimizer": "adafactor"})) == "batched"
    with pytest.raises(RecipeError, match="the engine batched has no optimizer"):
        engine_of(make_recipe(training={"optimizer": "adamw_8bit", "engine": "batched"}))


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ({"optimizer": "adamw_8bit", "optimizer_state": "keep"}, "training.optimizer_state"),
        ({"learning_rate_end": 1.0}, "training.learning_rate_end"),
        ({"schedule": "cosine", "schedule_scope": "rounds"}, "training.learning_rate_end"),
        ({"schedule_scope": "rounds", "warmup": 1}, "training.warmup"),
    ],
)
def test_controls_that_do_not_fit_together_are_refused(training: dict[str, Any], where: str) -> None:
    with pytest.raises(RecipeError) as refused:
        make_recipe(training=training)
    assert refused.value.where == where


def test_options_of_four_bits_are_refused_without_four_bits() -> None:
    for quantization in (None, "8bit"):
        with pytest.raises(RecipeError, match="options of weights of 4 bits"):
            make_recipe(model={"quantization": quantization, "quantization_options": {"type": "fp4"}})
