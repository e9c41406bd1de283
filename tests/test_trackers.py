"""Numbers of a run where people look at runs."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_recipe

from fedloom import run
from fedloom.display import Display
from fedloom.errors import RunError
from fedloom.trackers import TRACKERS, open_tracker, scalars


def test_scalars_are_the_numbers_of_a_record() -> None:
    record = {
        "round": 2,
        "central_loss": 2.5,
        "clients": [0, 1],
        "finished": "now",
        "client_losses": {"0": 2.0, "1": 3.0},
    }
    assert scalars(record) == {"central_loss": 2.5, "client_losses/0": 2.0, "client_losses/1": 3.0}


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finished = run(make_recipe(), tmp_path / "run", Display(), log_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = events.Scalars("central_loss")
    assert [(event.step, event.value) for event in logged] == [
        (record["round"], pytest.approx(record["central_loss"])) for record in finished.rounds
    ]


class Recorder(SimpleNamespace):
    """Stands for a tracker's package: whatever is called, is written down."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, arguments, named))


@pytest.mark.parametrize("kind", ["mlflow", "wandb", "trackio"])
def test_others_are_told_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, kind, Recorder(calls=calls))
    with open_tracker(kind, tmp_path / "run", {"name": "test"}) as log:
        log(1, {"central_loss": 2.5})
    names = [name for name, *_ in calls]
    assert names[-2:] == (["log_metrics", "end_run"] if kind == "mlflow" else ["log", "finish"])
    assert calls[-2][1:] == (({"central_loss": 2.5},), {"step": 1})


@pytest.mark.parametrize("kind", sorted(TRACKERS))
def test_one_that_is_missing_says_what_to_install(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.trackers.find_spec", lambda name: None)
    with pytest.raises(RunError, match=rf"{kind} is not installed.*pip install {kind}"):
        run(make_recipe(), tmp_path / "run", Display(), log_to=kind)
    assert not (tmp_path / "run").exists()


def test_one_that_is_unknown_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'no tracker "tensorbord".*tensorboard, mlflow'):
        run(make_recipe(), tmp_path / "run", Display(), log_to="tensorbord")
