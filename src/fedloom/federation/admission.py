"""Admits updates before any strategy sees them, wherever they come from.

It must answer what was asked, in this round, once; its weights must be laid out as those that were sent, every one
finite; its report must be possible, since strategies weigh by it. What is refused is refused by name.

**How large a change may be.** It is measured by the step, ‖w − w_start‖ / steps, so that clients with much data and
with little compare. A change is never too large that is no larger than the weights were, than AdamW's steps can make
(each moves a weight by up to 3.2 learning rates), or than `SMALL_WEIGHT` in every weight, as LoRA's A begins. Beyond
that the limit is `TIMES_THE_MEDIAN` times the median of what was admitted in this round and the one before; where
nothing was yet, `TIMES_UNKNOWN` times the larger of the last two.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.errors import TrainingError
from fedloom.training.jobs import ClientReport, ClientResult, ClientTask, ClientUpdate
from fedloom.training.objective import check_finite

TIMES_THE_MEDIAN = 100.0
TIMES_UNKNOWN = 1000.0
SMALL_WEIGHT = 0.005
LEARNING_RATES = 4.0
"""Learning rates by which a step of AdamW may move a weight: 0.1 / √0.001 = 3.2, and some weight decay."""
CHUNK = 2**20
"""Weights that are looked at together: no copy is made of a whole model."""
MAY_BE_UNKNOWN = ("holdout_loss_before", "holdout_loss_after")
COUNTS = ("examples", "tokens", "steps")


@dataclass(frozen=True)
class ClientSize:
    """The blocks and tokens that a client is known to have to train on."""

    examples: int
    tokens: int


class Admission:
    """Admits the updates of a run's rounds; `sizes` bounds what clients may say of themselves."""

    def __init__(self, sizes: Mapping[int, ClientSize] = MappingProxyType({})) -> None:
        self._sizes = sizes
        self._tasks: dict[int, ClientTask] = {}
        self._answered: set[int] = set()
        self._start_norms: dict[int, float] = {}
        self._known: list[float] = []
        self.norms: list[float] = []
        """Changes by the step that were admitted in this round, in the order in which they came."""

    def open(self, tasks: Sequence[ClientTask]) -> None:
        """Begin a round: these are its tasks."""
        self._tasks, self._answered, self._start_norms = {task.client: task for task in tasks}, set(), {}
        self._known, self.norms = sorted(self.norms), []

    def restore(self, norms: Sequence[float]) -> None:
        """Go on from where another admission of the same run was after a round."""
        self.norms = list(norms)

    @property
    def round(self) -> int:
        return next(iter(self._tasks.values())).round

    def unexpected(self, result: ClientResult) -> str | None:
        """Return why this result was not asked for, or None for a client's first in this round."""
        client, round = result.client, self.round
        if client not in self._tasks:
            return f"round {round}: an update from a client that was not asked ({str(client)[:20]})"
        if isinstance(result, ClientUpdate) and result.report.round != round:
            return f"round {round}, client {client}: an update of round {str(result.report.round)[:20]}"
        if client in self._answered:
            return f"round {round}, client {client}: a second answer"
        self._answered.add(client)
        return None

    def misses(self, client: int) -> bool:
        """Return whether a client was asked and has not answered."""
        return client in self._tasks and client not in self._answered

    def check(self, update: ClientUpdate) -> None:
        """Admit an update that was asked for.

        Raises:
            TrainingError: it is not what it must be.
        """
        task = self._tasks[update.client]
        try:
            check_report(update.report, task, self._sizes.get(update.client))
            check_layout(update.adapter, task.adapter)
            norm = change_norm(update.adapter, task.adapter, task.trains_P)
            self._check_norm(norm, update.report.steps, task)
        except ValueError as error:
            raise TrainingError(str(error), round=task.round, client=task.client, stage="admission") from None
        insort(self._known, norm / update.report.steps)
        self.norms.append(norm / update.report.steps)

    def _check_norm(self, norm: float, steps: int, task: ClientTask) -> None:
        weights_P = task.adapter.weights_P
        if (start := self._start_norms.get(id(weights_P))) is None:
            start = self._start_norms[id(weights_P)] = norm_of(weights_P)
        by_steps = LEARNING_RATES * task.training.learning_rate * steps
        small = max(by_steps, SMALL_WEIGHT) * math.sqrt(weights_P.numel())
        known = TIMES_THE_MEDIAN * median(self._known) * steps if self._known else TIMES_UNKNOWN * small
        limit = max(start, small, known)
        if not norm <= limit:
            raise ValueError(f"the change is too large: its norm is {norm:.3g}, and {limit:.3g} is allowed")


