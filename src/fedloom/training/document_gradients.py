"""Gradients of single documents: what a document asks of an adapter, beside what an update did.

Each is the gradient of a document's own mean token loss, without dropout. Plain LoRA has those of a batch in one
backward pass, in a slot for each (`stacked_lora`); every other method, one document after another.

Letters: N blocks, B sequences, T tokens, M rows that count, G gradients, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.stacked_lora import Stack, can_stack
from fedloom.data.tokens import IGNORED, Batch, TokenBlocks, take_batch
from fedloom.progress import Progress, Watch, ignore
from fedloom.training.objective import mean_token_loss, next_token_targets

AT_ONCE = 8
"""Documents whose gradients are held at once."""


def alignments(
    adapted: AdaptedModel, adapter: Adapter, change_P: Tensor, blocks: TokenBlocks, *, watch: Watch = ignore
) -> tuple[Tensor, Tensor]:
    """Return each block's cosine between a change of an adapter and its own wish, −∇ of its loss there, both [N].

    The second are the losses, mean nats per token. A gradient that is 0, or no number, is aligned with nothing: 0. The
    model keeps the adapter.
    """
    adapted.load(adapter)
    adapted.model.eval()
    change_P = change_P.to(adapted.device, adapted.weights_P.dtype)
    cosines_N, losses_N = (torch.zeros(len(blocks), dtype=torch.float64) for _ in range(2))
    stacked = can_stack(adapted)
    gradients_of = _stacked(adapted) if stacked else _one_by_one(adapted)
    # Blocks of similar lengths go together, so that little padding is computed.
    for rows in torch.argsort(blocks.widths, stable=True).split(AT_ONCE if stacked else 1):
        batch = take_batch(blocks, rows)
        gradients_GP, losses_G = gradients_of(batch.to(adapted.device))
        norms_G = torch.linalg.vector_norm(gradients_GP, dim=1) * torch.linalg.vector_norm(change_P)
        cosines_G = -(gradients_GP @ change_P).double() / norms_G.double()
        cosines_N[rows] = torch.nan_to_num(cosines_G, nan=0.0, posinf=0.0, neginf=0.0).cpu()
        losses_N[rows] = losses_G.double().cpu()
        watch(Progress("evaluate", batch.num_tokens, len(rows)))
    return cosines_N, losses_N


Gradients = Callable[[Batch], tuple[Tensor, Tensor]]
"""A function from a batch to each sequence's gradient, [G, P], and its loss, [G]."""


def _stacked(adapted: AdaptedModel) -> Gradients:
    stack = Stack(adapted)
    stack.leave_out_dropout()

    def gradients_of(batch: Batch) -> tuple[Tensor, Tensor]:
        weights_1P = adapted.weights_P.detach()[None]
        gradients_GP = weights_1P.new_zeros(len(batch.tokens_BT), weights_1P.shape[1])
        targets_BT = next_token_targets(batch.labels_BT)
        counted_BT = targets_BT != IGNORED
        rows_M = counted_BT.flatten().nonzero()[:, 0]
        owners_M = rows_M // targets_BT.shape[1]
        stack.bind(weights_1P, gradients_GP)
        with stack.installed():
            losses_M = adapted.loss_head.losses(batch.tokens_BT, rows_M, targets_BT.flatten()[rows_M], batch.mask_BT)
            shares_M = losses_M / counted_BT.sum(1)[owners_M]
            losses_G = shares_M.new_zeros(len(gradients_GP)).index_add(0, owners_M, shares_M)
            # A document's weights see its own loss alone, so the gradient of the sum is each one's own.
            losses_G.sum().backward()
        stack.let_go()
        return gradients_GP, losses_G.detach()

    return gradients_of


def _one_by_one(adapted: AdaptedModel) -> Gradients:
    def gradients_of(batch: Batch) -> tuple[Tensor, Tensor]:
        adapted.gradient_P.zero_()
        loss = mean_token_loss(adapted.logits(batch.tokens_BT, batch.mask_BT), batch.labels_BT)
        loss.backward()
        return adapted.gradient_P[None], loss.detach()[None]

    return gradients_of
