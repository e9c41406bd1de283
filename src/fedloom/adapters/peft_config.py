"""The recipe's `[adapter]` as PEFT's configuration, checked against the model's layers and PEFT's own fields."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError
from fedloom.recipe.methods import SET_BY_FEDLOOM, own_keys
from fedloom.text import nearest

if TYPE_CHECKING:
    from fedloom.recipe.sections import Adapter


def build_config(section: Adapter, base: PreTrainedModel) -> PeftConfig | None:
    """PEFT's configuration for the recipe's `[adapter]`; None for `full`, which PEFT has no part in.

    Raises:
        ModelError: an option that the method does not have, a target that the model does not have, or none named
            where PEFT knows no default.
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
                f'{kind.__name__} of PEFT has no "{option}"', where="adapter.options", mend=nearest(option, choices)
            )
    # What the recipe leaves out is PEFT's to choose, except of LoRA, whose defaults are the recipe's.
    values: dict[str, Any] = {
        field: getattr(section, key)
        for field, key in owned.items()
        if key in section.given or (section.method == "lora" and key != "targets")
    }
    if isinstance(section.targets, tuple):
        values["target_modules"] = sorted(section.targets)
    if "fan_in_fan_out" in fields:
        values["fan_in_fan_out"] = _are_conv1d(section, base)
    if "progressbar" in fields:
        values["progressbar"] = False
    _check_targets(section, base)
    try:
        return kind(**{**values, **section.options}, task_type="CAUSAL_LM", base_model_name_or_path=base.name_or_path)
    except Exception as error:  # of any kind: each method checks its options in its own way
        raise ModelError(f"PEFT refuses the options: {reason_of(error)}", where="adapter.options") from error


def reason_of(error: Exception) -> str:
    """The first line of what a library says."""
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
    """What may be a target: of LoRA the linear layers, of other methods whatever has weights."""
    linear = section.method == "lora"
    return {
        name: layer
        for name, layer in base.named_modules()
        if (
            isinstance(layer, nn.Linear | Conv1D) if linear else next(layer.parameters(recurse=False), None) is not None
        )
    }


def _are_conv1d(section: Adapter, base: PreTrainedModel) -> bool:
    """Whether the layers that are adapted keep their weights transposed, as GPT-2's do."""
    targets = section.targets if isinstance(section.targets, tuple) else None
    return any(
        isinstance(layer, Conv1D) and (targets is None or any(_matches(name, target) for target in targets))
        for name, layer in base.named_modules()
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
