"""Admits updates before any strategy sees them, wherever they come from.

It must answer what was asked, in this round, once; its weights must be laid out as those that were sent, every one
finite; its report must be possible, since strategies weigh by it. What is refused is refused by name.

**How large a change may be.** ‖w − w_start‖ is compared with the median of a round's changes, and with those of
rounds before: never with what a client says that it did. Of two middle ones the lower counts, so that of two clients
neither can lift the other's limit. Beyond `max_change` medians a change is scaled down to that: a client with much data
honestly moves far, and none moves the mean far. That needs all changes of a round, so it is for fleets that show each
update before the first counts (`preview`).

A change that no training makes is refused: larger than the weights were, than AdamW's steps with the round's middle
size can make (each moves a weight by up to 3.2 learning rates), than `SMALL_WEIGHT` in every weight, as A begins,
and than `TIMES_THE_MEDIAN` medians, or `TIMES_UNKNOWN` times the last two bounds where nothing is known yet.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median_low
from types import MappingProxyType

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter
from fedloom.errors import TrainingError
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientResult, ClientTask, ClientUpdate
from fedloom.training.objective import check_finite

TIMES_THE_MEDIAN = 10_000.0
TIMES_UNKNOWN = 1000.0
REMEMBERED = 5
"""Rounds whose middle change is remembered."""
SMALL_WEIGHT = 0.005
LEARNING_RATES = 4.0
"""Learning rates by which a step of AdamW may move a weight: 0.1 / √0.001 = 3.2, and some weight decay."""
CHUNK = 2**20
"""Weights that are looked at together: no copy is made of a whole model."""
MAY_BE_UNKNOWN = ("holdout_loss_before", "holdout_loss_after")
OF_DOCUMENTS = ("loss_first", "loss_last", "loss_mean")
"""Losses that a client of a private run does not tell; all of them or none. Its tokens are 0 then."""
COUNTS = ("examples", "tokens", "steps")


@dataclass(frozen=True)
class ClientSize:
    """The units (each a block, unless the recipe says otherwise) and tokens that a client has to train on."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class Foreseen:
    """Update that was shown before any of its round counts, as far as it is kept."""

    report: ClientReport
    norm: float


