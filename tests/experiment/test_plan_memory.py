"""What a plan says of memory and of the engine: by whom a step is taken, what it takes, and where that is too much."""

from typing import Any

import pytest
from support.marks import first
from support.tiny import make_recipe

from fedloom.experiment.run import plan
from fedloom.monitoring.display import describe_plan


def shown(**sections: Any) -> dict[str, str]:
    return describe_plan(plan(make_recipe(**sections)))


@pytest.mark.parametrize(
    ("sections", "engine"),
    first(
        [
            ({"training": {"engine": "reference"}}, "engine reference"),
            ({"adapter": {"dora": True}}, "engine reference, as batched has no adapter.dora"),
            (
                {"adapter": {"method": "ia3", "rank": None, "alpha": None}},
                'engine reference, as batched has no method "ia3"',
            ),
        ]
    ),
)
def test_a_plan_of_one_client_after_another_says_why_and_what_it_takes(sections: dict, engine: str) -> None:
    rows = shown(**sections)
    assert rows["device"] == f"cpu, float32, {engine}"
    assert rows["memory"].endswith(" MB predicted for model and training, one client after another")


@pytest.mark.long
def test_an_evaluation_is_predicted_for_what_is_held_out() -> None:
    all_at_once, more = (plan(make_recipe(evaluation={"batch_size": size})) for size in (100, 10**6))
    assert all_at_once.peak_bytes == more.peak_bytes


def test_a_step_is_predicted_for_what_there_is_to_train_on() -> None:
    few, more, pooled = (
        plan(make_recipe(training={"batch_size": size}, **given))
        for size, given in ((100, {}), (10**9, {}), (10**9, {"baselines": ["pooled"]}))
    )
    assert few.peak_bytes == more.peak_bytes < pooled.peak_bytes
    assert few.clients_at_once == more.clients_at_once > 1


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_a_step_that_takes_more_than_is_free_is_said(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.training.memory.free_memory", lambda: 2**20)
    rows = shown(training={"engine": engine})
    assert "; more than is free: it is likely to fail here" in rows["memory"]
    assert "would fit" not in rows["memory"]
