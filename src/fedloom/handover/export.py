"""Export of a run's adapter, or of the model with it merged in, proven to give the run's logits."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedloom.adapters.gguf_adapter import open_gguf_adapter, write_gguf_adapter
from fedloom.adapters.peft_config import reason_of
from fedloom.data.prompting import Prompting
from fedloom.errors import ModelError, RunError
from fedloom.experiment.building import load_base
from fedloom.handover.proof import TOLERANCES, Subject, open_subject
from fedloom.host.files import new_file, replace_folder, writing
from fedloom.model.attention import choose_attention
from fedloom.model.gguf_writer import KINDS, write_gguf
from fedloom.model.loading import computed_in
from fedloom.model.source import gguf_arguments
from fedloom.monitoring.observer import Observer

GGUF = ".gguf"
TEMPLATE_FILE = "chat_template.jinja"
"""Name by which transformers and vLLM find a chat template beside a tokenizer or an adapter."""
KIND_TOLERANCES = {"f32": 0.0, "f16": 1e-2, "q8_0": 2e-1}
"""Further distance of logits that the format of a GGUF file's weights allows: four times that of SmolLM2-135M."""
DEFAULT_KIND = "f16"


def export(
    folder: str | Path,
    to: str | Path,
    *,
    merged: bool = False,
    kind: str | None = None,
    which: str = "best",
    display: Observer | None = None,
) -> float:
    """Copy a run's adapter, or write the base model with it merged in, and prove the export by its logits.

    A target that ends in `.gguf` is a file for llama.cpp; `kind` is the format of a whole model's weights in it.
    Returns how far the export's logits are from the run's on a few hold-out blocks, relative to their norm: 0.0 for a
    copied adapter.

    Raises:
        RunError: there is no such run or adapter, the target exists or can't be written, PEFT can't merge this method,
            llama.cpp can't hold it, or the export does not give the same logits.
        ModelError: the base model or the export can't be read.
    """
    display = display or Observer()
    to = Path(to)
    check_target(to)
    if kind and not (to.suffix == GGUF and merged):
        raise RunError("only a merged .gguf file has a choice of formats", where="--as", mend="leave it out")
    if kind and kind not in KINDS:
        raise RunError(f'no format "{kind}"', where="--as", mend=f"known: {', '.join(KINDS)}")
    subject = open_subject(Path(folder), which, display)
    return write_export(subject, to, merged=merged, kind=kind, display=display)


def check_target(to: Path) -> None:
    """Refuse a target that exists.

    Raises:
        RunError
    """
    try:
        exists = to.exists()
    except OSError as error:  # a name that is too long, say
        raise RunError(f"not a possible target ({error.strerror})", where="--to", mend="name another") from error
    if exists:
        raise RunError("the target exists", where=str(to), mend="name another with --to, or remove it")


def write_export(
    subject: Subject, to: Path, *, merged: bool = False, kind: str | None = None, display: Observer
) -> float:
    """Write an export of an opened run as `export` does."""
    # Written and proven beside the target, and renamed only then: what is at the target is always proven.
    place = new_file(to) if to.suffix == GGUF else replace_folder(to, existing="refuse")
    with writing(to, "name another with --to"), place as written:
        display.show_step("writing", str(to))
        whole = merged or subject.adapted.is_whole
        if to.suffix == GGUF:
            opened, tolerance = _write_gguf(subject, written, kind or DEFAULT_KIND, whole=whole)
        else:
            opened, tolerance = _write_folder(subject, written, merged=merged)
        display.show_step("proof", f"logits of {len(subject.tokens_BT)} hold-out blocks")
        return subject.prove(opened, to, tolerance)


def _write_folder(subject: Subject, written: Path, *, merged: bool) -> tuple[torch.nn.Module, float]:
    """Write a folder that PEFT or transformers opens, and open it; return it with how far its logits may be."""
    adapted = subject.adapted
    if merged and not adapted.is_whole:
        with warnings.catch_warnings():
            # Libraries warn about each other, which nobody here can mend.
            warnings.simplefilter("ignore")
            _save_merged(_merge(subject), written)
        subject.source.tokenizer.save_pretrained(written)
    else:
        shutil.copytree(subject.folder, written, dirs_exist_ok=True)
    if subject.chat_template is not None:
        (written / TEMPLATE_FILE).write_text(subject.chat_template, encoding="utf-8")
    if merged or adapted.is_whole:
        opened = _open_merged(written, subject)
    else:
        with warnings.catch_warnings():
            # PEFT warns about layers that it knows less well.
            warnings.simplefilter("ignore")
            opened = PeftModel.from_pretrained(load_base(subject.recipe, subject.source), written)
    # A residual is read back as further ranks of the adapter, which also sum in another order.
    rounds_otherwise = (merged and not adapted.is_whole) or subject.adapter.residual is not None
    # A GPU's kernels are chosen by where in memory a tensor begins, too.
    rounds_otherwise |= adapted.device.type == "cuda"
    return opened, TOLERANCES[subject.dtype] if rounds_otherwise else 0.0


def _write_gguf(subject: Subject, file: Path, kind: str, *, whole: bool) -> tuple[torch.nn.Module, float]:
    """Write a file for llama.cpp, and open it; return it with how far its logits may be."""
    name, template = subject.recipe.name, subject.chat_template
    if not whole:
        write_gguf_adapter(subject.adapted, subject.folder, file, name=name, chat_template=template)
        base = load_base(subject.recipe, subject.source)
        return open_gguf_adapter(file, base), TOLERANCES[subject.dtype]
    model = subject.adapted.base if subject.adapted.is_whole else _merge(subject)
    write_gguf(model, subject.source, file, kind, name=name, chat_template=template, end_of_turn=_end_of_turn(subject))
    return _open_merged(file, subject), TOLERANCES[subject.dtype] + KIND_TOLERANCES[kind]


def _end_of_turn(subject: Subject) -> int | None:
    """Return the token by which the run's chat template ends a turn; None where the tokenizer's own end does."""
    prompting = Prompting(subject.recipe.data, subject.source.tokenizer, chats=subject.recipe.data.is_chat)
    prompting.close()
    return next((stop for stop in prompting.stops if stop != subject.source.tokenizer.eos_token_id), None)


def _merge(subject: Subject) -> PreTrainedModel:
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
        merging = PeftModel.from_pretrained(load_base(recipe, subject.source), subject.folder)
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


def _open_merged(place: Path, subject: Subject) -> torch.nn.Module:
    """Open a folder or a GGUF file as transformers does.

    Raises:
        ModelError: transformers can't read it.
    """
    location = gguf_arguments(place) if place.is_file() else {"pretrained_model_name_or_path": place}
    # Transformers does not read from a GGUF file how Llama 3 lengthens its positions.
    if place.is_file() and subject.source.config.rope_parameters["rope_type"] != "default":
        location["config"] = copy.deepcopy(subject.source.config)
    dtype, device = subject.logits_BTV.dtype, subject.adapted.device
    try:
        # Transformers shows a progress bar for a GGUF file that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(trust_remote_code=False, **location, **computed_in(dtype))
    # These files have just been written; if transformers can't read them, the error may be of any kind.
    except Exception as error:
        raise ModelError(f"the exported model can't be read: {reason_of(error)}", where=str(place)) from error
    model.set_attn_implementation(choose_attention(model.config))
    opened: torch.nn.Module = model.to(device).eval()
    return opened
