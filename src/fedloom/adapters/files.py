"""Files of adapters, written and read as PEFT does; files of whole models, as transformers does."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import A_SUFFIX, Residual, lora_pairs
from fedloom.errors import ModelError
from fedloom.host.files import Moment, replace_folder

WEIGHTS_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"
FAILPOINTS: Mapping[Moment, str] = {
    "written": "adapter.written",
    "between": "adapter.between",
    "renamed": "adapter.renamed",
}


def save_adapter(
    adapter: Adapter,
    config: PeftConfig,
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] = MappingProxyType({}),
    card: str = "",
) -> None:
    """Write the adapter, and the frozen tensors beside it, as PEFT does; the folder is replaced whole or not at all."""
    saved = copy.deepcopy(config)
    # As PEFT's own `save_pretrained` sets it: an adapter that is opened is not trained on unless that is asked for.
    saved.inference_mode = True
    # A set has another order in each process, and the same adapter must give the same file.
    if isinstance(getattr(saved, "target_modules", None), set):
        saved.target_modules = sorted(saved.target_modules)
    tensors = adapter.layout.split(adapter.weights_P)
    if adapter.residual:
        tensors, more = adapter.residual.widen(tensors)
        _widen(saved, more)
    with replace_folder(folder, failpoints=FAILPOINTS) as temporary:
        saved.save_pretrained(str(temporary))
        _write(tensors, frozen, temporary / WEIGHTS_FILE, card)


def save_model(
    adapter: Adapter,
    base: PreTrainedModel,
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] = MappingProxyType({}),
    tokenizer: Any = None,
    card: str = "",
) -> None:
    """Write a whole model as transformers does; the folder is replaced whole or not at all.

    The weights are written from where they are: no copy of the model is made.
    """
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = adapter.weights_P.dtype
    with replace_folder(folder, failpoints=FAILPOINTS) as temporary:
        config.save_pretrained(temporary)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _write(adapter.layout.split(adapter.weights_P), frozen, temporary / MODEL_FILE, card)


def _write(tensors: Mapping[str, Tensor], frozen: Mapping[str, Tensor], file: Path, card: str) -> None:
    # Copies: frozen tensors may share memory, which safetensors refuses to write.
    others = {name: value.to("cpu", copy=True).contiguous() for name, value in frozen.items()}
    save_file({**tensors, **others}, file, metadata={"format": "pt"})
    # safetensors makes files for their owner alone; of the folder, the umask said who may read it.
    file.chmod(file.parent.stat().st_mode & 0o666)
    if card:
        (file.parent / "README.md").write_text(card, encoding="utf-8")


def load_adapter(folder: Path, layout: Layout, frozen: Collection[str] | None = ()) -> Adapter:
    """Read an adapter that PEFT, `save_adapter` or `save_model` wrote, without the tensors named in `frozen`.

    If `frozen` is None, all tensors that are not in `layout` are left out. Ranks beyond those of `layout` are read as
    the adapter's residual.

    Raises:
        ModelError: there is no adapter, it can't be read, or its tensors are not those of `layout`.
    """
    path = folder / (MODEL_FILE if (folder / MODEL_FILE).exists() else WEIGHTS_FILE)
    try:
        found = load_file(path)
        leave_out = found.keys() - set(layout.names) if frozen is None else frozen
        tensors = {name: value for name, value in found.items() if name not in leave_out}
    # A damaged file raises errors of safetensors, of torch or of the system.
    except Exception as error:
        raise ModelError(f"no readable adapter ({type(error).__name__})", where=str(path)) from error
    if set(tensors) != set(layout.names):
        odd = sorted(set(tensors) ^ set(layout.names))[0]
        raise ModelError(f"not an adapter of this model: only one of the two has {odd}", where=str(path))
    ranks = {
        layer: layout.shapes[layout.names.index(a_name)][0] for layer, (a_name, _) in lora_pairs(layout.names).items()
    }
    residual = None
    if any(len(tensors[layer + A_SUFFIX]) > rank for layer, rank in ranks.items()):
        tensors, residual = Residual.split(tensors, ranks)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if tensors[name].shape != shape:
            raise ModelError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}", where=str(path))
    return Adapter(layout, torch.cat([tensors[name].reshape(-1) for name in layout.names]), residual)


def _widen(config: PeftConfig, ranks: int) -> None:
    """Add ranks to a LoRA configuration, with an α that keeps its scale: α/r, or α/√r with rank-stabilised LoRA."""
    wider = config.r + ranks
    config.lora_alpha *= (wider / config.r) ** (0.5 if config.use_rslora else 1)
    config.r = wider
