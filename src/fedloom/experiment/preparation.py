"""Preparation of a run: all that can be wrong before weights are loaded, and the plan.

The way to a plan: recipe -> documents -> splits -> token blocks, and what the model will be -> plan.
"""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import reason_of
from fedloom.data.documents import Documents, load_documents
from fedloom.data.seen_questions import digest_trained
from fedloom.data.splits import Splits, documents_needed, split_documents
from fedloom.data.tokens import ClientBlocks, TokenBlocks
from fedloom.errors import DataError, ModelError
from fedloom.evaluation.batches import tokens_at_once
from fedloom.experiment.arms import check_arms
from fedloom.experiment.building import build_shape, dtype_of, open_source
from fedloom.experiment.later_stages import plan_later
from fedloom.experiment.places import Place, choose_places, here, name_processes
from fedloom.experiment.preview import describe_learning
from fedloom.experiment.private import plan_privacy
from fedloom.experiment.step_memory import predict_memory, step_of, with_real_batches
from fedloom.experiment.tasks import NO_TASKS, LoadedTasks, describe_tasks, find_seen
from fedloom.experiment.tokenizing import find_idle, tokenize_splits
from fedloom.experiment.unused import find_unused
from fedloom.experiment.weighing import plan_shares
from fedloom.federation.lora_rules import check_lora_rule, shared_part
from fedloom.federation.schedule import choose_scored_clients, cohort_size, count_evaluated
from fedloom.federation.strategies import check_strategy
from fedloom.model.attention import is_slow
from fedloom.model.devices import has_in_hardware, open_device
from fedloom.model.loading import check_device_map, check_length, check_quantization
from fedloom.model.source import ModelSource
from fedloom.monitoring.observer import Observer
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import TOO_SHORT, UNANSWERED, ClientPlan, Plan
from fedloom.text import count
from fedloom.training.engines import EngineName, choose_engine, why_not_batched
from fedloom.training.memory import (
    StepMemory,
    check_room,
    free_on_each,
    leaves_no_doubt,
    most_worthwhile,
    share_of_each,
)
from fedloom.training.optimizers import check_optimizer


@dataclass(frozen=True)
class Material:
    """The base model without its weights, and the documents as it sees them: the same for all recipes that agree on
    `model`, `data` and `seed`, and on what is protected, if anything is."""

    source: ModelSource
    found: Documents
    splits: Splits
    central: TokenBlocks
    clients: tuple[ClientBlocks, ...]
    shared_blocks: int
    idle: tuple[str, ...]
    """Reasons why clients have nothing to train on, one for each that has not."""

    @property
    def blocks(self) -> list[TokenBlocks]:
        """Blocks of everybody: the central hold-out, then each client's two parts."""
        return [self.central, *(part for client in self.clients for part in (client.train, client.holdout))]

    @property
    def cuts(self) -> dict[str, int]:
        """Number of documents that were cut, and of the tokens that were cut off plain texts."""
        return {name: sum(getattr(part, name) for part in self.blocks) for name in ("cut", "cut_tokens")}

    @property
    def left_out(self) -> dict[str, int]:
        """Number of documents that gave no block, by reason."""
        too_short, unanswered = (sum(getattr(part, name) for part in self.blocks) for name in ("dropped", "unanswered"))
        return {reason: number for reason, number in ((TOO_SHORT, too_short), (UNANSWERED, unanswered)) if number}


@dataclass(frozen=True)
class Setup:
    """The model as it will be, and who trains it on which device."""

    device: torch.device
    dtype: str
    engine: EngineName
    shape: AdaptedModel
    """The adapted model without values."""
    lora_rule: str
    places: Sequence[Place] = ()
    """Places among which the clients are dealt out; none where one process trains them all."""

    @property
    def payload_bytes(self) -> int:
        """Bytes of one adapter, one way, without a part that each client has of its own."""
        weights_P, shared_P = self.shape.weights_P, shared_part(self.shape.layout, self.lora_rule)
        return (weights_P.numel() if shared_P is None else int(shared_P.sum())) * weights_P.element_size()


