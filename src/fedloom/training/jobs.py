"""The seam between whoever organises a round and whoever trains: jobs in, updates out as they finish.

Letters: P adapter parameters, N blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks
from fedloom.randomness import derive_seed
from fedloom.training.objective import check_finite, check_proximal, proximal_loss

OptimizerState = dict[str, Tensor]
"""A client's optimizer state by name, over the flat adapter."""


@dataclass(frozen=True)
class ClientJob:
    """What one client is asked to do in a round, with the data that it holds."""

    round: int
    client: int
    blocks: TokenBlocks
    optimizer_state: OptimizerState | None = None
    """From the client's last round; None starts fresh."""


@dataclass(frozen=True)
class ClientReport:
    """What is known of a client's work in a round. Losses are nats per token; times are of no effect."""

    round: int
    client: int
    examples: int
    tokens: int
    """Real tokens trained on, every epoch counted."""
    steps: int
    loss_first: float
    loss_last: float
    loss_mean: float
    """Over steps; the proximal term left out."""
    proximal_loss: float
    """μ/2 ‖w − w_global‖², the mean over steps, as it stood in the objective."""
    proximal_ratio: float
    """The norm of the proximal gradient over that of the loss gradient, the mean over steps."""
    drift: float
    """‖w − w_global‖ after the last step."""
    seconds: float
    """In training."""
    evaluate_seconds: float = 0.0
    """On the client's own hold-out, after training."""
    holdout_loss_before: float | None = None
    holdout_loss_after: float | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """What comes back from a job: the trained weights, and the optimizer's state where the client keeps it.

    The weights of a whole model are lent: they are valid until the next update is asked for, or the model is used for
    something else. Who wants them longer copies them.
    """

    report: ClientReport
    adapter: Adapter
    optimizer_state: OptimizerState


class WorkLog:
    """What an engine writes down of a client's steps, until they are a report."""

    def __init__(self, job: ClientJob, mu: float) -> None:
        self.job = job
        self._mu = mu
        self._started = time.perf_counter()
        self._losses: list[float] = []
        self._proximal_losses: list[float] = []
        self._ratios: list[float] = []
        self._tokens = 0

    def add_step(self, loss: float, drift: float, gradient_norm: float, num_tokens: int) -> None:
        """One step: the batch's loss, ‖w − w_global‖ before it, and the norm of the loss gradient.

        Raises:
            TrainingError: the loss is no number.
        """
        self._losses.append(loss)
        check_finite("the loss", loss, round=self.job.round, client=self.job.client, step=len(self._losses))
        self._proximal_losses.append(proximal_loss(drift, self._mu))
        self._ratios.append(self._mu * drift / gradient_norm if gradient_norm else 0.0)
        self._tokens += num_tokens

    def finish(self, drift: float) -> ClientReport:
        """The report, with the ‖w − w_global‖ that is left after the last step.

        Raises:
            TrainingError: the weights are no numbers, or the proximal term never was.
        """
        job, steps = self.job, len(self._losses)
        check_finite("the drift", drift, round=job.round, client=job.client, step=steps)
        check_proximal(self._proximal_losses, mu=self._mu, round=job.round, client=job.client)
        return ClientReport(
            round=job.round,
            client=job.client,
            examples=len(job.blocks),
            tokens=self._tokens,
            steps=steps,
            loss_first=self._losses[0],
            loss_last=self._losses[-1],
            loss_mean=sum(self._losses) / steps,
            proximal_loss=sum(self._proximal_losses) / steps,
            proximal_ratio=sum(self._ratios) / steps,
            drift=drift,
            seconds=time.perf_counter() - self._started,
        )


TrainClients = Callable[[Adapter, Sequence[ClientJob]], Iterator[ClientUpdate]]
"""Train every job from the same global adapter; yield each update when it is finished."""


def draw_batches(num_blocks: int, batch_size: int, epochs: int, *, seed: int, round: int, client: int) -> list[Tensor]:
    """The rows of every step of a client's round: each epoch visits each block once, in an order of its own."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", round, client))
    orders = (torch.randperm(num_blocks, generator=generator) for _ in range(epochs))
    return [rows for order in orders for rows in order.split(batch_size)]
