"""LoRA layers that hold K clients' weights over one frozen layer: the client is a tensor dimension.

A batch holds the sequences of all clients, client by client. A frozen layer sees them as one batch; its adapter
multiplies each client's rows by that client's own A and B. Nothing of one client reaches another: rows of a matrix
product do not mix, and the batched product keeps clients apart.

Letters: K clients, M rows of all clients (sequences × tokens, or real tokens), I and O features in and out, R rank, P
adapter parameters, G gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.lora import A_SUFFIX, ADAPTER_NAME, B_SUFFIX, split_name
from fedloom.adapters.stacked_product import multiply_stacked
from fedloom.model.unpadding import current_row

ROUND_MORE = (torch.bfloat16, torch.float16)
"""Dtypes of a frozen layer that round more than TF32, in which a GPU then computes the adapter's products: they are
nearly half of a step in float32 (docs/benchmarks.md)."""


OVER_BITS = ("Linear4bit", "Linear8bitLt")
"""PEFT's plain LoRA over weights that bitsandbytes packs, by name: without that package there are no such classes."""


def find_unstackable(adapted: AdaptedModel) -> str | None:
    """Return an adapted layer, with its kind, that `StackedLora` can't stand for; None where there is none."""
    for path, layer in adapted.base.named_modules():
        plain = isinstance(layer, Linear) or type(layer).__name__ in OVER_BITS
        if isinstance(layer, LoraLayer) and not plain:
            return f"{path}, a {type(layer.get_base_layer()).__name__}"
    return None


def can_stack(adapted: AdaptedModel) -> bool:
    """Return whether all that is trained of an adapter are plain LoRA's factors, which `Stack` can hold many of."""
    return (
        all(name.endswith((A_SUFFIX, B_SUFFIX)) for name in adapted.layout.names)
        and find_unstackable(adapted) is None
        # DoRA and its like compute something else from the same factors.
        and not any(isinstance(layer, LoraLayer) and layer.lora_variant for layer in adapted.base.modules())
    )


class StackedLora(nn.Module):
    """Frozen `nn.Linear` or `Conv1D` with K clients' LoRA on top: W x + s·B_k A_k x for the rows of client k."""

    def __init__(self, base: nn.Module, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.dropout = dropout
        self.lora_a_KRI: Tensor
        self.lora_b_KOR: Tensor
        self.gradient_a_GRI: Tensor
        """Place that the gradients of A are added to: of each client, or of each of its G / K pieces."""
        self.gradient_b_GOR: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return [K·B, T, O] for `x` of [K·B, T, I], or [K·B·T, O] for [K·B·T, I], client by client.

        Of real tokens alone, [1, M, O] or [M, O] for [1, M, I] or [M, I].
        """
        result: Tensor = self.base(x)
        # As in PEFT: the adapter is in float32 whatever the base is in, and so are its product and the sum.
        x_MI = x.reshape(-1, x.shape[-1]).to(self.lora_a_KRI.dtype)
        if self.training and self.dropout:
            # `ClientDropout` takes over this call, so that each client's mask is its own.
            x_MI = functional.dropout(x_MI, self.dropout, training=True)
        tf32 = result.is_cuda and result.dtype in ROUND_MORE
        gradients = self.gradient_a_GRI, self.gradient_b_GOR
        product = multiply_stacked(x_MI, self.lora_a_KRI, self.lora_b_KOR, gradients, current_row(), tf32)
        return torch.add(result, product.view_as(result), alpha=self.scaling).to(result.dtype)

    # Some models ask a layer for the dtype of its weight. PEFT's layer answers with the frozen one's too.
    @property
    def weight(self) -> Tensor:
        """Return the frozen layer's weight."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Return the frozen layer's bias."""
        return self.base.bias  # type: ignore[return-value]


class Stack:
    """All adapted layers of a model as `StackedLora`, over one flat buffer of weights and one of gradients.

    The rows of both are flat adapters in the layout of the adapted model. A frozen A is not in them: every client sees
    the one in the model.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._places: list[tuple[nn.Module, str, nn.Module, StackedLora]] = []
        self._owners: list[tuple[StackedLora, bool]] = []
        layers: dict[str, StackedLora] = {}
        for name in adapted.layout.names:
            path, suffix = split_name(name)
            if path not in layers:
                layers[path] = self._stack(path)
            self._owners.append((layers[path], suffix == A_SUFFIX))
        self._frozen = [(layers[split_name(name)[0]], adapted.parameter(name)) for name in adapted.frozen]

    @property
    def model(self) -> nn.Module:
        """Return the base model, whose adapted layers are the stacked ones inside `installed`."""
        base: nn.Module = self._adapted.base
        return base

    def bind(self, weights_KP: Tensor, gradients_GP: Tensor | None = None) -> None:
        """Let the layers use these weights, [K, P], and add to these gradients, [G, P]; K may differ from before.

        G is K, or a multiple of it: then each piece of a client's sequences has a gradient of its own. Both stay the
        caller's: the layers hold views of them. Without gradients the layers can't be trained.
        """
        layout = self._adapted.layout
        weights = layout.split_stacked(weights_KP)
        nothing = weights_KP.new_zeros(0)
        gradients = [nothing] * len(weights) if gradients_GP is None else layout.split_stacked(gradients_GP)
        for (layer, is_a), weight, gradient in zip(self._owners, weights, gradients, strict=True):
            # A leaf over the same memory: the layer multiplies by what the optimizer writes into the flat weights.
            leaf = weight.detach().requires_grad_(gradients_GP is not None)
            # A version of its own: a compiled layer keeps it for its backward pass, before which those of other layers
            # write to the same buffer.
            gradient = gradient.data
            if is_a:
                layer.lora_a_KRI, layer.gradient_a_GRI = leaf, gradient
            else:
                layer.lora_b_KOR, layer.gradient_b_GOR = leaf, gradient
        for layer, a_RI in self._frozen:
            # Expanded, not copied: K clients see one A.
            layer.lora_a_KRI, layer.gradient_a_GRI = a_RI.expand(len(weights_KP), *a_RI.shape), nothing.data

    def let_go(self) -> None:
        """Release the clients' weights and gradients, whose memory would stay taken while a layer has views of it."""
        nothing_KP = torch.zeros(0, self._adapted.layout.size)
        self.bind(nothing_KP, nothing_KP)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the stacked layers in the place of PEFT's, and PEFT's back at the end."""
        for parent, name, _, stacked in self._places:
            setattr(parent, name, stacked)
        try:
            yield
        finally:
            for parent, name, original, _ in self._places:
                setattr(parent, name, original)

    def _stack(self, path: str) -> StackedLora:
        parent_path, _, name = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        original = getattr(parent, name)
        assert isinstance(original, LoraLayer), f"{path} has no LoRA"
        drop = original.lora_dropout[ADAPTER_NAME]
        stacked = StackedLora(
            original.get_base_layer(), original.scaling[ADAPTER_NAME], drop.p if isinstance(drop, nn.Dropout) else 0.0
        )
        self._places.append((parent, name, original, stacked))
        return stacked
