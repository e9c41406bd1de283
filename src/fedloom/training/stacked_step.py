"""One step of K clients: pure arithmetic on a device, which gets all inputs before and is asked for nothing meanwhile.

So the step can be recorded as a CUDA graph and launched whole (`cuda_graph`), and it can be traced to see how much
memory it takes (`memory`).

Letters: K clients, N sequences of all clients, T tokens, R real tokens of all clients, M rows that count, P adapter
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import Stack
from fedloom.model.attention import without_padding
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.gradient_checkpointing import gradient_checkpointing
from fedloom.training.objective import (
    add_proximal_gradient,
    clip_gradient,
    hold_still,
    noised_mean,
    sum_clipped,
)
from fedloom.training.stacked_optimizers import STACKED_OPTIMIZERS

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training


class StepInputs(NamedTuple):
    """Inputs of a step; every client has as many sequences as the others."""

    tokens_NT: Tensor
    """Token ids, client by client."""
    keys_N: Tensor
    """Key of each sequence's dropout. A recorded step reads it like all that changes, so its masks change too."""
    rows_M: Tensor | None
    """Positions in the flattened tokens, or among the real ones, whose loss counts, in order; None for every one."""
    targets_M: Tensor
    """Token that each of these positions predicts."""
    clients_M: Tensor | None
    """Slot of the client that the position belongs to; None where each client has equally many."""
    shares_M: Tensor
    """Weight of each position: 1 / the number of its client's counted positions in the step, or 0 for padding.

    The weighted sum of a client's losses is then its own mean.
    """
    rates_K: Tensor
    """Learning rate of each client."""
    mus_K: Tensor
    """μ of each client's proximal term."""
    mask_NT: Tensor | None = None
    """Attention mask, where one is needed: `Batch.mask_BT`."""
    real_R: Tensor | None = None
    """Places of the tokens that are no padding in the flattened ones, in order, where these alone are computed.

    With fixed shapes [K, R]: equally many of each client, all that are no padding, and then some that are.
    """

    def each(self, change: Callable[[Tensor], Tensor]) -> StepInputs:
        """Return the inputs with each tensor changed."""
        return StepInputs._make(value if value is None else change(value) for value in self)


class Noise(NamedTuple):
    """Noise that covers each client's sum of gradients in a step."""

    noise_KP: Tensor
    """Noise as it is added, in float64."""
    batches_K: Tensor
    """Documents that each client draws on average."""


