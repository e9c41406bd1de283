"""A round that is under way: updates are admitted as they come, weighed, and added to the strategy's sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedloom.adapters.adapter import Adapter
from fedloom.errors import ShortageError, TrainingError
from fedloom.federation.admission import Admission, ClientSize, check_layout
from fedloom.federation.aggregation import WEIGHTS, RoundSum, State
from fedloom.federation.fleet import ClientPreview
from fedloom.federation.shares import cap_weights, to_shares
from fedloom.host.failpoints import failpoint
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientResult, ClientTask, ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation


class OpenRound:
    """A round that is under way: it admits results as they come, and adds each update to the strategy's sum.

    Reports are kept, weights are not, so memory does not grow with the number of clients. With `alone`, each update
    is bounded by itself and their sum is noised: any may be missing, for to stop at it would tell of its client.
    `foresee` gives what clients will have trained on, where no update is shown before the first counts.
    """

    def __init__(
        self,
        start: Adapter,
        round: int,
        tasks: Sequence[ClientTask],
        total: RoundSum,
        admission: Admission,
        on_update: Callable[[ClientUpdate], None],
        section: Federation,
        *,
        proximal_mu: float,
        foresee: Callable[[Sequence[ClientTask]], Mapping[int, ClientSize]] = lambda tasks: {},
        alone: bool = False,
    ) -> None:
        self.proximal_mu = proximal_mu
        self._start, self.number, self.tasks, self._total, self._alone = start, round, tasks, total, alone
        self._admission, self._on_update, self._section, self._foresee = admission, on_update, section, foresee
        self._weigh = WEIGHTS[section.strategy.weight_by]
        self._scales: dict[int, float] | None = None
        self._opened = time.perf_counter()
        self._last_loss: TrainingError | None = None
        self.error: TrainingError | None = None
        """The reason why the round can't be aggregated, once it is known."""
        self.reports: list[ClientReport] = []
        self._weights: dict[int, float] = {}
        self.lost: dict[int, str] = {}
        self.unasked: list[int] = []
        """Clients that were lost without being sent anything."""
        self.refused: list[tuple[int, str]] = []
        self.aggregate_seconds = 0.0
        admission.open(tasks)

    def add(self, result: ClientResult | ClientPreview) -> None:
        """Admit a client's result, and aggregate it if it is an update; after too many losses, `error` says so."""
        started = time.perf_counter()
        if isinstance(result, ClientPreview):
            self._admission.preview(result.update)
        elif why := self._admission.unexpected(result):
            self.refused.append((result.client, why))
        else:
            try:
                if not isinstance(result, ClientUpdate):
                    self.unasked += [result.client] * (not result.was_asked)
                    raise result.error
                update = self._weighed(self._admission.check(result))
            except TrainingError as error:
                self._lose(result.client, error)
            else:
                self.reports.append(update.report)
                failpoint("client.trained")
                self._on_update(update)
                self._total.add(update)
        self.aggregate_seconds += time.perf_counter() - started

    def finish(self) -> tuple[State, Adapter] | None:
        """Return the strategy's new state and the new adapter; None where the round is lost, and `error` says why."""
        for client, why in self.refused:
            if self._admission.misses(client):
                lost = TrainingError(f"no other update came ({why})", round=self.number, client=client)
                self._lose(client, lost)
        if not self.reports and not self._alone:
            self.error = self.error or self._last_loss or TrainingError("no update came", round=self.number)
        if self.error:
            return None
        started = time.perf_counter()
        state, adapter = self._total.finish()
        self.aggregate_seconds += time.perf_counter() - started
        where: dict[str, Any] = {"round": self.number, "stage": "aggregation"}
        try:
            # Later it would be refused as the clients' fault, who train from it.
            check_layout(adapter, self._start)
        except ValueError as error:
            raise TrainingError(f"the strategy's adapter does not fit: {error}", **where) from None
        # Each update was finite: later this would be taken for a client's training that diverged.
        if not bool(adapter.weights_P.isfinite().all()):
            mend = "lower federation.strategy.learning_rate, or mend the strategy where it is your own"
            raise TrainingError("the strategy's adapter has weights that are not finite", mend=mend, **where)
        return state, adapter

    @property
    def may_be_skipped(self) -> bool:
        """Return whether a run may go on without the round: it lost clients, and not what all of them need."""
        return bool(self.lost) and not self._alone

    @property
    def shares(self) -> dict[int, float]:
        """Each client's share of the weight, where the strategy weighs clients."""
        return to_shares(self._weights) if self._section.strategy.weighs and not self._alone else {}

    @property
    def capped(self) -> list[int]:
        """Clients whose weight was capped, ascending."""
        return sorted(client for client in self.shares if (self._scales or {}).get(client, 1.0) < 1)

    @property
    def train_seconds(self) -> float:
        """Seconds since the round was opened in which it waited for clients."""
        return time.perf_counter() - self._opened - self.aggregate_seconds

    @property
    def evaluate_seconds(self) -> float:
        """Seconds of that time in which clients evaluated: of those who do so side by side, the longest's."""
        told = [report.evaluate_seconds for report in self.reports]
        # Those elsewhere, who show what they did before it counts; and what they tell may be anything.
        at_once = bool(told) and bool(self._admission.foreseen)
        return min(max(told), self.train_seconds) if at_once else sum(told)

    def _weighed(self, update: ClientUpdate) -> ClientUpdate:
        """Return an update with its weight capped."""
        if self._scales is None:
            self._scales = self._scale()
        update = replace(update, weight_scale=self._scales.get(update.client, 1.0))
        self._weights[update.client] = self._weigh(update.report) * update.weight_scale
        return update

    def _scale(self) -> dict[int, float]:
        """Return the factor by which each client's weight is capped, at the first update that counts."""
        if self._section.max_share is None:
            return {}
        known = self._admission.shown or self._foresee(self.tasks)
        told = {client: self._weigh(amount) for client, amount in known.items()}
        capped = cap_weights(told, self._section.max_share)
        return {client: capped[client] / told[client] for client in told}

    def _lose(self, client: int, error: TrainingError) -> None:
        self.lost[client] = str(error)
        self._last_loss = error
        # What is too large for the machine is so whatever is in the documents.
        stops = isinstance(error, ShortageError) if self._alone else len(self.lost) > self._section.max_lost_clients
        if stops:
            self.error = self.error or error
