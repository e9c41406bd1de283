"""Knowing when to stop: onset, patience, and the experiment's own trajectories."""

from pathlib import Path

import pytest
from support.tiny import make_recipe

from fedloom import run
from fedloom.federation.schedule import stop_early
from fedloom.monitoring.observer import Observer
from fedloom.recipe.sections import EarlyStop
from fedloom.records.run import overfitting_onset, overfitting_onsets
from fedloom.report.run_report import load_reference


def test_the_experiments_own_trajectories() -> None:
    found = {
        trajectory["name"]: overfitting_onset(range(len(trajectory["central_loss"])), trajectory["central_loss"])
        for trajectory in load_reference("experiment")["trajectories"]
    }
    assert found == {
        "published: LoRA, 2,000 files a client": None,
        "published: LoRA, 1,000 files a client": None,
        "published: full model, 2,000 files a client": 5,
    }


def test_the_onset_is_told_for_the_central_hold_out_and_for_each_clients_own() -> None:
    central, first = [3.0, 2.0, 2.1, 2.2, 2.3], [3.0, 2.5, 2.4, 2.3, 2.2]
    rounds = [
        {"round": round, "central_loss": central[round], "client_losses": {"0": first[round], "1": central[round]}}
        for round in range(5)
    ]
    assert overfitting_onsets(rounds) == {"central": 2, "clients": {"0": None, "1": 2}}
    assert overfitting_onsets([]) == {"central": None, "clients": {}}


@pytest.mark.parametrize(
    ("early_stop", "losses", "stops"),
    [
        (None, [3, 3, 3, 3, 3], False),
        (EarlyStop(patience=2), [3, 2, 2.1], False),
        (EarlyStop(patience=2), [3, 2, 2.1, 2.05], True),
        (EarlyStop(patience=2), [3, 2, 2.1, 1.9], False),
        (EarlyStop(patience=1, min_delta=0.1), [3, 2.95], True),
        (EarlyStop(patience=2, min_delta=0.1), [3, 2.95, 2.92], True),
        (EarlyStop(patience=2, min_delta=0.1), [3, 2.95, 2.8], False),
    ],
)
def test_patience(early_stop: EarlyStop | None, losses: list[float], stops: bool) -> None:
    assert bool(stop_early(early_stop, losses)) == stops


def test_a_run_that_gets_no_better_stops_and_says_why(tmp_path: Path) -> None:
    recipe = make_recipe(federation={"rounds": 9, "early_stop": {"patience": 2, "min_delta": 1.0}})
    finished = run(recipe, tmp_path / "run", Observer())
    assert [record["round"] for record in finished.rounds] == [0, 1, 2]
    assert finished.status["state"] == "done"
    assert finished.status["overfitting_onset"] == {"central": None, "clients": {"0": None, "1": None, "2": None}}
    assert finished.status["stopped_early"].startswith("9 scheduled, 2 completed: no loss better than round 0's")
    assert (tmp_path / "run" / "adapters" / "best").is_dir()
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Stopped early: 9 scheduled, 2 completed" in text
    assert "| Rounds | 2 completed of 9 scheduled |" in text
