"""From a recipe to everything that a run needs: documents, splits, tokens, the model's shape and the plan.

recipe -> documents -> splits -> token blocks, and what the model will be -> plan
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from transformers import PreTrainedModel

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import build_config
from fedloom.data.documents import Document, Documents, load_documents
from fedloom.data.splits import Splits, documents_needed, split_documents
from fedloom.data.tokens import (
    ClientBlocks,
    TokenBlocks,
    check_vocabulary,
    distinct_blocks,
    tokenize_documents,
    without_blocks,
)
from fedloom.errors import DataError, ModelError
from fedloom.federation.aggregation import check_strategy
from fedloom.federation.lora_rules import check_lora_rule
from fedloom.federation.schedule import cohort_size
from fedloom.model.loading import build_meta_model, check_quantization, choose_device, choose_dtype, load_model
from fedloom.model.source import ModelSource, open_model
from fedloom.monitoring.display import Display
from fedloom.recipe.methods import METHODS
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import ClientPlan, Plan
from fedloom.seeds import derive_seed
from fedloom.training.engines import choose_engine
from fedloom.training.memory import free_bytes, predict_step


@dataclass(frozen=True)
class Material:
    """The base model without its weights, and the documents as it sees them: the same for all recipes that agree on
    `model`, `data` and `seed`."""

    source: ModelSource
    found: Documents
    splits: Splits
    central: TokenBlocks
    clients: tuple[ClientBlocks, ...]
    shared_blocks: int
    idle: tuple[str, ...]
    """Why each client that has nothing to train on has not."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the base model's weights."""

    source: ModelSource
    device: torch.device
    central: TokenBlocks
    clients: tuple[ClientBlocks, ...]
    plan: Plan
    capacity: int
    """Clients that may train in one pass, were there as many."""
    told: tuple[str, ...] = ()
    """Hashes of what clients elsewhere hold, by client."""


def gather(recipe: Recipe, display: Display) -> Material:
    """Documents, splits and tokens, and the tokenizer that they take."""
    display.show_step("documents", recipe.data.source)
    found = load_documents(recipe.data, recipe.seed, documents_needed(recipe.data))
    display.show_step("splits", f"{len(found.documents):,} documents")
    splits = split_documents(found, recipe.data, recipe.seed)
    display.show_step("model", recipe.model.source)
    source = open_model(recipe.model.source, recipe.model.revision, say=partial(display.show_step, "model"))
    central, clients, shared_blocks = tokenize_splits(splits, source, recipe)
    if not len(central) and not any(len(client.holdout) for client in clients):
        raise DataError(
            "nothing is held out, so no adapter can be judged",
            where="data.central_holdout, data.client_holdout",
            mend="hold out some documents, centrally or at the clients",
        )
    return Material(source, found, splits, central, clients, shared_blocks, find_idle(splits, clients, recipe))


