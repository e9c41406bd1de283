"""Carries out a run's rounds: sample, train, aggregate, evaluate. It knows nothing of files.

A `FederatedRun` says what is to be trained and takes what was; whoever drives it does the training between the two:
`run_rounds` one run on any fleet, `run_together` several runs in one pass over one model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedloom.adapters.adapter import Adapter
from fedloom.errors import TrainingError
from fedloom.evaluation.held_out import Score
from fedloom.federation.admission import Admission, ClientSize
from fedloom.federation.aggregation import Aggregate, State
from fedloom.federation.fleet import Fleet, LocalFleet
from fedloom.federation.lora_rules import adapter_of_rank, shared_part, trained_part
from fedloom.federation.open_round import OpenRound
from fedloom.federation.schedule import is_evaluated, proximal_mu, sample_clients, stop_early
from fedloom.federation.shares import judge_losses, mean_loss
from fedloom.host.failpoints import failpoint
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientResult, ClientTask, ClientUpdate, TrainClients
from fedloom.training.objective import check_finite

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation
    from fedloom.recipe.training_section import Training


@dataclass(frozen=True)
class RoundResult:
    """A round's new global adapter, and what is known of how it came about. Round 0 only evaluates."""

    round: int
    adapter: Adapter
    central: Score | None
    """The adapter's score on the central hold-out; None where a recipe has none."""
    clients: dict[int, Score]
    """The new global adapter's score on each client's own hold-out."""
    evaluate_seconds: float
    """Seconds of evaluation: central, and the clients' own before and after training."""
    client_loss: float | None
    """The loss over all clients' hold-outs, every token alike but for capped shares; None where there is none."""
    judged_loss: float | None
    """The loss that adapters are chosen by, runs are stopped by, and an adaptive μ follows; None where a round is not
    evaluated."""
    cohort: tuple[int, ...] = ()
    reports: tuple[ClientReport, ...] = ()
    lost: Mapping[int, str] = field(default_factory=dict)
    """Clients of the cohort without an update, and why."""
    unasked: Sequence[int] = ()
    """Those of them that were sent nothing."""
    refused: tuple[str, ...] = ()
    """Updates that nobody asked for, and why: late, second, or of others. They cost no client its own."""
    shares: Mapping[int, float] = field(default_factory=dict)
    """Each client's share of the round's weight, where the strategy weighs clients."""
    capped: Sequence[int] = ()
    """Clients whose share was capped."""
    scaled: Mapping[int, float] = field(default_factory=dict)
    """Clients whose change was scaled down, and how many times the round's middle change it was."""
    proximal_mu: float | None = None
    away: Mapping[int, float] = field(default_factory=dict)
    """Seconds for which clients were waited for that were away."""
    train_seconds: float = 0.0
    aggregate_seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    """Payload of the adapters that travelled; on a local fleet, that would have."""


