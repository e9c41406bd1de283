"""Hands a run's adapter on, or the model with it merged in, proven to be the same."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import ModelError, RunError
from fedloom.experiment.preparation import load_adapted_model, load_base, prepare
from fedloom.handover.finished_run import adapter_folder, recipe_of
from fedloom.host.files import replace_folder
from fedloom.model.attention import choose_attention
from fedloom.model.source import ModelSource
from fedloom.monitoring.display import Display
from fedloom.recipe.recipe import Recipe

PROOF_BLOCKS = 4
"""Hold-out blocks on which what was written must give the run's own logits."""
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
"""Of a merged model's logits, relative to their norm: W + BA rounds otherwise than W and BA apart."""


def export(
    folder: str | Path, to: str | Path, *, merged: bool = False, which: str = "best", display: Display | None = None
) -> float:
    """Copy a run's adapter, or write the base model with it merged in, and prove it by its logits.

    Returns the distance of the logits of what was written from the run's, relative to their norm, on a few hold-out
    blocks: 0.0 for a copied adapter.

    Raises:
        RunError: no such run or adapter, the target exists, or what was written is not the same.
    """
    display = display or Display()
    folder, to = Path(folder), Path(to)
    recipe = recipe_of(folder)
    source = adapter_folder(folder, which)
    if to.exists():
        raise RunError("the target exists", where=str(to), mend="name another with --to, or remove it")
    prepared = prepare(recipe, display)
    display.show_step("weights", prepared.source.name)
    adapted = load_adapted_model(recipe, prepared.source)
    adapter = adapted.open(source)
    adapted.load(adapter)
    held_out = (prepared.central, *(client.holdout for client in prepared.clients))
    blocks = next(blocks for blocks in held_out if len(blocks))
    tokens_BT = blocks.tokens_NT[:PROOF_BLOCKS].to(adapted.device)
    expected = _logits(adapted.model, tokens_BT)

    with replace_folder(to, existing="refuse") as written:
        display.show_step("writing", str(to))
        if merged and not adapted.is_whole:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries about each other
                _merge(adapted, recipe, prepared.source, source).save_pretrained(written)
            prepared.source.tokenizer.save_pretrained(written)
        else:
            shutil.copytree(source, written, dirs_exist_ok=True)
        if merged or adapted.is_whole:
            opened = _open_merged(written, expected.dtype, adapted.device)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT about layers that it knows less well
                opened = PeftModel.from_pretrained(load_base(recipe, prepared.source), written)
        display.show_step("proof", f"logits of {len(tokens_BT)} hold-out blocks")
        found = _logits(opened, tokens_BT)
        distance = float((found - expected).norm() / expected.norm())
        rounds_otherwise = (merged and not adapted.is_whole) or adapter.residual is not None
        if not distance <= (TOLERANCES[prepared.plan.dtype] if rounds_otherwise else 0.0):
            raise RunError(
                f"what was written is not the run's adapter: its logits lie {distance:.1e} apart", where=str(to)
            )
    return distance


def _merge(adapted: AdaptedModel, recipe: Recipe, model: ModelSource, source: Path) -> PreTrainedModel:
    """The base model with the adapter in its weights.

    Raises:
        RunError: PEFT can't do that for this method.
    """
    if recipe.model.quantization:
        raise RunError("packed weights can't take an adapter in", where="--merged", mend="leave it out")
    merging = adapted.model
    if recipe.federation.lora_rule == "fedex":  # whose residual stands beside the layers: PEFT's file has all in one
        merging = PeftModel.from_pretrained(load_base(recipe, model), source)
    try:
        return merging.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RunError(
            f"PEFT can't merge {recipe.adapter.method} into the model's weights", where="--merged", mend="leave it out"
        ) from error


def _open_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # of any kind: it is transformers' own writing that it can't read
        raise ModelError(f"what was written can't be read: {type(error).__name__}", where=str(folder)) from error
    model.set_attn_implementation(choose_attention(model.config))
    opened: torch.nn.Module = model.to(device).eval()
    return opened


@torch.inference_mode()
def _logits(model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=tokens_BT, use_cache=False).logits
    return logits
