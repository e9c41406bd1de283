"""Wires the parts together: the file to read first.

recipe -> documents -> splits -> token blocks
                                     |
base model -> adapted model -> engine -> fleet -> rounds -> records, adapters
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fedloom.adapters.adapter import AdaptedModel, Adapter, build_config
from fedloom.data.documents import Document, load_documents
from fedloom.data.splits import Splits, documents_needed, split_documents
from fedloom.data.tokens import (
    TokenBlocks,
    check_vocabulary,
    distinct_blocks,
    tokenize_documents,
    without_blocks,
)
from fedloom.display import Display, Terminal
from fedloom.errors import DataError, FedloomError, ModelError, RecipeError
from fedloom.evaluation import Score, evaluate
from fedloom.federation.aggregation import STRATEGIES, WEIGHTS, check_strategy
from fedloom.federation.averaging_error import AveragingMeter
from fedloom.federation.fleet import ClientBlocks, LocalFleet
from fedloom.federation.rounds import run_rounds
from fedloom.federation.sampling import cohort_size
from fedloom.machine import describe_machine
from fedloom.model import ModelSource, build_meta_model, choose_device, choose_dtype, load_model, open_model
from fedloom.model_card import write_card
from fedloom.planning import ClientPlan, Plan
from fedloom.recipe import Recipe, recipe_to_toml
from fedloom.records import Record, Run, RunWriter, check_free, judged_loss, read_run
from fedloom.report.run_report import write_report
from fedloom.sections import EarlyStop
from fedloom.telemetry import Telemetry
from fedloom.trackers import check_tracker, open_tracker, scalars
from fedloom.training.batched import build_batched_engine
from fedloom.training.jobs import ClientJob, ClientUpdate, TrainClients
from fedloom.training.memory import free_bytes, predict_step
from fedloom.training.reference import build_reference_engine

ENGINES: dict[str, Callable[..., TrainClients]] = {
    "batched": build_batched_engine,
    "reference": build_reference_engine,
}
"""Both give the same updates: `batched` in one pass over all clients, `reference` plainly."""

BATCHED_METHODS = ("lora",)
"""PEFT methods that the engine `batched` has."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the base model's weights."""

    source: ModelSource
    device: torch.device
    central: TokenBlocks
    clients: tuple[ClientBlocks, ...]
    plan: Plan


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


