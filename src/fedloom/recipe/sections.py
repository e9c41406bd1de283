"""Sections of a recipe: every key, its type, its default and its meaning. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from fedloom.recipe.methods import METHODS, check_choice, check_method
from fedloom.recipe.section import ANY_DEVICE, LARGEST, MOST, Section
from fedloom.recipe.training_section import Training


def _to_names(value: object) -> object:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('should be a list of names, or "all-linear"')
    return tuple(value)


Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_to_names)]


def _to_ranks(value: object) -> object:
    # Not isinstance(rank, int): True is one.
    if not isinstance(value, list | tuple) or not all(type(rank) is int and rank > 0 for rank in value):
        raise ValueError("should be a list of whole numbers, one for each client")
    return tuple(value)


class QuantizationOptions(Section):
    """Weights of 4 bits, as bitsandbytes packs them and computes with them."""

    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit numbers: NF4 of QLoRA, or floats")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="type that the weights are unpacked to and computed in"
    )
    double: bool = Field(True, description="scales packed as well")


class Model(Section):
    """The frozen base model."""

    source: str = Field(
        min_length=1, description="hub id, folder, `.gguf` file, `package:NAME/FILE`, or `random:SHAPE`"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model; its main branch if left out")
    weights_revision: str | None = Field(
        None,
        description="branch, tag, commit or `refs/pr/N` of a hub model that the weights are read from; if left out, its"
        " `revision`, or the hub's own conversion of pickles there",
    )
    convert: bool = Field(
        False,
        description="weights that there are only as pickles are read once, in a process without network, and kept as"
        " safetensors; refused otherwise",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto",
        description="type of the base model's weights; `auto` is bfloat16 where the device has it in hardware and the"
        " method allows it, else float32",
    )
    quantization: Literal["4bit", "8bit", "packed"] | None = Field(
        None,
        description="packing of the frozen weights: `4bit` (NF4) or `8bit` by bitsandbytes, or `packed` as in a `.gguf`"
        " file; none if left out",
    )
    quantization_options: QuantizationOptions | None = Field(
        None, description="how `4bit` packs and computes; with their defaults if left out"
    )
    device: str = Field("auto", pattern=ANY_DEVICE, description="`auto`, `cpu`, `cuda` or `cuda:N`")
    device_map: Literal["auto"] | None = Field(
        None,
        description="with `auto`, weights that the device has no room for beside a step lie in memory, or else in their"
        " files, and are read anew for every pass; if left out, such a model is refused",
    )


FEDERATED_METHODS = [name for name, method in METHODS.items() if not method.refused]


class Adapter(Section):
    """The weights that are trained and exchanged."""

    method: Annotated[str, AfterValidator(check_method), WithJsonSchema({"enum": FEDERATED_METHODS})] = Field(
        "lora", description="a PEFT method by its name, or `full`; `docs/methods.md` lists them"
    )
    rank: int = Field(16, ge=1, le=4096, description="LoRA's r; with another method, PEFT's default if left out")
    alpha: float = Field(
        32,
        gt=0,
        le=LARGEST,
        description="LoRA's α: the update is scaled by α/r; with another method, PEFT's default if left out",
    )
    rslora: bool = Field(False, description="scaling by α/√r instead of α/r (`lora`; arXiv 2312.03732)")
    dora: bool = Field(
        False, description="a trained magnitude for each column, apart from its direction (`lora`; arXiv 2402.09353)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapter's input in training; the base model's own is on too"
    )
    targets: Names | Literal["all-linear"] | None = Field(
        None, description="names of the layers to adapt; PEFT's choice for the architecture if left out"
    )
    options: dict[str, JsonValue] = Field(
        {}, description="the method's other options, by PEFT's names: a table, `[adapter.options]`"
    )

    @model_validator(mode="after")
    def _has_only_what_its_method_needs(self) -> Adapter:
        check_choice(self.method, self.given, self.options)
        alphas = self.options.get("alpha_pattern")
        for alpha in alphas.values() if isinstance(alphas, dict) else ():
            if isinstance(alpha, int | float) and alpha > LARGEST:
                raise ValueError(f"no alpha of options.alpha_pattern should be above {LARGEST:g}")
        return self

    @property
    def given(self) -> set[str]:
        """Return the keys that the recipe sets; None counts as left out."""
        return {key for key in self.model_fields_set if getattr(self, key) is not None}

    @property
    def is_plain_lora(self) -> bool:
        """True where a layer gets s·B A beside its weights, and nothing of them is read."""
        return self.method == "lora" and not self.dora


STRATEGY_DEFAULTS: dict[str, dict[str, float]] = {
    "fedavg": {},
    "fedavgm": {"learning_rate": 1.0, "momentum": 0.9, "nesterov": 0},
    "fedadam": {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-9},
    "fedyogi": {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
    "fedadagrad": {"learning_rate": 0.1, "tau": 1e-9},
    "fedmedian": {},
    "trimmed_mean": {"trim": 0.2},
    "krum": {"malicious": 0},
    "multi_krum": {"malicious": 0, "keep": 1},
    "bulyan": {"malicious": 0},
    "norm_clipped": {"max_norm": 1.0},
}
"""Keys of each strategy with their defaults, which are Flower's where it has the strategy."""

