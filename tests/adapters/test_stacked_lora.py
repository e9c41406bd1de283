"""Stacked LoRA layers by themselves: what they give, and what they keep for the backward pass."""

import pytest
import torch
from torch import Tensor, nn

from fedloom.adapters.stacked_lora import StackedLora, _StackedProduct

CLIENTS, ROWS, INPUTS, OUTPUTS, RANK = 3, 10, 32, 24, 4


def build_layer(dtype: torch.dtype) -> StackedLora:
    generator = torch.Generator().manual_seed(7)
    base = nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)
    base.weight.copy_(torch.randn(OUTPUTS, INPUTS, generator=generator))
    layer = StackedLora(base.to(dtype), 2.0, 0.0)
    layer.lora_a_KRI = torch.randn(CLIENTS, RANK, INPUTS, generator=generator).requires_grad_()
    layer.lora_b_KOR = torch.randn(CLIENTS, OUTPUTS, RANK, generator=generator).requires_grad_()
    layer.gradient_a_GRI = torch.zeros(CLIENTS, RANK, INPUTS)
    layer.gradient_b_GOR = torch.zeros(CLIENTS, OUTPUTS, RANK)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_layers_that_read_the_same_keep_it_once_and_as_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(CLIENTS * 2, ROWS // 2, INPUTS).to(dtype).requires_grad_()
    layers, kept = [build_layer(dtype) for _ in range(2)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        results = [layer(x) for layer in layers]
    assert len(results) == 2
    weights = {layer.base.weight.data_ptr() for layer in layers}
    bytes_of = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    a_token = sum(size for place, size in bytes_of.items() if place not in weights) / (CLIENTS * ROWS)
    # x, and A x of each layer in float32.
    assert a_token == INPUTS * dtype.itemsize + 2 * RANK * 4


def test_a_base_of_16_bits_has_the_bits_of_a_copy_in_float32() -> None:
    layer, x = build_layer(torch.bfloat16), torch.randn(CLIENTS * ROWS, INPUTS).to(torch.bfloat16)
    slope_MO = torch.randn(CLIENTS * ROWS, OUTPUTS)

    def run(given: Tensor) -> list[Tensor]:
        layer.gradient_a_GRI.zero_()
        layer.gradient_b_GOR.zero_()
        product_MO = _StackedProduct.apply(given, layer.lora_a_KRI, layer.lora_b_KOR, layer, None, False)
        product_MO.backward(slope_MO)
        return [product_MO.detach(), layer.gradient_a_GRI.clone(), layer.gradient_b_GOR.clone()]

    as_it_is, copied = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = zip(run(as_it_is), run(copied.float()), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in found)
    assert torch.equal(as_it_is.grad, copied.grad)
    assert all(gradient.any() for gradient in (as_it_is.grad, layer.gradient_a_GRI, layer.gradient_b_GOR))
