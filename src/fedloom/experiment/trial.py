"""A trial: one run over a session, with its fleet, its rounds and its recorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from fedloom.adapters.adapter import Adapter
from fedloom.errors import RunError
from fedloom.evaluation.held_out import Score
from fedloom.experiment.baselines import Baseline, describe, set_up_baselines
from fedloom.experiment.preparation import Prepared
from fedloom.experiment.private import open_aggregate
from fedloom.experiment.recorder import Recorder
from fedloom.experiment.session import Session
from fedloom.experiment.tasks import Examiner, describe_own_answers
from fedloom.federation.aggregation import Aggregate
from fedloom.federation.fleet import Fleet
from fedloom.federation.rounds import FederatedRun, RoundResult
from fedloom.host.failpoints import failpoint
from fedloom.host.files import clear_unfinished, writing
from fedloom.monitoring.observer import Observer
from fedloom.progress import StageName
from fedloom.recipe.recipe import Recipe
from fedloom.records.card import write_tasks
from fedloom.records.evaluations import (
    BASELINES,
    add_evaluations,
    baseline_folder,
    forget_evaluations,
    kept_baselines,
)
from fedloom.records.run import RoundRecord, read_run
from fedloom.records.state import RunState, forget_states, load_state, save_state
from fedloom.records.writer import RECORDS, RunWriter
from fedloom.text import count

AT_ONCE = "training.clients_at_once"
"""Key of how many clients train at once."""


@dataclass(frozen=True)
class Trial:
    """A run that is ready to begin, the clients that train for it, and who writes it down."""

    recipe: Recipe
    prepared: Prepared
    run: FederatedRun
    fleet: Fleet
    recorder: Recorder
    examiner: Examiner | None
    """Whoever asks the run's tasks, if it has some."""

    def begin(self, initial: Adapter) -> None:
        """Start from scratch: remove states, records and half-written adapters."""
        forget_states(self.recorder.writer.folder)
        self.recorder.writer.remove("contributions.json")
        self.recorder.writer.cut_records(dict.fromkeys(RECORDS, 0))
        forget_evaluations(self.recorder.writer.folder, after=None)
        clear_unfinished(self.recorder.adapters)
        self.recorder.begin(initial)

    def record(self, result: RoundResult) -> RoundRecord:
        """Write a round down, keep its adapter, and ask it the tasks where the recipe wants that after this round."""
        record = self.recorder.record(result, self.run)
        every = self.recipe.evaluation.tasks_every
        # Before the round is committed: a committed round has its answers on record, and no other ones.
        if every and result.round and result.round % every == 0:
            if self.examiner:
                self.examiner.examine(result.adapter, {"round": result.round})
            self._ask_clients(result.adapter, result.round)
            self.recorder.forget_measured()
        return record

    def ask_tasks(self, begin_stage: Callable[[StageName], object]) -> None:
        """Ask the base model, the best adapter and those of the baselines the tasks, at the end; cards tell of them.

        And ask clients those that they hold themselves. `begin_stage` is told if there is anything to ask.
        """
        if self.examiner or self.fleet.examined:
            begin_stage("tasks")
        run = read_run(self.recorder.writer.folder)
        assert run.best_round is not None, "round 0 is always evaluated"
        if self.examiner:
            self.examiner.examine_base()
            rounds = {run.best_round: "best", **({0: "initial"} if "round0" in self.recipe.baselines else {})}
            models = [({"round": round}, self.recorder.adapters / name) for round, name in rounds.items()]
            models += kept_baselines(run)
            for model, folder in models:
                self.examiner.examine(self.examiner.adapted.open(folder), model)
        # Of an adapter that was written again, too, and that was asked by `fedloom evaluate`.
        write_tasks(self.recorder.writer.folder)
        if self.fleet.own_parts:  # a client's part is that of the last round
            self._ask_clients(self.run.adapter, self.run.completed, base=True)
        elif self.fleet.examined:
            self._ask_clients(self.recorder.open("best"), run.best_round, base=True)

    def _ask_clients(self, adapter: Adapter, round: int, *, base: bool = False) -> None:
        """Have clients ask an adapter the tasks that they hold themselves, and put the counts on record."""
        # What is counted of a client's own questions, no promise of a private run covers: it is not asked for.
        if not self.fleet.examined or self.recipe.privacy is not None:
            return
        found = self.fleet.ask_tasks(adapter, base=base)
        model = {"round": round, "adapter_sha256": adapter.sha256()}
        add_evaluations(self.recorder.writer.folder, describe_own_answers(found, model))

    def past_rounds(self) -> list[RoundRecord]:
        """Return the records of the rounds that are complete."""
        return [cast(RoundRecord, record) for record in read_run(self.recorder.writer.folder).rounds]

    def stop(self, why: str) -> None:
        """Let no round follow the last one, and put on record why."""
        self.run.stop(why)
        if self.run.stopped_early:  # not after the last round, which ends the run anyway
            self.recorder.writer.write_status("running", stopped_early=self.run.stopped_early)

    def commit(self, identity: Mapping[str, str]) -> None:
        """Make the last round one that is never lost."""
        run, fleet, writer = self.run, self.fleet, self.recorder.writer
        state = RunState(
            adapter=run.adapter,
            strategy=run.strategy_state,
            losses=run.losses,
            scores=fleet.scores,
            optimizers=fleet.optimizer_states,
            own_parts=fleet.own_parts,
            record_bytes=writer.record_bytes,
            record_hashes=writer.record_hashes,
            adapters=self.recorder.saved,
            norms=run.admission.norms,
            began=run.began,
            identity=identity,
        )
        save_state(writer.folder, state)

    def restore(self, state: RunState, read_initial: Callable[[], Adapter], say: Callable[[str], object]) -> None:
        """Go on from a committed round: take back what was written of a later one, and `say` what was mended.

        `read_initial` gives the adapter that the run began with.
        """
        self.recorder.writer.cut_records(state.record_bytes)
        forget_evaluations(self.recorder.writer.folder, after=state.round)
        clear_unfinished(self.recorder.adapters)
        self.recorder.mend(state, read_initial, say)
        sent = sum(record["bytes_down"] + record["bytes_up"] for record in self.past_rounds())
        self.run.restore(state.adapter, state.strategy, state.losses, state.norms, state.began, sent=sent)
        self.fleet.restore(state.optimizers, state.scores, state.own_parts)


