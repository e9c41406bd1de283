"""LoRA layers that hold K clients' weights over one frozen layer: the client is a tensor dimension.

A batch holds the sequences of all clients, client by client. A frozen layer sees them as one batch; its adapter
multiplies each client's rows by that client's own A and B. Nothing of one client reaches another: rows of a matrix
product do not mix, and the batched product keeps clients apart.

Letters: K clients, M rows of all clients (sequences × tokens, or real tokens), I and O features in and out, R rank, P
adapter parameters, G gradients, X and Y two of a product's sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.lora import A_SUFFIX, ADAPTER_NAME, B_SUFFIX, split_name
from fedloom.adapters.rounded_product import RoundedFactors, RoundedProduct, RoundedWeights, cut, sums_rounded
from fedloom.model.unpadding import Row, current_row

ROUND_MORE = (torch.bfloat16, torch.float16)
"""Dtypes of a frozen layer that round more than TF32, in which a GPU then computes the adapter's products where it does
not compute them in that dtype itself (`rounded_product`)."""

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
        self.rounded: RoundedFactors | None = None
        """Factors for products in the frozen layer's dtype; None where products are of the factors as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [K·B, T, O] for `x` of [K·B, T, I], or [K·B·T, O] for [K·B·T, I], client by client.

        Of real tokens alone, [1, M, O] or [M, O] for [1, M, I] or [M, I].
        """
        result: Tensor = self.base(x)
        x_MI, row = x.reshape(-1, x.shape[-1]), current_row()
        if self.rounded and result.dtype == x.dtype == self.rounded.a_KRI.dtype:
            assert row is None or row.share(len(self.lora_a_KRI)) is None, "clients with unequal parts of a row"
            if self.training and self.dropout:
                x_MI = functional.dropout(x_MI, self.dropout, training=True)
            summed: Tensor = RoundedProduct.apply(result, x_MI, self.lora_b_KOR, self.rounded)  # type: ignore[no-untyped-call]
            return summed
        # As in PEFT: the adapter is in float32 whatever the base is in, and so are its product and the sum.
        if self.training and self.dropout:
            # `ClientDropout` takes over this call, so that each client's mask is its own.
            x_MI = functional.dropout(x_MI.to(self.lora_a_KRI.dtype), self.dropout, training=True)
        tf32 = result.is_cuda and result.dtype in ROUND_MORE
        product = _StackedProduct.apply(x_MI, self.lora_a_KRI, self.lora_b_KOR, self, row, tf32)  # type: ignore[no-untyped-call]
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


class _StackedProduct(torch.autograd.Function):
    """Product B_k A_k x for each client's rows, whose backward pass adds to the layer's gradients in place.

    Autograd itself would make a tensor for each gradient first, and then add it. And where gradients have more rows
    than there are clients, a client's rows are cut into as many pieces, each with a gradient of its own: of every
    document, by the same product in other shapes.

    What is kept of x is in its own dtype: in 16 bits it is the very tensor that the model's other layers have, and a
    copy in float32 for each adapted layer that reads it takes more than all else that such a layer keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, a_KRI: Tensor, b_KOR: Tensor, layer: StackedLora, row: Row | None, tf32: bool
    ) -> Tensor:
        # Not saved as tensors of the graph: the optimizer changes them in place between two steps.
        ctx.weights, ctx.layer, ctx.row, ctx.tf32 = (a_KRI, b_KOR), layer, row, tf32
        with _products(tf32):
            hidden_MR = _multiply(x_MI.to(a_KRI.dtype), a_KRI.mT, row)
            ctx.save_for_backward(x_MI, hidden_MR)
            return _multiply(hidden_MR, b_KOR.mT, row)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x_MI, hidden_MR = ctx.saved_tensors
        a_KRI, b_KOR = ctx.weights
        with _products(ctx.tf32):
            grad_MR = _multiply(grad_MO, b_KOR, ctx.row)
            # Views of the step's flat gradients (`Stack.bind`), so this writes where the optimizer reads.
            _add_products(ctx.layer.gradient_b_GOR, grad_MO, hidden_MR, ctx.row)
            # With FFA, A is the model's own, expanded to K clients and frozen: it has no gradient.
            if a_KRI.requires_grad:
                _add_products(ctx.layer.gradient_a_GRI, grad_MR, x_MI.to(grad_MR.dtype), ctx.row)
            # The first adapted layer's input has no trained part below it. Gradients of A and B are written already.
            grad_MI = _multiply(grad_MR, a_KRI, ctx.row).to(x_MI.dtype) if ctx.needs_input_grad[0] else None
            return grad_MI, None, None, None, None, None