def check_report(report: ClientReport, task: ClientTask, size: ClientSize | None) -> None:
    """Refuse a report of what can't have been.

    Raises:
        ValueError: it says what.
        TrainingError: the client's own evaluation came to no number.
    """
    for name, value in vars(report).items():
        if value is None and name in MAY_BE_UNKNOWN:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is no number but a {type(value).__name__[:40]}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} is no possible number")
        if name == "holdout_loss_after":
            where = {"round": task.round, "client": task.client, "stage": "evaluation after training"}
            check_finite("the loss", value, **where)
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    for name in COUNTS:
        value = getattr(report, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}, which is no count of what was done")
    epochs = task.training.epochs
    if size and report.examples > size.examples:
        raise ValueError(f"examples is {report.examples}, and the client has {size.examples}")
    if size and report.tokens > size.tokens * epochs:
        raise ValueError(f"tokens is {report.tokens}, and the client has {size.tokens * epochs} to train on")
    if report.steps > report.examples * epochs:
        raise ValueError(f"steps is {report.steps}, and {report.examples * epochs} are possible")


def check_layout(adapter: Adapter, sent: Adapter) -> None:
    """Refuse weights that are not laid out as those that were sent: names, shapes, dtype, count.

    Raises:
        ValueError: it names the tensor.
    """
    found, expected = adapter.layout, sent.layout
    if found != expected:
        for name, instead in zip(expected.names, found.names, strict=False):
            if name != instead:
                raise ValueError(f"{instead[:80]} stands where {name} must be")
        if len(found.names) != len(expected.names):
            raise ValueError(f"{len(found.names)} tensors came, and {len(expected.names)} were sent")
        for name, shape, other in zip(expected.names, expected.shapes, found.shapes, strict=False):
            if shape != other:
                raise ValueError(f"{name} is {tuple(other)}, not {tuple(shape)}")
        raise ValueError("the shapes are not those that were sent")
    weights_P, sent_P = adapter.weights_P, sent.weights_P
    if weights_P.dtype != sent_P.dtype:
        raise ValueError(f"the weights are {weights_P.dtype}, not {sent_P.dtype}")
    if weights_P.shape != sent_P.shape or weights_P.layout != sent_P.layout or weights_P.device != sent_P.device:
        raise ValueError(f"the weights are {tuple(weights_P.shape)}, not {tuple(sent_P.shape)}")


def change_norm(adapter: Adapter, sent: Adapter, trains_P: Tensor | None) -> float:
    """Return ‖w − w_start‖ of weights that are laid out alike.

    Raises:
        ValueError: a weight is not finite, or one changed that was to stay.
    """
    total = 0.0
    for start in range(0, len(sent.weights_P), CHUNK):
        part = slice(start, start + CHUNK)
        weights = adapter.weights_P[part]
        if not torch.isfinite(weights).all():
            raise ValueError(f"{_owner(adapter, part, ~torch.isfinite(weights))} has a weight that is not finite")
        change = weights.double() - sent.weights_P[part]
        if trains_P is not None and (moved := (change != 0) & ~trains_P[part]).any():
            raise ValueError(f"{_owner(adapter, part, moved)} has a weight that changed and was to stay")
        total += float(change.square().sum())
    return math.sqrt(total)


def norm_of(weights_P: Tensor) -> float:
    """Return ‖w‖, in float64 and without a copy of the weights."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in weights_P.split(CHUNK)))


def _owner(adapter: Adapter, part: slice, found: Tensor) -> str:
    """Return the name of the tensor that holds the first of the weights that were found."""
    place = part.start + int(found.nonzero()[0, 0])
    for name, shape in zip(adapter.layout.names, adapter.layout.shapes, strict=True):
        if place < shape.numel():
            return name
        place -= shape.numel()
    raise AssertionError("a weight beyond the last tensor")
