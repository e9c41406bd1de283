"""Engines by name, and which of them can train what a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import RecipeError
from fedloom.progress import Say, Watch
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientJob, ClientResult
from fedloom.training.reference import ReferenceEngine

if TYPE_CHECKING:
    from fedloom.recipe.sections import Adapter, Model, Training

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


def choose_engine(adapter: Adapter, training: Training, model: Model) -> EngineName:
    """Return `batched` for plain LoRA, unless the recipe asks for `reference`, and `reference` for everything else.

    Raises:
        RecipeError: `batched` is asked for with what it does not have.
    """
    lacks = [
        *([f'method "{adapter.method}"'] if adapter.method != "lora" else []),
        *(["adapter.dora"] if adapter.dora else []),
        *(f"adapter.options.{option}" for option in adapter.options if option not in BATCHED_OPTIONS),
        *(["model.quantization"] if model.quantization in ("4bit", "8bit") else []),
    ]
    if training.engine == "batched" and lacks:
        raise RecipeError(
            f"the engine batched has no {lacks[0]}",
            where="training.engine",
            mend="use reference or auto, or plain lora",
        )
    return "reference" if lacks or training.engine == "reference" else "batched"
