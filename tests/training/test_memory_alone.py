"""What it takes to train a whole model, one client after another: traced without memory, against what a client has."""

from typing import Any

import pytest
import torch
from support.marks import first
from support.shapes import ARCHITECTURES
from support.tiny import make_job, make_recipe

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation.held_out import evaluate
from fedloom.experiment.recognition import open_recipe
from fedloom.experiment.run import plan
from fedloom.model.loading import build_meta_model, load_model
from fedloom.model.source import open_model
from fedloom.progress import say_nothing
from fedloom.training import memory_alone
from fedloom.training.memory import HELD_BY_ALLOCATOR, StepMemory
from fedloom.training.memory_alone import HeldBytes, predict_alone, trace_alone, trace_scoring_alone
from fedloom.training.reference import train_client

CPU = torch.device("cpu")
LENGTH = 32


def build(shape: str, layers: int = 2) -> AdaptedModel:
    return AdaptedModel(build_meta_model(open_model(f"random:{shape}"), layers=layers, dtype="float32"), None, 7)


def load(shape: str) -> AdaptedModel:
    return AdaptedModel(load_model(open_model(f"random:{shape}"), dtype="float32", device=CPU), None, 7)


def others(adapted: AdaptedModel) -> list[torch.Tensor]:
    return [*adapted.model.parameters(), *adapted.model.buffers()]


def full_blocks(count: int) -> TokenBlocks:
    return TokenBlocks(
        torch.arange(count * LENGTH).view(count, LENGTH) % 250,
        torch.full((count,), LENGTH),
        torch.ones(count, LENGTH, dtype=torch.bool),
    )


@pytest.fixture(params=first(ARCHITECTURES))
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("large_from", first([2**14, 1, memory_alone.GIVEN_BACK_FROM]))
@pytest.mark.parametrize(
    "settings",
    first(
        [
            {"max_gradient_norm": 1.0, "proximal_mu": 0.1},
            {"optimizer": "sgd"},
            {"optimizer": "adafactor"},
            {"gradient_checkpointing": True},
        ],
        keep=2,
    ),
)
def test_the_trace_is_what_a_client_has(
    shape: str, settings: dict[str, Any], large_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_alone, "GIVEN_BACK_FROM", large_from)
    training = make_recipe(training={"batch_size": 2, **settings}).training
    adapted = load(shape)
    with HeldBytes(others(adapted), CPU) as live:
        adapted.gradient_P.zero_()
        start = adapted.read()
        train_client(adapted, make_job(full_blocks(6), start, batch_size=2, epochs=1, **settings))
    traced = trace_alone(build(shape), training, LENGTH, CPU)
    assert max(traced) == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize("large_from", [1, memory_alone.GIVEN_BACK_FROM])
def test_the_trace_of_scoring_is_what_an_evaluation_has(
    shape: str, large_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_alone, "GIVEN_BACK_FROM", large_from)
    adapted = load(shape)
    with HeldBytes(others(adapted), CPU) as live:
        adapted.gradient_P.zero_()
        evaluate(adapted, adapted.read(), full_blocks(8), batch_size=16)
    assert trace_scoring_alone(build(shape), 8 * LENGTH, LENGTH, CPU) == pytest.approx(live.peak, rel=0.1)


def predict(shape: str = "tiny-llama", layers: int = 2, **settings: Any) -> StepMemory:
    training = make_recipe(training={"batch_size": 2, **settings}).training
    return predict_alone(lambda count: build(shape, count), layers, training, length=LENGTH, device=CPU)


@pytest.mark.long
@pytest.mark.parametrize("large_from", first([1, memory_alone.GIVEN_BACK_FROM], rest=pytest.mark.slow))
def test_deep_models_are_told_from_short_ones(shape: str, large_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vectors of the model's size are the most, and where activations are."""
    monkeypatch.setattr(memory_alone, "GIVEN_BACK_FROM", large_from)
    traced = max(trace_alone(build(shape, 6), make_recipe(training={"batch_size": 2}).training, LENGTH, CPU))
    predicted = predict(shape, layers=6)
    assert predicted.peak_bytes(1) - predicted.base_bytes == pytest.approx(traced, rel=0.01)


@pytest.mark.long
def test_a_whole_models_vectors_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AdamW seven of them: weights, gradient, two moments, what a step makes of the second, the global weights."""
    monkeypatch.setattr(memory_alone, "GIVEN_BACK_FROM", 1)
    monkeypatch.setattr(memory_alone, "HELD_BY_ALLOCATOR", {"cpu": 1.0})
    vector = 4 * build("tiny-llama").layout.size
    plain = predict()
    assert plain.base_bytes == vector
    _, step = trace_alone(build("tiny-llama"), make_recipe().training, LENGTH, CPU)
    assert step == pytest.approx(6 * vector, rel=0.01)
    without = trace_alone(build("tiny-llama"), make_recipe(training={"optimizer": "sgd"}).training, LENGTH, CPU)
    assert without[1] == pytest.approx(2 * vector, rel=0.01)


@pytest.mark.long
def test_what_costs_memory_shows() -> None:
    plain = predict().peak_bytes(1)
    assert predict(batch_size=16).peak_bytes(1) > plain
    assert predict(optimizer="sgd").peak_bytes(1) < plain
    assert predict(batch_size=16, gradient_checkpointing=True).peak_bytes(1) < predict(batch_size=16).peak_bytes(1)


@pytest.mark.long
def test_an_evaluation_that_takes_more_than_a_step_is_in_the_prediction() -> None:
    training = make_recipe(training={"batch_size": 1}).training
    scored = predict_alone(
        lambda count: build("tiny-llama", count), 2, training, length=LENGTH, device=CPU, scored_tokens=1000 * LENGTH
    )
    assert scored.peak_bytes(1) == scored.base_bytes + scored.scoring_bytes > 2 * predict().peak_bytes(1)


def test_small_pieces_are_held_for_good_and_large_ones_as_long_as_they_live() -> None:
    small, large = 2**20, memory_alone.GIVEN_BACK_FROM
    with HeldBytes([], CPU) as live:
        torch.empty(small, dtype=torch.uint8)
        torch.empty(large, dtype=torch.uint8)
        again = live.peak_of(lambda: torch.empty(large, dtype=torch.uint8))
    assert again == live.peak == large + round(HELD_BY_ALLOCATOR["cpu"] * small)


@pytest.mark.long
def test_a_plan_of_a_whole_model_says_what_it_takes() -> None:
    recipe = open_recipe("tiny", ["adapter.method=full"], say_nothing)
    planned = plan(recipe)
    assert planned.engine == "reference"
    assert planned.peak_bytes is not None
    assert planned.peak_bytes > 4 * 4 * planned.parameters
    assert planned.clients_that_fit is None
