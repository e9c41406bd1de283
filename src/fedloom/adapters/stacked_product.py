"""Product of each client's rows with its own LoRA factors, whose backward pass adds to their gradients in place.

Autograd itself would make a tensor for each gradient first, and then add it. And where gradients have more rows than
there are clients, a client's rows are cut into as many pieces, each with a gradient of its own: of every document, by
the same product in other shapes.

Letters: K clients, M rows of all clients (sequences × tokens, or real tokens), I and O features in and out, R rank, G
gradients, X and Y two of a product's sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fedloom.model.unpadding import Row


def multiply_stacked(
    x_MI: Tensor, a_KRI: Tensor, b_KOR: Tensor, gradients: tuple[Tensor, Tensor], row: Row | None, tf32: bool
) -> Tensor:
    """Return B_k A_k x for the rows of each client k, [M, O]; its backward pass adds to the `gradients` of A and B.

    They are [G, R, I] and [G, O, R], G a multiple of K. `tf32` has a GPU round what goes in, as `_products` says.
    """
    if torch.compiler.is_compiling():
        assert row is None, "a compiled layer computes padding"
        product_MO: Tensor = _multiply_traced(x_MI, a_KRI, b_KOR, *gradients, tf32)[0]
        return product_MO
    product: Tensor = _StackedProduct.apply(x_MI, a_KRI, b_KOR, gradients, row, tf32)  # type: ignore[no-untyped-call]
    return product


class _StackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        a_KRI: Tensor,
        b_KOR: Tensor,
        gradients: tuple[Tensor, Tensor],
        row: Row | None,
        tf32: bool,
    ) -> Tensor:
        # Not saved as tensors of the graph: the optimizer changes them in place between two steps.
        ctx.weights, ctx.gradients, ctx.row, ctx.tf32 = (a_KRI, b_KOR), gradients, row, tf32
        product_MO, hidden_MR = _forward(x_MI, a_KRI, b_KOR, row, tf32)
        ctx.save_for_backward(x_MI, hidden_MR)
        return product_MO

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        # With FFA, A is the model's own, expanded to K clients and frozen: it has no gradient.
        trains_a = ctx.weights[0].requires_grad
        # The first adapted layer's input has no trained part below it.
        needs_x = ctx.needs_input_grad[0]
        given = grad_MO, *ctx.saved_tensors, *ctx.weights, *ctx.gradients
        return _backward(*given, ctx.row, ctx.tf32, trains_a, needs_x), None, None, None, None, None


def _forward(x_MI: Tensor, a_KRI: Tensor, b_KOR: Tensor, row: Row | None, tf32: bool) -> tuple[Tensor, Tensor]:
    with _products(tf32):
        hidden_MR = _multiply(x_MI, a_KRI.mT, row)
        return _multiply(hidden_MR, b_KOR.mT, row), hidden_MR


def _backward(
    grad_MO: Tensor,
    x_MI: Tensor,
    hidden_MR: Tensor,
    a_KRI: Tensor,
    b_KOR: Tensor,
    gradient_a_GRI: Tensor,
    gradient_b_GOR: Tensor,
    row: Row | None,
    tf32: bool,
    trains_a: bool,
    needs_x: bool,
) -> Tensor | None:
    """Add to the gradients of A and B, views of the step's flat ones (`Stack.bind`); return that of x."""
    with _products(tf32):
        grad_MR = _multiply(grad_MO, b_KOR, row)
        _add_products(gradient_b_GOR, grad_MO, hidden_MR, row)
        if trains_a:
            _add_products(gradient_a_GRI, grad_MR, x_MI, row)
        return _multiply(grad_MR, a_KRI, row) if needs_x else None


# `torch.compile` takes these two as they are. Traced, the products would be of whatever precision a GPU has outside.
@torch.library.custom_op(
    "fedloom::stacked_product",
    mutates_args=(),
    schema="(Tensor x, Tensor a, Tensor b, Tensor gradient_a, Tensor gradient_b, bool tf32) -> (Tensor, Tensor)",
)
def _multiply_traced(
    x_MI: Tensor, a_KRI: Tensor, b_KOR: Tensor, gradient_a_GRI: Tensor, gradient_b_GOR: Tensor, tf32: bool
) -> tuple[Tensor, Tensor]:
    return _forward(x_MI, a_KRI, b_KOR, None, tf32)