class FederatedRun:
    """One run between its rounds: the global adapter, the strategy's state, the losses so far.

    `on_update` sees each client's update as soon as it is admitted. `sizes` is what clients are known to hold, where
    that is known, and `foresee` gives what tasks will have them train on: as much, if it is left out. `trial` marks its
    tasks among those of other runs. Adapters are evaluated after every `evaluate_every`-th round, and after the last.
    Clients `elsewhere` are sent all that they share of an adapter in each round.
    """

    def __init__(
        self,
        training: Training,
        federation: Federation,
        seed: int,
        fleet: Fleet,
        aggregate: Aggregate,
        evaluate_central: Callable[[Adapter], Score | None],
        adapter: Adapter,
        *,
        on_update: Callable[[ClientUpdate], None] | None = None,
        sizes: Mapping[int, ClientSize] = MappingProxyType({}),
        foresee: Callable[[Sequence[ClientTask]], Mapping[int, ClientSize]] | None = None,
        trial: int = 0,
        evaluate_every: int = 1,
        elsewhere: bool = False,
    ) -> None:
        self._training, self._federation, self._seed = training, federation, seed
        self._fleet = fleet
        self.aggregate = aggregate
        self.evaluate_central = evaluate_central
        self._on_update = on_update or _keep_nothing
        self.trial = trial
        self._adapter = adapter
        self._state = aggregate.init(adapter)
        self._evaluate_every, self._elsewhere = evaluate_every, elsewhere
        self.losses: list[float | None] = []
        """Losses by which adapters are judged, round 0 first; None after a round that was not evaluated."""
        self._sent = 0
        """Bytes of all rounds so far, both ways."""
        self.began: dict[int, float] = {}
        """Each client's loss on its own hold-out in round 0."""
        self._foresee = foresee or (
            lambda tasks: {task.client: sizes[task.client] for task in tasks if task.client in sizes}
        )
        self.admission = Admission(sizes, federation.max_change, alone=aggregate.draw is not None)
        self._stopped = ""

    @property
    def adapter(self) -> Adapter:
        """The global adapter after the last round that is complete."""
        return self._adapter

    @property
    def strategy_state(self) -> State:
        """The strategy's memory."""
        return self._state

    def restore(
        self,
        adapter: Adapter,
        strategy_state: State,
        losses: Sequence[float | None],
        norms: Sequence[float] = (),
        began: Mapping[int, float] = MappingProxyType({}),
        *,
        sent: int = 0,
    ) -> None:
        """Go on from where another run of the same recipe was; `norms` are its admission's, `sent` its bytes."""
        self._sent = sent
        self._adapter, self._state, self.losses, self.began = adapter, strategy_state, list(losses), dict(began)
        self.admission.restore(norms)

    @property
    def completed(self) -> int:
        """Rounds that are complete, round 0 left out."""
        return len(self.losses) - 1

    def stop(self, why: str) -> None:
        """Stop the run early: no round follows the last one that is complete."""
        self._stopped = self._stopped or why

    @property
    def finished(self) -> bool:
        return self.completed >= self._federation.rounds or self.stopped_early is not None

    @property
    def stopped_early(self) -> str | None:
        """Rounds scheduled, rounds completed, and why no more; None for a run that did not stop early."""
        scheduled = self._federation.rounds
        if not self.losses or self.completed >= scheduled:
            return None
        why = stop_early(self._federation.early_stop, self.losses)
        why = why or self._budget_ends_before(len(self.losses)) or self._stopped
        return f"{scheduled} scheduled, {self.completed} completed: {why}" if why else None

    def _budget_ends_before(self, round: int) -> str:
        """Return why the budget of bytes allows no such round after what was sent; an empty text if it does."""
        budget = self._federation.max_bytes
        if budget is None:
            return ""
        tasks = self._draw_tasks(round, self._training)
        needed = sum(self._bytes_down(task) + task.num_bytes for task in tasks)
        if self._sent + needed <= budget:
            return ""
        return f"{self._sent:,} of federation.max_bytes ({budget:,}) are used, and a round takes {needed:,}"

    def begin(self) -> RoundResult:
        """Evaluate the adapter as it is given: round 0."""
        return self._evaluate(round=0)

    def open_round(self) -> OpenRound:
        """Draw the next round's clients, and open the round for their results."""
        section, round = self._federation, len(self.losses)
        mu = proximal_mu(self._training, self.losses, section.rounds)
        tasks = self._draw_tasks(round, self._training.model_copy(update={"proximal_mu": mu}))
        return OpenRound(
            self._adapter,
            round,
            tasks,
            self.aggregate.open(self._state, self._adapter),
            self.admission,
            self._on_update,
            section,
            proximal_mu=mu,
            foresee=self._foresee,
            alone=self.aggregate.draw is not None,
        )

    def _draw_tasks(self, round: int, training: Training) -> list[ClientTask]:
        """Draw a round's clients, and make their tasks."""
        section, clients = self._federation, self._fleet.clients
        if self.aggregate.draw:
            cohort = self.aggregate.draw(clients, round, self._adapter)
        else:
            cohort = sample_clients(clients, section, seed=self._seed, round=round)
        layout = self._adapter.layout
        ranks = {client: section.client_ranks[client] if section.client_ranks else None for client in cohort}
        # Clients of one rank share one adapter: it is cut, and packed for the wire, once.
        starts = {rank: adapter_of_rank(self._adapter, rank) for rank in set(ranks.values())}
        # And so do they one mask: each is as long as an adapter.
        trained = {rank: trained_part(layout, section.lora_rule, round, rank) for rank in starts}
        shared = shared_part(layout, section.lora_rule)
        return [
            ClientTask(
                round=round,
                client=client,
                adapter=starts[rank],
                training=training,
                rounds=section.rounds,
                seed=self._seed,
                trains_P=trained[rank],
                trial=self.trial,
                shares_P=shared,
            )
            for client, rank in ranks.items()
        ]

    def close_round(self, round: OpenRound, train_seconds: float | None = None) -> RoundResult:
        """Make the round's aggregate the global adapter, and evaluate it.

        `train_seconds` is what training took where it was not waited for in the round. A round that lost more clients
        than may be leaves the adapter as it was, where the recipe says so.

        Raises:
            TrainingError: more clients are lost than may be, or a loss is no longer a number.
        """
        # Clients evaluate while their updates are waited for.
        evaluate_seconds = round.evaluate_seconds
        if train_seconds is None:
            train_seconds = round.train_seconds - evaluate_seconds
        if aggregated := round.finish():
            self._state, self._adapter = aggregated
        elif round.error and not (round.may_be_skipped and self._federation.on_quorum_lost == "skip"):
            raise round.error
        failpoint("round.aggregated")
        payloads = {task.client: task.num_bytes for task in round.tasks}
        bytes_down = sum(self._bytes_down(task) for task in round.tasks if task.client not in round.unasked)
        bytes_up = sum(payloads[report.client] for report in round.reports)
        self._sent += bytes_down + bytes_up
        return self._evaluate(
            evaluate_seconds,
            round=round.number,
            cohort=tuple(payloads),
            reports=tuple(sorted(round.reports, key=lambda report: report.client)),
            lost=round.lost,
            unasked=round.unasked,
            refused=tuple(why for _, why in round.refused),
            shares=round.shares,
            capped=round.capped,
            scaled=self.admission.scaled,
            proximal_mu=round.proximal_mu,
            train_seconds=train_seconds,
            aggregate_seconds=round.aggregate_seconds,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
        )

    def _bytes_down(self, task: ClientTask) -> int:
        """Return what a client has to be sent: with RoLoRA, one that was there last round lacks only what changed."""
        section = self._federation
        # They keep nothing of a round, and an adapter of a lower rank is sent to them with its zeros.
        if self._elsewhere and task.shares_P is None:
            return task.adapter.num_bytes
        if section.lora_rule == "rolora" and section.fraction == 1 and task.round > 1:
            task = replace(task, trains_P=trained_part(task.adapter.layout, section.lora_rule, task.round - 1))
            return task.num_bytes
        less = section.client_ranks or task.shares_P is not None
        return task.num_bytes if less else task.adapter.num_bytes

    def _evaluate(self, evaluate_seconds: float = 0.0, *, round: int, **trained: Any) -> RoundResult:
        if not self._is_evaluated(round):
            self._fleet.forget_scores()
            self.losses.append(None)
            return RoundResult(
                round, self._adapter, None, {}, evaluate_seconds, None, None, away=self._fleet.away, **trained
            )
        started = time.perf_counter()
        central, clients = self.evaluate_central(self._adapter), self._fleet.evaluate(self._adapter)
        if central is not None:
            check_finite("the loss", central.loss, round=round, stage="central evaluation")
        for client, score in clients.items():
            check_finite("the loss", score.loss, round=round, client=client, stage="evaluation")
        evaluate_seconds += time.perf_counter() - started
        client_loss = mean_loss(clients, self._federation.max_share) if clients else None
        judged = self._judge(central, clients, client_loss)
        known = central, clients, evaluate_seconds, client_loss, judged
        result = RoundResult(round, self._adapter, *known, away=self._fleet.away, **trained)
        self.losses.append(judged)
        failpoint("round.evaluated")
        return result

    def _is_evaluated(self, round: int) -> bool:
        """Return whether a round's adapter is evaluated: that of the last round always, also if the budget ends it."""
        planned = is_evaluated(round, self._federation.rounds, self._evaluate_every)
        return planned or bool(self._budget_ends_before(round + 1))

    def _judge(self, central: Score | None, clients: Mapping[int, Score], client_loss: float | None) -> float:
        """Return the loss by which the adapter is judged: central, or the clients' where nothing is held out centrally.

        Where shares are capped, clients are not taken at their word, and no single one decides.
        """
        losses = {client: score.loss for client, score in clients.items()}
        if not self.losses:
            self.began = losses
        if central is not None:
            return central.loss
        assert client_loss is not None, "nothing is held out"
        if self._federation.max_share is None or not self.losses:
            return client_loss
        began = self.losses[0]
        assert began is not None, "round 0 is always evaluated"
        return judge_losses(losses, self.began, began)


