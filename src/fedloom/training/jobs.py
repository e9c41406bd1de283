"""The seam between whoever organises a round and whoever trains: jobs in, updates out as they finish.

Letters: P adapter parameters, N blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks
from fedloom.errors import ShortageError, TrainingError
from fedloom.privacy.ration import Ration
from fedloom.seeds import derive_seed
from fedloom.training.client_report import ClientReport
from fedloom.training.objective import check_finite, check_proximal, learning_rate, proximal_loss

if TYPE_CHECKING:
    from fedloom.recipe.training_section import Training

OptimizerState = dict[str, Tensor]
"""A client's optimizer state by name, over the flat adapter."""

OF_ALL_CLIENTS = (
    "clients_at_once",
    "gradient_checkpointing",
    "cuda_graph",
    "optimizer",
    "gradient_accumulation",
    "weight_decay",
    "max_gradient_norm",
)
"""Settings of `Training` that a step has once; the others are each client's own."""


@dataclass(frozen=True)
class ClientTask:
    """Task of one client in a round: all that it is told."""

    round: int
    client: int
    adapter: Adapter
    """Adapter that training starts from, and that the proximal term holds to."""
    training: Training
    """Settings of training; `proximal_mu` is this round's."""
    rounds: int
    """Rounds that a schedule of scope `run` stretches over."""
    seed: int
    trains_P: Tensor | None = None
    """True where the adapter may change; None is everywhere."""
    trial: int = 0
    """Number of the run that asks, where several train together."""
    shares_P: Tensor | None = None
    """True where the weights are shared, and false where each client has its own; None: all of them are shared."""

    @property
    def travels(self) -> Tensor | None:
        """Return where weights may have changed and are no client's own: those of the answer; None is everywhere."""
        return self.trains_P if self.shares_P is None else self.shares_P

    @property
    def num_bytes(self) -> int:
        """The payload of the answer: the weights that may have changed and are no client's own."""
        weights_P = self.adapter.weights_P
        count = weights_P.numel() if self.travels is None else int(self.travels.sum())
        return count * weights_P.element_size()


