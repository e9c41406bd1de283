"""Engines by name, and which of them can train what a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import find_unstackable
from fedloom.errors import RecipeError
from fedloom.progress import Say, Watch
from fedloom.training.assumptions import (
    check_model,
    check_packing,
    check_repeatable,
    let_results_differ_if_need_be,
    try_unpadding,
)
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientJob, ClientResult
from fedloom.training.own_randomness import check_own_dropout, check_own_randomness, draws_by_its_settings
from fedloom.training.reference import ReferenceEngine

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data
    from fedloom.recipe.sections import Adapter, Model
    from fedloom.recipe.training_section import Training

EngineName = Literal["batched", "reference"]


class Engine(Protocol):
    """Whoever trains clients on one model. Its `train` is the seam `TrainClients`."""

    @property
    def lowered_to(self) -> int | None:
        """Clients that train at once since memory ran out; None where it never did."""
        ...

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        """Carry out every job; yield each client's update, or its failure, when it is finished."""
        ...


ENGINES: dict[EngineName, Callable[[AdaptedModel, Watch, Say], Engine]] = {
    "batched": BatchedEngine,
    "reference": ReferenceEngine,
}
"""Engines that give the same updates: `batched` in one pass over all clients, `reference` plainly."""

BATCHED_OPTIONS = (
    *("init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
)
"""PEFT's options of LoRA that the engine `batched` has too."""


def open_engine(name: EngineName, adapted: AdaptedModel, data: Data, watch: Watch, say: Say) -> Engine:
    """Return an engine over a loaded model, once what it takes for granted about the model has been tried.

    Of `data`, the length of blocks counts, and whether texts share them.

    Raises:
        ModelError: something of it does not hold.
    """
    max_length = data.max_length
    if adapted.device.type == "cuda":
        let_results_differ_if_need_be(adapted, max_length, say)
    check_model(adapted, max_length)
    check_repeatable(adapted, max_length)
    try_unpadding(adapted, max_length, say)
    if data.window == "pack":
        check_packing(adapted, max_length)
    if name == "batched":
        check_own_randomness(adapted, max_length)
        check_own_dropout(adapted, max_length)
    return ENGINES[name](adapted, watch, say)


def choose_engine(
    adapter: Adapter, training: Training, model: Model, adapted: AdaptedModel | None = None
) -> EngineName:
    """Return `batched` for plain LoRA, unless the recipe asks for `reference`, and `reference` for everything else.

    Raises:
        RecipeError: `batched` is asked for with what it does not have.
    """
    lack = why_not_batched(adapter, training, model, adapted)
    if training.engine == "batched" and lack:
        raise RecipeError(
            f"the engine batched has no {lack}",
            where="training.engine",
            mend="use reference or auto, or leave that out",
        )
    return "reference" if lack or training.engine == "reference" else "batched"


def why_not_batched(adapter: Adapter, training: Training, model: Model, adapted: AdaptedModel | None = None) -> str:
    """Return the first thing of a recipe that `batched` does not have; an empty text where it has all of it.

    What PEFT built decides where there is a model to look at, with values or without: some of its layers are no plain
    linear ones, a router or fused experts, whatever the recipe calls them. So does a router's noise.
    """
    lacks = [
        *([f'method "{adapter.method}"'] if adapter.method != "lora" else []),
        *(["adapter.dora"] if adapter.dora else []),
        *(f"adapter.options.{option}" for option in adapter.options if option not in BATCHED_OPTIONS),
        *(['optimizer "adamw_8bit"'] if training.optimizer_table.kind == "adamw_8bit" else []),
        *(["model.device_map"] if model.device_map else []),
    ]
    if adapted is not None and not lacks and (layer := find_unstackable(adapted)):
        lacks = [f"adapter on {layer}"]
    if adapted is not None and not lacks and (noise := draws_by_its_settings(adapted)):
        lacks = [f"random numbers of the model's own ({noise})"]
    return lacks[0] if lacks else ""
