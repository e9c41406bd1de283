"""A run's rounds: sample, train, aggregate, evaluate. It knows nothing of files.

A `FederatedRun` says what is to be trained and takes what was; whoever drives it does the training between the two:
`run_rounds` one run on any fleet, `run_together` several runs in one pass over one model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedloom.adapters.adapter import Adapter
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import Gate, Holding
from fedloom.federation.aggregation import Aggregate, State
from fedloom.federation.fleet import Fleet, LocalFleet
from fedloom.federation.lora_rules import adapter_of_rank, trained_part
from fedloom.federation.schedule import proximal_mu, sample_clients, stop_early
from fedloom.host.failpoints import failpoint
from fedloom.training.jobs import ClientReport, ClientResult, ClientTask, ClientUpdate, TrainClients
from fedloom.training.objective import check_finite

if TYPE_CHECKING:
    from fedloom.recipe.recipe import Recipe


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
    lost: Mapping[int, str] = field(default_factory=dict)
    """Clients of the cohort without an update, and why."""
    refused: tuple[str, ...] = ()
    """Updates that nobody asked for, and why: late, second, or of others. They cost no client its own."""
    proximal_mu: float | None = None
    train_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    """Payload of the adapters that travelled; on a local fleet, that would have."""

    @property
    def client_score(self) -> Score | None:
        """Over all clients' hold-outs, every token alike."""
        return reduce(add, self.clients.values()) if self.clients else None

    @property
    def judged_loss(self) -> float:
        """What adapters are chosen by: the central loss, the clients' where there is none."""
        score = self.central or self.client_score
        assert score is not None, "nothing is held out"
        return score.loss


