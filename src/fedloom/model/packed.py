"""A base model whose linear layers keep the blocks of their GGUF file, and unpack them whenever they are used.

This takes an eighth to a quarter of float32's memory, and two more passes over the weights in each step. A layer is
kept packed only if it gives exactly the weights that transformers unpacks; embeddings, and a head that shares theirs,
stay as they are.

Letters: N rows (sequences × tokens), I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

from fedloom.model.gguf_layout import interleaved_rows, tensor_names


class PackedLinear(nn.Linear):
    """Linear layer over GGUF blocks: `weight` is [O, bytes of a row], `kind` ggml's number for their format."""

    def __init__(self, blocks: Tensor, kind: int, layer: nn.Linear) -> None:
        # Not nn.Linear's own, which would first make the [O, I] weights that are not to exist.
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.bias = layer.bias
        self.kind = kind
        self.dtype = layer.weight.dtype

    def unpack(self) -> Tensor:
        """Return the weights, [O, I], in the dtype of the layer whose place this one took."""
        unpacked: Tensor = dequantize(self.weight, self.kind, torch.float32)
        return unpacked.view(self.out_features, self.in_features).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b, [..., O], for `x` of [..., I]."""
        product: Tensor = _PackedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _PackedProduct(torch.autograd.Function):
    """Product W x that unpacks W once in each pass; autograd would keep the unpacked W between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.unpack())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.unpack(), None


class Held(NamedTuple):
    """Family of the model that a file holds and, by the tensors' names, ggml's number of each format and the bytes."""

    architecture: str
    tensors: dict[str, tuple[int, int]]


def pack_model(model: PreTrainedModel, file: Path) -> int:
    """Put the file's blocks in the place of the linear layers' weights, and return how many layers took them."""
    reader = _open(file)
    data, packed = {tensor.name: tensor.data for tensor in reader.tensors}, 0
    for path, layer, name, kind, _ in _layers_of(model, _held_by(reader)):
        # A copy: the reader maps the file into memory, and the weights must not depend on it staying there.
        rows = torch.from_numpy(data[name].reshape(layer.out_features, -1).copy())
        for order in _row_orders(model, layer.out_features):
            # The file does not say in which order it has the rows, so each is tried against the weights loaded before.
            candidate = PackedLinear(rows[order], kind, layer)
            if torch.equal(candidate.unpack(), layer.weight):
                model.set_submodule(path, candidate)
                packed += 1
                break
    return packed


def shape_as_packed(model: PreTrainedModel, file: Path) -> None:
    """Give linear layers the size that they have packed, on the meta device: none of them is compared."""
    for path, layer, _, kind, size in _layers_of(model, _read_held(file, file.stat().st_mtime_ns)):
        blocks = torch.empty(layer.out_features, size // layer.out_features, dtype=torch.uint8, device="meta")
        model.set_submodule(path, PackedLinear(blocks, kind, layer))


@lru_cache(maxsize=1)
def _read_held(file: Path, written: int) -> Held:
    # Once: a prediction makes several models, and the reader takes seconds for a large vocabulary.
    return _held_by(_open(file))


def _open(file: Path) -> Any:
    # Imported here alone: a machine that opens no .gguf file need not have this package.
    from gguf import GGUFReader

    return GGUFReader(file)


def _held_by(reader: Any) -> Held:
    tensors = {tensor.name: (int(tensor.tensor_type), tensor.data.nbytes) for tensor in reader.tensors}
    return Held(reader.fields["general.architecture"].contents(), tensors)


def _layers_of(model: PreTrainedModel, held: Held) -> Iterator[tuple[str, nn.Linear, str, int, int]]:
    """Yield the linear layers of which a file has blocks: path, layer, and the tensor's name, format and bytes."""
    names = tensor_names(held.architecture, model.config.get_text_config().num_hidden_layers)
    # A list first: the caller changes the modules that are walked over.
    for path, layer in [*model.named_modules()]:
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",)) or ""
        kind, size = held.tensors.get(name, (-1, 0))
        if type(layer) is not nn.Linear or kind not in GGML_BLOCK:
            continue
        # The embedding needs its weights unpacked, so packing a head that shares them would save nothing.
        if layer.weight is not model.get_input_embeddings().weight:
            yield path, layer, name, kind, size


def _row_orders(model: PreTrainedModel, rows: int) -> Iterator[Tensor]:
    """Yield the orders in which a file may hold the rows: as they are, or as llama.cpp has queries and keys."""
    yield torch.arange(rows)
    config = model.config.get_text_config()
    for heads in {config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 1}:
        if rows % (2 * heads) == 0:
            yield interleaved_rows(rows, heads)
