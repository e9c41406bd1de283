"""Optimizers over [K, P]: each client has a step count, a learning rate and moments of its own.

The arithmetic is that of torch.optim and transformers, so a client's state can move between engines. They have one
step count and one learning rate for a tensor, and here a tensor holds many clients.

Letters: K clients, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.adapters.adapter import Layout
from fedloom.training.jobs import OptimizerState
from fedloom.training.optimizers import kept_squares

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training


class StackedAdamW:
    """AdamW of K clients, as torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, weights_KP: Tensor, training: Training) -> None:
        self._weights_KP = weights_KP
        self._decay = training.weight_decay
        table = training.optimizer_table
        self._beta1, self._beta2 = table.setting("betas")
        self._epsilon = table.setting("eps")
        self._step_K = torch.zeros(len(weights_KP), dtype=torch.float64, device=weights_KP.device)
        self._mean_KP = torch.zeros_like(weights_KP)
        self._square_KP = torch.zeros_like(weights_KP)

    def step(self, gradient_KP: Tensor, rate_K: Tensor) -> None:
        """Step the first clients in place: as many as gradients, [K, P], and learning rates, [K], are given."""
        count = len(gradient_KP)
        weights, mean, square = self._weights_KP[:count], self._mean_KP[:count], self._square_KP[:count]
        step_K = self._step_K[:count].add_(1)
        correction1_K, correction2_K = 1 - self._beta1**step_K, 1 - self._beta2**step_K
        # Computed in float64, as torch.optim does with its Python numbers, and only then in the weights' dtype.
        rate_K1, size_K1, root_K1 = (
            value_K.to(weights.dtype)[:, None] for value_K in (rate_K, rate_K / correction1_K, correction2_K.sqrt())
        )
        if self._decay:
            weights.mul_(1 - rate_K1 * self._decay)
        mean.lerp_(gradient_KP, 1 - self._beta1)
        square.mul_(self._beta2).addcmul_(gradient_KP, gradient_KP, value=1 - self._beta2)
        # In place: one buffer of [K, P] beside weights, gradients and moments, and no more.
        denominator = square.sqrt().div_(root_K1).add_(self._epsilon)
        weights.sub_(denominator.reciprocal_().mul_(mean).mul_(size_K1))

    def load(self, slot: int, state: OptimizerState | None) -> None:
        """Copy a client's state into a slot; None starts it afresh."""
        self._step_K[slot] = state["step"] if state else 0.0
        for name, rows in (("exp_avg", self._mean_KP), ("exp_avg_sq", self._square_KP)):
            rows[slot].copy_(state[name]) if state else rows[slot].zero_()

    def read(self, slot: int) -> OptimizerState:
        """Return a copy of the state in a slot, on the CPU and under torch.optim's names."""
        # Copies even on a CPU: the slot goes to another client while this state waits for the next round.
        return {
            "step": self._step_K[slot].to("cpu", torch.float32),
            "exp_avg": self._mean_KP[slot].to("cpu", copy=True),
            "exp_avg_sq": self._square_KP[slot].to("cpu", copy=True),
        }

    def move(self, source: int, target: int) -> None:
        """Copy the state of a client from one slot to another."""
        for rows in (self._step_K, self._mean_KP, self._square_KP):
            rows[target] = rows[source]


class StackedSgd:
    """Gradient descent of K clients, as torch.optim.SGD: v ← βv + (g + λw), w ← w − ηv; without momentum no state."""

    def __init__(self, weights_KP: Tensor, training: Training) -> None:
        self._weights_KP = weights_KP
        self._decay = training.weight_decay
        self._momentum = training.optimizer_table.setting("momentum")
        # From zeros, the first step is the gradient itself, as in torch.optim.
        self._buffer_KP = torch.zeros_like(weights_KP) if self._momentum else None

    def step(self, gradient_KP: Tensor, rate_K: Tensor) -> None:
        """Step the first clients in place: as many as gradients, [K, P], and learning rates, [K], are given."""
        weights = self._weights_KP[: len(gradient_KP)]
        rate_K1 = rate_K.to(weights.dtype)[:, None]
        direction = gradient_KP.add(weights, alpha=self._decay)
        if self._buffer_KP is not None:
            direction = self._buffer_KP[: len(gradient_KP)].mul_(self._momentum).add_(direction)
        weights.sub_(rate_K1 * direction)

    def load(self, slot: int, state: OptimizerState | None) -> None:
        """Copy a client's state into a slot; None starts it afresh."""
        if self._buffer_KP is not None:
            rows = self._buffer_KP[slot]
            rows.copy_(state["momentum_buffer"]) if state else rows.zero_()

    def read(self, slot: int) -> OptimizerState:
        """Return a copy of the state in a slot, on the CPU and under torch.optim's names; empty without momentum."""
        return {} if self._buffer_KP is None else {"momentum_buffer": self._buffer_KP[slot].to("cpu", copy=True)}

    def move(self, source: int, target: int) -> None:
        """Copy the state of a client from one slot to another."""
        if self._buffer_KP is not None:
            self._buffer_KP[target] = self._buffer_KP[source]


