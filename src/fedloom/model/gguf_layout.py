"""Layout of GGUF files: llama.cpp's names of tensors, and the order in which it has the rows of queries and keys.

Letters: O features out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedloom.errors import ModelError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Transformers' kind of model -> llama.cpp's, for those whose files were tried in llama.cpp."""
INTERLEAVED = "llama"
"""The kind whose queries and keys llama.cpp rotates by neighbours; the others it rotates as transformers does."""

CONVERT = "export a folder with --to FOLDER --merged, and convert it with llama.cpp's convert_hf_to_gguf.py"
"""Way out where fedloom can't write a model as a GGUF file."""


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """Return for each row of queries or keys, as transformers has them, where llama.cpp's file has it, [O].

    There the two features of a head that are rotated together stand side by side; in transformers they stand half a
    head apart.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def tensor_names(architecture: str, layers: int) -> Any:
    """Return the table of the package gguf from transformers' names of tensors to those of llama.cpp."""
    # Imported here alone: a machine that opens no .gguf file need not have this package.
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map(next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)


@dataclass(frozen=True)
class GgufLayout:
    """Layout of the GGUF file of a model that llama.cpp knows."""

    architecture: str
    heads: int
    key_heads: int
    names: Any

    @classmethod
    def of(cls, config: PretrainedConfig) -> GgufLayout:
        """Return the layout of a model's file.

        Raises:
            ModelError: fedloom does not know how llama.cpp has such a model.
        """
        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise ModelError(
                f"fedloom writes GGUF of {', '.join(ARCHITECTURES)}, and this is {kind}",
                where="model.source",
                mend=CONVERT,
            )
        architecture, heads = ARCHITECTURES[kind], config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(architecture, heads, key_heads, tensor_names(architecture, config.num_hidden_layers))

    def name_of(self, name: str) -> str | None:
        """Return llama.cpp's name of a weight or a bias of transformers'; None where it has none."""
        found: str | None = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found

    def to_file(self, name: str, rows_O: Tensor) -> Tensor:
        """Return a tensor whose first dimension is a layer's O with its rows as the file of that name has them."""
        places = self._places(name, len(rows_O))
        return rows_O if places is None else rows_O[places.argsort()]

    def from_file(self, name: str, rows_O: Tensor) -> Tensor:
        """Undo `to_file`."""
        places = self._places(name, len(rows_O))
        return rows_O if places is None else rows_O[places]

    def layers_of(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield a model's layers with the name that the file has for the weight of each."""
        for path, layer in model.named_modules():
            if name := self.name_of(f"{path}.weight"):
                yield name, layer

    def _places(self, name: str, rows: int) -> Tensor | None:
        heads = {"attn_q": self.heads, "attn_k": self.key_heads}.get(name.split(".")[-2])
        return interleaved_rows(rows, heads) if heads and self.architecture == INTERLEAVED else None