@dataclass(frozen=True)
class Room:
    """The clients that may train in one pass."""

    capacity: int
    """Clients that there is room for in a pass, were there as many."""
    fit: int | None = None
    """Clients that free memory holds; None where that was not predicted."""
    memory: StepMemory | None = None
    """Bytes that a step takes; None where that was not predicted."""
    ample: bool = False
    """True where free memory leaves no doubt, so that nothing was predicted."""
    lacking: bool = False
    """True where free memory, by prediction, does not hold a single client."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the base model's weights."""

    source: ModelSource
    device: torch.device
    central: TokenBlocks
    clients: tuple[ClientBlocks, ...]
    scored_clients: Sequence[int]
    """Clients on whose hold-outs adapters are scored, the same ones in every round."""
    plan: Plan
    capacity: int
    """Clients that may train in one pass, were there as many."""
    told: tuple[str, ...] = ()
    """Hashes of the documents of clients elsewhere, by client."""
    tasks: LoadedTasks = NO_TASKS
    """Tasks that the run's models are asked."""
    trained: frozenset[bytes] | None = None
    """Hashes of the texts that are trained on, where tasks are asked and the documents are in this process."""
    memory: StepMemory | None = None
    """Bytes that a step takes; None where that was not predicted."""
    places: Sequence[Place] = ()
    """Places among which the clients are dealt out; none where this process trains them all."""


def prepare(
    recipe: Recipe,
    observer: Observer,
    material: Material | None = None,
    *,
    predict: bool = True,
    predicted: MutableMapping[Hashable, StepMemory] | None = None,
    nodes: Sequence[str] = (),
) -> Prepared:
    """Prepare a run whose clients are in this process.

    `material` is what `gather` gave for a recipe that agrees in what it comes from, where there is some. Without
    `predict`, the memory of a step is predicted only where it decides something. `predicted` keeps predictions for
    recipes whose steps are alike. `nodes` train some of the clients.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    device = open_device(recipe.model.device)
    check_strategy(recipe.federation.strategy, cohort_size(recipe.data.clients, recipe.federation))
    material = material or gather(recipe, observer)
    places = choose_places(recipe.training.devices, device, nodes)
    setup = replace(check(recipe, material.source, device), places=places)
    blocks = [len(client.train) for client in material.clients]
    per_round = check_cohort(recipe, sum(map(bool, blocks)))
    kept = {} if predicted is None else predicted
    # Tasks bring texts of their own, of any number.
    held_out = len(material.central) + sum(len(client.holdout) for client in material.clients)
    bound = None if recipe.evaluation.tasks else held_out
    real = with_real_batches(recipe, blocks)
    room_for = partial(
        measure, real, material.source, setup, held_out=bound, predict=predict, predicted=kept, say=observer.show_step
    )
    room = room_for(per_round)
    holdouts, private = [len(client.holdout) for client in material.clients], recipe.privacy is not None
    scored = choose_scored_clients(holdouts, recipe.evaluation, seed=recipe.seed, private=private)
    plan = plan_privacy(make_plan(recipe, material, setup, room, per_round, scored), recipe, material.clients)
    if recipe.federation.max_share is not None:
        plan = plan_shares(plan, recipe.federation)
    plan = plan_later(plan, recipe, lambda most: room_for(most).capacity)
    plan = replace(plan, unused=find_unused(recipe, plan, setup.shape, material.found, material.blocks))
    # Which questions were trained on tells of documents: of a private run it is not said.
    trained = digest_trained(material.splits.clients) if recipe.evaluation.tasks and not recipe.privacy else None
    parts = material.central, material.clients, scored, plan, room.capacity
    return Prepared(material.source, device, *parts, trained=trained, memory=room.memory, places=places)


def with_tasks(prepared: Prepared, tasks: LoadedTasks, recipe: Recipe) -> Prepared:
    """Return what is prepared with the run's tasks, which its plan tells of."""
    if prepared.trained is not None:
        tasks = find_seen(tasks, prepared.trained)
    return replace(prepared, tasks=tasks, plan=replace(prepared.plan, tasks=describe_tasks(tasks, recipe)))