def _multiply(rows_MX: Tensor, weights_KXY: Tensor, row: Row | None) -> Tensor:
    """Return each client's rows times its own weights, [M, Y]; in a row clients may have different numbers of them."""
    sizes = row.share(len(weights_KXY)) if row else None
    if sizes is None:
        return torch.bmm(cut(rows_MX, len(weights_KXY)), weights_KXY).flatten(0, 1)
    product_MY = rows_MX.new_empty(len(rows_MX), weights_KXY.shape[-1])
    for rows, weights, product in zip(rows_MX.split(sizes), weights_KXY, product_MY.split(sizes), strict=True):
        torch.mm(rows, weights, out=product)
    return product_MY


def _add_products(sums_GXY: Tensor, left_MX: Tensor, right_MY: Tensor, row: Row | None) -> None:
    """Add, for each client or piece of one, the sum over its rows of the products of left and right, in place."""
    sizes = row.share(len(sums_GXY)) if row else None
    if sizes is None:
        sums_GXY.baddbmm_(cut(left_MX, len(sums_GXY)).mT, cut(right_MY, len(sums_GXY)))
        return
    for sum_XY, left, right in zip(sums_GXY, left_MX.split(sizes), right_MY.split(sizes), strict=True):
        sum_XY.addmm_(left.mT, right)


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """Have a GPU compute float32 products in TF32 inside, and as before afterwards: rotary positions need them whole.

    TF32 rounds what goes in to 10 bits, 8 times finer than bfloat16 does.
    """
    if not tf32:
        yield
        return
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


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

    @staticmethod
    def rounds_to(adapted: AdaptedModel, device: torch.device) -> torch.dtype | None:
        """Return the dtype that a model's stacks round weights to for products on a device; None where they do not."""
        # A frozen A is the model's own, of which nobody would know when to round it anew. In float16 what is small in a
        # gradient would be lost, and without its loss scaled there is no way to keep it.
        dtype: torch.dtype = adapted.base.dtype
        rounds = device.type == "cuda" and dtype == torch.bfloat16 and not adapted.frozen
        return dtype if rounds and sums_rounded(device) else None

    def rounded_like(self, weights_KP: Tensor) -> RoundedWeights | None:
        """Return room for weights, [K, P], as their device rounds them for products; None where it does not."""
        dtype = self.rounds_to(self._adapted, weights_KP.device)
        if dtype is None:
            return None
        # B by its layer's scale, A by one.
        scales_P = torch.ones_like(weights_KP[0])
        for (layer, is_a), part in zip(self._owners, self._adapted.layout.split_stacked(scales_P[None]), strict=True):
            if not is_a:
                part.fill_(layer.scaling)
        return RoundedWeights(torch.zeros_like(weights_KP, dtype=dtype), scales_P)

    def bind(
        self, weights_KP: Tensor, gradients_GP: Tensor | None = None, rounded: RoundedWeights | None = None
    ) -> None:
        """Let the layers use these weights, [K, P], and add to these gradients, [G, P]; K may differ from before.

        G is K, or a multiple of it: then each piece of a client's sequences has a gradient of its own. All stay the
        caller's: the layers hold views of them. Without gradients the layers can't be trained. With `rounded`, products
        are of what was written into it.
        """
        layout = self._adapted.layout
        weights = layout.split_stacked(weights_KP)
        nothing = weights_KP.new_zeros(0)
        gradients = [nothing] * len(weights) if gradients_GP is None else layout.split_stacked(gradients_GP)
        for (layer, is_a), weight, gradient in zip(self._owners, weights, gradients, strict=True):
            # A leaf over the same memory: the layer multiplies by what the optimizer writes into the flat weights.
            leaf = weight.detach().requires_grad_(gradients_GP is not None)
            if is_a:
                layer.lora_a_KRI, layer.gradient_a_GRI = leaf, gradient
            else:
                layer.lora_b_KOR, layer.gradient_b_GOR = leaf, gradient
        self._bind_rounded(rounded, len(weights_KP))
        for layer, a_RI in self._frozen:
            # Expanded, not copied: K clients see one A.
            layer.lora_a_KRI = a_RI.expand(len(weights_KP), *a_RI.shape)

    def _bind_rounded(self, rounded: RoundedWeights | None, count: int) -> None:
        of_layer: dict[StackedLora, dict[bool, Tensor]] = {layer: {} for layer, _ in self._owners}
        if rounded is not None:
            parts = self._adapted.layout.split_stacked(rounded.values_KP[:count])
            for (layer, is_a), part in zip(self._owners, parts, strict=True):
                of_layer[layer][is_a] = part
        for layer, pair in of_layer.items():
            layer.rounded = None
            if pair:
                gradients = layer.gradient_a_GRI, layer.gradient_b_GOR
                layer.rounded = RoundedFactors(pair[True], pair[False], *gradients, layer.scaling)

    def let_go(self) -> None:
        """Release the clients' weights and gradients, whose memory would stay taken while a layer has views of it."""
        nothing_KP = torch.zeros(0, self._adapted.layout.size)
        self.bind(nothing_KP, nothing_KP)

    def leave_out_dropout(self) -> None:
        """Compute without dropout from now on, which a model tells the layers that are in it alone."""
        for *_, stacked in self._places:
            stacked.eval()

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
