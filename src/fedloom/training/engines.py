"""Engines by name, and which of them can train what a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable

from fedloom.errors import RecipeError
from fedloom.recipe.recipe import Recipe
from fedloom.training.batched import build_batched_engine
from fedloom.training.jobs import TrainClients
from fedloom.training.reference import build_reference_engine

ENGINES: dict[str, Callable[..., TrainClients]] = {
    "batched": build_batched_engine,
    "reference": build_reference_engine,
}
"""Both give the same updates: `batched` in one pass over all clients, `reference` plainly."""


BATCHED_OPTIONS = (
    *("init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
)
"""PEFT's options of LoRA that the engine `batched` has too."""


def choose_engine(recipe: Recipe) -> str:
    """`auto` is `batched` for plain LoRA, and `reference` for every other method.

    Raises:
        RecipeError: `batched` is asked for with what it does not have.
    """
    adapter, wanted = recipe.adapter, recipe.training.engine
    lacks = [
        *([f'method "{adapter.method}"'] if adapter.method != "lora" else []),
        *(["adapter.dora"] if adapter.dora else []),
        *(f"adapter.options.{option}" for option in adapter.options if option not in BATCHED_OPTIONS),
        *(["model.quantization"] if recipe.model.quantization in ("4bit", "8bit") else []),
    ]
    if wanted == "batched" and lacks:
        raise RecipeError(
            f"the engine batched has no {lacks[0]}",
            where="training.engine",
            mend="use reference or auto, or plain lora",
        )
    return "reference" if lacks or wanted == "reference" else "batched"