def set_up(
    recipe: Recipe,
    prepared: Prepared,
    session: Session,
    writer: RunWriter,
    initial: Adapter,
    fleet: Fleet,
    *,
    clients_at_once: int,
    aggregate: Aggregate | None = None,
    number: int = 0,
) -> Trial:
    """Set up one run over a session, from an adapter that every client starts from.

    `aggregate` takes the place of the recipe's strategy.
    """
    training = recipe.training.model_copy(update={"clients_at_once": clients_at_once})
    recipe = recipe.model_copy(update={"training": training})

    def score_central(adapter: Adapter) -> Score | None:
        if not len(prepared.central):
            return None
        (found,) = session.score([(adapter, prepared.central)], batch_size=recipe.evaluation.batch_size)
        return found

    recorder = Recorder(recipe, prepared.plan, session, writer)
    run = FederatedRun(
        recipe.training,
        recipe.federation,
        recipe.seed,
        fleet,
        aggregate or open_aggregate(recipe, prepared.clients, session.adapted.layout, writer.folder),
        score_central,
        initial,
        on_update=recorder.add_client,
        sizes=fleet.sizes,
        foresee=fleet.foresee,
        trial=number,
        evaluate_every=recipe.evaluation.every,
        elsewhere=bool(prepared.plan.elsewhere),
    )
    return Trial(recipe, prepared, run, fleet, recorder, open_examiner(recipe, prepared, session, writer.folder))


