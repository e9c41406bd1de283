"""The recipe as a whole: its sections, and one table of settings that can't be combined. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from fedloom.errors import RecipeError
from fedloom.hub import COMMIT
from fedloom.recipe.client_clashes import CLIENT_CLASHES
from fedloom.recipe.data_section import Data
from fedloom.recipe.methods import METHODS, SHAPED
from fedloom.recipe.privacy_section import Privacy
from fedloom.recipe.section import NAME, Section
from fedloom.recipe.sections import SERVER_OPTIMIZERS, Adapter, Evaluation, Federation, Model, Personalise, Report
from fedloom.recipe.training_section import Training


class Clash(NamedTuple):
    """Two settings that exclude each other, why, and how to mend it."""

    clashes: Callable[[Recipe], bool]
    """Test that is true of a recipe with both settings."""
    where: str
    """Dotted key to change."""
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
        lambda recipe: recipe.federation.lora_rule == "fedsa" and recipe.federation.strategy.kind != "fedavg",
        "federation.strategy",
        "beside A it takes the mean of the clients' own B, which no server has to step from",
        'set kind = "fedavg"',
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule == "fedsa" and recipe.personalise is not None,
        "personalise",
        'with lora_rule = "fedsa" every client has an adapter of its own already',
        "leave it out, or choose another lora_rule",
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule in ("svd", "fedex") and recipe.federation.strategy.kind != "fedavg",
        "federation.strategy",
        "this lora_rule averages the clients' products of A and B itself, so no other strategy can be used",
        'set kind = "fedavg"',
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule == "rolora" and recipe.federation.strategy.kind in SERVER_OPTIMIZERS,
        "federation.strategy",
        'an optimizer on the server also moves the factor that is not trained in a round, so "rolora" is not exact',
        'set kind = "fedavg", or another lora_rule',
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule in ("rolora", "svd") and recipe.training.optimizer_state == "keep",
        "training.optimizer_state",
        "this lora_rule trains different factors in each round, so the optimizer's state of the last one does not fit",
        'set it to "reset"',
    ),
    Clash(
        lambda recipe: (
            recipe.training.optimizer_table.kind == "adamw_8bit" and recipe.training.optimizer_state == "keep"
        ),
        "training.optimizer_state",
        "bitsandbytes keeps the state of adamw_8bit on the GPU, where it would fill with those of clients that wait",
        'set it to "reset"',
    ),
    Clash(
        lambda recipe: recipe.training.learning_rate_end > recipe.training.learning_rate,
        "training.learning_rate_end",
        "it is above training.learning_rate, the peak of the learning rate",
        "lower it",
    ),
    Clash(
        lambda recipe: recipe.training.schedule_scope == "rounds" and recipe.training.warmup > 0,
        "training.warmup",
        'with schedule_scope = "rounds" the rate is the same in all steps of a round',
        "leave it out, or choose another schedule_scope",
    ),
    Clash(
        lambda recipe: (
            recipe.training.schedule_scope == "rounds"
            and recipe.training.schedule != "constant"
            and not recipe.training.learning_rate_end
        ),
        "training.learning_rate_end",
        'with schedule_scope = "rounds" it is the rate of the whole last round, which would train with 0',
        "set it above 0",
    ),
    Clash(
        lambda recipe: recipe.federation.client_ranks is not None and recipe.federation.lora_rule != "svd",
        "federation.client_ranks",
        "factors of different ranks can't be averaged directly",
        'set lora_rule = "svd", or leave it out',
    ),
    Clash(
        lambda recipe: len(recipe.federation.client_ranks or ()) not in (0, recipe.data.clients),
        "federation.client_ranks",
        "it must have one rank for each client (data.clients)",
        "give as many ranks as there are clients",
    ),
    Clash(
        lambda recipe: max(recipe.federation.client_ranks or (0,)) > recipe.adapter.rank,
        "federation.client_ranks",
        "a client's rank is higher than adapter.rank, the rank of the shared adapter",
        "raise adapter.rank to the highest of them",
    ),
    Clash(
        lambda recipe: recipe.model.quantization_options is not None and recipe.model.quantization != "4bit",
        "model.quantization_options",
        "they are options of weights of 4 bits",
        'set model.quantization = "4bit", or leave them out',
    ),
    Clash(
        lambda recipe: bool(recipe.model.quantization) and METHODS[recipe.adapter.method].float32_base,
        "model.quantization",
        "this adapter.method trains weights in the base model's dtype, and quantized weights can't be trained",
        "leave it out, or use lora",
    ),
    Clash(
        lambda recipe: recipe.model.quantization == "packed" and not recipe.adapter.is_plain_lora,
        "model.quantization",
        "a packed GGUF file works with plain LoRA alone: other methods read the weights themselves",
        'leave it out, or use adapter.method = "lora" without dora',
    ),
    Clash(
        lambda recipe: (
            recipe.model.device_map is not None
            and not (recipe.adapter.is_plain_lora and {*recipe.adapter.options} <= SHAPED)
        ),
        "model.device_map",
        "this adapter reads or trains weights of the base model, which may lie elsewhere",
        "leave it out, or use plain LoRA",
    ),
    Clash(
        lambda recipe: recipe.model.device_map is not None and recipe.model.quantization is not None,
        "model.device_map",
        "packed weights (model.quantization) lie whole on their device",
        "leave out one of the two",
    ),
    Clash(
        lambda recipe: recipe.model.device_map is not None and bool(recipe.training.devices),
        "model.device_map",
        "each of training.devices has the whole model",
        "leave out one of the two",
    ),
    Clash(
        lambda recipe: recipe.model.device_map is not None and not recipe.training.gradient_checkpointing,
        "training.gradient_checkpointing",
        "without it, the way back would hold every layer's weights on the device (model.device_map) at once",
        "set it to true",
    ),
    Clash(
        lambda recipe: recipe.training.gradient_checkpointing and recipe.adapter.method == "prefix_tuning",
        "training.gradient_checkpointing",
        "prefix_tuning's keys and values are lost when a layer is computed a second time",
        "leave it out",
    ),
    Clash(
        lambda recipe: recipe.federation.lora_rule != "factors" and recipe.adapter.dora,
        "federation.lora_rule",
        "DoRA's magnitudes are not part of the product of A and B that this lora_rule averages",
        "leave it out, or leave out adapter.dora",
    ),
    Clash(
        lambda recipe: (
            recipe.federation.lora_rule == "fedex"
            and not {"rank_pattern", "alpha_pattern"}.isdisjoint(recipe.adapter.options)
        ),
        "federation.lora_rule",
        "its residual adds the same rank to every layer, which rank_pattern and alpha_pattern can't describe",
        "leave out rank_pattern and alpha_pattern of adapter.options",
    ),
    Clash(
        lambda recipe: recipe.data.completion is not None and recipe.data.prompt is None,
        "data.completion",
        "it is the answer to a prompt, and there is none",
        "set data.prompt",
    ),
    Clash(
        lambda recipe: recipe.data.prompt is not None and recipe.data.messages is not None,
        "data.messages",
        "a row is either a prompt and its answer, or a conversation",
        "leave it out, or data.prompt and data.completion",
    ),
    Clash(
        lambda recipe: not recipe.data.is_plain and "text" in recipe.data.model_fields_set,
        "data.text",
        "the text comes from the columns that data.prompt or data.messages names",
        "leave it out",
    ),
    Clash(
        lambda recipe: recipe.data.loss == "assistant" and recipe.data.messages is None,
        "data.loss",
        "only a conversation has turns of an assistant",
        'set data.messages, or loss = "completion"',
    ),
    Clash(
        lambda recipe: recipe.data.loss == "completion" and not (recipe.data.completion or recipe.data.messages),
        "data.loss",
        "there is no answer apart from its prompt",
        "set data.prompt and data.completion, or data.messages",
    ),
    Clash(
        lambda recipe: (
            recipe.data.messages is None and recipe.data.completion is None and recipe.data.chat_template is not None
        ),
        "data.chat_template",
        "a chat template writes conversations, and there are none",
        "set data.prompt and data.completion, or data.messages, or leave it out",
    ),
    Clash(
        lambda recipe: recipe.data.system is not None and not recipe.data.is_chat,
        "data.system",
        "only a conversation has a system message",
        "set data.messages, or data.chat_template beside data.prompt and data.completion",
    ),
    Clash(
        lambda recipe: recipe.data.window == "blocks" and recipe.data.learns != "all",
        "data.window",
        "the blocks behind the first would be pieces of an answer without its prompt",
        'leave it out, or set data.loss = "all"',
    ),
    Clash(
        lambda recipe: recipe.data.window == "pack" and recipe.data.pad_in_loss,
        "data.window",
        "packed texts leave hardly any padding that could be counted",
        "leave out data.pad_in_loss",
    ),
    Clash(
        lambda recipe: recipe.data.window == "pack" and METHODS[recipe.adapter.method].prompts,
        "data.window",
        "what this adapter.method trains stands before a text, and only the first of a block would see it",
        'use "truncate", or another adapter.method',
    ),
    Clash(
        lambda recipe: recipe.data.pad_in_loss and (not recipe.data.is_plain or recipe.data.ends),
        "data.pad_in_loss",
        "padding is counted only to repeat programs that learnt all of a plain text",
        "leave it out",
    ),
    Clash(
        lambda recipe: recipe.bounds_documents and recipe.training.max_gradient_norm is not None,
        "training.max_gradient_norm",
        "a private run scales each document's gradient to privacy.max_norm; the batch's is no more than that",
        "leave it out",
    ),
    Clash(
        lambda recipe: recipe.bounds_documents and recipe.data.window == "pack",
        "data.window",
        "what is protected has a gradient of its own, and texts that share a block have one together",
        'set it to "truncate" or "blocks"',
    ),
    Clash(
        lambda recipe: recipe.bounds_documents and recipe.data.pad_in_loss,
        "data.pad_in_loss",
        "a private run takes each document's own mean, and has no padding in it",
        "leave it out",
    ),
    Clash(
        lambda recipe: recipe.privacy is not None and recipe.adapter.method == "full",
        "adapter.method",
        "every weight of a model would have noise, and it would drown what is learnt",
        'use "lora"',
    ),
    Clash(
        lambda recipe: recipe.privacy is not None and bool({"local", "pooled"} & set(recipe.baselines)),
        "baselines",
        "local and pooled runs on the same documents would have no noise",
        'leave them out, or keep "round0"',
    ),
    Clash(
        lambda recipe: recipe.privacy is not None and (recipe.contributions or recipe.personalise is not None),
        "contributions, personalise",
        "they train on the same documents once more, without noise",
        "leave them out",
    ),
    Clash(
        lambda recipe: recipe.documents.unit in [column for _, column in recipe.data.columns],
        "privacy.unit",
        "texts are made of that column: how many units a client has, which is told, would say how many of them differ",
        "name a column that says whose a row is, whatever it says",
    ),
    Clash(
        lambda recipe: recipe.privacy is not None and recipe.federation.strategy.weight_by == "tokens",
        "federation.strategy.weight_by",
        "how many tokens a client has tells of its documents",
        'use "examples" or "equal"',
    ),
    Clash(
        lambda recipe: recipe.privacy is not None and recipe.data.central_holdout == 0,
        "data.central_holdout",
        "the clients of a private run tell no loss, so nothing would judge its adapters",
        "hold some documents out centrally",
    ),
    Clash(
        lambda recipe: recipe.federation.min_clients > recipe.data.clients,
        "federation.min_clients",
        "it is higher than data.clients, the number of all clients",
        "lower it, or raise data.clients",
    ),
    Clash(
        lambda recipe: recipe.training.proximal_schedule != "constant" and recipe.federation.rounds == 1,
        "training.proximal_schedule",
        "a schedule needs more than one round",
        "leave it out, or raise federation.rounds",
    ),
)
"""Every pair of settings that is refused; the first that a recipe has is the one it is told."""


def check_combinations(recipe: Recipe) -> None:
    """Refuse settings that can't be combined.

    Raises:
        RecipeError: the recipe has one of the CLASHES, or of the CLIENT_CLASHES.
    """
    for clash in CLASHES:
        if clash.clashes(recipe):
            raise RecipeError(clash.why, where=clash.where, mend=clash.mend)
    for other in CLIENT_CLASHES if recipe.bounds_clients else ():
        if other.clashes(recipe.federation, recipe.data):
            raise RecipeError(f'with privacy.unit = "client", {other.why}', where=other.where, mend=other.mend)


def _to_tuple(value: object) -> object:
    # TOML has lists only, and a strict frozen section wants tuples.
    return tuple(value) if isinstance(value, list) else value


class Recipe(Section):
    """A whole recipe: frozen, checked, with every default filled in."""

    name: str = Field(pattern=NAME, description="name of the recipe and of its runs")
    description: str = Field("", description="a sentence for people")
    seed: int = Field(42, ge=0, description="source of every random choice")
    baselines: Annotated[tuple[Literal["round0", "local", "pooled"], ...], BeforeValidator(_to_tuple)] = Field(
        (), description="runs to compare with: no training; each client alone; all their documents together"
    )
    personalise: Personalise | None = Field(
        None,
        description="training with which each client goes on at the end, from the best global adapter, on its own"
        " documents; its adapter is its own, in `clients/N/adapter`; none if left out",
    )
    contributions: bool = Field(
        False,
        description="find at the end what each client brings to the others, by federations without it and, of up to 8"
        " clients, by its Shapley value: the plan says what that costs",
    )
    model: Model
    adapter: Adapter = Field(default_factory=Adapter)
    data: Data
    training: Training = Field(default_factory=Training)
    federation: Federation = Field(default_factory=Federation)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    report: Report = Field(default_factory=Report)
    privacy: Privacy | None = Field(None, description="a bound on what leaves a client; without it there is none")

    @property
    def bounds_documents(self) -> bool:
        """Return whether each client bounds what its updates tell of a document, or of another unit."""
        return self.privacy is not None and not self.privacy.of_clients

    @property
    def bounds_clients(self) -> bool:
        """Return whether the server bounds what its adapters tell of a client."""
        return self.privacy is not None and self.privacy.of_clients

    @property
    def documents(self) -> Data:
        """Return the section `data` as it is read: with the column whose values are protected whole, if one is."""
        return self.data.with_unit(self.privacy.unit_column) if self.privacy else self.data

    @model_validator(mode="after")
    def _can_be_combined(self) -> Recipe:
        check_combinations(self)
        return self


def pin(recipe: Recipe, plan: Mapping[str, Any]) -> Recipe:
    """Return a recipe that names the commits of the hub which a plan has on record: a main branch may have moved on."""
    found = {
        ("model", "revision"): plan.get("model_revision", ""),
        ("model", "weights_revision"): plan.get("model_weights", {}).get("commit", ""),
        ("data", "revision"): plan.get("data_revision", ""),
    }
    for (name, key), commit in found.items():
        if COMMIT.fullmatch(commit):
            section: Section = getattr(recipe, name)
            recipe = recipe.model_copy(update={name: section.model_copy(update={key: commit})})
    return recipe
