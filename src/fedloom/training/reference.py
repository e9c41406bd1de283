"""Engine that trains one client after another on one base model: stock PEFT and torch.optim, plain to read.

Slow, and the oracle of any faster engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.data.tokens import Batch, take_batch
from fedloom.errors import TrainingError
from fedloom.host.failpoints import failpoint
from fedloom.model.shortage import SHORT, is_shortage
from fedloom.privacy.ration import Ration
from fedloom.progress import Progress, Say, Watch, ignore, say_nothing
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.dropout_masks import sequence_keys
from fedloom.training.gradient_checkpointing import gradient_checkpointing
from fedloom.training.jobs import (
    ClientFailure,
    ClientJob,
    ClientResult,
    ClientUpdate,
    WorkLog,
    too_large,
)
from fedloom.training.objective import (
    add_proximal_gradient,
    clip_gradient,
    count_targets,
    hold_still,
    mean_token_loss,
    noised_mean,
    sum_clipped,
)
from fedloom.training.optimizers import load_state, open_optimizer, read_state

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training


class ReferenceEngine:
    """The engine `reference`, bound to a model: one client after another, so that memory holds one at a time."""

    lowered_to: int | None = None
    """Always None: there is never more than one client at once."""

    def __init__(self, adapted: AdaptedModel, watch: Watch = ignore, say: Say = say_nothing) -> None:
        self._adapted, self._watch = adapted, watch

    def train(self, jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        """Carry out every job; yield each result when it is there."""
        for job in jobs:
            try:
                yield train_client(self._adapted, job, self._watch)
            except TrainingError as error:
                yield ClientFailure(job.client, error, job.trial)
            except SHORT as error:
                if not is_shortage(error):
                    raise
                yield ClientFailure(job.client, too_large(job, error), job.trial)


def train_client(adapted: AdaptedModel, job: ClientJob, watch: Watch = ignore) -> ClientUpdate:
    """Train one client for a round, from the global adapter to its update.

    Raises:
        TrainingError: the loss is no longer a number, or the proximal term has no effect.
    """
    log, training = WorkLog(job), job.training
    adapted.load(job.adapter)
    weights_P, gradient_P = adapted.weights_P, adapted.gradient_P
    global_P = job.adapter.weights_P.to(adapted.device)  # on a processor the server's own, which nobody changes
    trains_P = None if job.trains_P is None else job.trains_P.to(adapted.device)
    optimizer = open_optimizer(training, weights_P, gradient_P, adapted.layout)
    load_state(optimizer, training, job.optimizer_state)
    batches = job.draw_batches()
    devices = [adapted.device] if adapted.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # Of what methods and models draw beside dropout.
        torch.manual_seed(job.dropout_seed)
        adapted.model.train()
        for step, rows in enumerate(batches):
            if job.ration:
                loss, num_tokens = _private_gradient(adapted, job, job.ration, step, rows, trains_P)
            else:
                parts = [take_batch(job.blocks, part) for part in rows.split(training.batch_size)]
                keys_N = sequence_keys([job.dropout_seed], [step], [0], len(rows))[0]
                loss, num_tokens = (
                    put_gradient(adapted, training, parts, keys_N),
                    sum(part.num_tokens for part in parts),
                )

            drift, norm = finish_gradient(adapted, training, global_P, trains_P)
            log.add_step(loss, drift, norm, num_tokens)
            optimizer.param_groups[0]["lr"] = job.rate(step, len(batches))
            optimizer.step()
            if trains_P is not None:
                hold_still(weights_P, global_P, trains_P)

            failpoint("training.stepped")
            watch(Progress("train", num_tokens, len(rows), job.round, job.client))
        adapted.model.eval()
    report = log.finish(drift=(weights_P - global_P).norm().item())
    state = read_state(optimizer, training) if training.optimizer_state == "keep" else {}
    update = replace(job.adapter, weights_P=adapted.lend().weights_P)
    return ClientUpdate(report, update, state, job.trial, own_losses=log.own_losses)


def put_gradient(adapted: AdaptedModel, training: Training, parts: Sequence[Batch], keys_N: Tensor) -> float:
    """Put the gradient of a step's mean token loss in the model, and return the loss; `keys_N` are of its dropout."""
    counted = [count_targets(part.labels_BT) for part in parts]
    adapted.gradient_P.zero_()
    loss = 0.0
    for part, keys_B, count in zip(parts, keys_N.split(training.batch_size), counted, strict=True):
        # Every token counts alike: a mean of means would favour those of short micro-batches.
        loss += _add_gradient(adapted, training, part, keys_B, count / sum(counted))
    return loss


@torch.no_grad()
def finish_gradient(
    adapted: AdaptedModel, training: Training, global_P: Tensor, trains_P: Tensor | None
) -> tuple[float, float]:
    """Add the proximal term to the gradient in the model and clip it; return the drift, and the loss' gradient's norm.

    What it needs of its own is let go of before the optimizer's step: of a whole model that is as much as the model.
    """
    gradient_P = adapted.gradient_P
    if trains_P is not None:
        gradient_P.mul_(trains_P)
    offset_P = adapted.weights_P - global_P
    told = offset_P.norm().item(), gradient_P.norm().item()
    add_proximal_gradient(gradient_P, offset_P, training.proximal_mu)
    clip_gradient(gradient_P, training.max_gradient_norm)
    return told


def _private_gradient(
    adapted: AdaptedModel, job: ClientJob, ration: Ration, step: int, rows: Tensor, trains_P: Tensor | None
) -> tuple[float, int]:
    """Put the noised mean of the drawn documents' clipped gradients in the model, document by document.

    A document's gradient is that of its own mean token loss: it depends on no other. Return the documents' mean loss.
    """
    gradient_P = adapted.gradient_P
    sum_P = torch.zeros_like(gradient_P)
    loss, num_tokens = 0.0, 0
    for row in rows:
        part = take_batch(job.blocks, row[None])
        seed = ration.dropout_seed(step, part.tokens_BT[0])
        torch.manual_seed(seed)
        gradient_P.zero_()
        loss += _add_gradient(adapted, job.training, part, torch.tensor([seed]), 1.0) / len(rows)
        if trains_P is not None:
            gradient_P.mul_(trains_P)
        sum_P += sum_clipped(gradient_P[None], ration.terms.max_norm, 1)[0]
        num_tokens += part.num_tokens
    noise_P = ration.noise(step, len(sum_P)).to(sum_P.device)
    batch = torch.tensor([ration.terms.batch], device=sum_P.device)
    gradient_P.copy_(noised_mean(sum_P[None], noise_P[None], batch)[0])
    return loss, num_tokens


def _add_gradient(adapted: AdaptedModel, training: Training, part: Batch, keys_B: Tensor, share: float) -> float:
    """Add the gradient of a share of a batch's mean token loss; return that share. `keys_B` are of its dropout."""
    batch, dropout = part.to(adapted.device), ClientDropout(keys_B.to(adapted.device), alone=True)
    with gradient_checkpointing(adapted.base, training.gradient_checkpointing, dropout.contexts):
        with dropout:
            loss = share * mean_token_loss(adapted.logits(batch.tokens_BT, batch.mask_BT), batch.labels_BT)
        loss.backward()
    return loss.item()
