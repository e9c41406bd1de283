"""The round loop: sample, train, aggregate, evaluate. A generator that knows nothing of files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fedloom.adapters.adapter import Adapter
from fedloom.evaluation import Score
from fedloom.federation.aggregation import Aggregate
from fedloom.federation.fleet import Fleet
from fedloom.federation.sampling import sample_clients
from fedloom.training.jobs import ClientReport, ClientUpdate
from fedloom.training.objective import check_finite


@dataclass(frozen=True)
class RoundResult:
    """A round's new global adapter, and what is known of how it came about. Round 0 only evaluates."""

    round: int
    adapter: Adapter
    central: Score | None
    """On the central hold-out; None where a recipe has none."""
    clients: dict[int, Score]
    """Of the new global adapter, on each client's own hold-out."""
    evaluate_seconds: float
    """Central, and the clients' own before and after training."""
    cohort: tuple[int, ...] = ()
    reports: tuple[ClientReport, ...] = ()
    train_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    """Payload of the adapters that travelled; on a local fleet, that would have."""


def run_rounds(
    fleet: Fleet,
    aggregate: Aggregate,
    evaluate_central: Callable[[Adapter], Score | None],
    adapter: Adapter,
    *,
    rounds: int,
    fraction: float,
    seed: int,
    on_update: Callable[[ClientUpdate], None] = lambda update: None,
) -> Iterator[RoundResult]:
    """Yield round 0 (the adapter as it is given, evaluated), then each round when it is complete.

    `on_update` sees each client's update as soon as it has come.

    Raises:
        TrainingError: a loss is no longer a number.
    """

    def evaluated(round: int, adapter: Adapter, evaluate_seconds: float = 0.0, **trained: Any) -> RoundResult:
        started = time.perf_counter()
        central, clients = evaluate_central(adapter), fleet.evaluate(adapter)
        if central is not None:
            check_finite("the loss", central.loss, round=round, stage="central evaluation")
        for client, score in clients.items():
            check_finite("the loss", score.loss, round=round, client=client, stage="evaluation")
        evaluate_seconds += time.perf_counter() - started
        return RoundResult(round, adapter, central, clients, evaluate_seconds, **trained)

    yield evaluated(0, adapter)
    state = aggregate.init(adapter)
    for round in range(1, rounds + 1):
        cohort = sample_clients(fleet.clients, fraction, seed=seed, round=round)
        bytes_down = len(cohort) * adapter.num_bytes
        started = time.perf_counter()
        arrivals = _Arrivals(fleet.train(round, cohort, adapter), on_update)
        state, adapter = aggregate.update(state, adapter, arrivals)
        aggregate_seconds = time.perf_counter() - started - arrivals.seconds
        evaluate_seconds = sum(report.evaluate_seconds for report in arrivals.reports)
        yield evaluated(
            round,
            adapter,
            evaluate_seconds,
            cohort=tuple(cohort),
            reports=tuple(sorted(arrivals.reports, key=lambda report: report.client)),
            train_seconds=arrivals.seconds - evaluate_seconds,
            aggregate_seconds=aggregate_seconds,
            bytes_down=bytes_down,
            bytes_up=arrivals.bytes,
        )


class _Arrivals:
    """Updates on their way to the strategy: what is known of each is kept, its weights are not."""

    def __init__(self, updates: Iterable[ClientUpdate], on_update: Callable[[ClientUpdate], None]) -> None:
        self._updates = iter(updates)
        self._on_update = on_update
        self.reports: list[ClientReport] = []
        self.seconds = 0.0
        """Spent waiting for updates: the clients' training and evaluation."""
        self.bytes = 0

    def __iter__(self) -> Iterator[ClientUpdate]:
        return self

    def __next__(self) -> ClientUpdate:
        started = time.perf_counter()
        try:
            update = next(self._updates)
        finally:
            self.seconds += time.perf_counter() - started
        report = update.report
        if report.holdout_loss_after is not None:
            where = {"round": report.round, "client": report.client, "stage": "evaluation after training"}
            check_finite("the loss", report.holdout_loss_after, **where)
        self.reports.append(report)
        self._on_update(update)
        self.bytes += update.adapter.num_bytes
        return update