class FederatedRun:
    """One run between its rounds: the global adapter, the strategy's state, the losses so far.

    `on_update` sees each client's update as soon as it is admitted. `holdings` is what clients are known to have, where
    that is known. `arm` marks its tasks among those of other runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        fleet: Fleet,
        aggregate: Aggregate,
        evaluate_central: Callable[[Adapter], Score | None],
        adapter: Adapter,
        *,
        on_update: Callable[[ClientUpdate], None] = lambda update: None,
        holdings: Mapping[int, Holding] = MappingProxyType({}),
        arm: int = 0,
    ) -> None:
        self._recipe = recipe
        self._fleet = fleet
        self._aggregate = aggregate
        self._evaluate_central = evaluate_central
        self._on_update = on_update
        self.arm = arm
        self._adapter = adapter
        self._state = aggregate.init(adapter)
        self.losses: list[float] = []
        """By which adapters are judged, round 0 first."""
        self.gate = Gate(holdings)
        self._tasks: list[ClientTask] = []
        self._ended = False

    @property
    def adapter(self) -> Adapter:
        """The global one, after the last round that is complete."""
        return self._adapter

    @property
    def strategy_state(self) -> State:
        """What the strategy remembers."""
        return self._state

    def restore(
        self, adapter: Adapter, strategy_state: State, losses: Sequence[float], norms: Sequence[float] = ()
    ) -> None:
        """Go on from where another run of the same recipe was; `norms` are its gate's."""
        self._adapter, self._state, self.losses = adapter, strategy_state, list(losses)
        self.gate.restore(norms)

    @property
    def completed(self) -> int:
        """Rounds that are complete, round 0 left out."""
        return len(self.losses) - 1

    def end(self) -> None:
        """No more rounds, though more were to be."""
        self._ended = True

    @property
    def finished(self) -> bool:
        return self._ended or self.completed >= self._recipe.federation.rounds or self.stopped_early is not None

    @property
    def stopped_early(self) -> str | None:
        """How many rounds were to be, how many were, and why; None for a run that did not stop early."""
        section = self._recipe.federation
        why = stop_early(section.early_stop, self.losses)
        return f"{section.rounds} scheduled, {self.completed} completed: {why}" if why else None

    def begin(self) -> RoundResult:
        """Round 0: the adapter as it is given, evaluated."""
        return self._evaluate(round=0)

    def tasks(self) -> list[ClientTask]:
        """What the next round's clients are asked to do."""
        recipe, section, round = self._recipe, self._recipe.federation, len(self.losses)
        mu = proximal_mu(recipe.training, self.losses, section.rounds)
        training = recipe.training.model_copy(update={"proximal_mu": mu})
        cohort = sample_clients(self._fleet.clients, section, seed=recipe.seed, round=round)
        layout = self._adapter.layout
        ranks = {client: section.client_ranks[client] if section.client_ranks else None for client in cohort}
        starts = {rank: adapter_of_rank(self._adapter, rank) for rank in set(ranks.values())}
        self._tasks = [
            ClientTask(
                round=round,
                client=client,
                adapter=starts[rank],
                training=training,
                rounds=section.rounds,
                seed=recipe.seed,
                trains_P=trained_part(layout, section.lora_rule, round, rank),
                arm=self.arm,
            )
            for client, rank in ranks.items()
        ]
        return self._tasks

    def complete(self, results: Iterable[ClientResult], train_seconds: float | None = None) -> RoundResult:
        """Aggregate what came of the tasks as it comes, and evaluate what becomes of it.

        `train_seconds` is what they took where they are there already.

        A round that loses more clients than may be leaves the adapter as it was, where the recipe says so.

        Raises:
            TrainingError: more clients are lost than may be, or a loss is no longer a number.
        """
        tasks, started = self._tasks, time.perf_counter()
        self.gate.open(tasks)
        arrivals = _Arrivals(results, self.gate, self._on_update, self._recipe.federation.max_lost_clients)
        try:
            self._state, self._adapter = self._aggregate.update(self._state, self._adapter, arrivals)
        except TrainingError:
            if not arrivals.lost or self._recipe.federation.on_quorum_lost != "skip":
                raise
        aggregate_seconds = time.perf_counter() - started - arrivals.seconds
        failpoint("round.aggregated")
        evaluate_seconds = sum(report.evaluate_seconds for report in arrivals.reports)
        payloads = {task.client: task.num_bytes for task in tasks}
        return self._evaluate(
            evaluate_seconds,
            round=tasks[0].round,
            cohort=tuple(payloads),
            reports=tuple(sorted(arrivals.reports, key=lambda report: report.client)),
            lost=arrivals.lost,
            refused=tuple(why for _, why in arrivals.strays),
            proximal_mu=tasks[0].training.proximal_mu,
            train_seconds=arrivals.seconds - evaluate_seconds if train_seconds is None else train_seconds,
            aggregate_seconds=aggregate_seconds,
            bytes_down=sum(self._bytes_down(task) for task in tasks),
            bytes_up=sum(payloads[report.client] for report in arrivals.reports),
        )

    def _bytes_down(self, task: ClientTask) -> int:
        """What a client has to be sent: with RoLoRA, one that was there last round lacks only what changed in it."""
        section = self._recipe.federation
        if section.lora_rule == "rolora" and section.fraction == 1 and task.round > 1:
            task = replace(task, trains_P=trained_part(task.adapter.layout, section.lora_rule, task.round - 1))
            return task.num_bytes
        return task.num_bytes if section.client_ranks else task.adapter.num_bytes

    def _evaluate(self, evaluate_seconds: float = 0.0, *, round: int, **trained: Any) -> RoundResult:
        started = time.perf_counter()
        central, clients = self._evaluate_central(self._adapter), self._fleet.evaluate(self._adapter)
        if central is not None:
            check_finite("the loss", central.loss, round=round, stage="central evaluation")
        for client, score in clients.items():
            check_finite("the loss", score.loss, round=round, client=client, stage="evaluation")
        evaluate_seconds += time.perf_counter() - started
        result = RoundResult(round, self._adapter, central, clients, evaluate_seconds, **trained)
        self.losses.append(result.judged_loss)
        failpoint("round.evaluated")
        return result


