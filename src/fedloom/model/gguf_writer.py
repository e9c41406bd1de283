"""GGUF files of whole models, written tensor by tensor.

What a file says of a model beside its weights comes from the GGUF file that the model was read from, or else from its
configuration and its tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fedloom.errors import ModelError
from fedloom.model.gguf_layout import CONVERT, INTERLEAVED, GgufLayout
from fedloom.model.gguf_vocabulary import PREFIX, vocabulary_of
from fedloom.model.source import ModelSource

KINDS = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7)}
"""Formats of weights -> ggml's name, and llama.cpp's number for a file of them."""
CHAT_TEMPLATE = "tokenizer.chat_template"
NOT_COPIED = ("GGUF.", "split.", "quantize.", "general.architecture")
"""Starts of the keys that tell of a file itself, and not of the model in it."""
ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(
    model: PreTrainedModel,
    source: ModelSource,
    file: Path,
    kind: str,
    *,
    name: str,
    chat_template: str | None = None,
    end_of_turn: int | None = None,
) -> None:
    """Write a model, with its tokenizer, as a GGUF file; `kind` is one of `KINDS`.

    A `chat_template` takes the place of the model's own; `end_of_turn` is the token by which it ends an answer.

    Raises:
        ModelError: fedloom does not know how llama.cpp has this model or its tokenizer.
        OSError: it can't be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    layout = GgufLayout.of(model.config)
    ggml, number = KINDS[kind]
    keys = _read_keys(source.file) if source.file else _make_keys(model.config, layout, source)
    keys |= {"general.type": "model", "general.name": name, "general.file_type": number}
    if chat_template is not None:
        keys[CHAT_TEMPLATE] = chat_template
    if end_of_turn is not None:
        keys[f"{PREFIX}eot_token_id"] = end_of_turn
    tensors = [
        (title, tensor, GGMLQuantizationType[_kind_of(tensor, ggml)])
        for title, tensor in _tensors_of(model, source, layout)
    ]
    writer = GGUFWriter(file, layout.architecture)
    try:
        write_keys(writer, keys)
        # Told first and written one after another, so that no second copy of the model is held.
        for title, tensor, wanted in tensors:
            empty = quantize(tensor.new_zeros(1, tensor.shape[-1], dtype=torch.float32).numpy(), wanted)
            shape = (*tensor.shape[:-1], empty.shape[-1])
            writer.add_tensor_info(title, shape, empty.dtype, math.prod(shape) * empty.itemsize, raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for title, tensor, wanted in tensors:
            rows = layout.to_file(title, tensor.detach().cpu()).float().contiguous()
            writer.write_tensor_data(quantize(rows.numpy(), wanted))
    finally:
        writer.close()


def write_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    """Write what a file says beside its tensors: fields of another file as they are, and values by their kind."""
    from gguf import GGUFValueType, ReaderField

    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
        list: GGUFValueType.ARRAY,
    }
    for key, value in keys.items():
        if isinstance(value, ReaderField):
            items = value.types[-1] if value.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, value.contents(), value.types[0], sub_type=items)
        else:
            writer.add_key_value(key, value, kinds[type(value)])


def _kind_of(tensor: Tensor, ggml: str) -> str:
    """Return the format of one tensor: norms and biases stay whole, and so does a row that can't be cut into blocks."""
    if tensor.ndim == 1:
        return "F32"
    return "F16" if ggml == "Q8_0" and tensor.shape[-1] % 32 else ggml


def _tensors_of(model: PreTrainedModel, source: ModelSource, layout: GgufLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors by llama.cpp's names, as transformers has them; a head that is tied is left out."""
    for name, tensor in model.named_parameters():
        title = layout.name_of(name)
        if title is None:
            raise ModelError(f"llama.cpp has no place for {name}", where="model.source", mend=CONVERT)
        yield title, tensor
    if (factors := _rope_factors(model, source)) is not None:
        yield ROPE_FACTORS, factors


def _rope_factors(model: PreTrainedModel, source: ModelSource) -> Tensor | None:
    """Return what llama.cpp divides the frequencies of positions by; None where they are the usual ones."""
    from gguf import GGUFReader

    if source.file:
        found = [tensor for tensor in GGUFReader(source.file).tensors if tensor.name == ROPE_FACTORS]
        return torch.from_numpy(found[0].data.copy()) if found else None
    if _rope_of(model.config)["rope_type"] == "default":
        return None
    scaled: Tensor = model.model.rotary_emb.inv_freq.detach().float().cpu()
    usual: Tensor = _rope_of(model.config)["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))
    return usual / scaled


def _rope_of(config: PretrainedConfig) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def _read_keys(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field for name, field in GGUFReader(file).fields.items() if not name.startswith(NOT_COPIED)}


def _make_keys(config: PretrainedConfig, layout: GgufLayout, source: ModelSource) -> dict[str, Any]:
    """Return what a file says of a model that was read from no GGUF file.

    Raises:
        ModelError: it has what fedloom does not know llama.cpp's way to say.
    """
    rope, longest = _rope_of(config), source.max_length or 0
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    odd = {
        f"positions of the kind {rope['rope_type']}": rope["rope_type"] not in ("default", "llama3"),
        f"attention to the last {window} tokens alone": window is not None and window < longest,
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
        "biases where llama.cpp's Llama has none": layout.architecture == INTERLEAVED
        and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)),
    }
    if told := [what for what, is_odd in odd.items() if is_odd]:
        raise ModelError(
            f"fedloom can't say in a GGUF file that the model has {told[0]}",
            where="model.source",
            mend=CONVERT,
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own = {
        "block_count": source.num_layers,
        "context_length": longest,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": layout.heads,
        "attention.head_count_kv": layout.key_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": source.vocabulary_size,
    }
    template = source.tokenizer.chat_template
    return {
        **{f"{layout.architecture}.{key}": value for key, value in own.items()},
        **vocabulary_of(source.tokenizer, source.vocabulary_size),
        **({CHAT_TEMPLATE: template} if isinstance(template, str) else {}),
    }
