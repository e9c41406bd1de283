"""Wires the parts together: the file to read first.

recipe -> documents -> splits -> token blocks
                                     |
base model -> adapted model -> engine -> fleet -> rounds -> records, adapters
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedloom.errors import RunError
from fedloom.experiment.baselines import describe
from fedloom.experiment.preparation import Prepared, load_adapted_model, prepare
from fedloom.experiment.recorder import open_run
from fedloom.experiment.session import Workshop, identify
from fedloom.experiment.trial import Arm, baselines_of, set_up, train_baselines
from fedloom.federation.fleet import LoyalFleet
from fedloom.federation.rounds import run_rounds
from fedloom.host.failpoints import failpoint
from fedloom.host.signals import Interruption
from fedloom.model.loading import choose_device
from fedloom.monitoring.display import Display, Terminal
from fedloom.monitoring.status import telling
from fedloom.monitoring.telemetry import Telemetry
from fedloom.monitoring.trackers import check_tracker, open_tracker, scalars
from fedloom.progress import Progress
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan
from fedloom.records.run import Run, flatten, read_run
from fedloom.records.state import RunState, committed, damaged_adapters, load_state
from fedloom.records.writer import RunWriter, check_free, default_folder
from fedloom.report.run_report import write_report


@dataclass(frozen=True)
class Venue:
    """Where a run's clients are: how one prepares for them, who asks them, and what is typed for it."""

    prepare: Callable[[Recipe, Display, Callable[[], None]], Prepared]
    """The third is to be called now and then: it raises where the run is to end."""
    open_fleet: Callable[[Recipe, Prepared, Workshop, Path], LoyalFleet | None]
    """The last is the run directory."""
    command: str


