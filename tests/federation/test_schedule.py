"""μ over the rounds, and what the rounds are told of it."""

from pathlib import Path

import pytest
from support.tiny import make_recipe

from fedloom import run
from fedloom.federation.schedule import adapt_mu, proximal_mu
from fedloom.monitoring.observer import Observer


@pytest.mark.parametrize(
    ("losses", "mu"),
    [
        ([3.0], 0.2),
        ([3.0, 3.1], 0.3),
        ([3.0, 3.1, 3.2], 0.4),
        ([3.0, 2.9, 2.8, 2.7, 2.6], 0.2),
        ([3.0, 2.9, 2.8, 2.7, 2.6, 2.5], 0.1),
        ([6.0 - loss for loss in range(16)], 0.0),
        ([3.0, 2.9, 2.8, 3.5, 2.7, 2.6, 2.5, 2.4], 0.3),
        ([3.0, 3.0, 3.0], 0.2),
    ],
)
def test_adaptive_mu_rises_with_the_loss_and_falls_after_five_falls(losses: list[float], mu: float) -> None:
    assert adapt_mu(0.2, losses) == pytest.approx(mu)


def test_schedules_fall_over_the_rounds() -> None:
    for schedule, expected in (("constant", [0.4] * 4), ("linear", [0.4, 0.3, 0.2, 0.1])):
        training = make_recipe(training={"proximal_mu": 0.4, "proximal_schedule": schedule}).training
        assert [proximal_mu(training, [1.0] * rounds, 4) for rounds in range(1, 5)] == pytest.approx(expected)


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_a_rounds_mu_is_on_record_and_is_what_was_trained_with(engine: str, tmp_path: Path) -> None:
    recipe = make_recipe(
        training={"proximal_mu": 1.0, "proximal_schedule": "linear", "engine": engine},
        federation={"rounds": 4},
    )
    finished = run(recipe, tmp_path / "run", Observer())
    assert [record.get("proximal_mu") for record in finished.rounds] == [None, 1.0, 0.75, 0.5, 0.25]
    assert [client["proximal_mu"] for client in finished.clients if client["client"] == 0] == [1.0, 0.75, 0.5, 0.25]
    for client in finished.clients:
        assert client["proximal_loss"] > 0
