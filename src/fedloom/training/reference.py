"""One client after another on one base model: stock PEFT and torch.optim, plain to read.

Slow, and the oracle of any faster engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from fedloom.adapters.adapter import AdaptedModel, Adapter
from fedloom.data.tokens import take_batch
from fedloom.progress import Progress, Watch, ignore
from fedloom.randomness import derive_seed
from fedloom.training.checkpointing import gradient_checkpointing
from fedloom.training.jobs import ClientJob, ClientUpdate, OptimizerState, TrainClients, WorkLog, draw_batches
from fedloom.training.objective import (
    OPTIMIZERS,
    add_proximal_gradient,
    clip_gradient,
    learning_rate,
    mean_token_loss,
)

if TYPE_CHECKING:
    from fedloom.sections import Training


def build_reference_engine(
    adapted: AdaptedModel, training: Training, *, rounds: int, seed: int, watch: Watch = ignore
) -> TrainClients:
    """An engine bound to a model: `rounds` is what a schedule of scope `run` stretches over."""

    def train_clients(adapter: Adapter, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        for job in jobs:
            yield train_client(adapted, training, adapter, job, rounds=rounds, seed=seed, watch=watch)

    return train_clients


def train_client(
    adapted: AdaptedModel,
    training: Training,
    adapter: Adapter,
    job: ClientJob,
    *,
    rounds: int,
    seed: int,
    watch: Watch = ignore,
) -> ClientUpdate:
    """One client's round, from the global adapter to its update.

    Raises:
        TrainingError: the loss is no longer a number, or the proximal term has no effect.
    """
    log = WorkLog(job, training.proximal_mu)
    adapted.load(adapter)
    weights_P, gradient_P = adapted.weights_P, adapted.gradient_P
    global_P = adapter.weights_P.to(adapted.device)  # on a processor the server's own, which nobody changes
    optimizer = OPTIMIZERS[training.optimizer]([weights_P], training)
    _restore(optimizer, job.optimizer_state)
    batches = draw_batches(
        len(job.blocks), training.batch_size, training.epochs, seed=seed, round=job.round, client=job.client
    )
    devices = [adapted.device] if adapted.device.type == "cuda" else []
    checkpointing = gradient_checkpointing(adapted.base, training.gradient_checkpointing)
    with torch.random.fork_rng(devices), checkpointing:
        torch.manual_seed(derive_seed(seed, "dropout", job.round, job.client))
        adapted.model.train()
        for step, rows in enumerate(batches):
            batch = take_batch(job.blocks, rows).to(adapted.device)

            gradient_P.zero_()
            loss = mean_token_loss(adapted.logits(batch.tokens_BT), batch.labels_BT)
            loss.backward()

            with torch.no_grad():
                offset_P = weights_P - global_P
                log.add_step(loss.item(), offset_P.norm().item(), gradient_P.norm().item(), batch.num_tokens)
                add_proximal_gradient(gradient_P, offset_P, training.proximal_mu)
                clip_gradient(gradient_P, training.max_gradient_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(training, step, len(batches), job.round, rounds)
            optimizer.step()

            watch(Progress("train", batch.num_tokens, len(rows), job.round, job.client))
        adapted.model.eval()
    report = log.finish(drift=(weights_P - global_P).norm().item())
    return ClientUpdate(report, adapted.lend(), _state_of(optimizer) if training.optimizer_state == "keep" else {})


def _restore(optimizer: torch.optim.Optimizer, state: OptimizerState | None) -> None:
    if state is not None:
        copied = {name: value.clone() for name, value in state.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: copied}})


def _state_of(optimizer: torch.optim.Optimizer) -> OptimizerState:
    return {name: value for name, value in optimizer.state_dict()["state"].get(0, {}).items() if value is not None}