class StackedStep:
    """Weights, gradients and optimizer of the clients that train at once: row k of every buffer is one client's slot.

    `start_KP` has the weights that each client began with, to which its proximal term holds it. With `partly`,
    `trains_KP` is false where a client's weights stay as they began; otherwise it is None. With `max_norm`, each
    sequence has a gradient of its own, scaled down to that norm, and the sum of a client's is noised.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        stack: Stack,
        training: Training,
        num_slots: int,
        device: torch.device,
        *,
        partly: bool = False,
        max_norm: float | None = None,
    ) -> None:
        self._max_norm = max_norm
        self._adapted, self._stack, self._training = adapted, stack, training
        self.weights_KP = torch.zeros(num_slots, adapted.layout.size, dtype=adapted.weights_P.dtype, device=device)
        self.start_KP = torch.zeros_like(self.weights_KP)
        self.trains_KP = torch.ones_like(self.weights_KP, dtype=torch.bool) if partly else None
        self._gradient_KP = torch.zeros_like(self.weights_KP)
        self._rounded = stack.rounded_like(self.weights_KP)
        self.optimizer = STACKED_OPTIMIZERS[training.optimizer_table.kind](self.weights_KP, training, adapted.layout)

    @property
    def tensors(self) -> list[Tensor]:
        """Return all that a step reads and writes beside its inputs: the clients', and the model's own."""
        own = tree_leaves([vars(self), vars(self.optimizer)])
        return [*(value for value in own if isinstance(value, Tensor)), *self._adapted.tensors]

    def use_slots(self, count: int) -> None:
        """Step the first `count` slots from now on."""
        self._count = count
        self._bind(self._gradient_KP[:count])

    def _bind(self, gradients_GP: Tensor) -> None:
        self._stack.bind(self.weights_KP[: self._count], gradients_GP, self._rounded)

    def move(self, source: int, target: int) -> None:
        """Copy a client, with its optimizer's state, from one slot to another."""
        buffers = [self.weights_KP, self.start_KP]
        for rows in buffers if self.trains_KP is None else [*buffers, self.trains_KP]:
            rows[target] = rows[source]
        self.optimizer.move(source, target)

    def vacate(self, place: int) -> None:
        """Leave a slot to nobody: what it steps from then on is finite, and moves nothing."""
        self.weights_KP[place] = self.start_KP[place]

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Take one step, and return facts from before it, [3, K]: losses, ‖w − w_global‖, norms of the loss gradients.

        The facts stay on the device: reading them waits for the GPU, and the caller says when.
        """
        return self.accumulate([inputs])

    def accumulate(self, parts: Iterable[StepInputs], noise: Noise | None = None) -> Tensor:
        """Take one step on the gradients of one or more micro-batches together, and return its facts as above.

        The shares of a client's positions are of all its micro-batches together; with `noise`, of their own sequence.
        """
        # In place: the layers add their gradients to views of this buffer.
        self._gradient_KP[: self._count].zero_()
        if self._rounded is not None:
            self._rounded.write(self.weights_KP[: self._count])
        losses_K = []
        for inputs in parts:
            losses_K.append(self._add_gradients(inputs))
        if noise is not None:
            gradient_KP = self._gradient_KP[: self._count]
            gradient_KP.copy_(noised_mean(gradient_KP, *noise))
        return self._move_weights(reduce(add, losses_K), inputs)

    def _add_gradients(self, inputs: StepInputs) -> Tensor:
        """Add each client's gradient on its sequences to the buffer; return its share of the step's loss, [K]."""
        if self._max_norm is not None:
            units_GP = self._gradient_KP.new_zeros(len(inputs.tokens_NT), self._gradient_KP.shape[1])
            self._bind(units_GP)
        checkpointed, model = self._training.gradient_checkpointing, self._stack.model
        # Not in each step: it visits every module, a twentieth of a tiny model's step. Who evaluates switches back.
        if not model.training:
            model.train()
        dropout = ClientDropout(inputs.keys_N)
        alone = without_padding(inputs.real_R, inputs.tokens_NT.shape, inputs.mask_NT)
        with self._stack.installed(), alone, gradient_checkpointing(model, checkpointed, dropout.contexts):
            with dropout:
                loss_K = self._losses(inputs)
            # A client's weights are in its own loss alone, so the gradient of the sum is each client's own gradient.
            loss_K.sum().backward()
        if self._max_norm is not None:
            if self.trains_KP is not None:
                sequences = len(units_GP) // self._count
                units_GP.mul_(self.trains_KP[: self._count].repeat_interleave(sequences, 0))
            self._gradient_KP[: self._count] += sum_clipped(units_GP, self._max_norm, self._count)
        return loss_K.detach()

    def _move_weights(self, loss_K: Tensor, inputs: StepInputs) -> Tensor:
        """Step every client along its gradient, and return the facts."""
        training = self._training
        weights_KP, gradient_KP = self.weights_KP[: self._count], self._gradient_KP[: self._count]
        start_KP, trains_KP = self.start_KP[: self._count], self.trains_KP
        with torch.no_grad():
            if trains_KP is not None:
                gradient_KP.mul_(trains_KP[: self._count])
            offset_KP = weights_KP - start_KP
            facts_3K = torch.stack([loss_K.to(weights_KP.dtype), offset_KP.norm(dim=1), gradient_KP.norm(dim=1)])
            add_proximal_gradient(gradient_KP, offset_KP, inputs.mus_K.to(weights_KP.dtype)[:, None])
            clip_gradient(gradient_KP, training.max_gradient_norm)
            self.optimizer.step(gradient_KP, inputs.rates_K)
            if trains_KP is not None:
                hold_still(weights_KP, start_KP, trains_KP[: self._count])
        return facts_3K

    def _losses(self, inputs: StepInputs) -> Tensor:
        """Return each client's mean loss over its own counted tokens, [K]."""
        losses_M = self._adapted.loss_head.losses(inputs.tokens_NT, inputs.rows_M, inputs.targets_M, inputs.mask_NT)
        shared_M = losses_M * inputs.shares_M
        if inputs.clients_M is None:
            return shared_M.view(self._count, -1).sum(1)
        return shared_M.new_zeros(self._count).index_add(0, inputs.clients_M, shared_M)