def gather(recipe: Recipe, observer: Observer) -> Material:
    """Load documents, split them, and tokenize them as the base model sees them.

    Raises:
        DataError: the documents can't be had, or nothing is held out.
        ModelError: the tokenizer can't be had.
    """

    @cache
    def open_once() -> ModelSource:
        observer.show_step("model", recipe.model.source)
        return open_source(recipe, partial(observer.show_step, "model"))

    observer.show_step("documents", recipe.data.source)
    found = load_documents(
        recipe.documents, recipe.seed, documents_needed(recipe.data), open_tokenizer=lambda: open_once().tokenizer
    )
    observer.show_step("splits", count(len(found.documents), "document"))
    splits = split_documents(found, recipe.data, recipe.seed, private=recipe.bounds_documents)
    source = open_once()
    central, clients, shared_blocks = tokenize_splits(splits, source, recipe)
    if not len(central) and not any(len(client.holdout) for client in clients):
        raise DataError(
            "nothing is held out, so no adapter can be judged",
            where="data.central_holdout, data.client_holdout",
            mend="hold out some documents, centrally or at the clients",
        )
    return Material(source, found, splits, central, clients, shared_blocks, find_idle(splits, clients, recipe))


def check(recipe: Recipe, source: ModelSource, device: torch.device, *, room: bool = True) -> Setup:
    """Refuse what does not fit together: model, adapter, engine, lengths; without `room`, whatever memory is free.

    Raises:
        RecipeError, ModelError
    """
    check_quantization(recipe.model.quantization, source)
    check_device_map(recipe.model.device_map, source)
    check_optimizer(recipe.training, device)
    dtype = dtype_of(recipe, device)
    choose_engine(recipe.adapter, recipe.training, recipe.model)  # what it refuses by the recipe needs no model
    shape = build_shape(recipe, source, dtype)
    engine = choose_engine(recipe.adapter, recipe.training, recipe.model, shape)
    check_length(recipe.data.max_length, source, shape.prompt_length)
    check_lora_rule(shape.layout, recipe.federation)
    # The blocks of a .gguf file are unpacked beside the GPU.
    whole = recipe.model.quantization != "packed" and not recipe.model.device_map
    if room and device.type == "cuda" and whole:
        check_room(build_shape(recipe, source, dtype, packed=True), device)
    if recipe.training.gradient_checkpointing and not shape.base.supports_gradient_checkpointing:
        raise ModelError(
            "the model can't checkpoint its layers", where="training.gradient_checkpointing", mend="leave it out"
        )
    return Setup(device, dtype, engine, shape, recipe.federation.lora_rule)


def check_cohort(recipe: Recipe, able: int) -> int:
    """Return how many clients train in a round, of those that are able to.

    Raises:
        RecipeError: too few for the strategy, should as many be lost as may be.
    """
    per_round = cohort_size(able, recipe.federation)
    check_strategy(recipe.federation.strategy, per_round - recipe.federation.max_lost_clients)
    if recipe.contributions and able > 1:
        check_arms(recipe, able - 1)
    return per_round


def measure(
    recipe: Recipe,
    source: ModelSource,
    setup: Setup,
    per_round: int,
    *,
    held_out: int | None,
    predict: bool,
    predicted: MutableMapping[Hashable, StepMemory],
    say: Say,
) -> Room:
    """Find how many clients may train in one pass, on each device where there are several.

    A step's memory is predicted by tracing it, which takes seconds, unless that was `predicted` before. Without
    `predict`, that is left out where the recipe says how many clients train at once, or where the free memory leaves no
    doubt. Clients that train one after another need no number, so theirs is predicted for a plan alone. An evaluation
    has `held_out` blocks at most, if that is known.
    """
    together = setup.engine == "batched"
    # Of a model that is spread over several memories, no one memory holds the weights.
    if not together and (not predict or recipe.model.device_map):
        return Room(1)
    given = recipe.training.clients_at_once
    most = min(share_of_each(per_round, setup.places), most_worthwhile(setup.device)) if together else 1
    wanted = min(most, given or most)
    device, length, free = setup.device, recipe.data.max_length, free_on_each(here(setup.places) or [setup.device])
    scored = tokens_at_once(recipe.evaluation.batch_size, length, device)
    scored = scored if held_out is None else min(scored, held_out * length)
    size: dict[str, Any] = {"clients": wanted, "length": length, "scored_tokens": scored, "device": device}
    if given and not predict:
        return Room(given)
    if not predict and leaves_no_doubt(setup.shape, recipe.training, **size, free=free):
        return Room(most, ample=True)
    try:
        key = step_of(recipe), wanted, scored
        memory = predicted[key] = predicted.get(key) or predict_memory(
            recipe, source, setup.engine, setup.dtype, device, clients=wanted, scored_tokens=scored
        )
    except Exception as error:  # of any kind, from an operation of a model that can't be traced
        # Where a GPU's memory runs out, fewer at once are tried; a processor's may take the whole machine with it.
        at_once = given or (wanted if device.type == "cuda" else 1)
        say("memory", f"a step's can't be predicted, {at_once} at once ({type(error).__name__}: {reason_of(error)})")
        return Room(at_once)
    fit, lacking = memory.clients_that_fit(free), memory.peak_bytes(1) > free
    if not together:
        return Room(1, None, memory, lacking=lacking)
    return Room(given or min(fit, memory.clients_worthwhile(device)), fit, memory, lacking=lacking)