HERE = Venue(
    lambda recipe, display, check: prepare(recipe, display),
    lambda recipe, prepared, workshop, folder: None,
    "fedloom run",
)
"""In this process."""


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    display: Display | None = None,
    *,
    resume: bool = False,
    log_to: str | None = None,
    watch: bool = False,
    venue: Venue = HERE,
) -> Run:
    """Carry out a recipe and return its run directory, read; shown on the terminal or notebook, or on `display`.

    Nothing is written before the data, the model and the adapter are there and fit together. The report is written at
    the end, with `watch` after every round too. `log_to` names a tracker that is told each round's numbers. With
    `resume`, a run directory that is there goes on after its last complete round, to the same result.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    display = display or Terminal()
    folder = Path(out) if out else default_folder(recipe.name)
    resume = resume and folder.is_dir()
    if not resume:
        check_free(folder)
    if log_to:
        check_tracker(log_to)
    gpu = choose_device(recipe.model.device).type == "cuda"
    with ExitStack() as stack:
        display = stack.enter_context(telling(display, folder, venue.command))
        stack.callback(display.close)
        interruption = stack.enter_context(Interruption(partial(display.show_step, "stopping")))

        def note(progress: Progress) -> None:
            display.watch(progress)
            interruption.check()

        telemetry = stack.enter_context(Telemetry(gpu=gpu, watch=note))
        writer = stack.enter_context(closing(RunWriter(folder, resume=True))) if resume else None
        if writer:
            check_same_recipe(folder, recipe)
            if writer.status.get("state") == "done" and is_sound(folder):
                if not (folder / "report.html").is_file():
                    write_report(folder)
                display.show_step("done", f"{folder} is complete: nothing is left to do")
                return read_run(folder)
        prepared = venue.prepare(recipe, display, interruption.check)
        interruption.check()
        display.show_plan(prepared.plan)
        failpoint("run.prepared")
        display.show_step("weights", prepared.source.name)
        adapted = load_adapted_model(recipe, prepared.source)
        workshop = Workshop(adapted, prepared.plan.engine, telemetry, display.show_step)
        identity = identify(prepared, workshop.adapted)
        failpoint("run.loaded")
        interruption.check()
        if writer is None:
            writer = stack.enter_context(closing(RunWriter(folder)))
        try:
            state = load_state(folder, partial(display.show_step, "skipped"))
            if state:
                check_same_inputs(folder, state.identity, identity)
                display.show_step("resumed", f"after round {state.round}")
            with open_run(writer, recipe, prepared):
                display.show_folder(folder)
                log = None
                if log_to:
                    log = stack.enter_context(open_tracker(log_to, folder, recipe.model_dump(mode="json")))
                stack.enter_context(telemetry.phase("aggregation"))
                fleet = venue.open_fleet(recipe, prepared, workshop, folder)
                mended = partial(display.show_step, "mended")
                arm = begin_or_restore(recipe, prepared, workshop, writer, state, mended, fleet)
                for result in run_rounds(arm.run, arm.fleet):
                    record = arm.recorder.record(result, arm.run)
                    arm.commit(identity)
                    display.show_round(record)
                    if log:
                        log(record["round"], scalars(record))
                    if watch:
                        report_or_say(folder, display)
                if recipe.baselines:
                    run_baselines(arm, workshop, writer, display)
                    failpoint("baselines.written")
        except KeyboardInterrupt:
            display.show_step("stopped", f"go on with: {venue.command} --resume {folder}")
            raise
        failpoint("run.ends")
    finished = read_run(folder)
    display.show_end(finished, folder / "report.html")
    return finished


def begin_or_restore(
    recipe: Recipe,
    prepared: Prepared,
    workshop: Workshop,
    writer: RunWriter,
    state: RunState | None,
    say: Callable[[str], object],
    fleet: LoyalFleet | None = None,
) -> Arm:
    """A run at its beginning, or after its last complete round."""
    # How many train at once moves results by rounding: a run that goes on has as many as it began with.
    at_once = writer.status.get("clients_at_once") or read_run(writer.folder).plan["clients_at_once"]
    initial = workshop.adapted.read() if state is None else state.adapter
    arm = set_up(recipe, prepared, workshop, writer, initial, clients_at_once=at_once, fleet=fleet)
    if state:
        arm.restore(state, workshop.adapted.read, say)
        writer.write_status("running", round=state.round, resumed=writer.status.get("resumed", 0) + 1)
    else:
        arm.begin(initial)
    return arm


def is_sound(folder: Path) -> bool:
    """Whether the newest state of a run that is done is whole, and the adapters are as it knows them."""
    state = load_state(folder)
    newest = next(iter(committed(folder)), None)
    return bool(state and newest and newest.name == state.name and not damaged_adapters(folder, state))


def report_or_say(folder: Path, display: Display) -> None:
    """Write the report of a run that is still going, which can do without it."""
    try:
        write_report(folder)
    except RunError as error:
        display.show_step("report", str(error))


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the run began with.

    Raises:
        RunError: naming the keys that differ.
    """
    if not (folder / "plan.json").is_file():  # killed before it began
        return
    began, asked = flatten(read_run(folder).recipe), flatten(recipe.model_dump(mode="json"))
    differing = sorted(key for key in began | asked if began.get(key) != asked.get(key))
    if differing:
        raise RunError(
            f"the run began with another recipe: {', '.join(differing[:5])}",
            where=str(folder),
            mend="go on with the recipe.toml in it, or begin a run of its own with another --out",
        )


def check_same_inputs(folder: Path, began: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse to go on with another base model or other documents.

    Raises:
        RunError: naming which.
    """
    if differing := [name for name in found if began.get(name) != found[name]]:
        raise RunError(
            f"the {' and the '.join(differing)} are not those that the run began with",
            where=str(folder),
            mend="bring them back, or begin a run of its own with another --out",
        )


def plan(recipe: Recipe, display: Display | None = None) -> Plan:
    """What a run of the recipe would load and need; trains nothing and writes nothing.

    Raises:
        FedloomError: what a run would be refused for.
    """
    return prepare(recipe, display or Display()).plan


def run_baselines(arm: Arm, workshop: Workshop, writer: RunWriter, display: Display) -> None:
    """Train a finished run's baselines, all of them in one pass where the engine can, and put them on record."""
    display.show_step("baselines", ", ".join(arm.recipe.baselines))
    baselines = baselines_of(arm, workshop, rounds=arm.run.completed)
    train_baselines(baselines, workshop)
    writer.write_json("baselines.json", describe(baselines, arm.run, arm.recipe.baselines))