UNWEIGHTED = ("fedmedian", "trimmed_mean", "krum", "bulyan")
"""Strategies that give every client the same weight."""
SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
"""Strategies that step with momentum or a step size on the server, after the average."""


OF_A_PACKAGE = {"type": "string", "pattern": r"^[A-Za-z0-9._-]+:[A-Za-z0-9._-]+$"}
"""Form of a strategy's name that an installed package offers: the package's name and the strategy's."""


def _check_kind(kind: str) -> str:
    if kind not in STRATEGY_DEFAULTS and not re.fullmatch(OF_A_PACKAGE["pattern"], kind):
        known = ", ".join(map(repr, STRATEGY_DEFAULTS))
        raise ValueError(f"there is no such strategy; choose {known}, or package:name of an installed package")
    return kind


class Strategy(Section):
    """The rule by which the server makes one adapter of many. A key that the kind does not use is an error."""

    kind: Annotated[
        str, AfterValidator(_check_kind), WithJsonSchema({"anyOf": [{"enum": [*STRATEGY_DEFAULTS]}, OF_A_PACKAGE]})
    ] = Field(
        "fedavg",
        description="the rule: a kind of `docs/strategies.md`, or `package:name` if an installed package offers one",
    )
    options: dict[str, JsonValue] = Field({}, description="settings of a strategy that an installed package offers")
    weight_by: Literal["examples", "tokens", "equal"] = Field(
        "examples", description="measure of a client's weight, where the kind weighs clients; `equal`: all count alike"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="the server's learning rate (`fedavgm`, `fedadam`, ...)"
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="the server's momentum (`fedavgm`)")
    nesterov: bool | None = Field(None, description="Nesterov's look-ahead (`fedavgm`)")
    beta_1: float | None = Field(None, ge=0, lt=1, description="decay of the mean change (`fedadam`, `fedyogi`)")
    beta_2: float | None = Field(None, ge=0, lt=1, description="decay of its square (`fedadam`, `fedyogi`)")
    tau: float | None = Field(
        None, gt=0, description="term added to the root of the squares: the smaller, the more adaptive the step"
    )
    trim: float | None = Field(None, ge=0, lt=0.5, description="share cut off at each end (`trimmed_mean`)")
    malicious: int | None = Field(
        None, ge=0, le=MOST, description="updates that may hold anything, for example an attack (`krum`, `bulyan`, ...)"
    )
    keep: int | None = Field(None, ge=1, le=MOST, description="updates that are averaged (`multi_krum`)")
    max_norm: float | None = Field(
        None, gt=0, description="largest norm of a client's change; a larger one is scaled down (`norm_clipped`)"
    )

    @model_validator(mode="after")
    def _has_only_what_its_kind_needs(self) -> Strategy:
        needed = STRATEGY_DEFAULTS.get(self.kind, {})
        if self.options and self.kind in STRATEGY_DEFAULTS:
            raise ValueError(f'kind "{self.kind}" does not use options: they are for a strategy of another package')
        given = [key for key in STRATEGY_KEYS if getattr(self, key) is not None]
        if spare := [key for key in given if key not in needed]:
            raise ValueError(f'kind "{self.kind}" does not use {" and ".join(spare)}')
        if "weight_by" in self.model_fields_set and self.kind in UNWEIGHTED:
            raise ValueError(f'kind "{self.kind}" does not use weight_by: it gives every client the same weight')
        return self

    @property
    def weighs(self) -> bool:
        """True where every update counts, by its client's weight."""
        return self.kind in STRATEGY_DEFAULTS and self.kind not in (*UNWEIGHTED, "multi_krum")

    def setting(self, key: str) -> float:
        """Return the value of one of the kind's own keys, or its default if the recipe leaves it out."""
        given = getattr(self, key)
        return STRATEGY_DEFAULTS[self.kind][key] if given is None else float(given)