def open_examiner(recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> Examiner | None:
    """Return whoever asks a run's tasks; None where it has none."""
    if not prepared.tasks:
        return None
    how = session.adapted, folder
    return Examiner(prepared.tasks, recipe, prepared.source, *how, say=session.say, watch=session.watch)


def find_state(folder: Path, identity: Mapping[str, str], observer: Observer) -> RunState | None:
    """Return the state after the last complete round, None where there is none.

    Raises:
        RunError: no state is whole, or the base model or the documents are others.
    """
    state = load_state(folder, partial(observer.show_step, "skipped"))
    if state:
        check_same_inputs(folder, state.identity, identity)
        observer.show_step("resumed", f"after round {state.round}")
    return state


def check_same_inputs(folder: Path, began: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse to go on with another base model or other documents.

    Raises:
        RunError: naming which.
    """
    if began.get("hold-outs") != found["hold-outs"]:
        raise RunError(
            "the run began with a fedloom that chose otherwise what a client holds out, so its clients would train on"
            " other documents",
            where=str(folder),
            mend="go on with the fedloom that began it, or begin a run of its own with another --out",
        )
    if differing := [name for name in found if began.get(name) != found[name]]:
        raise RunError(
            f"the {' and the '.join(differing)} are not those that the run began with",
            where=str(folder),
            mend="bring them back, or begin a run of its own with another --out",
        )


def begin_or_restore(
    recipe: Recipe,
    prepared: Prepared,
    session: Session,
    writer: RunWriter,
    state: RunState | None,
    fleet: Fleet,
    observer: Observer,
    aggregate: Aggregate | None = None,
    *,
    initial: Adapter | None = None,
    clients_at_once: int | None = None,
    number: int = 0,
) -> Trial:
    """Return a run at its beginning, or after its last complete round.

    It began with `initial`, or with what is in the model now, and is the pass's run of that `number`.
    """
    # How many train at once moves results by rounding: a run that goes on has as many as it began with.
    at_once = clients_at_once or writer.status.get("clients_at_once") or read_run(writer.folder).plan["clients_at_once"]
    read_initial = session.adapted.read if initial is None else lambda: initial
    start = read_initial() if state is None else state.adapter
    trial = set_up(
        recipe,
        prepared,
        session,
        writer,
        start,
        fleet,
        clients_at_once=at_once,
        aggregate=aggregate,
        number=number,
    )
    if state:
        planned = prepared.plan
        if not (clients_at_once or planned.elsewhere or at_once == planned.clients_at_once):
            observer.show_step("memory", f"{count(at_once, 'client')} at once, as before it was stopped")
        trial.restore(state, read_initial, partial(observer.show_step, "mended"))
    else:
        trial.begin(start)
    if state or "paused" in writer.status:  # it goes on, be it from before its first round
        told = {"round": state.round if state else None, "resumed": writer.status.get("resumed", 0) + 1}
        writer.write_status("running", **told, stopped_early=trial.run.stopped_early)
    return trial


def baselines_of(trial: Trial, session: Session, *, rounds: int, first_trial: int = 0) -> list[Baseline]:
    """Return the baselines that a run's recipe asks for, ready to begin from the adapter that it began with."""
    return set_up_baselines(
        trial.recipe,
        trial.prepared.clients,
        trial.prepared.central,
        session.adapted.open(trial.recorder.adapters / "initial"),
        session.train_clients,
        session.scorer(trial.recipe.evaluation.batch_size),
        rounds=rounds,
        scored_clients=trial.prepared.scored_clients,
        first_trial=first_trial,
    )


def train_baselines(baselines: Sequence[Baseline], session: Session) -> None:
    """Train baselines, all of them in one pass where the engine can; they are numbered as they stand here."""
    if baselines:
        session.begin_stage("baselines")
    for number, result in session.run_all([(baseline.run, baseline.fleet) for baseline in baselines]):
        baselines[number].note(result)


def write_baselines(trial: Trial, session: Session, baselines: Sequence[Baseline]) -> None:
    """Put a run's baselines on record, and keep the best adapter of each: tasks are asked of it."""
    folder = trial.recorder.writer.folder
    clear_unfinished(folder / BASELINES)
    for baseline in baselines:
        if baseline.best and not baseline.error:
            home = folder / baseline_folder(baseline.client)
            with writing(home):
                session.adapted.save(baseline.best, home)
    record = describe(baselines, trial.run, trial.recipe.baselines)
    trial.recorder.writer.write_json("baselines.json", record)
    failpoint("baselines.written")
