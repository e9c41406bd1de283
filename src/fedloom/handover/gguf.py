"""Files for llama.cpp of a run's adapter, of its base model, and of both merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fedloom.adapters.gguf_adapter import open_gguf_adapter, write_gguf_adapter
from fedloom.data.prompting import Prompting
from fedloom.experiment.building import load_base
from fedloom.handover.merging import merge, open_merged
from fedloom.handover.proof import TOLERANCES, Subject
from fedloom.model.gguf_writer import write_gguf
from fedloom.records.card import public_name

KIND_TOLERANCES = {"f32": 0.0, "f16": 1e-2, "q8_0": 2e-1}
"""Further distance of logits that the format of a GGUF file's weights allows: four times that of SmolLM2-135M."""
DEFAULT_KIND = "f16"


def write_file(subject: Subject, file: Path, kind: str, *, whole: bool) -> tuple[torch.nn.Module, float]:
    """Write a file for llama.cpp, and open it; return it with how far its logits may be."""
    name, template = subject.recipe.name, subject.chat_template
    if not whole:
        write_gguf_adapter(subject.adapted, subject.folder, file, name=name, chat_template=template)
        base = load_base(subject.recipe, subject.source)
        return open_gguf_adapter(file, base), TOLERANCES[subject.dtype]
    model = subject.adapted.base if subject.adapted.is_whole else merge(subject)
    write_gguf(model, subject.source, file, kind, name=name, chat_template=template, end_of_turn=_end_of_turn(subject))
    return open_merged(file, subject), TOLERANCES[subject.dtype] + KIND_TOLERANCES[kind]


def write_pair(subject: Subject, base: Path, adapter: Path, kind: str) -> tuple[torch.nn.Module, float]:
    """Write a base model and its adapter as two files, and open both; return it with how far its logits may be.

    A base model that came as a GGUF file is that file, to the byte.
    """
    name, source = subject.recipe.name, subject.source
    write_gguf_adapter(subject.adapted, subject.folder, adapter, name=name, chat_template=subject.chat_template)
    if source.file:
        shutil.copyfile(source.file, base)
        return open_gguf_adapter(adapter, load_base(subject.recipe, source)), TOLERANCES[subject.dtype]
    # Weights that a run packed on a GPU are written as they were before.
    plain = subject.recipe.model.model_copy(update={"quantization": None})
    model = load_base(subject.recipe.model_copy(update={"model": plain}), source)
    name = public_name(source.name, source.revision)
    write_gguf(model, source, base, kind, name=name, chat_template=subject.chat_template)
    opened = open_gguf_adapter(adapter, open_merged(base, subject))
    return opened, TOLERANCES[subject.dtype] + KIND_TOLERANCES[kind]


def _end_of_turn(subject: Subject) -> int | None:
    """Return the token by which the run's chat template ends a turn; None where the tokenizer's own end does."""
    prompting = Prompting(subject.recipe.data, subject.source.tokenizer, chats=subject.recipe.data.is_chat)
    prompting.close()
    return next((stop for stop in prompting.stops if stop != subject.source.tokenizer.eos_token_id), None)