class Admission:
    """Admits the updates of a run's rounds; `sizes` bounds what clients may say of themselves.

    A change of more than `max_change` medians is scaled down to that where all of a round were shown; None lets it be.
    With `alone`, no change is compared with the others: each is scaled to a norm of its own later.
    """

    def __init__(
        self,
        sizes: Mapping[int, ClientSize] = MappingProxyType({}),
        max_change: float | None = None,
        *,
        alone: bool = False,
    ) -> None:
        self._sizes, self._max_change, self._alone = sizes, max_change, alone
        self._tasks: dict[int, ClientTask] = {}
        self._answered: set[int] = set()
        self._start_norms: dict[int, float] = {}
        self._remembered: list[float] = []
        self._changes: list[float] = []
        self._steps = 1
        self.foreseen: dict[int, Foreseen] = {}
        """Updates of this round that were shown and can be admitted, by client."""
        self.scaled: dict[int, float] = {}
        """Changes of this round that were scaled down, in medians, by client."""

    def open(self, tasks: Sequence[ClientTask]) -> None:
        """Begin a round: these are its tasks."""
        self._remembered = self.norms
        self._tasks, self._answered, self._start_norms = {task.client: task for task in tasks}, set(), {}
        self._changes, self.foreseen, self.scaled = [], {}, {}
        self._steps = median_low([self._steps_of(task) for task in tasks] or [1])

    @property
    def norms(self) -> list[float]:
        """The middle change of each of the last rounds, the oldest first."""
        now = [median_low(self._changes)] if self._changes else []
        return [*self._remembered, *now][-REMEMBERED:]

    def restore(self, norms: Sequence[float]) -> None:
        """Go on from where another admission of the same run was after a round."""
        self._remembered, self._changes = list(norms)[-REMEMBERED:], []

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

    def preview(self, update: ClientUpdate) -> None:
        """Note an update that comes again, before any of the round counts; one that will be refused leaves no trace."""
        task = self._tasks.get(update.client)
        with suppress(TrainingError):
            if task and update.client not in self.foreseen:
                norm = self._measure(update, task)
                self.foreseen[task.client] = Foreseen(update.report, norm)
                insort(self._changes, norm)

    @property
    def shown(self) -> dict[int, ClientReport]:
        """The report of each client that was shown and will be admitted."""
        fit = {c: f for c, f in self.foreseen.items() if f.norm <= self._limit(self._tasks[c])}
        return {client: foreseen.report for client, foreseen in fit.items()}

    def check(self, update: ClientUpdate) -> ClientUpdate:
        """Admit an update that was asked for, and return it, its change scaled down where that is too long.

        Raises:
            TrainingError: it is not what it must be.
        """
        task = self._tasks[update.client]
        norm = self._measure(update, task)
        if not norm <= (limit := self._limit(task)):
            why = f"the change is too large: its norm is {norm:.3g}, and {limit:.3g} is allowed"
            raise TrainingError(why, round=task.round, client=task.client, stage="admission")
        if task.client not in self.foreseen:
            insort(self._changes, norm)
            return update
        middle, start_P = median_low(self._known), task.adapter.weights_P
        # A median of 0 says nothing: most clients did not move.
        if not self._max_change or not 0 < (most := self._max_change * middle) < norm:
            return update
        self.scaled[task.client] = norm / middle
        weights_P = start_P.lerp(update.adapter.weights_P, most / norm)
        return replace(update, adapter=replace(update.adapter, weights_P=weights_P))

    def _measure(self, update: ClientUpdate, task: ClientTask) -> float:
        """Return ‖w − w_start‖ of an update.

        Raises:
            TrainingError: its report or its weights are not what they must be.
        """
        try:
            check_report(update.report, task, self._sizes.get(task.client))
            check_layout(update.adapter, task.adapter)
            return change_norm(update.adapter, task.adapter, task.trains_P)
        except ValueError as error:
            raise TrainingError(str(error), round=task.round, client=task.client, stage="admission") from None

    @property
    def _known(self) -> list[float]:
        return [*self._changes, *self._remembered]

    def _limit(self, task: ClientTask) -> float:
        """Return the norm above which no training made a change."""
        if self._alone:
            return math.inf
        weights_P = task.adapter.weights_P
        if (start := self._start_norms.get(id(weights_P))) is None:
            start = self._start_norms[id(weights_P)] = norm_of(weights_P)
        by_steps = LEARNING_RATES * task.training.learning_rate * self._steps
        small = max(by_steps, SMALL_WEIGHT) * math.sqrt(weights_P.numel())
        known = TIMES_THE_MEDIAN * median_low(self._known) if self._known else TIMES_UNKNOWN * small
        return max(start, small, known)

    def _steps_of(self, task: ClientTask) -> int:
        """Return the steps that a client's known size gives; 1 an epoch where it is not known."""
        size = self._sizes.get(task.client)
        return task.training.steps_of(size.examples if size else 1)


def check_report(report: ClientReport, task: ClientTask, size: ClientSize | None) -> None:
    """Refuse a report of what can't have been.

    Raises:
        ValueError: it says what.
        TrainingError: the client's own evaluation came to no number.
    """
    private = all(getattr(report, name) is None for name in OF_DOCUMENTS)
    unknown = {*MAY_BE_UNKNOWN, *(OF_DOCUMENTS if private else ())}
    for name, value in vars(report).items():
        if value is None and name in unknown:
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
        if not isinstance(value, int) or value < (0 if private and name == "tokens" else 1):
            raise ValueError(f"{name} is {value}, which is no count of what was done")
    epochs = task.training.epochs
    if size and report.examples > size.examples:
        raise ValueError(f"examples is {report.examples}, and the client has {size.examples}")
    if size and report.tokens > size.tokens * epochs:
        raise ValueError(f"tokens is {report.tokens}, and the client has {size.tokens * epochs} to train on")
    most = report.examples * epochs
    if report.steps > (most := min(most, task.training.max_steps or most)):
        raise ValueError(f"steps is {report.steps}, and {most} are possible")


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
