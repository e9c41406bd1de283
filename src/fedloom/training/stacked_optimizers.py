"""AdamW and SGD over [K, P]: each client has a step count, a learning rate and moments of its own.

The arithmetic is that of torch.optim, so a client's state can move between engines. torch.optim itself has one step
count and one learning rate for a tensor, and here a tensor holds many clients.

Letters: K clients, P adapter parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.training.jobs import OptimizerState

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training


class StackedAdamW:
    """AdamW of K clients, as torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""

    def __init__(self, weights_KP: Tensor, training: Training) -> None:
        self._weights_KP = weights_KP
        self._decay = training.weight_decay
        # The defaults of torch.optim.AdamW, which the reference engine uses.
        self._beta1, self._beta2, self._epsilon = 0.9, 0.999, 1e-8
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
    """Gradient descent of K clients, w ← w − η(g + λw), as torch.optim.SGD without momentum; it has no state."""

    def __init__(self, weights_KP: Tensor, training: Training) -> None:
        self._weights_KP = weights_KP
        self._decay = training.weight_decay

    def step(self, gradient_KP: Tensor, rate_K: Tensor) -> None:
        """Step the first clients in place: as many as gradients, [K, P], and learning rates, [K], are given."""
        weights = self._weights_KP[: len(gradient_KP)]
        rate_K1 = rate_K.to(weights.dtype)[:, None]
        weights.sub_(rate_K1 * gradient_KP.add(weights, alpha=self._decay))

    def load(self, slot: int, state: OptimizerState | None) -> None:
        """Do nothing: there is no state."""

    def read(self, slot: int) -> OptimizerState:
        """Return an empty state."""
        return {}

    def move(self, source: int, target: int) -> None:
        """Do nothing: there is no state."""


STACKED_OPTIMIZERS: dict[str, type[StackedAdamW] | type[StackedSgd]] = {"adamw": StackedAdamW, "sgd": StackedSgd}
"""Optimizers of K clients at once, under the names of `objective.OPTIMIZERS`."""