STRATEGY_KEYS = tuple(dict.fromkeys(key for keys in STRATEGY_DEFAULTS.values() for key in keys))
"""Keys that at least one strategy has, each once."""


class EarlyStop(Section):
    """The rule for stopping before the last round."""

    patience: int = Field(ge=1, le=MOST, description="rounds without a new best central loss after which a run stops")
    min_delta: float = Field(0.0, ge=0, description="nats per token by which a new best must be better")


class Federation(Section):
    """The rounds, the clients that take part, and the averaging of their updates."""

    rounds: int = Field(3, ge=1, le=MOST, description="rounds after round 0, which only evaluates")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients that train in a round")
    min_clients: int = Field(1, ge=1, le=MOST, description="least number of clients that train in a round")
    max_lost_clients: int = Field(
        0, ge=0, le=MOST, description="clients that a round may lose: no answer, say, or a loss that is not a number"
    )
    round_deadline: float = Field(
        3600.0, gt=0, description="seconds that a client on another machine has to answer; a later answer is refused"
    )
    on_quorum_lost: Literal["wait", "skip", "stop"] = Field(
        "stop",
        description="reaction to a round that loses more than `max_lost_clients`: ask those again, on other machines;"
        " leave the adapter as it was and go on; end the run, which can be resumed",
    )
    max_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="largest share of a client in a round's weight and in the clients' hold-out loss; the others share"
        " the rest. If left out, no cap in one process; on other machines 0.5, or 4/K of K clients where that is less",
    )
    max_change: float | None = Field(
        None,
        ge=1,
        description="times the middle change of a round that a client's may be; a longer one is scaled down. If left"
        " out, 10 where clients are on other machines; it has no effect in one process",
    )
    max_client_blocks: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="blocks that a client on another machine may say it has, to train on or held out; one with more is"
        " refused. If left out, 1000000",
    )
    lora_rule: Literal["factors", "ffa", "rolora", "fedsa", "svd", "fedex"] = Field(
        "factors", description="rule by which LoRA's A and B are averaged; `docs/strategies.md` explains each"
    )
    client_ranks: Annotated[tuple[PositiveInt, ...], BeforeValidator(_to_ranks)] | None = Field(
        None, description='a LoRA rank for each client, none above `adapter.rank`; with `lora_rule = "svd"`'
    )
    strategy: Strategy = Field(default_factory=Strategy, description="rule that makes the next adapter of the updates")
    early_stop: EarlyStop | None = Field(None, description="end before the last round; never if left out")
    keep_every: int | None = Field(
        None, ge=1, le=MOST, description="keep the adapter of every N-th round, in `adapters/round-N`; none if left out"
    )
    max_bytes: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="most bytes of adapters both ways, as the records count them: a run ends before the round that"
        " would exceed it; no limit if left out",
    )


class Personalise(Section):
    """The training that each client goes on with by itself, when the rounds are over."""

    epochs: int = Field(1, ge=1, le=MOST, description="passes over its own documents, from the best global adapter on")

    def alone(self, training: Training) -> Training:
        """Return how a client trains that goes on by itself: not held to the others, on a schedule of its own."""
        return training.model_copy(
            update={
                "epochs": self.epochs,
                "max_steps": None,
                "schedule_scope": "round",
                "proximal_mu": 0.0,
                "proximal_schedule": "constant",
            }
        )


def _to_tasks(value: object) -> object:
    # TOML has lists only, and a strict frozen section wants tuples.
    return tuple(value) if isinstance(value, list) else value


class Evaluation(Section):
    """The measurement of held-out loss, and the tasks that models are asked."""

    batch_size: int = Field(
        8,
        ge=1,
        le=MOST,
        description="sequences in a forward pass, of full length: as many tokens of shorter ones; changes the result by"
        " rounding only",
    )
    clients: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="clients whose own hold-outs are scored, the same in every round; all if left out",
    )
    every: int = Field(
        1,
        ge=1,
        le=MOST,
        description="evaluate the adapter after every N-th round, and after the last: the best adapter is chosen among"
        " those, and a run stops early after one of them; baselines are evaluated after each round",
    )

    tasks: Annotated[tuple[str, ...], BeforeValidator(_to_tasks)] = Field(
        (), description="files of tasks, or names of those that ship, by which the base and the best adapter are judged"
    )
    tasks_every: int = Field(
        0, ge=0, le=MOST, description="the tasks are asked after every N-th round too; 0 is at the end alone"
    )


class Report(Section):
    """The report of a run."""

    samples: int = Field(
        3,
        ge=0,
        le=100,
        description="questions of the central hold-out that the base model and the best adapter answer at the end,"
        " where answers are learnt",
    )
