"""PEFT's configuration, made from the recipe's `[adapter]` and checked against the model's layers and PEFT's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError
from fedloom.recipe.methods import SET_BY_FEDLOOM, own_keys
from fedloom.text import nearest

if TYPE_CHECKING:
    from fedloom.recipe.sections import Adapter


def build_config(section: Adapter, base: PreTrainedModel) -> PeftConfig | None:
    """Return PEFT's configuration for the recipe's `[adapter]`, or None for `full`, which does not use PEFT.

    Raises:
        ModelError: the method lacks an option, PEFT refuses one, the model lacks a target, or no target is named
            and PEFT knows no default.
    """
    if section.method == "full":
        return None
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(section.method.upper())]
    fields = {field.name for field in dataclasses.fields(kind)}
    owned = own_keys(section.method)
    choices = sorted(field for field in fields - owned.keys() - {*SET_BY_FEDLOOM} if not field.endswith("_config"))
    for option in section.options:
        if option not in choices:
            raise ModelError(
                f'PEFT\'s {kind.__name__} has no option "{option}"',
                where="adapter.options",
                mend=nearest(option, choices),
            )
    # PEFT's own defaults apply to keys that the recipe leaves out; LoRA's defaults are the recipe's.
    values: dict[str, Any] = {
        field: getattr(section, key)
        for field, key in owned.items()
        if key in section.given or (section.method == "lora" and key != "targets")
    }
    if isinstance(section.targets, tuple):
        values["target_modules"] = sorted(section.targets)
    # Left to itself, PEFT looks for its default too late for a model whose experts it takes for parameters (Mixtral).
    elif section.method == "lora" and section.targets is None:
        values["target_modules"] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type)
    # With a wrong value, PEFT warns about every layer.
    if "fan_in_fan_out" in fields:
        values["fan_in_fan_out"] = _are_conv1d(section, base)
    if "progressbar" in fields:
        values["progressbar"] = False
    _check_targets(section, base)
    try:
        config = kind(**{**values, **section.options}, task_type="CAUSAL_LM", base_model_name_or_path=base.name_or_path)
    # Each of PEFT's methods checks its options in its own way, with errors of any kind.
    except Exception as error:
        raise ModelError(f"PEFT refuses the options: {reason_of(error)}", where="adapter.options") from error
    # PEFT finds it out by multiplying with None.
    if getattr(config, "num_virtual_tokens", 1) is None:
        raise ModelError(
            f"{section.method} needs a number of virtual tokens",
            where="adapter.options",
            mend="set num_virtual_tokens, to 16 for example",
        )
    return config


def reason_of(error: Exception) -> str:
    """Return the first line of a library's error, cut to 200 characters, or else the name of its kind."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _check_targets(section: Adapter, base: PreTrainedModel) -> None:
    known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in _layers(section, base)}))
    for target in section.targets if isinstance(section.targets, tuple) else ():
        if not any(_matches(name, target) for name in _layers(section, base)):
            raise ModelError(f'the model has no layer "{target}"', where="adapter.targets", mend=f"it has: {known}")
    known_model = base.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if section.method == "lora" and section.targets is None and not known_model:
        raise ModelError(
            f"PEFT knows no default layers for {base.config.model_type}",
            where="adapter.targets",
            mend=f"name some of: {known}",
        )


def _layers(section: Adapter, base: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that may be targets: for LoRA the linear ones, for other methods all that have weights."""
    linear = section.method == "lora"
    return {
        name: layer
        for name, layer in base.named_modules()
        if (
            isinstance(layer, nn.Linear | Conv1D) if linear else next(layer.parameters(recurse=False), None) is not None
        )
    }


def _are_conv1d(section: Adapter, base: PreTrainedModel) -> bool:
    """Return whether an adapted layer keeps its weight transposed, [I, O], as GPT-2's do."""
    targets = section.targets if isinstance(section.targets, tuple) else None
    return any(
        isinstance(layer, Conv1D) and (targets is None or any(_matches(name, target) for target in targets))
        for name, layer in base.named_modules()
    )


def _matches(name: str, target: str) -> bool:
    # PEFT's own rule for a list of targets.
    return name == target or name.endswith(f".{target}")


def unmatched_options(options: dict[str, Any], wrapped: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what options name and a model with its adapter has not, each with why: PEFT passes over it in silence.

    `wrapped` is PEFT's model.
    """
    layers = getattr(getattr(wrapped, "base_model", None), "targeted_module_names", [])
    modules = [name for name, _ in wrapped.named_modules()]
    trained = [name for name, value in wrapped.named_parameters() if value.requires_grad]

    def adapts_layer(number: Any) -> bool:
        return any(f".{number}." in name for name in layers)

    def has_pattern(pattern: str) -> bool:
        return any(get_pattern_key([pattern], name) == pattern for name in layers)

    def is_layer(name: str) -> bool:
        # A text alone is a pattern to PEFT, and in a list it is a name.
        return isinstance(options["exclude_modules"], str) or any(_matches(known, name) for known in modules)

    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "rank_pattern": (has_pattern, "no adapted layer has such a name"),
        "alpha_pattern": (has_pattern, "no adapted layer has such a name"),
        "layers_to_transform": (adapts_layer, "no adapted layer has that number"),
        "exclude_modules": (is_layer, "no layer has such a name"),
        "modules_to_save": (lambda name: any(known.endswith(name) for known in modules), "no layer has such a name"),
        "bias": (lambda kind: kind == "none" or any(name.endswith("bias") for name in trained), "no layer has a bias"),
    }
    for option, (matches, why) in checks.items():
        value = options.get(option, [])
        for name in value if isinstance(value, list | dict) else [value]:
            if not matches(name):
                yield f'adapter.options.{option} "{name}"', why
