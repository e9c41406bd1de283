"""The meter of what averaging LoRA's factors apart costs, against dense matrices."""

from pathlib import Path

import pytest
import torch
from support.tiny import make_adapted, make_recipe

from fedloom import run
from fedloom.adapters.adapter import Layout
from fedloom.federation import lora_error
from fedloom.federation.lora_error import AveragingMeter
from fedloom.monitoring.observer import Observer

LAYOUT = Layout(
    tuple(f"base_model.model.{layer}.lora_{side}.weight" for layer in ("q", "v") for side in "AB"),
    (torch.Size([2, 5]), torch.Size([7, 2]), torch.Size([2, 3]), torch.Size([3, 2])),
)
SHARES = [1.0, 5.0, 2.0]


def draw() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(LAYOUT.size, generator=generator) for _ in SHARES]


def dense(weights: list[torch.Tensor]) -> tuple[dict[str, float], float]:
    """By the definition: the mean of the products against the product of the means."""
    share = [value / sum(SHARES) for value in SHARES]
    named = [LAYOUT.split(weights_P.double()) for weights_P in weights]
    errors, means = {}, {}
    for layer in ("q", "v"):
        a, b = f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"
        exact = sum(p * n[b] @ n[a] for p, n in zip(share, named, strict=True))
        apart = sum(p * n[b] for p, n in zip(share, named, strict=True)) @ sum(
            p * n[a] for p, n in zip(share, named, strict=True)
        )
        errors[layer], means[layer] = (exact - apart).norm() ** 2, exact.norm() ** 2
    whole = float((sum(errors.values()) / sum(means.values())) ** 0.5)
    return {layer: float((errors[layer] / means[layer]) ** 0.5) for layer in errors}, whole


def test_it_is_the_distance_of_the_dense_matrices() -> None:
    meter, weights = AveragingMeter(LAYOUT), draw()
    for weights_P, share in zip(weights, SHARES, strict=True):
        meter.add(weights_P, share)
    found = meter.take()
    assert found is not None
    layers, whole = dense(weights)
    assert found.whole == pytest.approx(whole, rel=1e-9)
    assert {name.removeprefix("base_model.model."): value for name, value in found.layers.items()} == {
        layer: pytest.approx(value, rel=1e-9) for layer, value in layers.items()
    }
    assert meter.take() is None, "a round's updates are forgotten with the round"


def test_there_is_none_where_clients_agree_or_a_is_frozen() -> None:
    meter, weights = AveragingMeter(LAYOUT), draw()
    for share in SHARES:
        meter.add(weights[0], share)
    same = meter.take()
    assert same is not None
    assert same.whole == pytest.approx(0, abs=1e-7)
    frozen = AveragingMeter(make_adapted(freeze_a=True).layout)
    frozen.add(torch.ones(make_adapted(freeze_a=True).layout.size), 1.0)
    assert frozen.take() is None


def test_memory_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_error, "MOST_CLIENTS", 2)
    meter = AveragingMeter(LAYOUT)
    for weights_P, share in zip(draw(), SHARES, strict=True):
        meter.add(weights_P, share)
    assert len(meter._updates) == 2
    assert meter.take() is None


def test_it_is_on_record_and_in_the_report(tmp_path: Path) -> None:
    finished = run(make_recipe(), tmp_path / "run", Observer())
    assert "lora_error" not in finished.rounds[0]
    for record in finished.rounds[1:]:
        assert 0 < record["lora_error"] < 1
        assert len(record["lora_error_layers"]) == 4
    assert "| LoRA averaging error |" in (tmp_path / "run" / "report.md").read_text()
