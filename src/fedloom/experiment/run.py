"""Wiring of the parts: the file to read first.

recipe -> documents -> splits -> token blocks
                                     |
base model -> adapted model -> engine -> fleet -> rounds -> records, adapters

The arrows say what becomes of what; `run` below says when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedloom.errors import RecipeError, RunError
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.cards import open_session
from fedloom.experiment.clients import Clients, LocalClients
from fedloom.experiment.contributions import find_contributions
from fedloom.experiment.moves import find_moves, note_moves
from fedloom.experiment.preparation import Prepared, prepare, with_tasks
from fedloom.experiment.recorder import open_run
from fedloom.experiment.samples import write_samples
from fedloom.experiment.session import Session, identify
from fedloom.experiment.tasks import gather_tasks
from fedloom.experiment.trial import (
    Trial,
    baselines_of,
    begin_or_restore,
    find_state,
    train_baselines,
    write_baselines,
)
from fedloom.experiment.watchers import open_watchers
from fedloom.federation.aggregation import Aggregate
from fedloom.federation.rounds import run_rounds
from fedloom.host.failpoints import failpoint
from fedloom.model.devices import choose_device
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.trackers import Tracker
from fedloom.recipe.recipe import Recipe, pin
from fedloom.recipe.sections import Strategy
from fedloom.records.check import damaged_own_adapters, missing_results
from fedloom.records.going_on import how_to_go_on
from fedloom.records.plan import Plan
from fedloom.records.run import RoundRecord, Run, has_plan, read_run
from fedloom.records.state import committed, damaged_adapters, load_state
from fedloom.records.writer import RunWriter, check_free, default_folder
from fedloom.report.run_report import write_report


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    display: Observer | None = None,
    *,
    resume: bool = False,
    log_to: str | None = None,
    watch: bool = False,
    clients: Clients | None = None,
    aggregate: Aggregate | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Carry out a recipe and return its run directory, read; shown on the terminal or notebook, or on `display`.

    Nothing is written before the data, the model and the adapter are there and fit together. The report is written at
    the end, with `watch` after every round too. `log_to` names a tracker that is told each round's numbers. With
    `resume`, a run directory that is there goes on after its last complete round, to the same result; the keys of
    `MOVABLE` in `moves.py` may differ then.

    `clients` are those of this process where it is left out. `aggregate` takes the place of the recipe's strategy, and
    `observers` are told of everything that happens.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    clients, display = clients or LocalClients(), display or Terminal()
    folder = Path(out).expanduser() if out else default_folder(recipe.name)
    resume = resume and folder.is_dir()
    if not resume:
        check_free(folder)
    trackers = [Tracker(log_to, recipe.model_dump(mode="json"))] if log_to else []
    everyone = [display, *trackers, *observers]
    gpu = choose_device(recipe.model.device).type == "cuda"
    with ExitStack() as stack:
        watchers = stack.enter_context(open_watchers(folder, clients.command, everyone, gpu=gpu, report=watch))
        writer = stack.enter_context(closing(RunWriter(folder, resume=True))) if resume else None
        moved = find_moves(writer, recipe) if writer else {}
        if writer and is_complete(writer, aggregate):
            watchers.show_step("done", f"{folder} is complete: nothing is left to do")
            for key in moved:
                watchers.show_step("note", f"{key} has no effect on it")
            return read_run(folder)

        # ---- Prepare: all that can be wrong before weights are loaded. Nothing is written yet.
        asked = pin(recipe, read_run(folder).plan) if has_plan(folder) else recipe
        tasks = gather_tasks(recipe.evaluation.tasks, say=watchers.show_step)
        prepared = with_tasks(clients.prepare(asked, watchers), tasks, recipe)
        prepared = name_strategy(prepared, recipe, aggregate)
        watchers.show_plan(prepared.plan)
        failpoint("run.prepared")

        # ---- Load: the base model, once, and what runs over it share.
        watchers.show_step("weights", prepared.source.name)
        say = partial(watchers.show_step, "weights")
        adapted = load_adapted_model(recipe, prepared.source, prepared.plan, say=say)
        session = stack.enter_context(open_session(recipe, prepared, adapted, watchers.telemetry, watchers, folder))
        identity = identify(prepared, adapted)
        failpoint("run.loaded")
        watchers.check()
        writer = writer or stack.enter_context(closing(RunWriter(folder)))

        # ---- Rounds: each is on record, and can't be lost any more, before the next begins.
        stack.enter_context(tell_how_to_go_on(watchers, clients.command, folder))
        state = find_state(folder, identity, watchers)
        with open_run(writer, recipe, prepared):
            watchers.show_folder(folder)
            # Whatever is neither training nor evaluation from here on is aggregation and its records.
            stack.enter_context(session.telemetry.phase("aggregation"))
            fleet = clients.open_fleet(recipe, prepared, session, folder)
            if moved and not prepared.plan.elsewhere:  # who trains elsewhere has places of its own
                note_moves(writer, moved, state.round if state else 0, watchers)
            trial = begin_or_restore(recipe, prepared, session, writer, state, fleet, watchers, aggregate)
            # Observers that count rounds or steps know those of before the run was stopped.
            past_rounds = trial.past_rounds()
            session.begin_stage("rounds")
            watchers.show_past(prepared.plan, past_rounds)
            for past in past_rounds:
                ask_to_stop(trial, watchers, past)
            for result in run_rounds(trial.run, fleet):
                record = trial.record(result)
                trial.commit(identity)
                watchers.show_round(record)
                ask_to_stop(trial, watchers, record)
            if trial.run.stopped_early:
                watchers.show_step("early end", trial.run.stopped_early)
                watchers.show_left(prepared.plan.stages_left(trial.past_rounds(), ended=True))

            # ---- Finish: what the run is set against; the status and the report are written as the block ends.
            if recipe.baselines:
                run_baselines(trial, session, watchers)
                writer.note_work()
            clients.finish(trial, session, watchers.show_step)
            writer.note_work()
            if recipe.contributions:
                find_contributions(trial, session, watchers.show_step)
            trial.ask_tasks(session.begin_stage)
            write_samples(recipe, prepared, session, trial)
        failpoint("run.ends")
    finished = read_run(folder)
    watchers.show_end(finished, folder / "report.html")
    return finished


def is_complete(writer: RunWriter, aggregate: Aggregate | None) -> bool:
    """Return whether a run directory holds a whole run; a report that is missing is written.

    Raises:
        RunError: it began with another strategy of the caller's.
    """
    check_same_strategy(writer.folder, own_strategy(aggregate))
    if writer.status.get("state") != "done" or not is_sound(writer.folder):
        return False
    if not (writer.folder / "report.html").is_file():
        write_report(writer.folder)
    return True


def name_strategy(prepared: Prepared, recipe: Recipe, aggregate: Aggregate | None) -> Prepared:
    """Name a strategy of the caller's own in the plan: records, reports and resume then know of it.

    Raises:
        RecipeError: the recipe has a rule for LoRA's factors, which that strategy would leave out, or protects clients.
    """
    if aggregate is None:
        return prepared
    if recipe.bounds_clients:
        raise RecipeError(
            "aggregate= would see each client's update, and only their noised sum may be seen",
            where='privacy.unit = "client"',
            mend="leave one of them out",
        )
    if recipe.federation.lora_rule != "factors":
        raise RecipeError(
            f'aggregate= takes the place of lora_rule = "{recipe.federation.lora_rule}" too',
            where="federation.lora_rule",
            mend="leave one of them out",
        )
    plan = replace(prepared.plan, strategy=own_strategy(aggregate), shares={}, capped={})
    unused = [line for line in plan.unused if not line.startswith("federation.strategy")]
    if recipe.federation.strategy != Strategy():
        unused.append("federation.strategy has no effect: aggregate= takes its place")
    return replace(prepared, plan=replace(plan, unused=tuple(unused)))


def own_strategy(aggregate: Aggregate | None) -> str | None:
    """Return the name of a strategy of the caller's own, None for the recipe's."""
    return None if aggregate is None else aggregate.name or "the caller's own"


def check_same_strategy(folder: Path, strategy: str | None) -> None:
    """Refuse to go on with another strategy than the run began with, where one of them is the caller's own.

    Raises:
        RunError: naming the strategy that it began with.
    """
    if not has_plan(folder):
        return
    if (began := read_run(folder).plan.get("strategy")) != strategy:
        raise RunError(
            f"the run began with {f'aggregate= ({began})' if began else 'the strategy of its recipe'}",
            where=str(folder),
            mend="go on with the same one, from Python, or begin a run of its own",
        )


def ask_to_stop(trial: Trial, watchers: Observer, record: RoundRecord) -> None:
    """Ask the observers whether the run should end after a round."""
    if why := watchers.stop_after(record):
        trial.stop(why)


@contextmanager
def tell_how_to_go_on(watchers: Observer, command: str, folder: Path) -> Iterator[None]:
    """Say how a run goes on that is interrupted inside."""
    try:
        yield
    except KeyboardInterrupt:
        watchers.show_step("stopped", f"go on with: {how_to_go_on(folder, command)}")
        raise


def is_sound(folder: Path) -> bool:
    """Return whether a run that is done is whole: its newest state, its adapters, and what came of them."""
    state = load_state(folder)
    newest = next(iter(committed(folder)), None)
    if not state or not newest or newest.name != state.name or damaged_adapters(folder, state):
        return False
    run = read_run(folder)
    return not damaged_own_adapters(run, state.adapter.layout) and not missing_results(run)


def plan(recipe: Recipe, display: Observer | None = None) -> Plan:
    """Return what a run of the recipe would load and need; train nothing and write nothing.

    Raises:
        FedloomError: what a run would be refused for.
    """
    display = display or Observer()
    tasks = gather_tasks(recipe.evaluation.tasks, say=display.show_step)
    planned = with_tasks(prepare(recipe, display), tasks, recipe).plan
    display.show_step("weights", "not read for a plan: a run tries them before its first round")
    return planned


def run_baselines(trial: Trial, session: Session, watchers: Observer) -> None:
    """Train a finished run's baselines, all of them in one pass where the engine can, and put them on record."""
    watchers.show_step("baselines", ", ".join(trial.recipe.baselines))
    baselines = baselines_of(trial, session, rounds=trial.run.completed)
    try:
        train_baselines(baselines, session)
    except KeyboardInterrupt:
        watchers.show_step("baselines", "begin again when the run goes on: it keeps them as a whole")
        raise
    write_baselines(trial, session, baselines)
