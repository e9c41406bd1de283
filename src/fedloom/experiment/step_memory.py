"""Memory of a run's steps, predicted by the engine that will take them; recipes whose steps are alike are told."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch

from fedloom.experiment.building import build_shape
from fedloom.model.source import ModelSource
from fedloom.recipe.recipe import Recipe
from fedloom.training.engines import EngineName
from fedloom.training.memory import StepMemory, predict_step
from fedloom.training.memory_alone import predict_alone


def predict_memory(
    recipe: Recipe,
    source: ModelSource,
    engine: EngineName,
    dtype: str,
    device: torch.device,
    *,
    clients: int,
    scored_tokens: int,
) -> StepMemory:
    """Predict what a step of so many clients needs, or of one alone where they train one after another."""
    build = partial(build_shape, recipe, source, dtype, packed=True)
    told: dict[str, Any] = {
        "length": recipe.data.max_length,
        "device": device,
        "scored_tokens": scored_tokens,
        "alike": not recipe.adapter.options and not any("." in name for name in recipe.adapter.targets or ()),
        "packed": recipe.data.window == "pack",
    }
    if engine == "reference":
        return predict_alone(build, source.num_layers, recipe.training, **told)
    private = recipe.bounds_documents
    return predict_step(build, source.num_layers, recipe.training, clients=clients, private=private, **told)


def with_real_batches(recipe: Recipe, blocks: Sequence[int]) -> Recipe:
    """Return a recipe whose batches are no larger than what is trained on: a client's blocks, of so many each.

    The baseline `pooled` has all of them together.
    """
    most = sum(blocks) if "pooled" in recipe.baselines else max(blocks)
    training = recipe.training.model_copy(update={"batch_size": min(recipe.training.batch_size, max(1, most))})
    return recipe.model_copy(update={"training": training})


OF_NO_STEPS_MEMORY = {
    *("learning_rate", "learning_rate_end", "schedule", "schedule_scope", "warmup", "weight_decay"),
    *("epochs", "max_steps", "proximal_schedule", "devices"),
}
"""Keys of `training` that change no tensor's size in a step."""


def step_of(recipe: Recipe) -> Hashable:
    """Return a key: recipes for which it is equal need the same memory for a step."""
    training = recipe.training.model_copy(update={"proximal_mu": float(recipe.training.proximal_mu > 0)})
    rule, data = recipe.federation.lora_rule, recipe.data
    return (
        recipe.model,
        recipe.adapter.model_dump_json(),
        rule if rule in ("ffa", "fedex") else "plain",
        training.model_dump_json(exclude=OF_NO_STEPS_MEMORY),
        (data.max_length, data.window, data.pad_in_loss, recipe.privacy is not None, recipe.evaluation.batch_size),
    )
