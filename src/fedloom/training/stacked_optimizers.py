"""AdamW and SGD over [K, P]: each client with a step count, a learning rate and moments of its own.

The arithmetic is torch.optim's, so that a client's state moves freely between engines; torch.optim itself has one
step count and one learning rate for a tensor, and here a tensor is many clients.

Letters: K clients, P adapter parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.training.jobs import OptimizerState

if TYPE_CHECKING:
    from fedloom.recipe.sections import Training


class StackedAdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), as torch.optim.AdamW."""

    def __init__(self, weights_KP: Tensor, training: Training) -> None:
        self._weights_KP = weights_KP
        self._decay = training.weight_decay
        self._beta1, self._beta2, self._epsilon = 0.9, 0.999, 1e-8
        self._step_K = torch.zeros(len(weights_KP), dtype=torch.float64, device=weights_KP.device)
        self._mean_KP = torch.zeros_like(weights_KP)
        self._square_KP = torch.zeros_like(weights_KP)

    def step(self, gradient_KP: Tensor, rate_K: Tensor) -> None:
        """Move the first clients, as many as there are gradients, by their learning rates."""
        count = len(gradient_KP)
        weights, mean, square = self._weights_KP[:count], self._mean_KP[:count], self._square_KP[:count]
        step_K = self._step_K[:count].add_(1)
        correction1_K, correction2_K = 1 - self._beta1**step_K, 1 - self._beta2**step_K
        rate_K1, size_K1, root_K1 = (
            value_K.to(weights.dtype)[:, None] for value_K in (rate_K, rate_K / correction1_K, correction2_K.sqrt())
        )
        if self._decay:
            weights.mul_(1 - rate_K1 * self._decay)
        mean.lerp_(gradient_KP, 1 - self._beta1)
        square.mul_(self._beta2).addcmul_(gradient_KP, gradient_KP, value=1 - self._beta2)
        denominator = square.sqrt().div_(root_K1).add_(self._epsilon)
        weights.sub_(denominator.reciprocal_().mul_(mean).mul_(size_K1))

    def load(self, slot: int, state: OptimizerState | None) -> None:
        """Put a client's state into its slot; None is a fresh start."""
        self._step_K[slot] = state["step"] if state else 0.0
        for name, rows in (("exp_avg", self._mean_KP), ("exp_avg_sq", self._square_KP)):
            rows[slot].copy_(state[name]) if state else rows[slot].zero_()

    def read(self, slot: int) -> OptimizerState:
        """A copy of a client's state, under torch.optim's names."""
        return {
            "step": self._step_K[slot].to("cpu", torch.float32),
            "exp_avg": self._mean_KP[slot].to("cpu", copy=True),
            "exp_avg_sq": self._square_KP[slot].to("cpu", copy=True),
        }

    def move(self, source: int, target: int) -> None:
        """A client moves to another slot."""
        for rows in (self._step_K, self._mean_KP, self._square_KP):
            rows[target] = rows[source]


class StackedSgd:
    """w ← w − η(g + λw), as torch.optim.SGD without momentum: there is nothing to remember."""

    def __init__(self, weights_KP: Tensor, training: Training) -> None:
        self._weights_KP = weights_KP
        self._decay = training.weight_decay

    def step(self, gradient_KP: Tensor, rate_K: Tensor) -> None:
        weights = self._weights_KP[: len(gradient_KP)]
        rate_K1 = rate_K.to(weights.dtype)[:, None]
        weights.sub_(rate_K1 * gradient_KP.add(weights, alpha=self._decay))

    def load(self, slot: int, state: OptimizerState | None) -> None: ...

    def read(self, slot: int) -> OptimizerState:
        return {}

    def move(self, source: int, target: int) -> None: ...


STACKED_OPTIMIZERS: dict[str, type[StackedAdamW] | type[StackedSgd]] = {"adamw": StackedAdamW, "sgd": StackedSgd}
