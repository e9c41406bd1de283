"""Products by oneDNN are torch's own up to rounding, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedloom.host import machine
from fedloom.model import frozen_products
from fedloom.model.frozen_products import choose_products, multiply_frozen, onednn_is_faster


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take oneDNN for faster on any processor, as its products are right on every one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(frozen_products, "is_amd_with_avx512", lambda: True)
    onednn_is_faster.cache_clear()
    yield
    onednn_is_faster.cache_clear()


def make_layer(bias: bool = True, features: tuple[int, int] = (384, 768)) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(*features, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(384,), (1, 384), (5, 384), (2, 7, 384), (0, 384)])
def test_a_product_and_its_gradients_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = make_layer(bias), torch.randn(shape, requires_grad=True)
    choose_products(layer)
    found, wanted = layer(x), functional.linear(x, layer.weight, layer.bias)
    assert type(found.grad_fn).__name__ == "_FrozenProductBackward", "oneDNN was not asked"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Twice: who reads texts out of gradients differentiates these again.
    ways = []
    for product in (found, wanted):
        (first,) = torch.autograd.grad(product.tanh().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        ways.append((first, second))
    torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-5)


def test_values_that_lie_in_any_order_and_gradients_that_repeat_are_taken() -> None:
    layer, x = make_layer(), torch.randn(384, 6).T.requires_grad_()
    torch.testing.assert_close(multiply_frozen(x, layer.weight), x @ layer.weight.T, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(multiply_frozen(x, layer.weight).sum(), x)
    torch.testing.assert_close(found, layer.weight.sum(0).expand(6, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [(384, 768), (768, 384), (2048, 768)])
def test_a_row_does_not_depend_on_those_beside_it(features: tuple[int, int]) -> None:
    layer, x = make_layer(features=features), torch.randn(300, features[0])
    choose_products(layer)
    whole = layer(x)
    assert all(torch.equal(layer(x[:rows]), whole[:rows]) for rows in (300, 128, 64, 17))


def test_a_weight_that_is_trained_or_small_or_of_another_type_is_left_to_torch() -> None:
    layer, x = make_layer(), torch.randn(2, 384, requires_grad=True)

    def asked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        return type(multiply_frozen(x, weight, bias).grad_fn).__name__ == "_FrozenProductBackward"

    assert asked(x, layer.weight, layer.bias)
    assert not asked(x, layer.weight.clone().requires_grad_())
    assert not asked(x, layer.weight, layer.bias.clone().requires_grad_())
    assert not asked(x, layer.weight[:128])
    assert not asked(x.double(), layer.weight.double())
    small = make_layer(features=(64, 64))
    choose_products(small)
    assert "forward" not in vars(small)


def test_another_processor_and_a_layer_with_a_way_of_its_own_keep_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    layer.forward = own = lambda x: x  # type: ignore[method-assign]
    choose_products(layer)
    assert layer.forward is own
    onednn_is_faster.cache_clear()
    monkeypatch.setattr(frozen_products, "is_amd_with_avx512", lambda: False)
    other = make_layer()
    choose_products(other)
    assert "forward" not in vars(other)


@pytest.mark.parametrize(
    ("vendor", "flags", "known"),
    [("AuthenticAMD", "avx2 avx512f", True), ("GenuineIntel", "avx2 avx512f", False), ("AuthenticAMD", "avx2", False)],
)
def test_a_processor_is_known_by_what_linux_says_of_it(
    vendor: str, flags: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cpu_facts", lambda: {"vendor_id": vendor, "flags": flags})
    assert machine.is_amd_with_avx512() is known