def run_rounds(run: FederatedRun, fleet: Fleet) -> Iterator[RoundResult]:
    """Yield round 0, then each round when it is complete; of a run that was restored, the rounds that are left.

    Raises:
        TrainingError: a loss is no longer a number.
    """
    if not run.losses:
        yield run.begin()
    while not run.finished:
        failpoint("round.begins")
        round = run.open_round()
        # Training happens here: the fleet trains while its next result is asked for. Each update is aggregated before
        # the next client's is made, so that only one of them is held.
        for result in fleet.train(round.tasks):
            round.add(result)
            if round.error:
                break
        yield run.close_round(round)


def run_together(
    trials: Sequence[tuple[FederatedRun, LocalFleet]], train_clients: TrainClients
) -> Iterator[tuple[int, RoundResult | TrainingError]]:
    """Yield the rounds of several runs, each with its run's `trial`: a round of all of them is one call of the engine.

    Where there is more than one, the updates of a round are held until all are there. A run that can't go on ends
    with its error, and the others go on.
    """
    failed: set[int] = set()

    def attempt(run: FederatedRun, step: Callable[[], RoundResult]) -> tuple[int, RoundResult | TrainingError]:
        try:
            return run.trial, step()
        except TrainingError as error:
            failed.add(run.trial)
            return run.trial, error

    for run, _ in trials:
        if not run.losses:
            yield attempt(run, run.begin)
    while going := [(run, fleet) for run, fleet in trials if run.trial not in failed and not run.finished]:
        if len(going) == 1:
            ((run, fleet),) = going
            yield attempt(run, partial(next, run_rounds(run, fleet)))
            continue
        started = time.perf_counter()
        rounds = {run.trial: run.open_round() for run, _ in going}
        arrived: dict[int, list[ClientResult]] = {trial: [] for trial in rounds}
        for result in train_clients([job for run, fleet in going for job in fleet.jobs(rounds[run.trial].tasks)]):
            arrived[result.trial].append(result)
        train_seconds = time.perf_counter() - started
        for run, fleet in going:
            results = fleet.finish(arrived.pop(run.trial))
            yield attempt(run, partial(_close_with, run, rounds[run.trial], results, train_seconds))


def _close_with(
    run: FederatedRun, round: OpenRound, results: Iterable[ClientResult], train_seconds: float
) -> RoundResult:
    """Close a round whose results are all there."""
    for result in results:
        round.add(result)
        if round.error:
            break
    return run.close_round(round, train_seconds)


def _keep_nothing(update: ClientUpdate) -> None:
    """Look at no update."""
