"""Builds the model of a recipe: its shape without values, or the base model with the adapter on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import build_config, reason_of
from fedloom.data.documents import Document
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import ClientBlocks, TokenBlocks, check_vocabulary, tokenize_documents
from fedloom.errors import ModelError
from fedloom.evaluation.batches import tokens_at_once
from fedloom.model.attention import MASKLESS, choose_attention
from fedloom.model.devices import choose_dtype, open_device
from fedloom.model.loading import build_meta_model, check_length, load_model
from fedloom.model.packed import shape_as_packed
from fedloom.model.packed_shape import BITS, pack_shape
from fedloom.model.source import ModelSource, open_model
from fedloom.recipe.methods import METHODS
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import Plan
from fedloom.training.memory import predict_step, room_for_weights


def dtype_of(recipe: Recipe, device: torch.device) -> str:
    """Return the base model's dtype: the recipe's choice, or the device's, or what the method can be trained in."""
    if recipe.model.dtype == "auto" and METHODS[recipe.adapter.method].float32_base:
        return "float32"
    return choose_dtype(recipe.model.dtype, device)


def open_source(recipe: Recipe, say: Callable[[str], object] = str, *, convert: bool = True) -> ModelSource:
    """Open the base model of a recipe, without its weights; without `convert`, pickles are refused all the same."""
    model = recipe.model
    return open_model(
        model.source, model.revision, say, weights_revision=model.weights_revision, convert=convert and model.convert
    )


def build_shape(
    recipe: Recipe, source: ModelSource, dtype: str, layers: int | None = None, *, packed: bool = False
) -> AdaptedModel:
    """Return the adapted model without its values, and where PEFT can do with it without memory for them.

    With `packed`, layers that are packed have the size that they take in memory, and not their own.
    """
    base = build_meta_model(source, dtype=dtype, layers=layers, attention=_attention(recipe, source))
    if packed and recipe.model.quantization in BITS:
        pack_shape(base, recipe.model.quantization, recipe.model.quantization_options)
    if packed and recipe.model.quantization == "packed" and source.file:
        shape_as_packed(base, source.file)
    if METHODS[recipe.adapter.method].needs_values:
        base = base.to_empty(device="cpu")
        for value in base.state_dict().values():
            value.zero_()
    return adapt(base, recipe, source)


def load_adapted_model(
    recipe: Recipe, source: ModelSource, plan: Plan | None = None, *, say: Callable[[str], object] = str
) -> AdaptedModel:
    """Load the base model, once, with the adapter that every client starts from; `say` is told as in `load_model`.

    Raises:
        ModelError: something else is trained than the plan says.
    """
    adapted = adapt(load_base(recipe, source, say=say), recipe, source)
    if plan and adapted.layout.size != plan.trainable_parameters:
        raise ModelError(
            f"the loaded model has {adapted.layout.size:,} trainable parameters, not {plan.trainable_parameters:,} as"
            " planned",
            where="[adapter]",
            mend="name the layers in adapter.targets",
        )
    return adapted


def load_base(recipe: Recipe, source: ModelSource, *, say: Callable[[str], object] = str) -> PreTrainedModel:
    """Load the base model as the recipe wants it.

    Raises:
        ModelError: it can't be read, or there is no room for it.
    """
    device = open_device(recipe.model.device)
    dtype = dtype_of(recipe, device)
    return load_model(
        source,
        dtype=dtype,
        device=device,
        attention=_attention(recipe, source),
        quantization=recipe.model.quantization,
        quantization_options=recipe.model.quantization_options,
        room=_room(recipe, source, dtype, device) if recipe.model.device_map else None,
        say=say,
    )


def _room(recipe: Recipe, source: ModelSource, dtype: str, device: torch.device) -> dict[int | str, int]:
    """Return the bytes of weights that have room on the device beside a client's step, and in memory."""
    length = recipe.data.max_length
    scored = tokens_at_once(recipe.evaluation.batch_size, length, device)
    try:
        step = predict_step(
            partial(build_shape, recipe, source, dtype),
            source.num_layers,
            recipe.training,
            clients=1,
            length=length,
            device=device,
            scored_tokens=scored,
            packed=recipe.data.window == "pack",
            private=recipe.bounds_documents,
        )
    except Exception as error:  # of any kind, from an operation of a model that can't be traced
        raise ModelError(
            f"how much room a step needs can't be predicted ({reason_of(error)})",
            where="model.device_map",
            mend="leave it out",
        ) from error
    # The engine reference makes whole logits, and so does scoring where the head is elsewhere: with their gradient, in
    # float32, and once more in the loss.
    logits = 16 * source.vocabulary_size * max(scored, recipe.training.batch_size * length)
    return room_for_weights(step.peak_bytes(1) - step.base_bytes + logits, device)


def adapt(base: PreTrainedModel, recipe: Recipe, source: ModelSource) -> AdaptedModel:
    """Put the recipe's adapter on a base model."""
    rule = recipe.federation.lora_rule
    return AdaptedModel(
        base,
        build_config(recipe.adapter, base),
        recipe.seed,
        freeze_a=rule == "ffa",
        residuals=rule == "fedex",
        tokenizer=source.tokenizer,
    )


def tokenize_for(
    source: ModelSource, recipe: Recipe, documents: Sequence[Document], *, units: bool = False
) -> TokenBlocks:
    """Return documents as a base model sees them, each a block of its own or several.

    Blocks know their unit, as in `tokenize_documents`, with `units` and where the recipe bounds what is told of one.

    Raises:
        DataError: the tokenizer is not the model's, or there is no room for the blocks.
        ModelError: the base model is shorter than a block.
    """
    # Before anything has that length. A server's own look at it is no reason for a client to believe it.
    check_length(recipe.data.max_length, source)
    blocks = tokenize_documents(documents, source.tokenizer, recipe.data, units=units or recipe.bounds_documents)
    check_vocabulary(blocks.tokens_NT, source.tokenizer, source.vocabulary_size)
    return blocks


def hold(recipe: Recipe, train: TokenBlocks, holdout: TokenBlocks) -> ClientBlocks:
    """Return what a client holds, with the blocks to train on packed where the recipe says so.

    What is held out stays as it is: sorted by length, it has hardly any padding.
    """
    return ClientBlocks(pack_blocks(train) if recipe.data.window == "pack" else train, holdout)


def _attention(recipe: Recipe, source: ModelSource) -> str:
    """Choose attention with masks where padding counts, or where a prefix makes keys more than queries."""
    # Attention without masks takes more keys than queries for a cache.
    masked = recipe.data.pad_in_loss or recipe.adapter.method == "prefix_tuning"
    attention = choose_attention(source.config, masked=masked)
    if recipe.data.window == "pack" and attention != MASKLESS:
        raise ModelError(
            f"texts can't be packed for this model ({source.config.model_type}): not every token of it sees all that"
            " stands to its left",
            where="data.window",
            mend='use "truncate", or another base model',
        )
    return attention
