"""The recipe as a whole: its sections, and what they can't be combined to, in one table. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from fedloom.errors import RecipeError
from fedloom.recipe.methods import METHODS
from fedloom.recipe.sections import Adapter, Data, Evaluation, Federation, Model, Section, Training

SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")


class Clash(NamedTuple):
    """Two settings that exclude each other, why, and how to mend it."""

    clashes: Callable[[Recipe], bool]
    where: str
    why: str
    mend: str


CLASHES = (
    Clash(
        lambda recipe: recipe.federation.lora_rule != "factors" and recipe.adapter.method != "lora",
        "federation.lora_rule",
        "there are no A and B to average with this adapter.method",
        'leave it out, or set adapter.method = "lora"',
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule in ("svd", "fedex") and recipe.federation.strategy.kind != "fedavg",
        "federation.strategy",
        "this lora_rule makes the mean of the clients' products itself, and leaves nothing to another strategy",
        'set kind = "fedavg"',
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule == "rolora" and recipe.federation.strategy.kind in SERVER_OPTIMIZERS,
        "federation.strategy",
        'an optimizer on the server goes on moving the factor that is not trained: "rolora" would not be exact',
        'set kind = "fedavg", or another lora_rule',
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule in ("rolora", "svd") and recipe.training.optimizer_state == "keep",
        "training.optimizer_state",
        "with this lora_rule other factors are trained in each round: the state of the last ones says nothing of them",
        'set it to "reset"',
    ),
    Clash(
        lambda recipe: recipe.federation.client_ranks is not None and recipe.federation.lora_rule != "svd",
        "federation.client_ranks",
        "factors of different ranks can't be averaged apart",
        'set lora_rule = "svd", or leave it out',
    ),
    Clash(
        lambda recipe: len(recipe.federation.client_ranks or ()) not in (0, recipe.data.clients),
        "federation.client_ranks",
        "there must be a rank for each of data.clients",
        "give as many as there are clients",
    ),
    Clash(
        lambda recipe: max(recipe.federation.client_ranks or (0,)) > recipe.adapter.rank,
        "federation.client_ranks",
        "a client's rank is above adapter.rank, that of the adapter that all of them make",
        "raise adapter.rank to the highest of them",
    ),
    Clash(
        lambda recipe: bool(recipe.model.quantization) and METHODS[recipe.adapter.method].float32_base,
        "model.quantization",
        "this adapter.method trains weights that have the base model's dtype, and packed ones can't be trained",
        "leave it out, or use lora",
    ),
    Clash(
        lambda recipe: (
            recipe.model.quantization == "packed" and (recipe.adapter.method != "lora" or recipe.adapter.dora)
        ),
        "model.quantization",
        "over a packed GGUF file there is plain LoRA alone: other methods look into the weights",
        'leave it out, or use adapter.method = "lora" without dora',
    ),
    Clash(
        lambda recipe: recipe.training.gradient_checkpointing and recipe.adapter.method == "prefix_tuning",
        "training.gradient_checkpointing",
        "prefix_tuning's keys and values would be lost in a second pass",
        "leave it out",
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule != "factors" and recipe.adapter.dora,
        "federation.lora_rule",
        "DoRA's magnitudes are not part of the product of A and B that this lora_rule averages",
        "leave it out, or dora",
    ),
    Clash(
        lambda recipe: (
            recipe.federation.lora_rule == "fedex"
            and not {"rank_pattern", "alpha_pattern"}.isdisjoint(recipe.adapter.options)
        ),
        "federation.lora_rule",
        "a residual makes every layer's rank wider by the same number, which patterns of ranks can't say",
        "leave out adapter.options' rank_pattern and alpha_pattern",
    ),
    Clash(
        lambda recipe: recipe.federation.min_clients > recipe.data.clients,
        "federation.min_clients",
        "it is more than data.clients",
        "lower it",
    ),
    Clash(
        lambda recipe: recipe.training.proximal_schedule != "constant" and recipe.federation.rounds == 1,
        "training.proximal_schedule",
        "one round leaves nothing to schedule",
        "leave it out, or raise federation.rounds",
    ),
)


def check_combinations(recipe: Recipe) -> None:
    """Refuse what can't be combined.

    Raises:
        RecipeError
    """
    for clash in CLASHES:
        if clash.clashes(recipe):
            raise RecipeError(clash.why, where=clash.where, mend=clash.mend)


def _to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Recipe(Section):
    """What was asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run directory")
    description: str = Field("", description="a sentence for people")
    seed: int = Field(42, ge=0, description="every random choice comes from it")
    baselines: Annotated[tuple[Literal["round0", "local", "pooled"], ...], BeforeValidator(_to_tuple)] = Field(
        (), description="what the run is set against: no training; each client alone; all their documents together"
    )
    model: Model
    adapter: Adapter = Field(default_factory=Adapter)
    data: Data
    training: Training = Field(default_factory=Training)
    federation: Federation = Field(default_factory=Federation)
    evaluation: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _can_be_combined(self) -> Recipe:
        check_combinations(self)
        return self