def make_plan(
    recipe: Recipe, material: Material, setup: Setup, room: Room, per_round: int, scored_clients: Sequence[int]
) -> Plan:
    """Put together what is known of a run in this process."""
    at_once = min(share_of_each(per_round, setup.places), room.capacity)
    return Plan.of(
        recipe.name,
        recipe.training,
        recipe.federation,
        model=material.source.name,
        model_revision=material.source.revision,
        model_weights=material.source.weights.record if material.source.weights else {},
        dtype=setup.dtype,
        device=str(setup.device),
        engine=setup.engine,
        slow_attention=is_slow(material.source.config),
        slow_dtype=not has_in_hardware(setup.dtype, setup.device),
        parameters=setup.shape.num_parameters,
        base_parameters=setup.shape.num_base_parameters,
        trainable_parameters=setup.shape.layout.size,
        payload_bytes=setup.payload_bytes,
        data=material.found.source,
        data_revision=material.found.revision,
        documents=len(material.found.documents),
        skipped={**material.found.skipped, **material.left_out},
        rows=material.found.rows,
        files_left_out=material.found.files_left_out,
        learns=describe_learning(
            recipe.data, [client.train for client in material.clients], material.found.other_columns
        ),
        central_documents=len(material.splits.central),
        central_tokens=material.central.num_tokens,
        clients=[
            ClientPlan.of(
                recipe.training,
                train_documents=len(documents.train),
                holdout_documents=len(documents.holdout),
                blocks=blocks.train.num_units,
                tokens=blocks.train.num_tokens,
                holdout_tokens=blocks.holdout.num_tokens,
            )
            for documents, blocks in zip(material.splits.clients, material.clients, strict=True)
        ],
        scored_clients=scored_clients,
        left_out=material.idle,
        clients_per_round=per_round,
        clients_at_once=at_once,
        clients_that_fit=room.fit,
        peak_bytes=room.memory.peak_bytes(at_once) if room.memory else None,
        ample_memory=room.ample,
        lacks_memory=room.lacking,
        audit=material.splits.audit,
        shared_blocks=material.shared_blocks,
        **material.cuts,
        duplicates=recipe.data.duplicates,
        ways=name_ways(recipe, setup),
        processes=len(setup.places),
        evaluated_rounds=count_evaluated(recipe.federation.rounds, recipe.evaluation.every),
    )


def name_ways(recipe: Recipe, setup: Setup) -> tuple[str, ...]:
    """Name the settings of speed and memory that a plan shows nowhere else."""
    graphs = setup.engine == "batched" and setup.device.type == "cuda" and not recipe.training.gradient_checkpointing
    options = recipe.model.quantization_options
    packed = f" ({options.type}, {options.compute_dtype}{', double' * options.double})" if options else ""
    lack = why_not_batched(recipe.adapter, recipe.training, recipe.model, setup.shape)
    ways = {
        f"as batched has no {lack}": bool(lack),
        f"{recipe.model.quantization} weights{packed}": recipe.model.quantization is not None,
        "weights that don't fit read anew for every pass": recipe.model.device_map is not None,
        "each layer computed twice": recipe.training.gradient_checkpointing,
        name_processes(setup.places): bool(setup.places),
        "no CUDA graph": graphs and not recipe.training.cuda_graph,
    }
    return tuple(way for way, taken in ways.items() if taken)
