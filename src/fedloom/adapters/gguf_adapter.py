"""LoRA adapters as GGUF files, written for llama.cpp and read as llama.cpp reads them.

llama.cpp adds α/r · B A x to what a layer gives, with one α for the whole file and r the rank of the layer's own B.

Letters: I and O features in and out, R rank.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.files import WEIGHTS_FILE
from fedloom.adapters.lora import ADAPTER_NAME, PREFIX, lora_pairs
from fedloom.errors import RunError
from fedloom.model.gguf_layout import GgufLayout
from fedloom.model.gguf_writer import CHAT_TEMPLATE, write_keys

ALPHA = "adapter.lora.alpha"
OPTIONS = {"use_dora": "DoRA", "layer_replication": "layers that stand twice", "use_qalora": "QALoRA"}
"""PEFT's options -> what they make of an adapter, where llama.cpp has no place for it."""
MARKS = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_": "an adapted embedding",
    ".lora_B.bias": "a bias in LoRA's factors (lora_bias)",
    ".bias": "trained biases",
}
"""Part of a tensor's name in PEFT's files -> what it is of, where llama.cpp has no place for it."""
NO_PLACE = {"output.weight": "an adapted head", "token_embd.weight": "an adapted embedding"}
"""llama.cpp's names of weights that may be one and the same, which it adapts in no file."""


def write_gguf_adapter(
    adapted: AdaptedModel, folder: Path, file: Path, *, name: str, chat_template: str | None = None
) -> None:
    """Write the adapter of a folder, as PEFT saved it, as a GGUF file; `adapted` is its model.

    Raises:
        RunError: llama.cpp can't hold it; names what it is.
        ModelError: fedloom does not know how llama.cpp has this model.
        OSError: it can't be written.
    """
    from gguf import GGUFWriter

    factors, alpha = _read_factors(adapted, folder)
    layout = GgufLayout.of(adapted.base.config)
    writer = GGUFWriter(file, layout.architecture)
    try:
        template = {} if chat_template is None else {CHAT_TEMPLATE: chat_template}
        keys = {"general.type": "adapter", "general.name": name, "adapter.type": "lora", ALPHA: alpha}
        write_keys(writer, {**keys, **template})
        for layer, (a_RI, b_OR) in factors.items():
            title = layout.name_of(f"{layer}.weight")
            if title is None or title in NO_PLACE:
                raise _refuse(NO_PLACE.get(title or "", f"an adapter on {layer}"))
            writer.add_tensor(f"{title}.lora_a", a_RI.numpy())
            writer.add_tensor(f"{title}.lora_b", layout.to_file(title, b_OR).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def open_gguf_adapter(file: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Return a base model whose layers add what a GGUF adapter holds for them, as llama.cpp does.

    Raises:
        RunError: it holds tensors that the model has no layer for.
    """
    from gguf import GGUFReader

    layout, reader = GgufLayout.of(base.config), GGUFReader(file)
    # Copies: the reader maps the file into memory, and the weights must not depend on it staying there.
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).to(base.device) for tensor in reader.tensors}
    alpha = reader.fields[ALPHA].contents()
    for title, layer in layout.layers_of(base):
        a_RI = tensors.pop(f"{title}.lora_a", None)
        if a_RI is not None:
            b_OR = layout.from_file(title, tensors.pop(f"{title}.lora_b"))
            layer.register_forward_hook(partial(_add_product, a_RI, b_OR, alpha / len(a_RI)))
    if tensors:
        raise RunError(f"the model has no layer for {min(tensors)}", where=str(file))
    return base


def _add_product(
    a_RI: Tensor, b_OR: Tensor, scaling: float, _: nn.Module, inputs: tuple[Tensor, ...], result: Tensor
) -> Tensor:
    """Return W x + s·B A x, in the dtype of the layer's own result."""
    return (result + (inputs[0].to(a_RI.dtype) @ a_RI.mT) @ b_OR.mT * scaling).to(result.dtype)


def _read_factors(adapted: AdaptedModel, folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return A [R, I] and B [O, R] by layer of an adapter that PEFT saved, and the α that llama.cpp has for all.

    The residual of `fedex` is among them, as further ranks: that is how it is saved.

    Raises:
        RunError: there is more in the adapter than that; names what it is.
    """
    config = adapted.config
    if config is None or config.peft_type != PeftType.LORA:
        raise _refuse("a whole model" if config is None else f"the method {config.peft_type.value.lower()}")
    if options := [what for option, what in OPTIONS.items() if getattr(config, option, None)]:
        raise _refuse(options[0])
    tensors = load_file(folder / WEIGHTS_FILE)
    pairs = lora_pairs(tuple(tensors))
    for odd in sorted(tensors.keys() - {name for pair in pairs.values() for name in pair}):
        whole = f"{odd.removeprefix(PREFIX)}, trained as a whole (modules_to_save)"
        raise _refuse(next((what for mark, what in MARKS.items() if mark in odd), whole))
    # Saved with more ranks than the model's layer has, an adapter keeps its scale: `save_adapter` raises its α.
    scales = {
        name: layer.scaling[ADAPTER_NAME]
        for name, layer in adapted.model.named_modules()
        if isinstance(layer, LoraLayer) and name in pairs
    }
    alphas = [scale * len(tensors[pairs[layer][0]]) for layer, scale in scales.items()]
    if not all(math.isclose(alpha, alphas[0], rel_tol=1e-9) for alpha in alphas):
        raise _refuse("ranks and scales that differ from layer to layer")
    return {
        layer.removeprefix(PREFIX): (tensors[a].float(), tensors[b].float()) for layer, (a, b) in pairs.items()
    }, alphas[0]


def _refuse(what: str) -> RunError:
    return RunError(
        f"llama.cpp can't hold {what} in an adapter", where="adapter", mend="write the merged model with --merged"
    )
