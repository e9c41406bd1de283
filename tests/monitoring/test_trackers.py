"""Numbers of a run where people look at runs."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import RunError
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.trackers import TRACKERS, Tracker, scalars


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

    finished = run(make_recipe(), tmp_path / "run", Observer(), log_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = events.Scalars("central_loss")
    assert [(event.step, event.value) for event in logged] == [
        (record["round"], pytest.approx(record["central_loss"])) for record in finished.rounds
    ]


class Recorder(SimpleNamespace):
    """Stands for a tracker's package: what is called is written down."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: self.calls.append((name, arguments, named))


RECIPE = {"name": "test"}
METRICS = {"central_loss": 2.5}
STARTED = {"project": "fedloom", "name": "run", "config": RECIPE}
CALLS: dict[str, list[Any]] = {
    "mlflow": [
        ("set_experiment", ("test",), {}),
        ("start_run", (), {"run_name": "run"}),
        ("log_dict", (RECIPE, "recipe.json"), {}),
        ("log_metrics", (METRICS,), {"step": 1}),
        ("end_run", (), {}),
    ],
    "wandb": [
        ("Settings", (), {"disable_git": True, "save_code": False, "console": "off"}),
        ("init", (), {**STARTED, "settings": None}),
        ("log", (METRICS,), {"step": 1}),
        ("finish", (), {}),
    ],
    "trackio": [("init", (), STARTED), ("log", (METRICS,), {"step": 1}), ("finish", (), {})],
}
"""What each is told, and that W&B takes no patch of the working tree and no console."""


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_others_are_told_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, kind, Recorder(calls=calls))
    monkeypatch.setattr("fedloom.monitoring.trackers.find_spec", lambda name: object())
    tracker = Tracker(kind, RECIPE)
    tracker.show_folder(tmp_path / "run")
    tracker.show_round({"round": 1, **METRICS})  # type: ignore[typeddict-item]
    tracker.close()
    assert calls == CALLS[kind]


def test_a_tracker_that_is_down_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise ConnectionError

    monkeypatch.setitem(TRACKERS, "tensorboard", lambda folder, recipe: (fail, fail))
    with pytest.warns(RuntimeWarning, match="tensorboard takes no more numbers: ConnectionError") as said:
        finished = run(make_recipe(), tmp_path / "run", Observer(), log_to="tensorboard")
    assert len(said) == 1
    assert finished.status["state"] == "done"


@pytest.mark.parametrize("kind", sorted(TRACKERS))
def test_one_that_is_missing_says_what_to_install(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.monitoring.trackers.find_spec", lambda name: None)
    with pytest.raises(RunError, match=rf"{kind} is not installed.*pip install {kind}"):
        run(make_recipe(), tmp_path / "run", Observer(), log_to=kind)
    assert not (tmp_path / "run").exists()


def test_one_that_is_unknown_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'no tracker "tensorbord".*tensorboard, mlflow'):
        run(make_recipe(), tmp_path / "run", Observer(), log_to="tensorbord")
