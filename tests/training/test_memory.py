"""How many clients fit, and what a step of theirs needs."""

import pytest
import torch
from conftest import make_adapted

from fedloom.adapters.stacked import Stack
from fedloom.training.memory import StepMemory, free_bytes, measure_step


def test_a_clients_share_grows_with_its_tokens_and_its_adapter(shape: str) -> None:
    def client_bytes(tokens: int, optimizer: str = "adamw", **adapter: int) -> int:
        adapted = make_adapted(shape, **adapter)
        return measure_step(adapted, Stack(adapted), tokens=tokens, optimizer=optimizer).client_bytes

    adapter_bytes = 4 * make_adapted(shape).layout.size
    assert client_bytes(64) - client_bytes(64, "sgd") == 2 * adapter_bytes
    activations = client_bytes(64) - 4 * adapter_bytes
    assert client_bytes(256) - 4 * adapter_bytes == pytest.approx(4 * activations, rel=0.01)
    # Two layers of width 64: at least the inputs of the adapted layers are kept, and not the logits of 260 words.
    assert 64 * 2 * 64 * 4 < activations < 64 * 200 * 64 * 4


def test_the_base_model_is_counted_once_and_not_with_a_client() -> None:
    adapted = make_adapted()
    base = sum(p.numel() * p.element_size() for p in adapted.model.parameters())
    assert measure_step(adapted, Stack(adapted), tokens=64, optimizer="adamw").base_bytes == base


def test_tracing_leaves_the_model_as_it_was() -> None:
    adapted = make_adapted("tiny-opt", dropout=0.3)
    adapted.model.eval()
    before = adapted.read().sha256()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    measure_step(adapted, Stack(adapted), tokens=64, optimizer="adamw")
    assert torch.equal(torch.rand(3), expected)
    assert not adapted.model.training
    assert adapted.read().sha256() == before


@pytest.mark.parametrize(("free", "fit"), [(0, 1), (499, 1), (1500, 5), (10_000, 39)])
def test_clients_that_fit(free: int, fit: int) -> None:
    step = StepMemory(base_bytes=5000, loss_bytes=200, client_bytes=200)
    assert step.clients_that_fit(free) == fit
    assert step.peak_bytes(3) == 5800


def test_this_machine_has_memory() -> None:
    assert free_bytes(torch.device("cpu")) > 2**20
