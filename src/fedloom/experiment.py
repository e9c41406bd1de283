"""Wires the parts together: the file to read first.

recipe -> documents -> splits -> token blocks
                                     |
base model -> adapted model -> engine -> fleet -> rounds -> records, adapters
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fedloom.baselines import describe
from fedloom.display import Display, Terminal
from fedloom.federation.rounds import run_rounds
from fedloom.model import choose_device
from fedloom.planning import Plan
from fedloom.preparation import load_adapted_model, prepare
from fedloom.recipe import Recipe
from fedloom.records import Run, RunWriter, check_free, default_folder, read_run
from fedloom.report.run_report import write_report
from fedloom.telemetry import Telemetry
from fedloom.trackers import check_tracker, open_tracker, scalars
from fedloom.workshop import Arm, Workshop, baselines_of, open_run, set_up


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    display: Display | None = None,
    *,
    log_to: str | None = None,
    watch: bool = False,
) -> Run:
    """Carry out a recipe and return its run directory, read; shown on the terminal or notebook, or on `display`.

    Nothing is written before the data, the model and the adapter are there and fit together. The report is written at
    the end, with `watch` after every round too. `log_to` names a tracker that is told each round's numbers.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    display = display or Terminal()
    folder = Path(out) if out else default_folder(recipe.name)
    check_free(folder)
    if log_to:
        check_tracker(log_to)
    gpu = choose_device(recipe.model.device).type == "cuda"
    with Telemetry(gpu=gpu, watch=display.watch) as telemetry, ExitStack() as stack:
        stack.callback(display.close)
        prepared = prepare(recipe, display)
        display.show_plan(prepared.plan)
        display.show_step("weights", prepared.source.name)
        workshop = Workshop(load_adapted_model(recipe, prepared), prepared.plan.engine, telemetry)
        try:
            with open_run(folder, recipe, prepared) as writer:
                display.show_folder(folder)
                log = None
                if log_to:
                    log = stack.enter_context(open_tracker(log_to, folder, recipe.model_dump(mode="json")))
                stack.enter_context(telemetry.phase("aggregation"))
                initial, at_once = workshop.adapted.read(), prepared.plan.clients_at_once
                arm = set_up(recipe, prepared, workshop, writer, initial, clients_at_once=at_once)
                for result in run_rounds(arm.run, arm.fleet):
                    record = arm.recorder.record(result, arm.run)
                    display.show_round(record)
                    if log:
                        log(record["round"], scalars(record))
                    if watch:
                        write_report(folder)
                if recipe.baselines:
                    run_baselines(arm, workshop, writer, display)
        except KeyboardInterrupt:
            display.show_step("stopped", f"{folder} holds the rounds that are complete")
            raise
    finished = read_run(folder)
    display.show_end(finished, folder / "report.html")
    return finished


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
    for number, result in workshop.run_all([(baseline.run, baseline.fleet) for baseline in baselines]):
        baselines[number].note(result)
    writer.write_json("baselines.json", describe(baselines, arm.run, arm.recipe.baselines))
