"""A sweep whose process is killed inside a pass goes on with the same command: each arm after its last round."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.killed_runs import make_recipe, sweep_out

from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.check import check_run
from fedloom.records.run import read_run

AXES = ["seed=1,2", "training.proximal_mu=0.0,0.5"]
KILLED = -9
KEPT = ("round", "central_loss", "train_loss", "client_loss", "proximal_loss", "drift", "bytes_up", "clients")


def write_recipe(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(recipe_to_toml(make_recipe(folder, model={"dtype": "float64"}, baselines=("pooled",))))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and its sweep that nobody killed."""
    folder = tmp_path_factory.mktemp("sweeps")
    path = write_recipe(folder)
    assert sweep_out(path, AXES, folder / "whole") == 0
    return path, folder / "whole"


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in KEPT if key in record} for record in read_run(folder).rounds]


def lines(run: Path) -> list[str]:
    return (run / "rounds.jsonl").read_text().splitlines()


def committed(folder: Path) -> dict[str, list[str]]:
    """The lines of each run's rounds that its newest state holds, by the run's name."""
    newest = {
        run.parent.name: max((int(state.name.removeprefix("round-")) for state in run.glob("round-*")), default=-1)
        for run in folder.glob("*/state")
    }
    return {name: lines(folder / name)[: round + 1] for name, round in newest.items()}


@pytest.mark.slow  # five processes each
@pytest.mark.parametrize(
    "kills",
    [
        ["training.stepped=kill@15", "state.renamed=kill@2", "record.round=kill@3"],
        ["run.opened=kill@2", "record.round=kill@2", "state.file=kill@7"],
        ["state.renamed=kill@14", "training.stepped=kill@12", "training.stepped=kill@4"],
    ],
    ids=str,
)
def test_three_kills_leave_no_trace_in_the_records(kills: list[str], whole: tuple[Path, Path], tmp_path: Path) -> None:
    path, right = whole
    for kill in kills:
        before = committed(tmp_path / "sweep")
        assert sweep_out(path, AXES, tmp_path / "sweep", kill) == KILLED, "the place is on the way"
        for name, had in before.items():
            assert lines(tmp_path / "sweep" / name)[: len(had)] == had, "a committed round is not trained again"
    assert any(before.values())
    assert sweep_out(path, AXES, tmp_path / "sweep") == 0
    for other in sorted(right.glob("*/rounds.jsonl")):
        ours = tmp_path / "sweep" / other.parent.name
        for mine, alone in zip(numbers(ours), numbers(other.parent), strict=True):
            assert mine == pytest.approx(alone, rel=1e-9)
        assert read_run(ours).status["state"] == "done"
        assert not [finding for finding in check_run(ours) if not finding.well]
        pooled, theirs = (json.loads((run / "baselines.json").read_text())["pooled"] for run in (ours, other.parent))
        assert pooled["losses"] == pytest.approx(theirs["losses"], rel=1e-9)
    assert (tmp_path / "sweep" / "comparison.html").is_file()
