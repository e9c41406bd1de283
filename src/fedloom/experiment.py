"""Wires the parts together: the file to read first.

recipe -> documents -> splits -> token blocks
                                     |
base model -> adapted model -> engine -> fleet -> rounds -> records, adapters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fedloom.adapters.adapter import AdaptedModel, Adapter
from fedloom.data.tokens import (
    TokenBlocks,
)
from fedloom.display import Display, Terminal
from fedloom.errors import FedloomError
from fedloom.evaluation import Score, evaluate
from fedloom.federation.aggregation import STRATEGIES, WEIGHTS
from fedloom.federation.averaging_error import AveragingMeter
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.rounds import run_rounds
from fedloom.machine import describe_machine
from fedloom.model import choose_device
from fedloom.model_card import write_card
from fedloom.planning import Plan
from fedloom.preparation import Prepared, choose_judges, load_adapted_model, prepare
from fedloom.recipe import Recipe, recipe_to_toml
from fedloom.records import Record, Run, RunWriter, check_free, judged_loss, read_run
from fedloom.report.run_report import write_report
from fedloom.sections import EarlyStop
from fedloom.telemetry import Telemetry
from fedloom.trackers import check_tracker, open_tracker, scalars
from fedloom.training.batched import build_batched_engine
from fedloom.training.jobs import ClientJob, ClientUpdate, TrainClients
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
        adapted = load_adapted_model(recipe, prepared.source)
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
    rounds, seed, plan = recipe.federation.rounds, recipe.seed, prepared.plan
    training = recipe.training.model_copy(update={"clients_at_once": plan.clients_at_once})
    engine = ENGINES[plan.engine](adapted, training, rounds=rounds, seed=seed, watch=telemetry.watch)

    def train_clients(adapter: Adapter, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        return telemetry.iterate("training", engine(adapter, jobs))

    def score(adapter: Adapter, blocks: TokenBlocks) -> Score:
        with telemetry.phase("evaluation"):
            batch_size = recipe.evaluation.batch_size
            return evaluate(adapted, adapter, blocks, batch_size=batch_size, watch=telemetry.watch)

    def score_central(adapter: Adapter) -> Score | None:
        return score(adapter, prepared.central) if len(prepared.central) else None

    adapters = writer.folder / "adapters"

    def start() -> Adapter:
        initial = adapted.read()
        adapted.save(initial, adapters / "initial", write_card(recipe, plan, None))
        return initial

    writer.write_status("running", round=0, rounds=rounds)
    losses: list[float] = []
    meter, weigh = AveragingMeter(adapted.layout), WEIGHTS[recipe.federation.strategy.weight_by]

    def on_update(update: ClientUpdate) -> None:
        writer.append_client(update.report)
        meter.add(update.adapter.weights_P, weigh(update.report))

    for result in run_rounds(
        LocalFleet(prepared.clients, train_clients, score, choose_judges(prepared.clients, recipe)),
        STRATEGIES[recipe.federation.strategy.kind](recipe.federation.strategy),
        score_central,
        start(),  # not by a name, which would keep it to the end: of a whole model, a model more
        rounds=rounds,
        fraction=recipe.federation.fraction,
        seed=seed,
        on_update=on_update,
    ):
        record = writer.append_round(result, {**telemetry.take(), **_averaging_error(meter)})
        card = write_card(recipe, plan, record)
        adapted.save(result.adapter, adapters / "last", card)
        losses.append(judged_loss(record))
        if losses[-1] == min(losses):
            adapted.save(result.adapter, adapters / "best", card)
        writer.write_status("running", round=result.round)
        yield record
        if why := stop_early(recipe.federation.early_stop, losses):
            writer.write_status("running", stopped_early=f"{rounds} scheduled, {result.round} completed: {why}")
            return


def stop_early(early_stop: EarlyStop | None, losses: Sequence[float]) -> str | None:
    """Why a run should stop after these losses (round 0 first), or None: no new best for too many rounds."""
    if early_stop is None:
        return None
    best_round, best = 0, losses[0]
    for round, loss in enumerate(losses):
        if loss < best - early_stop.min_delta:
            best_round, best = round, loss
    waited = len(losses) - 1 - best_round
    if waited < early_stop.patience:
        return None
    better = f"better than round {best_round}'s {best:.4f} by more than {early_stop.min_delta:g}"
    return f"no loss {better} in {waited} rounds"


def _averaging_error(meter: AveragingMeter) -> dict[str, Any]:
    error = meter.take()
    return {"lora_error": error.whole, "lora_error_layers": error.layers} if error else {}
