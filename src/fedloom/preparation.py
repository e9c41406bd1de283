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

from fedloom.adapters.adapter import AdaptedModel, build_config
from fedloom.data.documents import Document, load_documents
from fedloom.data.splits import Splits, documents_needed, split_documents
from fedloom.data.tokens import (
    TokenBlocks,
    check_vocabulary,
    distinct_blocks,
    tokenize_documents,
    without_blocks,
)
from fedloom.display import Display
from fedloom.errors import DataError, ModelError, RecipeError
from fedloom.federation.aggregation import check_strategy
from fedloom.federation.fleet import ClientBlocks
from fedloom.federation.sampling import cohort_size
from fedloom.model import ModelSource, build_meta_model, choose_device, choose_dtype, load_model, open_model
from fedloom.planning import ClientPlan, Plan
from fedloom.randomness import derive_seed
from fedloom.recipe import Recipe
from fedloom.training.memory import free_bytes, predict_step

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


def prepare(recipe: Recipe, display: Display) -> Prepared:
    """Documents, splits, tokens and the model's shape: all that can be wrong before weights are loaded."""
    device = choose_device(recipe.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_strategy(recipe.federation.strategy, cohort_size(recipe.data.clients, recipe.federation.fraction))
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
    central, tokenized, shared_blocks = tokenize_splits(splits, source, recipe)
    short = sum(blocks.dropped for blocks in (central, *(b for c in tokenized for b in (c.train, c.holdout))))
    able, left_out = _choose_able(splits, tokenized, recipe)
    clients = tuple(tokenized[client] for client in able)
    if not len(central) and not any(len(client.holdout) for client in clients):
        raise DataError(
            "nothing is held out, so no adapter can be judged",
            where="data.central_holdout, data.client_holdout",
            mend="hold out some documents, centrally or at the clients",
        )
    per_round = cohort_size(len(able), recipe.federation.fraction)
    check_strategy(recipe.federation.strategy, per_round)
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
        judged_tokens=sum(clients[judge].holdout.num_tokens for judge in choose_judges(clients, recipe)),
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
            for documents, blocks in zip((splits.clients[client] for client in able), clients, strict=True)
        ),
        left_out=left_out,
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
        DataError: the central hold-out's documents are all too short, or the tokenizer is not the model's.
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
    clients, shared = [], 0
    for client, holdout in enumerate(holdouts):
        train = tokenize(splits.clients[client].train)
        unseen = without_blocks(train, held_out)
        shared += len(train) - len(unseen)
        clients.append(ClientBlocks(unseen if recipe.data.duplicates == "drop" else train, holdout))
    return central, tuple(clients), shared


def _choose_able(
    splits: Splits, tokenized: Sequence[ClientBlocks], recipe: Recipe
) -> tuple[list[int], tuple[str, ...]]:
    """The clients that have something to train on, and why each of the others has not.

    Raises:
        DataError: none has.
    """
    able = [client for client, blocks in enumerate(tokenized) if len(blocks.train)]
    left_out = tuple(
        _why_idle(client, splits, tokenized) for client, blocks in enumerate(tokenized) if not len(blocks.train)
    )
    if not able:
        raise DataError(
            f"no client has anything to train on: {left_out[0]}",
            where=f'data.source = "{recipe.data.source}"',
            mend="use more or longer documents, fewer clients, a smaller data.client_holdout or a larger"
            " data.max_length",
        )
    return able, left_out


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


def load_adapted_model(recipe: Recipe, prepared: Prepared) -> AdaptedModel:
    """The base model, loaded once, with the adapter that every client starts from."""
    base = load_model(prepared.source, dtype=prepared.plan.dtype, device=prepared.device, seed=recipe.seed)
    return adapt(base, recipe)


def adapt(base: PreTrainedModel, recipe: Recipe) -> AdaptedModel:
    """A base model with the recipe's adapter."""
    freeze_a = recipe.federation.lora_rule == "ffa"
    return AdaptedModel(base, build_config(recipe.adapter, base), recipe.seed, freeze_a=freeze_a)


def choose_judges(clients: Sequence[ClientBlocks], recipe: Recipe) -> Sequence[int]:
    """The clients whose hold-outs are scored: the same ones in every round, so that rounds can be compared."""
    able = [client for client, blocks in enumerate(clients) if len(blocks.holdout)]
    wanted = recipe.evaluation.clients or len(able)
    return sorted(Random(derive_seed(recipe.seed, "judges")).sample(able, min(wanted, len(able))))
