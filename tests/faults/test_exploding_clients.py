"""A client whose training explodes is dropped for the round, on record; too many end the run, which keeps its best."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.marks import CI, first
from support.quick_runs import attempt, make_recipe

from fedloom.federation.fleet import LocalFleet
from fedloom.records.check import check_run
from fedloom.records.run import read_run
from fedloom.training.jobs import ClientJob


def explode_by_rate(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Client 1's learning rate in round 2."""
    right = ClientJob.rate

    def rate(self: ClientJob, step: int, steps: int) -> float:
        return value if (self.round, self.client) == (2, 1) else right(self, step, steps)

    monkeypatch.setattr(ClientJob, "rate", rate)


def explode_by_state(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """What client 1's optimizer kept from round 1."""
    right = LocalFleet.restore, LocalFleet.jobs

    def jobs(self: LocalFleet, tasks: list) -> list[ClientJob]:
        if tasks[0].round == 2:
            self.optimizer_states[1]["exp_avg"] = torch.full_like(self.optimizer_states[1]["exp_avg"], value)
        return right[1](self, tasks)

    monkeypatch.setattr(LocalFleet, "jobs", jobs)


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "rate 1e35": lambda patch: explode_by_rate(patch, 1e35),
    "rate 1e8": lambda patch: explode_by_rate(patch, 1e8),
    "rate NaN": lambda patch: explode_by_rate(patch, math.nan),
    "state NaN": lambda patch: explode_by_state(patch, math.nan),
    "state infinite": lambda patch: explode_by_state(patch, math.inf),
}


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
@pytest.mark.parametrize("way", first(WAYS, keep=2, rest=CI))
def test_a_client_that_explodes_is_dropped_for_the_round(
    way: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WAYS[way](monkeypatch)
    recipe = make_recipe(tmp_path, training={"engine": engine}, federation={"max_lost_clients": 1})
    assert not attempt(recipe, tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert [record["lost"] for record in found.rounds] == [[], [], [1], []], "it is back in the next round"
    why = found.rounds[2]["lost_because"]["1"]
    assert why.startswith("round 2, client 1, ")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Updates were lost in 1 of 3 rounds (round 2: 1)" in report
    assert "round 2, client 1" in report
    assert load_file(tmp_path / "run/adapters/last/adapter_model.safetensors").keys()
    for path in (tmp_path / "run").glob("adapters/*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert all(finding.well for finding in check_run(tmp_path / "run"))


@pytest.mark.parametrize("engine", ["batched", "reference"])
def test_more_than_allowed_end_the_run_and_its_best_adapter_is_kept(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explode_by_rate(monkeypatch, 1e35)
    recipe = make_recipe(tmp_path, training={"engine": engine}, federation={"max_lost_clients": 0})
    assert attempt(recipe, tmp_path / "run").startswith("round 2, client 1, ")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "round 2, client 1" in status["error"]
    assert "round 2, client 1" in (tmp_path / "run" / "report.md").read_text()
    found = read_run(tmp_path / "run")
    assert len(found.rounds) == 2
    whole = {finding.what: finding.found for finding in check_run(tmp_path / "run") if finding.well}
    assert whole["adapters/best"] == f"the adapter of round {found.best_round}"