@dataclass(frozen=True, kw_only=True)
class ClientJob(ClientTask):
    """A task with what the client holds. Nothing else decides what comes of it."""

    blocks: TokenBlocks
    optimizer_state: OptimizerState | None = None
    """Optimizer state from the client's last round; None starts fresh."""
    ration: Ration | None = None
    """Terms on which the client tells what it learns of a document; None where nothing bounds that."""

    def draw_batches(self) -> list[Tensor]:
        """Draw the rows of every step: each epoch visits each block once, in an order of its own.

        With a ration, each step draws each unit by itself, and some steps none.
        """
        if self.ration:
            return [self.ration.draw_rows(step, self.blocks.owners) for step in range(self.ration.terms.steps)]
        if self.training.max_steps:
            return self._walk(self.training.steps_of(len(self.blocks)))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.round, self.client))
        orders = (torch.randperm(len(self.blocks), generator=generator) for _ in range(self.training.epochs))
        return [rows for order in orders for rows in order.split(self.training.step_size)]

    def count_tokens(self) -> int:
        """Return the real tokens of all steps together."""
        return sum(int(self.blocks.tokens_of_each[rows].sum()) for rows in self.draw_batches())

    def _walk(self, steps: int) -> list[Tensor]:
        """Return the rows of a round that goes on where the one before ended: passes follow each other over rounds.

        The number of the round says where that was, so nobody has to remember it.
        """
        first, in_a_pass = (self.round - 1) * steps, -(-len(self.blocks) // self.training.step_size)
        batches: list[Tensor] = []
        for number in range(first // in_a_pass, -(-(first + steps) // in_a_pass)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "walk", number, self.client))
            batches += torch.randperm(len(self.blocks), generator=generator).split(self.training.step_size)
        return batches[first % in_a_pass :][:steps]

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step (from 0)."""
        return learning_rate(self.training, step, steps, self.round, self.rounds)

    @property
    def dropout_seed(self) -> int:
        return derive_seed(self.seed, "dropout", self.round, self.client)


def can_share_a_step(one: ClientJob, other: ClientJob) -> bool:
    """Return whether two jobs can train at once: they agree in what a step has once for all its clients."""
    mine, its = one.training, other.training
    alike = one.adapter.residual is other.adapter.residual and max_norm_of(one) == max_norm_of(other)
    return alike and all(getattr(mine, name) == getattr(its, name) for name in OF_ALL_CLIENTS)


def max_norm_of(job: ClientJob) -> float | None:
    """Return the norm to which a document's gradient is scaled down; None where none is."""
    return job.ration.terms.max_norm if job.ration else None


class StepKind(NamedTuple):
    """Kind of a step: what its buffers and operations hang on, beside its shape."""

    clients: int
    """Clients at once, at most."""
    masked: bool
    """True where attention has a mask: always or never, as a recorded step has it, so for those that wait too."""
    partly: bool
    """True where some weights stay as they were."""
    max_norm: float | None
    settings: tuple[Any, ...]
    """Values of `OF_ALL_CLIENTS`."""


def kind_of_step(jobs: Sequence[ClientJob], clients: int) -> StepKind:
    """Return the kind of these jobs' steps, of so many clients at once."""
    masked = any(job.blocks.needs_mask for job in jobs)
    partly = any(job.trains_P is not None for job in jobs)
    settings = tuple(getattr(jobs[0].training, name) for name in OF_ALL_CLIENTS)
    return StepKind(clients, masked, partly, max_norm_of(jobs[0]), settings)


@dataclass(frozen=True)
class ClientUpdate:
    """Update that comes back from a job: the trained weights, and the optimizer's state where the client keeps it.

    The weights of a whole model are lent: they are valid until the next update is asked for, or the model is used for
    something else. Who wants them longer copies them.
    """

    report: ClientReport
    adapter: Adapter
    optimizer_state: OptimizerState
    trial: int = 0
    weight_scale: float = 1.0
    """Factor on the client's weight in a mean, below 1 where `federation.max_share` caps it."""
    own_losses: tuple[float, ...] = ()
    """Losses of the steps in which a client with a ration drew anything: for its owner's eyes alone, in no message."""

    @property
    def client(self) -> int:
        """Id of the client."""
        return self.report.client


@dataclass(frozen=True)
class ClientFailure:
    """Failure that comes back where there is no update: why not."""

    client: int
    error: TrainingError
    trial: int = 0
    was_asked: bool = True
    """False where nothing was sent to the client."""


ClientResult = ClientUpdate | ClientFailure


class WorkLog:
    """Log of a client's steps, which becomes its report."""

    def __init__(self, job: ClientJob) -> None:
        self.job = job
        self._mu = job.training.proximal_mu
        self._started = time.perf_counter()
        self._losses: list[float] = []
        self._own_losses: list[float] = []
        self._proximal_losses: list[float] = []
        self._ratios: list[float] = []
        self._tokens = 0

    def add_step(self, loss: float, drift: float, gradient_norm: float, num_tokens: int) -> None:
        """Add one step: the batch's loss, ‖w − w_global‖ before it, and the norm of the loss gradient.

        Raises:
            TrainingError: one of them is no finite number.
        """
        self._losses.append(loss)
        facts = {"the drift": drift, "the norm of the gradient": gradient_norm}
        # With a ration, that a step failed would tell of the document that made it: what is no number counts as 0.
        if self.job.ration:
            self._own_losses += [loss] if num_tokens else []
        else:
            facts = {"the loss": loss, **facts}
        # All three: how an optimizer goes on from an infinite one depends on the order of its operations.
        for what, value in facts.items():
            check_finite(what, value, round=self.job.round, client=self.job.client, step=len(self._losses))
        self._proximal_losses.append(proximal_loss(drift, self._mu))
        self._ratios.append(self._mu * drift / gradient_norm if gradient_norm else 0.0)
        self._tokens += num_tokens

    @property
    def own_losses(self) -> tuple[float, ...]:
        """Return the losses that are told to nobody, of steps that drew anything; nothing without a ration."""
        return tuple(self._own_losses)

    def finish(self, drift: float) -> ClientReport:
        """Return the report, with the ‖w − w_global‖ that is left after the last step.

        Raises:
            TrainingError: the weights are no numbers, or the proximal term never was.
        """
        job, steps = self.job, len(self._losses)
        check_finite("the drift", drift, round=job.round, client=job.client, step=steps)
        if any(job.rate(step, steps) for step in range(steps - 1)):  # in a warm-up, the first step moves nothing
            check_proximal(self._proximal_losses, mu=self._mu, round=job.round, client=job.client)
        return ClientReport(
            round=job.round,
            client=job.client,
            examples=job.ration.terms.units if job.ration else len(job.blocks),
            tokens=0 if job.ration else self._tokens,
            steps=steps,
            proximal_mu=self._mu,
            loss_first=None if job.ration else self._losses[0],
            loss_last=None if job.ration else self._losses[-1],
            loss_mean=None if job.ration else sum(self._losses) / steps,
            proximal_loss=sum(self._proximal_losses) / steps,
            proximal_ratio=sum(self._ratios) / steps,
            drift=drift,
            seconds=time.perf_counter() - self._started,
        )


TrainClients = Callable[[Sequence[ClientJob]], Iterator[ClientResult]]
"""Carry out every job; yield each client's update, or its failure, when it is finished."""


def too_large(job: ClientJob, error: Exception) -> ShortageError:
    """Return the error for a client that does not fit in memory even alone."""
    training = job.training
    keys = f"training.batch_size ({training.batch_size}) or data.max_length ({job.blocks.tokens_NT.shape[1]})"
    more = "" if training.gradient_checkpointing else ", or set training.gradient_checkpointing"
    return ShortageError(
        f"there is not enough memory to train a single client ({type(error).__name__})",
        round=job.round,
        client=job.client,
        stage="training",
        mend=f"lower {keys}{more}",
    )