class StackedAdafactor:
    """Adafactor of K clients, as in transformers with a rate of the caller's.

    Each tensor of an adapter is treated by itself (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5): of a
    matrix, the mean squares of rows and columns are kept, and its step has a root mean square of 1 at most.
    """

    DECAY, LEAST = -0.8, 1e-30
    """Exponent of the decay in the step's number, and what is added to squares: transformers' own."""

    def __init__(self, weights_KP: Tensor, training: Training, layout: Layout) -> None:
        self._weights_KP, self._layout = weights_KP, layout
        self._decay = training.weight_decay
        clients = len(weights_KP)
        self._step_K = torch.zeros(clients, dtype=torch.float64, device=weights_KP.device)
        self._squares = {name: weights_KP.new_zeros(clients, *size) for name, size in kept_squares(layout).items()}

    def step(self, gradient_KP: Tensor, rate_K: Tensor) -> None:
        """Step the first clients in place: as many as gradients, [K, P], and learning rates, [K], are given."""
        count = len(gradient_KP)
        decay_K = 1 - self._step_K[:count].add_(1) ** self.DECAY
        parts = (self._layout.split_stacked(whole) for whole in (self._weights_KP[:count], gradient_KP))
        for number, (weights, gradient) in enumerate(zip(*parts, strict=True)):
            # One number of each client, along all axes of its tensor.
            decay, rate = (value.to(weights.dtype).view(-1, *[1] * (weights.dim() - 1)) for value in (decay_K, rate_K))
            step = gradient * self._inverse_root(number, gradient.square() + self.LEAST, decay)
            size = step.reshape(count, -1).norm(dim=1) / max(1, step[0].numel()) ** 0.5
            step.div_(size.clamp(min=1.0).view_as(rate)).mul_(rate)
            if self._decay:
                weights.sub_(weights * (rate * self._decay))
            weights.sub_(step)

    def _inverse_root(self, number: int, squared: Tensor, decay: Tensor) -> Tensor:
        """Return 1/√ of a tensor's mean squares, [K, ...], once this step's have been taken in."""

        def take_in(side: str, mean: Tensor) -> Tensor:
            kept = self._squares[f"exp_avg_sq{side}.{number}"][: len(squared)]
            share = decay.view(-1, *[1] * (kept.dim() - 1))
            return kept.mul_(share).add_(mean * (1 - share))

        if squared.dim() < 3:
            return take_in("", squared).rsqrt()
        row, col = take_in("_row", squared.mean(-1)), take_in("_col", squared.mean(-2))
        return (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)

    def load(self, slot: int, state: OptimizerState | None) -> None:
        """Copy a client's state into a slot; None starts it afresh."""
        self._step_K[slot] = state["step"] if state else 0.0
        for name, kept in self._squares.items():
            kept[slot].copy_(state[name]) if state else kept[slot].zero_()

    def read(self, slot: int) -> OptimizerState:
        """Return a copy of the state in a slot, on the CPU and under the names of `optimizers.read_state`."""
        squares = {name: kept[slot].to("cpu", copy=True) for name, kept in self._squares.items()}
        return {"step": self._step_K[slot].to("cpu", torch.float32), **squares}

    def move(self, source: int, target: int) -> None:
        """Copy the state of a client from one slot to another."""
        for rows in (self._step_K, *self._squares.values()):
            rows[target] = rows[source]


StackedOptimizer = StackedAdamW | StackedSgd | StackedAdafactor
STACKED_OPTIMIZERS: dict[str, Callable[[Tensor, Training, Layout], StackedOptimizer]] = {
    "adamw": lambda weights_KP, training, layout: StackedAdamW(weights_KP, training),
    "sgd": lambda weights_KP, training, layout: StackedSgd(weights_KP, training),
    "adafactor": StackedAdafactor,
}
"""Optimizers of K clients at once, under the names of `optimizers.OPTIMIZERS`."""