def prepare(recipe: Recipe, display: Display) -> Prepared:
    """Documents, splits, tokens and the model's shape: all that can be wrong before weights are loaded."""
    device = choose_device(recipe.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    per_round = cohort_size(recipe.data.clients, recipe.federation.fraction)
    check_strategy(recipe.federation.strategy, per_round)
    display.show_step("documents", recipe.data.source)
    found = load_documents(recipe.data, recipe.seed, documents_needed(recipe.data))
    display.show_step("splits", f"{len(found.documents):,} documents")
    splits = split_documents(found, recipe.data, recipe.seed)
    display.show_step("model", recipe.model.source)
    source = open_model(recipe.model.source, recipe.model.revision, say=partial(display.show_step, "model"))
    if source.max_length is not None and recipe.data.max_length > source.max_length:
        raise ModelError(
            f"{recipe.data.max_length} tokens are more than the model's {source.max_length}",
            where="data.max_length",
            mend=f"at most {source.max_length}",
        )
    central, clients, shared_blocks = tokenize_splits(splits, source, recipe)
    short = sum(blocks.dropped for blocks in (central, *(b for c in clients for b in (c.train, c.holdout))))
    engine = choose_engine(recipe.training.engine, recipe.adapter.method)
    dtype = choose_dtype(recipe.model.dtype, device)

    def build_shape(layers: int) -> AdaptedModel:
        return adapt(build_meta_model(source, dtype=dtype, layers=layers), recipe)

    shape = build_shape(source.num_layers)
    if recipe.training.gradient_checkpointing and not shape.model.get_base_model().supports_gradient_checkpointing:
        raise ModelError(
            "the model can't checkpoint its layers", where="training.gradient_checkpointing", mend="leave it out"
        )
    at_once, memory, fit = 1, None, None
    if engine == "batched":
        wanted = min(per_round, recipe.training.clients_at_once or per_round)
        length = recipe.data.max_length
        with suppress(Exception):  # of any kind, from an operation of a model that can't be traced
            memory = predict_step(
                build_shape,
                source.num_layers,
                recipe.training,
                clients=wanted,
                length=length,
                device=device,
                alike=not any("." in target for target in recipe.adapter.targets or ()),
            )
        if memory:
            fit = memory.clients_that_fit(free_bytes(device))
            at_once = min(fit, memory.clients_worthwhile(device))
        at_once = min(per_round, recipe.training.clients_at_once or at_once)
    plan = Plan(
        name=recipe.name,
        model=source.name,
        model_revision=source.revision,
        dtype=dtype,
        device=str(device),
        engine=engine,
        parameters=shape.num_parameters,
        trainable_parameters=shape.layout.size,
        data=found.source,
        data_revision=found.revision,
        documents=len(found.documents),
        skipped={**found.skipped, **({"too short": short} if short else {})},
        central_documents=len(splits.central),
        central_tokens=central.num_tokens,
        clients=tuple(
            ClientPlan(
                train_documents=len(documents.train),
                holdout_documents=len(documents.holdout),
                blocks=len(blocks.train),
                tokens=blocks.train.num_tokens,
                holdout_tokens=blocks.holdout.num_tokens,
                steps=recipe.training.epochs * -(-len(blocks.train) // recipe.training.batch_size),
            )
            for documents, blocks in zip(splits.clients, clients, strict=True)
        ),
        clients_per_round=per_round,
        clients_at_once=at_once,
        clients_that_fit=fit,
        peak_bytes=memory.peak_bytes(at_once) if memory else None,
        audit=splits.audit,
        shared_blocks=shared_blocks,
        duplicates=recipe.data.duplicates,
        rounds=recipe.federation.rounds,
        epochs=recipe.training.epochs,
        proximal_mu=recipe.training.proximal_mu,
        payload_bytes=shape.weights_P.numel() * shape.weights_P.element_size(),
    )
    return Prepared(source, device, central, clients, plan)


def choose_engine(wanted: str, method: str) -> str:
    """`auto` is `batched` for the methods that it has, and `reference` for the others.

    Raises:
        RecipeError: `batched` is asked for with a method that it does not have.
    """
    if wanted == "auto":
        return "batched" if method in BATCHED_METHODS else "reference"
    if wanted == "batched" and method not in BATCHED_METHODS:
        raise RecipeError(
            f'the engine batched has no method "{method}"',
            where="training.engine",
            mend=f"use reference or auto, or one of: {', '.join(BATCHED_METHODS)}",
        )
    return wanted


def tokenize_splits(
    splits: Splits, source: ModelSource, recipe: Recipe
) -> tuple[TokenBlocks, tuple[ClientBlocks, ...], int]:
    """Token blocks of the central hold-out and of every client, and how many training blocks are also held out.

    Raises:
        DataError: a client has nothing to train on, nothing is held out, or the tokenizer is not the model's.
    """

    def tokenize(documents: Sequence[Document]) -> TokenBlocks:
        blocks = tokenize_documents(documents, source.tokenizer, recipe.data)
        check_vocabulary(blocks, source.vocabulary_size)
        return blocks

    where = f'data.source = "{recipe.data.source}"'
    central, holdouts = tokenize(splits.central), [tokenize(client.holdout) for client in splits.clients]
    if splits.central and not len(central):
        raise DataError(
            "each of the central hold-out's documents has fewer than two tokens",
            where=where,
            mend="use longer documents",
        )
    held_out = set().union(*map(distinct_blocks, [central, *holdouts]))
    if not held_out:
        raise DataError(
            "nothing is held out, so no adapter can be judged",
            where="data.central_holdout, data.client_holdout",
            mend="hold out some documents, centrally or at the clients",
        )
    clients, shared = [], 0
    for client, holdout in enumerate(holdouts):
        train = tokenize(splits.clients[client].train)
        unseen = without_blocks(train, held_out)
        shared += len(train) - len(unseen)
        clients.append(ClientBlocks(unseen if recipe.data.duplicates == "drop" else train, holdout))
        if not len(clients[client].train):
            raise DataError(
                f"client {client} has nothing to train on: {train.dropped} documents have fewer than two tokens,"
                f" {len(train) - len(unseen)} blocks equal a held-out one",
                where=where,
                mend="use longer documents, fewer clients or a larger data.max_length",
            )
    return central, tuple(clients), shared


def load_adapted_model(recipe: Recipe, prepared: Prepared) -> AdaptedModel:
    """The base model, loaded once, with the adapter that every client starts from."""
    base = load_model(prepared.source, dtype=prepared.plan.dtype, device=prepared.device, seed=recipe.seed)
    return adapt(base, recipe)


def adapt(base: PreTrainedModel, recipe: Recipe) -> AdaptedModel:
    """A base model with the recipe's adapter."""
    freeze_a = recipe.federation.lora_rule == "ffa"
    return AdaptedModel(base, build_config(recipe.adapter, base), recipe.seed, freeze_a=freeze_a)


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

    initial = adapted.read()
    adapters = writer.folder / "adapters"
    adapted.save(initial, adapters / "initial", write_card(recipe, plan, None))
    writer.write_status("running", round=0, rounds=rounds)
    losses: list[float] = []
    meter, weigh = AveragingMeter(adapted.layout), WEIGHTS[recipe.federation.strategy.weight_by]

    def on_update(update: ClientUpdate) -> None:
        writer.append_client(update.report)
        meter.add(update.adapter.weights_P, weigh(update.report))

    for result in run_rounds(
        LocalFleet(prepared.clients, train_clients, score),
        STRATEGIES[recipe.federation.strategy.kind](recipe.federation.strategy),
        score_central,
        initial,
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
