"""The frozen base model, loaded in the dtype and onto the device that a recipe wants."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from fedloom.downloads import fetch_weights
from fedloom.errors import ModelError
from fedloom.model.attention import choose_attention, settle_attention
from fedloom.model.frozen_products import choose_products
from fedloom.model.packed import pack_model
from fedloom.model.packed_shape import BITS
from fedloom.model.source import ModelSource, loading
from fedloom.model.spreading import bytes_elsewhere, spread_over
from fedloom.recipe.sections import QuantizationOptions
from fedloom.seeds import derive_seed
from fedloom.text import count, format_bytes

PEFT_CONFIG = "adapter_config.json"
"""File by whose name transformers looks for an adapter beside a model's weights."""
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|decoder\.version)$")
"""Names under which earlier versions of transformers saved masks, frequencies and a number: all are computed now."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(
    source: ModelSource,
    *,
    dtype: str,
    device: torch.device,
    attention: str | None = None,
    quantization: str | None = None,
    quantization_options: QuantizationOptions | None = None,
    room: Mapping[int | str, int] | None = None,
    say: Callable[[str], object] = str,
) -> PreTrainedModel:
    """Load the frozen base model onto its device, in evaluation mode; `attention` is a name that transformers knows.

    With `room`, the bytes of weights that may lie on the GPU of a number and in memory ("cpu"), what does not fit on
    the device lies elsewhere, and at last in its files. `say` is told how much that is, and what of its files the model
    does not use.

    Raises:
        ModelError: the weights can't be read, are not all there, or are others than the model's; none of them can
            stay packed though that was asked for; or there is no room for the first of them.
    """
    attention = attention or choose_attention(source.config)
    if source.location and (Path(source.location) / PEFT_CONFIG).is_file():
        raise ModelError(
            f"an adapter lies beside the weights ({PEFT_CONFIG}), and transformers would put it on the model",
            where=f'model.source = "{source.name}"',
            mend=f"move {PEFT_CONFIG} and its weights elsewhere, or name the base model",
        )
    if not source.location:
        with torch.random.fork_rng(devices=[]):
            # The seed is not the run's: a random base model is the same in every run, as a downloaded one is.
            torch.manual_seed(derive_seed(0, source.name))
            model = _build(source.config, DTYPES[dtype], attention)
    else:
        place = _place(source)
        if not Path(place["pretrained_model_name_or_path"]).is_dir():
            fetch_weights(place["pretrained_model_name_or_path"], place["revision"], say)
        with loading(source.name, _mend_conversion(source)), torch.random.fork_rng(devices=[]):
            model, found = AutoModelForCausalLM.from_pretrained(
                **place,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Otherwise transformers ends with an error that names no weight; here they are refused by name.
                ignore_mismatched_sizes=True,
                **computed_in(DTYPES[dtype]),
                **quantized(quantization, device, quantization_options),
                **({} if room is None else spread_over(room)),
            )
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ValueError("an adapter lies beside the weights, and transformers put it on the model")
            check_files(model, found, source.weights.told if source.weights else "its files", say)
        if quantization not in BITS:  # whose packed weights have other shapes
            _check_as_described(model, source, dtype, attention)
    # PEFT writes this name into an adapter as its base; transformers would leave the folder of an unpacked file.
    model.name_or_path = source.name
    model.requires_grad_(False)
    model.eval()
    if quantization == "packed" and source.file and not pack_model(model, source.file):
        raise ModelError("none of its layers can be kept packed", where="model.quantization", mend="leave it out")
    # Bitsandbytes' weights are on the device already (`device_map`); some versions refuse to move 8-bit ones.
    if quantization in BITS:
        _keep_trainable(model)
    elif room is None:
        model.to(device)
    else:
        _tell_of_elsewhere(model, device, say)
    settle_attention(model)
    choose_products(model)
    return model


def _tell_of_elsewhere(model: PreTrainedModel, device: torch.device, say: Callable[[str], object]) -> None:
    """Say how much of a model lies elsewhere than on its device.

    Raises:
        ModelError: even what tokens come in by does, which decides where all else is computed.
    """
    if next(model.parameters()).is_meta:
        raise ModelError(
            f"beside a step, {device} has no room for the first of its weights and its largest layer",
            where="model.device_map",
            mend="lower training.batch_size, evaluation.batch_size or data.max_length, or use a larger device",
        )
    if elsewhere := bytes_elsewhere(model):
        say(f"{format_bytes(elsewhere)} of its weights don't fit on {device}, and are read anew for every pass")


def _check_as_described(model: PreTrainedModel, source: ModelSource, dtype: str, attention: str) -> None:
    """Refuse a loaded model that is another one than its configuration describes, by which everything was planned.

    Raises:
        ModelError: names the first weight that one of the two lacks, or has in another shape.
    """
    described, loaded = (
        {(name, tuple(value.shape)) for name, value in each.named_parameters()}
        for each in (build_meta_model(source, dtype=dtype, attention=attention), model)
    )
    if differing := sorted(described ^ loaded):
        name, shape = differing[0]
        raise ModelError(
            f"what was loaded is not what its configuration describes: {len(differing)} weights differ, {name}"
            f" {list(shape)} for one",
            where=f'model.source = "{source.name}"',
            mend="get its files again, or use another base model",
        )


def _place(source: ModelSource) -> dict[str, Any]:
    """Return the arguments with which transformers finds the weights: beside the configuration, or elsewhere."""
    if source.weights:
        return {
            "pretrained_model_name_or_path": source.weights.location,
            "revision": source.weights.revision,
            "config": copy.deepcopy(source.config),
            "generation_config": source.generation or GenerationConfig.from_model_config(source.config),
        }
    # A folder has no revisions, and its source's `revision` says only what kind of thing it is.
    revision = "main" if Path(source.location).is_dir() else source.revision
    return {"pretrained_model_name_or_path": source.location, "revision": revision}


def _mend_conversion(source: ModelSource) -> str:
    """Return what to do where the weights are somebody else's conversion; an empty text where they are not."""
    if source.weights is None or "commit" not in source.weights.record:
        return ""
    commit = source.weights.revision
    return f"the weights are those of commit {commit}: fedloom convert {source.name} makes others of its pickle"


