"""The base model with a run's adapter merged into its weights, and models opened as transformers opens them."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedloom.adapters.peft_config import reason_of
from fedloom.errors import ModelError, RunError
from fedloom.experiment.building import load_base
from fedloom.handover.proof import Subject
from fedloom.model.attention import choose_attention, settle_attention
from fedloom.model.loading import computed_in
from fedloom.model.source import gguf_arguments
from fedloom.model.spreading import with_stand_ins


def merge(subject: Subject) -> PreTrainedModel:
    """Return the base model with the adapter merged into its weights.

    Raises:
        RunError: the weights are packed, or PEFT can't merge this method.
    """
    recipe = subject.recipe
    if recipe.model.quantization:
        raise RunError("an adapter can't be merged into packed weights", where="--merged", mend="leave it out")
    merging = subject.adapted.model
    # The residual of `fedex` stands beside the layers, where PEFT would not merge it; its file has both in one adapter.
    if recipe.federation.lora_rule == "fedex":
        merging = open_with_peft(subject, subject.folder)
    try:
        return merging.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise RunError(
            f"PEFT can't merge {recipe.adapter.method} into the model's weights", where="--merged", mend="leave it out"
        ) from error


def open_with_peft(subject: Subject, folder: Path) -> PeftModel:
    """Open an adapter's folder over a base model that is loaded anew, as PEFT does."""
    base = load_base(subject.recipe, subject.source)
    with with_stand_ins(base):
        return PeftModel.from_pretrained(base, folder)


def save_merged(model: PreTrainedModel, folder: Path) -> None:
    """Write a merged model, as transformers does.

    Raises:
        RunError: transformers refuses to, because layers share a weight, say.
    """
    try:
        model.save_pretrained(folder)
    # A disk that takes no more, in the words of either.
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # transformers and safetensors refuse with errors of several kinds
        raise RunError(
            f"the merged model can't be saved: {reason_of(error)}", where="--merged", mend="leave it out"
        ) from error


def open_merged(place: Path, subject: Subject) -> torch.nn.Module:
    """Open a folder or a GGUF file as transformers does.

    Raises:
        ModelError: transformers can't read it.
    """
    location = gguf_arguments(place) if place.is_file() else {"pretrained_model_name_or_path": place}
    # Transformers does not read from a GGUF file how Llama 3 lengthens its positions.
    if place.is_file() and subject.source.config.rope_parameters["rope_type"] != "default":
        location["config"] = copy.deepcopy(subject.source.config)
    dtype, device = subject.logits_MV.dtype, subject.adapted.device
    try:
        # Transformers shows a progress bar for a GGUF file that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(trust_remote_code=False, **location, **computed_in(dtype))
    # These files have just been written; if transformers can't read them, the error may be of any kind.
    except Exception as error:
        raise ModelError(f"the exported model can't be read: {reason_of(error)}", where=str(place)) from error
    model.set_attn_implementation(choose_attention(model.config))
    opened: torch.nn.Module = model.to(device).eval()
    settle_attention(model)
    return opened
