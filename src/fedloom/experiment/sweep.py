"""Sweeps: every combination of a few settings of a recipe, over as few models and in as few passes as can be.

Runs whose base model and adapter are alike share them. Where the engine takes many clients at once, the clients of
all these runs are clients of one pass, and then those of all their baselines: seeds, μ, learning rates, schedules,
batch sizes, epochs, strategies and data ride along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import chain
from pathlib import Path

from fedloom.adapters.adapter import Adapter
from fedloom.errors import FedloomError, RunError, TrainingError
from fedloom.experiment.baselines import Baseline
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.cards import open_session
from fedloom.experiment.clients import local_fleet
from fedloom.experiment.combinations import Combination, expand, open_sweep
from fedloom.experiment.contributions import find_contributions
from fedloom.experiment.costing import clients_at_once, count_cost, count_left, describe_cost
from fedloom.experiment.moves import find_moves, note_moves
from fedloom.experiment.personalising import personalise, write_own_adapters
from fedloom.experiment.preparation import Material, Prepared, gather, prepare, with_tasks
from fedloom.experiment.recorder import open_run
from fedloom.experiment.session import Session, identify
from fedloom.experiment.tasks import gather_tasks
from fedloom.experiment.trial import baselines_of, begin_or_restore, find_state, train_baselines, write_baselines
from fedloom.experiment.watchers import Interruptible, OfOneRun, ToldOnce
from fedloom.federation.rounds import RoundResult
from fedloom.host.files import find_holder, take_lock
from fedloom.host.signals import Interruption
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer, Observers
from fedloom.monitoring.status import status_file
from fedloom.monitoring.telemetry import Telemetry
from fedloom.recipe.axes import Axis, collect_axes
from fedloom.recipe.recipe import Recipe
from fedloom.records.going_on import how_to_go_on
from fedloom.records.run import RoundRecord, Run, flatten, judged_loss, read_run
from fedloom.records.sweep_folder import write_asked
from fedloom.records.writer import RunWriter, default_folder
from fedloom.report.comparison import write_comparison
from fedloom.report.run_report import write_report
from fedloom.text import quote_path
from fedloom.training.engines import choose_engine
from fedloom.training.jobs import OF_ALL_CLIENTS
from fedloom.training.memory import StepMemory


def sweep(
    source: str | Path,
    axes: Sequence[str] = (),
    out: str | Path | None = None,
    display: Observer | None = None,
    *,
    num_random: int | None = None,
) -> Path:
    """Run every combination of `section.key=value,value,...`, or `num_random` of them drawn; return the folder.

    Axes stand in the recipe's `[sweep]` table, too; one that is given here takes its place.

    Each is a run directory of its own in it, and `comparison.html` sets them side by side, as arms where there are
    several seeds. With a folder of an earlier sweep of the same combinations, those that are done stay, and the others
    go on after their last rounds.

    Raises:
        RecipeError: a setting or a combination that no run could have; nothing is run.
        RunError: the folder is something else, or some of the runs failed, or another process is at work in
            them: the others are done.
    """
    display = display or Terminal()
    combinations = list(expand(source, axes, num_random, display.show_step))
    folder = Path(out).expanduser() if out else default_folder(f"{combinations[0].recipe.name}-sweep")
    combinations = open_sweep(folder, combinations)
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        stack.enter_context(closing(take_lock(folder)))
        write_asked(folder, source, axes, num_random)
        done = {combination.name for combination in combinations if read_done(folder / combination.name)}
        left = [combination for combination in combinations if combination.name not in done]
        held = {one.name: who for one in left if (who := find_holder(folder / one.name))}
        left = [combination for combination in left if combination.name not in held]
        shown = Observers(display, stack.enter_context(status_file(folder, "fedloom sweep")))
        interruption = stack.enter_context(Interruption(partial(shown.show_step, "stopping")))
        display = Interruptible([shown], interruption)
        stack.callback(display.close)
        display.show_step("sweep", f"{len(combinations)} runs, {len(done)} of them done, in {folder}")
        for name, who in held.items():
            display.show_step("left out", f"{name}: it is at work by itself ({who})")
        try:
            run_combinations(folder, left, display, errors)
        except KeyboardInterrupt:
            display.show_step("stopped", f"go on with: {how_to_go_on(folder)}")
            raise
    finished = [run for combination in combinations if (run := read_done(folder / combination.name))]
    held = {name: who for name, who in held.items() if not read_done(folder / name)}
    undone = describe_undone(folder, len(combinations), errors, held) if errors or held else None
    by = keys_of_arms(collect_axes(source, axes), finished) if len(finished) > 1 else []
    say = partial(display.show_step, "arms") if by else None
    try:
        for run in finished:
            if not (run.folder / "report.html").is_file():  # there was no room for it, say
                write_report(run.folder)
        if len(finished) > 1:
            write_comparison([run.folder for run in finished], folder, by=by, say=say)
    except RunError as error:
        if not undone:
            raise
        display.show_step("comparison", f"there is none: {error}")  # what failed first is told last
    display.show_sweep_end(rank(finished), folder)
    if undone:
        raise undone
    return folder


def run_combinations(
    folder: Path, combinations: Sequence[Combination], display: Observer, errors: dict[str, str]
) -> None:
    """Run combinations, those that share a base model one after another; `errors` is told what went wrong, by name."""
    ready = prepare_all(combinations, display, errors)
    models = group_by([combination for combination in combinations if combination.name in ready], same_model)
    passes = [[[one.name for one in together] for together in group_by(group, same_pass)] for group in models]
    cost = count_cost(folder, passes, ready)
    for line in describe_cost(cost) if combinations else ():
        display.show_step("cost", line)
    display.show_sweep(cost.stages)
    in_order = [together for model in passes for together in model]

    def show_left(names: list[str], ahead: Collection[str] = ()) -> None:
        """Show what is left from a pass on: a run that failed has nothing, and one that ended early has less.

        `ahead` are its runs that trained a round which is not on record yet. Passes to come are as they were.
        """
        here = count_left(folder, [name for name in names if name not in errors], ready, ahead)
        display.show_left((*here, *chain.from_iterable(cost.passes[in_order.index(names) + 1 :])))

    for group in models:
        try:
            run_group(folder, group, ready, display, errors, show_left)
        except FedloomError as error:  # what they share: the base model, say
            undone = [combination.name for combination in group if not read_done(folder / combination.name)]
            errors |= dict.fromkeys(undone, str(error))


def describe_undone(folder: Path, num_runs: int, errors: Mapping[str, str], held: Mapping[str, str]) -> RunError:
    """Return an error that says which runs of a sweep failed, who is at work in others, and how the sweep goes on."""
    said, first = [], ""
    if errors:
        name, why = next(iter(errors.items()))
        said.append(f"{len(errors)} of {num_runs} runs failed, {name} for one: {why}")
    if held:
        name, who = next(iter(held.items()))
        said.append(f"another process is at work in {len(held)} of {num_runs} runs, {name} for one ({who})")
        first = f"wait for its end, or end it: fedloom stop {quote_path(folder / name)}; then "
    mend = f"the others are done; {first}go on with: {how_to_go_on(folder)}"
    return RunError("; ".join(said), where=str(folder), mend=mend)


def keys_of_arms(axes: Sequence[Axis], runs: Sequence[Run]) -> list[str]:
    """Return the axes beside the seed in which runs over several seeds differ; none where there is one seed alone."""
    flat = [flatten(run.recipe) for run in runs]

    def differ(key: str) -> bool:
        return all(key in recipe for recipe in flat) and len({json.dumps(recipe[key]) for recipe in flat}) > 1

    return [axis.key for axis in axes if axis.key != "seed" and differ(axis.key)] if differ("seed") else []


def read_done(folder: Path) -> Run | None:
    """Return a run that was carried out to its end; None for one that was not."""
    with suppress(RunError):
        run = read_run(folder)
        return run if run.is_done else None
    return None


def same_model(recipe: Recipe) -> Hashable:
    """Return a key: recipes for which it is equal can share an adapted model, and the processes that have it."""
    rule = recipe.federation.lora_rule
    layers = rule if rule in ("ffa", "fedex") else "plain"
    engine = choose_engine(recipe.adapter, recipe.training, recipe.model)
    # What is frozen comes from the seed with "ffa", and other methods than plain LoRA have more than one vector.
    seed = None if engine == "batched" and rule != "ffa" else recipe.seed
    # Where padding counts, attention is built to take masks.
    on = recipe.training.devices
    return recipe.model, recipe.adapter.model_dump_json(), layers, engine, seed, recipe.data.pad_in_loss, on


def same_pass(recipe: Recipe) -> Hashable:
    """Return a key: recipes for which it is equal, and `same_model`, can train in one pass."""
    engine = choose_engine(recipe.adapter, recipe.training, recipe.model)
    alone = None if engine == "batched" and recipe.federation.lora_rule != "fedex" else id(recipe)
    return alone, *(getattr(recipe.training, name) for name in OF_ALL_CLIENTS)


def group_by(combinations: Sequence[Combination], key: Callable[[Recipe], Hashable]) -> list[list[Combination]]:
    """Group combinations whose recipes have an equal key, in the order in which they came."""
    groups: dict[Hashable, list[Combination]] = {}
    for combination in combinations:
        groups.setdefault(key(combination.recipe), []).append(combination)
    return list(groups.values())


def prepare_all(combinations: Sequence[Combination], display: Observer, errors: dict[str, str]) -> dict[str, Prepared]:
    """Prepare combinations, by name; `errors` is told which could not be, and why.

    Those that agree on the model, the data and the seed share their documents, and those whose steps are alike the
    prediction of what memory one takes.
    """
    materials: dict[Hashable, Material] = {}
    predicted: dict[Hashable, StepMemory] = {}
    ready: dict[str, Prepared] = {}
    display = ToldOnce(display)
    for combination in combinations:
        recipe = combination.recipe
        display.check()
        try:
            key = recipe.model, recipe.data, recipe.seed, recipe.bounds_documents, recipe.documents.unit
            if key not in materials:
                materials[key] = gather(recipe, display)
            tasks = gather_tasks(recipe.evaluation.tasks, say=display.show_step)
            prepared = prepare(recipe, display, materials[key], predicted=predicted)
            ready[combination.name] = with_tasks(prepared, tasks, recipe)
        except FedloomError as error:
            errors[combination.name] = str(error)
    return ready


def run_group(
    folder: Path,
    able: Sequence[Combination],
    ready: Mapping[str, Prepared],
    display: Observer,
    errors: dict[str, str],
    show_left: Callable[..., None],
) -> None:
    """Run combinations over one base model; `errors` is told what went wrong, by name.

    `show_left` is called with the names of a pass whenever less is left of it than was planned.
    """
    first, prepared = able[0], ready[able[0].name]
    with Telemetry(gpu=prepared.device.type == "cuda") as telemetry, ExitStack() as stack:
        display.show_step("weights", prepared.source.name)
        say = partial(display.show_step, "weights")
        adapted = load_adapted_model(first.recipe, prepared.source, prepared.plan, say=say)
        watching = Observers(display, telemetry)
        session = stack.enter_context(open_session(first.recipe, prepared, adapted, telemetry, watching, folder))
        first_adapter = adapted.read()
        stack.enter_context(telemetry.phase("aggregation"))
        for together in group_by(able, same_pass):
            names = [combination.name for combination in together]
            display.show_pass(names, [ready[name].plan for name in names])
            at_once = clients_at_once([ready[name] for name in names])
            with ExitStack() as all_open:
                trials: list[OpenTrial] = []
                for combination in together:
                    name, seed = combination.name, combination.recipe.seed
                    initial = first_adapter if seed == first.recipe.seed else adapted.draw(seed)
                    number = len(trials)
                    try:
                        opened = OpenTrial(
                            folder, combination, ready[name], session, initial, at_once, number, display, all_open
                        )
                        trials.append(opened)
                    except FedloomError as error:  # it began with other documents, say
                        errors[name] = str(error)
                run_pass(trials, session, display, errors, partial(show_left, names))


class OpenTrial:
    """A combination under way: its run directory is open, and says in the end how it went."""

    def __init__(
        self,
        folder: Path,
        combination: Combination,
        prepared: Prepared,
        session: Session,
        initial: Adapter,
        clients_at_once: int,
        number: int,
        display: Observer,
        all_open: ExitStack,
    ) -> None:
        self.name, recipe = combination.name, combination.recipe
        self._session, self._display = session, display
        self._exits = all_open.enter_context(ExitStack())
        self._writer = self._exits.enter_context(closing(RunWriter(folder / self.name, resume=True)))
        moved = find_moves(self._writer, recipe)
        session.adapted.load(initial)
        self._identity = identify(prepared, session.adapted)
        named = OfOneRun(self.name, display)
        state = find_state(self._writer.folder, self._identity, named)
        self._exits.enter_context(open_run(self._writer, recipe, prepared))
        if moved:  # by itself, since the sweep had it
            note_moves(self._writer, moved, state.round if state else 0, named)
        self.fleet = local_fleet(recipe, prepared, session, self._writer.folder)
        self.trial = begin_or_restore(
            recipe,
            prepared,
            session,
            self._writer,
            state,
            self.fleet,
            named,
            initial=initial,
            clients_at_once=clients_at_once,
            number=number,
        )
        self.baselines: list[Baseline] = []

    def record(self, result: RoundResult) -> RoundRecord:
        """Write a round down, for good: a sweep that is stopped goes on after it."""
        record = self.trial.record(result)
        self.trial.commit(self._identity)
        return record

    def finish(self) -> None:
        """Do what follows the rounds, and close the run directory: the run and those of its baselines are complete."""
        if self.trial.recipe.baselines:
            write_baselines(self.trial, self._session, self.baselines)
        write_own_adapters(self.trial, self._session)
        if section := self.trial.recipe.personalise:
            personalise(self.trial, self._session, section)
        if self.trial.recipe.contributions:
            find_contributions(self.trial, self._session, self._display.show_step)
        self.trial.ask_tasks(self._session.begin_stage)
        self._exits.close()

    def fail(self, error: FedloomError) -> None:
        """Close the run directory, which says that the run failed and why, as people are told."""
        self._display.show_step("failed", f"{self.name}: {error}")
        with suppress(FedloomError), self._exits:
            raise error


def run_pass(
    trials: Sequence[OpenTrial],
    session: Session,
    display: Observer,
    errors: dict[str, str],
    show_left: Callable[..., None],
) -> None:
    """Train trials together where the engine can, then all their baselines; `errors` is told what went wrong, by name.

    `show_left` is called when a trial has less left than was planned, with the names of those that trained a round
    which is not on record yet.
    """
    session.begin_stage("rounds")
    if errors:
        show_left()  # without the runs that could not be opened
    for opened in trials:
        opened.trial.recorder.runs_together = len(trials)
    for number, result in session.run_all([(opened.trial.run, opened.fleet) for opened in trials]):
        opened = trials[number]
        try:
            if isinstance(result, TrainingError):
                raise result
            display.show_trial(opened.name, opened.record(result))
            if why := opened.trial.run.stopped_early:
                display.show_step("early end", f"{opened.name}: {why}")
        except FedloomError as error:
            errors[opened.name] = str(error)
            opened.trial.run.stop(str(error))
            opened.fail(error)
        if opened.name in errors or opened.trial.run.stopped_early:
            # Of a round of several, all are trained before the first of them is evaluated.
            others = trials[number + 1 :] if session.batched else ()
            show_left([one.name for one in others if one.name not in errors and not one.trial.run.finished])
    whole = [opened for opened in trials if opened.name not in errors]
    baselines: list[Baseline] = []
    for opened in whole:
        rounds = opened.trial.run.completed
        opened.baselines = baselines_of(opened.trial, session, rounds=rounds, first_trial=len(baselines))
        baselines += opened.baselines
    train_baselines(baselines, session)
    # What was measured of the baselines is no round's.
    session.telemetry.take()
    for opened in whole:
        try:
            opened.finish()
        except FedloomError as error:
            errors[opened.name] = str(error)
            opened.fail(error)


def rank(runs: Sequence[Run]) -> list[tuple[str, float, float, int]]:
    """Return name, best and last judged loss and best round of each run, the best first."""
    rows = []
    for run in runs:
        losses = [loss for record in run.rounds if math.isfinite(loss := judged_loss(record))]
        rows.append((run.folder.name, min(losses), losses[-1], run.best_round or 0))
    return sorted(rows, key=lambda row: row[1])