def check_files(model: PreTrainedModel, found: dict[str, Any], files: str, say: Callable[[str], object]) -> None:
    """Refuse weights that are not all there or not the model's, and say what of the files it does not use.

    `found` is what transformers tells of the loading. A tied weight that the files lack is not missing: transformers
    made it the one that it is tied to.

    Raises:
        ValueError: one of them, by name.
    """
    # Transformers fills missing weights with random numbers, leaves others out, and only warns.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{files} lack {count(len(missing), 'weight')} of the model, {missing[0]} for one")
    if others := sorted(found["mismatched_keys"]):
        name, in_file, in_model = others[0]
        raise ValueError(f"{name} is {_shape(in_file)} in {files} and {_shape(in_model)} in the model")
    spare = sorted(name for name in found["unexpected_keys"] if not BUFFERS.search(name))
    # A bias or a scale that a layer is built without would be missed in each of its results.
    layers = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    for name in spare:
        home = name.rpartition(".")[0]
        if not layers.isdisjoint((home, f"{model.base_model_prefix}.{home}")):
            raise ValueError(f"{files} have {name}, and the configuration builds this layer without it")
    if spare:
        say(f"{files} have {count(len(spare), 'weight')} that the model has no layer for, {spare[0]} for one: not used")
    for name, other in sorted(model.get_expanded_tied_weights_keys(all_submodels=True).items()):
        if model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(other):
            raise ValueError(f"{name} and {other} differ in {files}, though the configuration ties them")


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def computed_in(dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which transformers makes a model that computes in this dtype."""
    # Its fused product of a router's experts has no float64.
    return {"dtype": dtype, **({"experts_implementation": "eager"} if dtype == torch.float64 else {})}


def quantized(
    quantization: str | None, device: torch.device, options: QuantizationOptions | None = None
) -> dict[str, Any]:
    """Return the arguments with which transformers packs the weights while it loads them; none if it shall not.

    Unless the options say otherwise, 4 bits are QLoRA's NF4 with packed scales (Dettmers et al. 2023, arXiv
    2305.14314, section 3); 8 bits are LLM.int8's (arXiv 2208.07339) without outliers apart. Which features are
    outliers would be decided over a whole batch: a token would see later ones, and a client another's.
    """
    if quantization not in BITS:
        return {}
    options = options or QuantizationOptions()
    four_bits = {
        "bnb_4bit_quant_type": options.type,
        "bnb_4bit_use_double_quant": options.double,
        "bnb_4bit_compute_dtype": options.compute_dtype,
    }
    known: dict[str, dict[str, Any]] = {
        "4bit": {"load_in_4bit": True, **four_bits},
        "8bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }
    return {"quantization_config": transformers.BitsAndBytesConfig(**known[quantization]), "device_map": {"": device}}


def _keep_trainable(model: PreTrainedModel) -> None:
    """Have layers that bitsandbytes has packed stay as they can be trained through."""
    for layer in model.modules():
        # On processors with bfloat16, a layer that is evaluated is packed anew for a product that has no gradient, for
        # good: what lies below it would no longer learn.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    # It tells of a cast before each single product of 8 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def check_quantization(quantization: str | None, source: ModelSource) -> None:
    """Refuse a quantization that this model, this machine or its packages can't give.

    Raises:
        ModelError: it needs a package, a .gguf file, or weights that are not random.
    """
    where = "model.quantization"
    if quantization == "packed":
        if source.file is None:
            raise ModelError("only a .gguf file has packed weights", where=where, mend="name one in model.source")
        return
    if quantization and not source.location:
        raise ModelError(f"a random model has no weights to pack as {quantization}", where=where, mend="leave it out")
    if quantization and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{quantization} weights need bitsandbytes, which is not installed",
            where=where,
            mend="pip install 'fedloom[quantized]', or leave it out",
        )


def check_device_map(device_map: str | None, source: ModelSource) -> None:
    """Refuse to have weights elsewhere of a model that has no files.

    Raises:
        ModelError
    """
    if device_map and not source.location:
        raise ModelError("a random model is made whole, in memory", where="model.device_map", mend="leave it out")


def check_length(max_length: int, source: ModelSource, prompt: int = 0) -> None:
    """Refuse blocks that, with the tokens of the adapter's prompt before them, are longer than the model.

    Raises:
        ModelError
    """
    if source.max_length is not None and max_length + prompt > source.max_length:
        raise ModelError(
            f"{max_length} tokens{f' after a prompt of {prompt}' if prompt else ''} are more than the model's"
            f" {source.max_length}",
            where="data.max_length",
            mend=f"at most {source.max_length - prompt}",
        )


def build_meta_model(
    source: ModelSource, *, dtype: str = "float32", layers: int | None = None, attention: str | None = None
) -> PreTrainedModel:
    """Build the model without memory for its weights, to count and check them; `layers` of its layers, to trace fewer.

    Raises:
        ModelError: transformers can't build it.
    """
    config = copy.deepcopy(source.config)
    text = config.get_text_config()
    if layers is not None and layers != text.num_hidden_layers:
        text.num_hidden_layers = layers
        # A configuration that names the kind of each layer must name as many as there are.
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
    with loading(source.name), torch.device("meta"):
        model = _build(config, DTYPES[dtype], attention or choose_attention(config))
    model.requires_grad_(False)
    model.name_or_path = source.name
    return model


def _build(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **computed_in(dtype))
