"""Section of a recipe on the work of a client in a round, and the optimizers with their own keys. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from fedloom.recipe.section import DEVICE, LARGEST, MOST, Section

OptimizerName = Literal["adamw", "sgd", "adafactor", "adamw_8bit"]
OPTIMIZER_DEFAULTS: dict[OptimizerName, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "sgd": {"momentum": 0.0},
    "adafactor": {},
    "adamw_8bit": {"betas": (0.9, 0.999), "eps": 1e-8},
}
"""Keys of each optimizer with their defaults, which are those of its library."""
OPTIMIZER_KEYS = tuple(dict.fromkeys(key for keys in OPTIMIZER_DEFAULTS.values() for key in keys))
"""Keys that at least one optimizer has, each once."""


def _to_betas(value: object) -> object:
    # TOML has lists only, and a strict frozen section wants tuples.
    numbers = isinstance(value, list | tuple) and all(type(one) in (int, float) and 0 <= one < 1 for one in value)
    if not isinstance(value, list | tuple) or not numbers or len(value) != 2:
        raise ValueError("should be a list of two numbers from 0 to below 1")
    return tuple(map(float, value))


class Optimizer(Section):
    """The optimizer of a client, as a table. A key that the kind does not use is an error."""

    kind: OptimizerName = Field(
        "adamw",
        description="AdamW and SGD as in torch.optim; Adafactor as in transformers, with `learning_rate` as it is;"
        " AdamW with moments of 8 bits by bitsandbytes, on a GPU",
    )
    betas: Annotated[tuple[float, float], BeforeValidator(_to_betas)] | None = Field(
        None, description="decay of the mean gradient and of its square (`adamw`, `adamw_8bit`): 0.9 and 0.999"
    )
    eps: float | None = Field(
        None, gt=0, description="term added to the root of the squares (`adamw`, `adamw_8bit`): 1e-8"
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="share of the last step's direction in the next (`sgd`): 0"
    )

    @model_validator(mode="after")
    def _has_only_what_its_kind_uses(self) -> Optimizer:
        given = [key for key in OPTIMIZER_KEYS if getattr(self, key) is not None]
        if spare := [key for key in given if key not in OPTIMIZER_DEFAULTS[self.kind]]:
            raise ValueError(f'kind "{self.kind}" does not use {" and ".join(spare)}')
        return self

    def setting(self, key: str) -> Any:
        """Return the value of one of the kind's own keys, or its default if the recipe leaves it out."""
        given = getattr(self, key)
        return OPTIMIZER_DEFAULTS[self.kind][key] if given is None else given


def _to_devices(value: object) -> object:
    if isinstance(value, str):
        raise ValueError('input should be "all" or a list of devices')
    # TOML has lists only, and a strict frozen section wants tuples.
    return tuple(value) if isinstance(value, list) else value


DeviceName = Annotated[str, Field(pattern=DEVICE)]


def _form_of(value: object) -> str:
    return "a table" if isinstance(value, dict | Optimizer) else "a name"


class Training(Section):
    """The work of a client in a round."""

    engine: Literal["auto", "batched", "reference"] = Field(
        "auto", description="engine: chosen by fedloom; all clients in one pass; one client after another"
    )
    clients_at_once: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="clients in one pass of `batched`; as many as fit in memory if left out, on a processor 64 at most",
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory for a third more time: each layer keeps its input and is computed twice"
    )
    cuda_graph: bool = Field(
        True,
        description="a step recorded on a GPU and launched whole; not with `gradient_checkpointing` or"
        " `gradient_accumulation`",
    )
    devices: (
        Annotated[tuple[DeviceName, ...], Field(min_length=1), BeforeValidator(_to_devices)] | Literal["all"] | None
    ) = Field(
        None,
        description='devices of this machine among which clients are dealt out, as `["cuda:0", "cuda:1"]`, or `"all"`'
        " GPUs: a process with the model for each; the one of `model.device` alone if left out",
    )
    epochs: int = Field(1, ge=1, le=MOST, description="passes over a client's documents in a round")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="the most steps of a client in a round; each round goes on where the one before ended in the"
        " client's own order, so a client of every round sees all rows before one again; who sits rounds out skips"
        " theirs. `epochs` alone counts if left out",
    )
    batch_size: int = Field(2, ge=1, le=MOST, description="sequences in a step, or in one of its micro-batches")
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=MOST,
        description="micro-batches of a step: the gradient is that of one batch of all their sequences, the memory"
        " that of one micro-batch",
    )
    learning_rate: float = Field(1e-4, gt=0, le=LARGEST, description="peak of the learning rate")
    learning_rate_end: float = Field(0.0, ge=0, le=LARGEST, description="learning rate that a schedule falls to")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="decay of the learning rate to `learning_rate_end`"
    )
    schedule_scope: Literal["round", "run", "rounds"] = Field(
        "round",
        description="span of warm-up and decay: every round anew; the run, step by step; the run, one rate for all"
        " steps of a round",
    )
    warmup: float = Field(
        0.0,
        ge=0,
        description="steps in which the rate rises from 0 to its peak, as in transformers; below 1, a share of all",
    )
    # The form decides which of the two is meant, so an error is about that one.
    optimizer: Annotated[
        Annotated[OptimizerName, Tag("a name")] | Annotated[Optimizer, Tag("a table")], Discriminator(_form_of)
    ] = Field("adamw", description="optimizer by its name, or a table with its own keys: `[training.optimizer]`")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="the optimizer's state between a client's rounds"
    )
    weight_decay: float = Field(
        0.0, ge=0, le=LARGEST, description="weight decay; added to the gradient for SGD, else decoupled"
    )
    max_gradient_norm: float | None = Field(
        None, gt=0, description="norm that a step's gradient is clipped to; no clipping if left out"
    )
    proximal_mu: float = Field(0.0, ge=0, le=LARGEST, description="FedProx μ; 0 is FedAvg")
    proximal_schedule: Literal["constant", "linear", "cosine", "adaptive"] = Field(
        "constant",
        description="course of μ over the rounds: the same, falling to 0, or up by 0.1 when the loss rises and down by"
        " 0.1 after five falls (arXiv 1812.06127, section 5.3)",
    )

    @model_validator(mode="after")
    def _warms_up_in_whole_steps(self) -> Training:
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError("warmup should be a whole number of steps, or a share below 1")
        return self

    @property
    def optimizer_table(self) -> Optimizer:
        """Return the optimizer as a table, however the recipe has it."""
        given = self.optimizer
        return given if isinstance(given, Optimizer) else Optimizer(kind=given)

    @property
    def step_size(self) -> int:
        """Return the sequences of a whole step."""
        return self.batch_size * self.gradient_accumulation

    def steps_of(self, blocks: int) -> int:
        """Return the steps of a client with so many blocks in a round."""
        steps = self.epochs * -(-blocks // self.step_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


assert set(OPTIMIZER_DEFAULTS) == set(get_args(OptimizerName))
