"""Optimizers of the reference engine, by name; `stacked_optimizers` has their counterparts for K clients at once.

AdamW and SGD go over the flat adapter as a whole. Adafactor and the 8-bit AdamW treat each tensor by itself, as they
would in anybody's program: the one by rows and columns, the other by blocks of its own.

Letters: P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from fedloom.adapters.adapter import Layout
from fedloom.errors import RecipeError

if TYPE_CHECKING:
    from fedloom.recipe.training_section import OptimizerName, Training
    from fedloom.training.jobs import OptimizerState

Build = Callable[[Sequence[nn.Parameter], "Training"], torch.optim.Optimizer]


def _adamw(weights: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    setting = training.optimizer_table.setting
    return torch.optim.AdamW(
        weights,
        lr=training.learning_rate,
        betas=setting("betas"),
        eps=setting("eps"),
        weight_decay=training.weight_decay,
    )


def _sgd(weights: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        weights,
        lr=training.learning_rate,
        momentum=training.optimizer_table.setting("momentum"),
        weight_decay=training.weight_decay,
    )


def _adafactor(weights: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    # The recipe's schedule says the rate, and not the one of Adafactor's own.
    optimizer: torch.optim.Optimizer = Adafactor(
        weights,
        lr=training.learning_rate,
        scale_parameter=False,
        relative_step=False,
        weight_decay=training.weight_decay,
    )
    return optimizer


def _adamw_8bit(weights: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    setting = training.optimizer_table.setting
    # Imported by name: a machine without a GPU has no such package, and a type checker on it no types.
    optimizer: torch.optim.Optimizer = import_module("bitsandbytes.optim").AdamW8bit(
        weights,
        lr=training.learning_rate,
        betas=setting("betas"),
        eps=setting("eps"),
        weight_decay=training.weight_decay,
    )
    return optimizer


OPTIMIZERS: dict[OptimizerName, tuple[Build, bool]] = {
    "adamw": (_adamw, False),
    "sgd": (_sgd, False),
    "adafactor": (_adafactor, True),
    "adamw_8bit": (_adamw_8bit, True),
}
"""Function that builds each optimizer, and whether that treats each tensor of the adapter by itself."""


def check_optimizer(training: Training, device: torch.device) -> None:
    """Refuse an optimizer that this machine or its packages can't give.

    Raises:
        RecipeError: it needs a GPU, or a package.
    """
    if training.optimizer_table.kind != "adamw_8bit":
        return
    where = "training.optimizer"
    if device.type != "cuda":
        raise RecipeError("adamw_8bit needs a GPU", where=where, mend='use "adamw", or set model.device')
    if find_spec("bitsandbytes") is None:
        raise RecipeError("bitsandbytes is not installed", where=where, mend="pip install 'fedloom[quantized]'")


def open_optimizer(
    training: Training, weights_P: nn.Parameter, gradient_P: Tensor, layout: Layout
) -> torch.optim.Optimizer:
    """Return a fresh optimizer of the flat adapter, or of its tensors, which are views of it and of its gradient."""
    build, apart = OPTIMIZERS[training.optimizer_table.kind]
    if not apart:
        return build([weights_P], training)
    tensors = [nn.Parameter(part) for part in layout.split(weights_P.data).values()]
    for tensor, part in zip(tensors, layout.split(gradient_P).values(), strict=True):
        tensor.grad = part
    return build(tensors, training)


def state_shapes(training: Training, layout: Layout) -> dict[str, torch.Size]:
    """Return what a client's optimizer keeps between rounds: the shape of each tensor, by its name in `read_state`.

    Each but `step`, which is float32, has the dtype of the weights.
    """
    kind, scalar, flat = training.optimizer_table.kind, torch.Size(), torch.Size((layout.size,))
    if training.optimizer_state != "keep":
        return {}
    if kind == "sgd":
        return {"momentum_buffer": flat} if training.optimizer_table.setting("momentum") else {}
    if kind == "adafactor":
        return {"step": scalar, **kept_squares(layout)}
    assert kind == "adamw", "a recipe keeps no state of any other"
    return {"step": scalar, "exp_avg": flat, "exp_avg_sq": flat}


def kept_squares(layout: Layout) -> dict[str, torch.Size]:
    """Return the shapes of Adafactor's mean squares: of a matrix's rows and columns, and of a vector as it is."""
    found: dict[str, torch.Size] = {}
    for number, shape in enumerate(layout.shapes):
        kept = {"_row": shape[:-1], "_col": (*shape[:-2], *shape[-1:])} if len(shape) > 1 else {"": shape}
        found |= {f"exp_avg_sq{side}.{number}": torch.Size(size) for side, size in kept.items()}
    return found


def load_state(optimizer: torch.optim.Optimizer, training: Training, state: OptimizerState | None) -> None:
    """Give an optimizer a copy of the state that `read_state` took from one like it; None leaves it fresh."""
    if not state:
        return
    copied = {name: value.clone() for name, value in state.items()}
    by_tensor = {0: copied}
    if OPTIMIZERS[training.optimizer_table.kind][1]:
        by_tensor = {number: {} for number in range(len(optimizer.param_groups[0]["params"]))}
        for name, value in copied.items():
            kind, _, number = name.rpartition(".")
            if kind:
                # A step of its own: Adafactor counts in place.
                by_tensor[int(number)] |= {kind: value, "step": copied["step"].clone()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_tensor})


def read_state(optimizer: torch.optim.Optimizer, training: Training) -> OptimizerState:
    """Return the state on the CPU: a GPU would fill with those of clients that wait for their next round.

    Names are the optimizer's own. Where it treats each tensor by itself, its number is behind them: `exp_avg_sq_row.3`.
    """
    found: OptimizerState = {}
    apart = OPTIMIZERS[training.optimizer_table.kind][1]
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is None or name == "RMS":  # of the weights, found anew in each step
                continue
            held = value if isinstance(value, Tensor) else torch.tensor(float(value))
            found[f"{name}.{number}" if apart and name != "step" else name] = held.to("cpu")
    return found
