"""Section of a recipe on the work of a client in a round. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.recipe.section import Section


class Training(Section):
    """The work of a client in a round."""

    engine: Literal["auto", "batched", "reference"] = Field(
        "auto", description="engine: chosen by fedloom; all clients in one pass; one client after another"
    )
    clients_at_once: int | None = Field(
        None, ge=1, description="clients in one pass of `batched`; as many as fit in memory if left out"
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory for a third more time: each layer keeps its input and is computed twice"
    )
    cuda_graph: bool = Field(
        True, description="a step recorded on a GPU and launched whole; not with `gradient_checkpointing`"
    )
    epochs: int = Field(1, ge=1, description="passes over a client's documents in a round")
    batch_size: int = Field(2, ge=1, description="sequences in a step")
    learning_rate: float = Field(1e-4, gt=0, description="peak of the learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay of the learning rate to 0")
    schedule_scope: Literal["round", "run"] = Field("round", description="span of the decay")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimizer of torch.optim, with its defaults")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="the optimizer's state between a client's rounds"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay; decoupled for AdamW")
    max_gradient_norm: float | None = Field(
        None, gt=0, description="norm that a step's gradient is clipped to; no clipping if left out"
    )
    proximal_mu: float = Field(0.0, ge=0, description="FedProx μ; 0 is FedAvg")
    proximal_schedule: Literal["constant", "linear", "cosine", "adaptive"] = Field(
        "constant",
        description="course of μ over the rounds: the same, falling to 0, or up by 0.1 when the loss rises and down by"
        " 0.1 after five falls (arXiv 1812.06127, section 5.3)",
    )
