"""Export of a run's adapter, or of the model with it merged in, proven to give the run's logits."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import reason_of
from fedloom.errors import ModelError, RunError
from fedloom.experiment.building import load_adapted_model, load_base
from fedloom.experiment.preparation import prepare
from fedloom.handover.finished_run import adapter_folder, recipe_of
from fedloom.host.files import replace_folder
from fedloom.model.attention import choose_attention
from fedloom.model.loading import computed_in
from fedloom.model.source import ModelSource
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe

PROOF_BLOCKS = 4
"""Number of hold-out blocks on which the export must give the run's own logits."""
TOLERANCES = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 5e-2}
"""Largest distance of a merged model's logits, relative to their norm: W + BA rounds otherwise than W and BA apart.

Many models compute norms, positions or recurrences in float32 whatever their weights are in."""


def export(
    folder: str | Path, to: str | Path, *, merged: bool = False, which: str = "best", display: Observer | None = None
) -> float:
    """Copy a run's adapter, or write the base model with it merged in, and prove the export by its logits.

    Returns how far the export's logits are from the run's on a few hold-out blocks, relative to their norm: 0.0 for a
    copied adapter.

    Raises:
        RunError: there is no such run or adapter, the target exists, PEFT can't merge this method, or the export does
            not give the same logits.
        ModelError: the base model or the export can't be read.
    """
    display = display or Observer()
    folder, to = Path(folder), Path(to)
    recipe = recipe_of(folder)
    source = adapter_folder(folder, which)
    if to.exists():
        raise RunError("the target exists", where=str(to), mend="name another with --to, or remove it")
    prepared = prepare(recipe, display, predict=False)
    display.show_step("weights", prepared.source.name)
    adapted = load_adapted_model(recipe, prepared.source)
    adapter = adapted.open(source)
    adapted.load(adapter)
    held_out = (prepared.central, *(client.holdout for client in prepared.clients))
    blocks = next(blocks for blocks in held_out if len(blocks))
    tokens_BT = blocks.tokens_NT[:PROOF_BLOCKS].to(adapted.device)
    expected = _logits(adapted.model, tokens_BT)

    # Written and proven beside the target, and renamed only then: a folder at the target is always a proven one.
    with replace_folder(to, existing="refuse") as written:
        display.show_step("writing", str(to))
        if merged and not adapted.is_whole:
            with warnings.catch_warnings():
                # Libraries warn about each other, which nobody here can mend.
                warnings.simplefilter("ignore")
                _save_merged(_merge(adapted, recipe, prepared.source, source), written)
            prepared.source.tokenizer.save_pretrained(written)
        else:
            shutil.copytree(source, written, dirs_exist_ok=True)
        if merged or adapted.is_whole:
            opened = _open_merged(written, expected.dtype, adapted.device)
        else:
            with warnings.catch_warnings():
                # PEFT warns about layers that it knows less well.
                warnings.simplefilter("ignore")
                opened = PeftModel.from_pretrained(load_base(recipe, prepared.source), written)
        display.show_step("proof", f"logits of {len(tokens_BT)} hold-out blocks")
        found = _logits(opened, tokens_BT)
        distance = float((found - expected).norm() / expected.norm())
        # A residual is read back as further ranks of the adapter, which also sum in another order.
        rounds_otherwise = (merged and not adapted.is_whole) or adapter.residual is not None
        # A GPU's kernels are chosen by where in memory a tensor begins, too.
        rounds_otherwise |= adapted.device.type == "cuda"
        # Not `distance >`: a distance that is no number must fail too.
        if not distance <= (TOLERANCES[prepared.plan.dtype] if rounds_otherwise else 0.0):
            raise RunError(
                f"the export does not match the run's adapter: its logits are {distance:.1e} away, relative to their"
                " norm; nothing was written",
                where=str(to),
            )
    return distance


def _merge(adapted: AdaptedModel, recipe: Recipe, model: ModelSource, source: Path) -> PreTrainedModel:
    """Return the base model with the adapter merged into its weights.

    Raises:
        RunError: the weights are packed, or PEFT can't merge this method.
    """
    if recipe.model.quantization:
        raise RunError("an adapter can't be merged into packed weights", where="--merged", mend="leave it out")
    merging = adapted.model
    # The residual of `fedex` stands beside the layers, where PEFT would not merge it; its file has both in one adapter.
    if recipe.federation.lora_rule == "fedex":
        merging = PeftModel.from_pretrained(load_base(recipe, model), source)
    try:
        return merging.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RunError(
            f"PEFT can't merge {recipe.adapter.method} into the model's weights", where="--merged", mend="leave it out"
        ) from error


def _save_merged(model: PreTrainedModel, folder: Path) -> None:
    """Write a merged model, as transformers does.

    Raises:
        RunError: transformers refuses to, because layers share a weight, say.
    """
    try:
        model.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # transformers and safetensors refuse with errors of several kinds
        raise RunError(
            f"the merged model can't be saved: {reason_of(error)}", where="--merged", mend="leave it out"
        ) from error


def _open_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **computed_in(dtype))
    # Transformers has just written these files; if it can't read them, the error may be of any kind.
    except Exception as error:
        raise ModelError(f"the exported model can't be read: {type(error).__name__}", where=str(folder)) from error
    model.set_attn_implementation(choose_attention(model.config))
    opened: torch.nn.Module = model.to(device).eval()
    return opened


@torch.inference_mode()
def _logits(model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=tokens_BT, use_cache=False).logits
    return logits
