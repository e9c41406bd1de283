"""Wires the parts together: the file to read first.

recipe -> documents -> splits -> token blocks
                                     |
base model -> adapted model -> engine -> fleet -> rounds -> records, adapters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fedloom.adapters.adapter import AdaptedModel, Adapter
from fedloom.data.tokens import TokenBlocks
from fedloom.display import Display, Terminal
from fedloom.errors import FedloomError
from fedloom.evaluation import Score, evaluate
from fedloom.federation.aggregation import WEIGHTS
from fedloom.federation.averaging_error import AveragingMeter
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.lora_rules import LORA_RULES
from fedloom.federation.rounds import FederatedRun, RoundResult, run_rounds
from fedloom.machine import describe_machine
from fedloom.model import choose_device
from fedloom.model_card import write_card
from fedloom.planning import Plan
from fedloom.preparation import Prepared, choose_judges, load_adapted_model, prepare
from fedloom.recipe import Recipe, recipe_to_toml
from fedloom.records import Record, Run, RunWriter, check_free, read_run
from fedloom.report.run_report import write_report
from fedloom.telemetry import Telemetry
from fedloom.trackers import check_tracker, open_tracker, scalars
from fedloom.training.batched import build_batched_engine
from fedloom.training.jobs import ClientJob, ClientResult, ClientUpdate, TrainClients
from fedloom.training.reference import build_reference_engine

ENGINES: dict[str, Callable[..., TrainClients]] = {
    "batched": build_batched_engine,
    "reference": build_reference_engine,
}
"""Both give the same updates: `batched` in one pass over all clients, `reference` plainly."""


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
    folder = Path(out) if out else Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_free(folder)
    if log_to:
        check_tracker(log_to)
    gpu = choose_device(recipe.model.device).type == "cuda"
    with Telemetry(gpu=gpu, watch=display.watch) as telemetry, ExitStack() as stack:
        prepared = prepare(recipe, display)
        display.show_plan(prepared.plan)
        display.show_step("weights", prepared.source.name)
        adapted = load_adapted_model(recipe, prepared)
        resolved = recipe.model_dump(mode="json")

        writer = RunWriter(folder)
        try:
            writer.write_text("recipe.toml", recipe_to_toml(recipe))
            writer.write_json("resolved.json", resolved)
            writer.write_json("environment.json", describe_machine())
            writer.write_json("plan.json", prepared.plan.to_json())
            display.show_folder(folder)
            log = stack.enter_context(open_tracker(log_to, folder, resolved)) if log_to else None
            stack.enter_context(telemetry.phase("aggregation"))
            for record in train_and_record(recipe, prepared, adapted, writer, telemetry):
                display.show_round(record)
                if log:
                    log(record["round"], scalars(record))
                if watch:
                    write_report(folder)
            writer.write_status("done")
        except KeyboardInterrupt:
            _write_end(writer, "interrupted")
            display.show_step("stopped", f"{folder} holds the rounds that are complete")
            raise
        except FedloomError as error:
            _write_end(writer, "failed", error=str(error))
            raise
        except BaseException as error:
            _write_end(writer, "failed", error=f"bug: {type(error).__name__}")
            raise
        finally:
            display.close()
    report = write_report(folder)
    finished = read_run(folder)
    display.show_end(finished, report)
    return finished


def _write_end(writer: RunWriter, state: str, **more: Any) -> None:
    """How a run ended that was not meant to, and a report that says so; what failed is raised, not what comes after."""
    writer.write_status(state, **more)
    with suppress(Exception):
        write_report(writer.folder)


def plan(recipe: Recipe, display: Display | None = None) -> Plan:
    """What a run of the recipe would load and need; trains nothing and writes nothing.

    Raises:
        FedloomError: what a run would be refused for.
    """
    return prepare(recipe, display or Display()).plan


def train_and_record(
    recipe: Recipe, prepared: Prepared, adapted: AdaptedModel, writer: RunWriter, telemetry: Telemetry
) -> Iterator[Record]:
    """Every round's record, as soon as the round is complete; the last and the best adapter kept.

    What is neither training nor evaluation here is aggregation and its records.
    """
    run, fleet, recorder = set_up(recipe, prepared, adapted, writer, telemetry)
    for result in run_rounds(run, fleet):
        yield recorder.record(result, run)


def set_up(
    recipe: Recipe, prepared: Prepared, adapted: AdaptedModel, writer: RunWriter, telemetry: Telemetry, arm: int = 0
) -> tuple[FederatedRun, LocalFleet, Recorder]:
    """A run that is ready to begin, the clients that train for it, and who writes it down."""
    training = recipe.training.model_copy(update={"clients_at_once": prepared.plan.clients_at_once})
    recipe = recipe.model_copy(update={"training": training})
    engine = ENGINES[prepared.plan.engine](adapted, telemetry.watch)

    def train_clients(jobs: Sequence[ClientJob]) -> Iterator[ClientResult]:
        return telemetry.iterate("training", engine(jobs))

    def score(adapter: Adapter, blocks: TokenBlocks) -> Score:
        with telemetry.phase("evaluation"):
            batch_size = recipe.evaluation.batch_size
            return evaluate(adapted, adapter, blocks, batch_size=batch_size, watch=telemetry.watch)

    def score_central(adapter: Adapter) -> Score | None:
        return score(adapter, prepared.central) if len(prepared.central) else None

    recorder = Recorder(recipe, prepared.plan, adapted, writer, telemetry)
    fleet = LocalFleet(prepared.clients, train_clients, score, choose_judges(prepared.clients, recipe))
    aggregate = LORA_RULES[recipe.federation.lora_rule](recipe.federation)
    initial = adapted.read()
    recorder.begin(initial)
    run = FederatedRun(recipe, fleet, aggregate, score_central, initial, on_update=recorder.add_client, arm=arm)
    return run, fleet, recorder


class Recorder:
    """Writes a run down, round by round, and keeps its adapters."""

    def __init__(
        self, recipe: Recipe, plan: Plan, adapted: AdaptedModel, writer: RunWriter, telemetry: Telemetry
    ) -> None:
        self._recipe, self._plan, self._adapted = recipe, plan, adapted
        self._writer, self._telemetry = writer, telemetry
        self._meter = AveragingMeter(adapted.layout)
        self._weigh = WEIGHTS[recipe.federation.strategy.weight_by]
        self._best = math.inf

    def begin(self, initial: Adapter) -> None:
        """Keep the adapter that every client starts from."""
        self._save(initial, "initial", write_card(self._recipe, self._plan, None))
        self._writer.write_status("running", round=0, rounds=self._recipe.federation.rounds)

    def add_client(self, update: ClientUpdate) -> None:
        """One client's work in a round."""
        self._writer.append_client(update.report)
        self._meter.add(update.adapter.weights_P, self._weigh(update.report))

    def record(self, result: RoundResult, run: FederatedRun) -> Record:
        """One round, and whether the run ends with it."""
        error = self._meter.take()
        measured = {"lora_error": error.whole, "lora_error_layers": error.layers} if error else {}
        record = self._writer.append_round(result, {**self._telemetry.take(), **measured})
        card = write_card(self._recipe, self._plan, record)
        self._save(result.adapter, "last", card)
        if result.judged_loss <= self._best:
            self._best = result.judged_loss
            self._save(result.adapter, "best", card)
        stopped = {"stopped_early": run.stopped_early} if run.stopped_early else {}
        self._writer.write_status("running", round=result.round, **stopped)
        return record

    def _save(self, adapter: Adapter, name: str, card: str) -> None:
        self._adapted.save(adapter, self._writer.folder / "adapters" / name, card)