@torch.library.custom_op(
    "fedloom::stacked_gradients",
    mutates_args=("gradient_a", "gradient_b"),
    schema="(Tensor grad, Tensor x, Tensor hidden, Tensor a, Tensor b, Tensor(a!) gradient_a, Tensor(b!) gradient_b,"
    " bool tf32, bool trains_a, bool needs_x) -> Tensor",
)
def _add_traced(
    grad_MO: Tensor,
    x_MI: Tensor,
    hidden_MR: Tensor,
    a_KRI: Tensor,
    b_KOR: Tensor,
    gradient_a_GRI: Tensor,
    gradient_b_GOR: Tensor,
    tf32: bool,
    trains_a: bool,
    needs_x: bool,
) -> Tensor:
    factors = a_KRI, b_KOR, gradient_a_GRI, gradient_b_GOR
    grad_MI = _backward(grad_MO, x_MI, hidden_MR, *factors, None, tf32, trains_a, needs_x)
    return x_MI.new_empty(0) if grad_MI is None else grad_MI


@_multiply_traced.register_fake
def _(
    x_MI: Tensor, a_KRI: Tensor, b_KOR: Tensor, gradient_a_GRI: Tensor, gradient_b_GOR: Tensor, tf32: bool
) -> tuple[Tensor, Tensor]:
    return x_MI.new_empty(len(x_MI), b_KOR.shape[1]), x_MI.new_empty(len(x_MI), a_KRI.shape[1])


@_add_traced.register_fake
def _(
    grad_MO: Tensor,
    x_MI: Tensor,
    hidden_MR: Tensor,
    a_KRI: Tensor,
    b_KOR: Tensor,
    gradient_a_GRI: Tensor,
    gradient_b_GOR: Tensor,
    tf32: bool,
    trains_a: bool,
    needs_x: bool,
) -> Tensor:
    return x_MI.new_empty(x_MI.shape if needs_x else 0)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.tf32 = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward_traced(ctx: Any, grad_MO: Tensor, _: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
    hidden_MR, x_MI, *factors = ctx.saved_tensors
    needs_x, trains_a, *_others = ctx.needs_input_grad
    grad_MI = _add_traced(grad_MO, x_MI, hidden_MR, *factors, ctx.tf32, trains_a, needs_x)
    return grad_MI if needs_x else None, None, None, None, None, None


_multiply_traced.register_autograd(_backward_traced, setup_context=_keep)


def _multiply(rows_MX: Tensor, weights_KXY: Tensor, row: Row | None) -> Tensor:
    """Return each client's rows times its own weights, [M, Y]; in a row clients may have different numbers of them."""
    if row is None:
        return torch.bmm(_cut(rows_MX, len(weights_KXY)), weights_KXY).flatten(0, 1)
    product_MY = rows_MX.new_empty(len(rows_MX), weights_KXY.shape[-1])
    sizes = row.share(len(weights_KXY))
    for rows, weights, product in zip(rows_MX.split(sizes), weights_KXY, product_MY.split(sizes), strict=True):
        torch.mm(rows, weights, out=product)
    return product_MY


def _add_products(sums_GXY: Tensor, left_MX: Tensor, right_MY: Tensor, row: Row | None) -> None:
    """Add, for each client or piece of one, the sum over its rows of the products of left and right, in place."""
    if row is None:
        sums_GXY.baddbmm_(_cut(left_MX, len(sums_GXY)).mT, _cut(right_MY, len(sums_GXY)))
        return
    sizes = row.share(len(sums_GXY))
    for sum_XY, left, right in zip(sums_GXY, left_MX.split(sizes), right_MY.split(sizes), strict=True):
        sum_XY.addmm_(left.mT, right)


def _cut(rows_MX: Tensor, pieces: int) -> Tensor:
    """Return clients' rows as so many equal pieces, in their order."""
    return rows_MX.reshape(pieces, -1, rows_MX.shape[-1])


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