def run_rounds(run: FederatedRun, fleet: Fleet) -> Iterator[RoundResult]:
    """Yield round 0, then each round when it is complete; of a run that was restored, the rounds that are left.

    Raises:
        TrainingError: a loss is no longer a number.
    """
    if not run.losses:
        yield run.begin()
    while not run.finished:
        failpoint("round.begins")
        yield run.complete(fleet.train(run.tasks()))


def run_together(
    arms: Sequence[tuple[FederatedRun, LocalFleet]], train_clients: TrainClients
) -> Iterator[tuple[int, RoundResult | TrainingError]]:
    """As `run_rounds`, of several runs: each round of all of them is one call of the engine.

    What is yielded comes with its run's `arm`. Where there is more than one, the updates of a round are held until all
    are there. A run that can't go on ends with its error, and the others go on.
    """
    failed: set[int] = set()

    def attempt(run: FederatedRun, step: Callable[[], RoundResult]) -> tuple[int, RoundResult | TrainingError]:
        try:
            return run.arm, step()
        except TrainingError as error:
            failed.add(run.arm)
            return run.arm, error

    for run, _ in arms:
        yield attempt(run, run.begin)
    while going := [(run, fleet) for run, fleet in arms if run.arm not in failed and not run.finished]:
        if len(going) == 1:
            ((run, fleet),) = going
            yield attempt(run, lambda run=run, fleet=fleet: run.complete(fleet.train(run.tasks())))  # type: ignore[misc]
            continue
        started = time.perf_counter()
        arrived: dict[int, list[ClientResult]] = {run.arm: [] for run, _ in going}
        for result in train_clients([job for run, fleet in going for job in fleet.jobs(run.tasks())]):
            arrived[result.arm].append(result)
        train_seconds = time.perf_counter() - started
        for run, fleet in going:
            finished = map(fleet.finish, arrived.pop(run.arm))
            yield attempt(run, partial(run.complete, finished, train_seconds))


class _Arrivals:
    """Updates on their way to the strategy: what is known of each is kept, its weights are not."""

    def __init__(
        self,
        results: Iterable[ClientResult],
        gate: Gate,
        on_update: Callable[[ClientUpdate], None],
        max_lost: int,
    ) -> None:
        self._results = iter(results)
        self._gate = gate
        self._on_update = on_update
        self._max_lost = max_lost
        self._last_error: TrainingError | None = None
        self.reports: list[ClientReport] = []
        self.lost: dict[int, str] = {}
        self.strays: list[tuple[int, str]] = []
        self.seconds = 0.0
        """Spent waiting for updates: the clients' training and evaluation."""

    def __iter__(self) -> Iterator[ClientUpdate]:
        return self

    def __next__(self) -> ClientUpdate:
        while (result := self._wait()) is not None:
            if why := self._gate.stray(result):
                self.strays.append((result.client, why))
                continue
            try:
                if not isinstance(result, ClientUpdate):
                    raise result.error
                self._gate.check(result)
            except TrainingError as error:
                self._lose(result.client, error)
                continue
            self.reports.append(result.report)
            failpoint("client.trained")
            self._on_update(result)
            return result
        for client, why in self.strays:
            if self._gate.misses(client):
                self._lose(
                    client, TrainingError(f"no other update came ({why})", round=self._gate.round, client=client)
                )
        if not self.reports:
            raise self._last_error or TrainingError("no update came", round=self._gate.round)
        raise StopIteration

    def _wait(self) -> ClientResult | None:
        started = time.perf_counter()
        try:
            return next(self._results, None)
        finally:
            self.seconds += time.perf_counter() - started

    def _lose(self, client: int, error: TrainingError) -> None:
        self.lost[client] = str(error)
        self._last_error = error
        if len(self.lost) > self._max_lost:
            raise error