def prepare(recipe: Recipe, display: Display, material: Material | None = None) -> Prepared:
    """Documents, splits, tokens and the model's shape: all that can be wrong before weights are loaded.

    `material` is what `gather` gave for a recipe with the same `model`, `data` and `seed`, where there is some.
    """
    device = choose_device(recipe.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_strategy(recipe.federation.strategy, cohort_size(recipe.data.clients, recipe.federation))
    material = material or gather(recipe, display)
    source, found, splits = material.source, material.found, material.splits
    central, clients, shared_blocks = material.central, material.clients, material.shared_blocks
    check_quantization(recipe.model.quantization, source, device)
    per_round = cohort_size(sum(1 for client in clients if len(client.train)), recipe.federation)
    check_strategy(recipe.federation.strategy, per_round - recipe.federation.max_lost_clients)
    short = sum(blocks.dropped for blocks in (central, *(b for c in clients for b in (c.train, c.holdout))))
    engine = choose_engine(recipe)
    dtype = dtype_of(recipe, device)
    shape = build_shape(recipe, source, dtype)
    check_length(recipe.data.max_length, source, shape)
    check_lora_rule(shape.layout, recipe.federation)
    if recipe.training.gradient_checkpointing and not shape.base.supports_gradient_checkpointing:
        raise ModelError(
            "the model can't checkpoint its layers", where="training.gradient_checkpointing", mend="leave it out"
        )
    capacity, memory, fit = 1, None, None
    if engine == "batched":
        wanted = min(per_round, recipe.training.clients_at_once or per_round)
        length = recipe.data.max_length
        with suppress(Exception):  # of any kind, from an operation of a model that can't be traced
            memory = predict_step(
                partial(build_shape, recipe, source, dtype),
                source.num_layers,
                recipe.training,
                clients=wanted,
                length=length,
                device=device,
                alike=not recipe.adapter.options and not any("." in name for name in recipe.adapter.targets or ()),
            )
        if memory:
            fit = memory.clients_that_fit(free_bytes(device))
            capacity = min(fit, memory.clients_worthwhile(device))
        capacity = recipe.training.clients_at_once or capacity
    at_once = min(per_round, capacity)
    judges = choose_judges([len(client.holdout) for client in clients], recipe)
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
        judged_tokens=sum(clients[judge].holdout.num_tokens for judge in judges),
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
        left_out=material.idle,
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
    return Prepared(source, device, central, clients, plan, capacity)


def check_length(max_length: int, source: ModelSource, adapted: AdaptedModel) -> None:
    """Refuse blocks that, with the adapter's prompt before them, are longer than the model.

    Raises:
        ModelError
    """
    prompt = adapted.prompt_length
    if source.max_length is not None and max_length + prompt > source.max_length:
        raise ModelError(
            f"{max_length} tokens{f' after a prompt of {prompt}' if prompt else ''} are more than the model's"
            f" {source.max_length}",
            where="data.max_length",
            mend=f"at most {source.max_length - prompt}",
        )


def dtype_of(recipe: Recipe, device: torch.device) -> str:
    """What the base model is loaded in: the recipe's choice, or the device's, or what the method can be trained in."""
    if recipe.model.dtype == "auto" and METHODS[recipe.adapter.method].float32_base:
        return "float32"
    return choose_dtype(recipe.model.dtype, device)


def tokenize_for(source: ModelSource, recipe: Recipe, documents: Sequence[Document]) -> TokenBlocks:
    """Documents as a base model sees them.

    Raises:
        DataError: the tokenizer is not the model's.
    """
    blocks = tokenize_documents(documents, source.tokenizer, recipe.data)
    check_vocabulary(blocks, source.vocabulary_size)
    return blocks


def tokenize_splits(
    splits: Splits, source: ModelSource, recipe: Recipe
) -> tuple[TokenBlocks, tuple[ClientBlocks, ...], int]:
    """Token blocks of the central hold-out and of every client, and how many training blocks are also held out.

    Raises:
        DataError: the central hold-out's documents are all too short, or the tokenizer is not the model's.
    """

    tokenize = partial(tokenize_for, source, recipe)
    where = f'data.source = "{recipe.data.source}"'
    central, holdouts = tokenize(splits.central), [tokenize(client.holdout) for client in splits.clients]
    if splits.central and not len(central):
        raise DataError(
            "each of the central hold-out's documents has fewer than two tokens",
            where=where,
            mend="use longer documents",
        )
    held_out = set().union(*map(distinct_blocks, [central, *holdouts]))
    clients, shared = [], 0
    for client, holdout in enumerate(holdouts):
        train = tokenize(splits.clients[client].train)
        unseen = without_blocks(train, held_out)
        shared += len(train) - len(unseen)
        clients.append(ClientBlocks(unseen if recipe.data.duplicates == "drop" else train, holdout))
    return central, tuple(clients), shared


def find_idle(splits: Splits, tokenized: Sequence[ClientBlocks], recipe: Recipe) -> tuple[str, ...]:
    """Why each of the clients that have nothing to train on has not; they hold out what they have, and never train.

    Raises:
        DataError: none has.
    """
    left_out = tuple(
        _why_idle(client, splits, tokenized) for client, blocks in enumerate(tokenized) if not len(blocks.train)
    )
    if len(left_out) == len(tokenized):
        raise DataError(
            f"no client has anything to train on: {left_out[0]}",
            where=f'data.source = "{recipe.data.source}"',
            mend="use more or longer documents, fewer clients, a smaller data.client_holdout or a larger"
            " data.max_length",
        )
    return left_out


def _why_idle(client: int, splits: Splits, tokenized: Sequence[ClientBlocks]) -> str:
    """What became of the documents of a client that has nothing to train on."""
    documents, train = splits.clients[client], tokenized[client].train
    counts = {
        "held out": len(documents.holdout),
        "dropped as a copy of held-out text": splits.audit.dropped[client],
        "too short": train.dropped,
        "equal to held-out text within data.max_length": len(documents.train) - train.dropped,
    }
    why = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    return f"client {client} of {len(tokenized)}: {why or 'no document'}"


def build_shape(recipe: Recipe, source: ModelSource, dtype: str, layers: int | None = None) -> AdaptedModel:
    """The adapted model without its values, and where PEFT can do with it without memory for them."""
    base = build_meta_model(source, dtype=dtype, layers=layers, attention=_attention(recipe))
    if METHODS[recipe.adapter.method].needs_values:
        base = base.to_empty(device="cpu")
        for value in base.state_dict().values():
            value.zero_()
    return adapt(base, recipe, source)


def load_adapted_model(recipe: Recipe, source: ModelSource) -> AdaptedModel:
    """The base model, loaded once, with the adapter that every client starts from."""
    return adapt(load_base(recipe, source), recipe, source)


def load_base(recipe: Recipe, source: ModelSource) -> PreTrainedModel:
    """The base model as the recipe wants it."""
    device = choose_device(recipe.model.device)
    return load_model(
        source,
        dtype=dtype_of(recipe, device),
        device=device,
        attention=_attention(recipe),
        quantization=recipe.model.quantization,
    )


def adapt(base: PreTrainedModel, recipe: Recipe, source: ModelSource) -> AdaptedModel:
    """A base model with the recipe's adapter."""
    rule = recipe.federation.lora_rule
    return AdaptedModel(
        base,
        build_config(recipe.adapter, base),
        recipe.seed,
        freeze_a=rule == "ffa",
        residuals=rule == "fedex",
        tokenizer=source.tokenizer,
    )


def _attention(recipe: Recipe) -> str | None:
    """`sdpa` where a prefix makes keys more than queries, which attention without masks can't tell from a cache."""
    return "sdpa" if recipe.adapter.method == "prefix_tuning" else None


def choose_judges(holdout_blocks: Sequence[int], recipe: Recipe) -> Sequence[int]:
    """The clients whose hold-outs are scored: the same ones in every round, so that rounds can be compared."""
    able = [client for client, blocks in enumerate(holdout_blocks) if blocks]
    wanted = recipe.evaluation.clients or len(able)
    return sorted(Random(derive_seed(recipe.seed, "judges")).sample(able, min(wanted, len(able))))
