"""A run directory that an earlier fedloom wrote, and was killed over, goes on here to the same end.

Commit 0376450 wrote `before/run` and was killed after round 2; `before/expected*` is what it made of it without a kill.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedloom import load_recipe, read_run, run
from fedloom.monitoring.observer import Observer
from fedloom.records.check import check_run
from fedloom.report.run_report import write_report

BEFORE = Path(__file__).parent / "before"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    shutil.copy(BEFORE / "documents.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_it_is_read_reported_and_found_whole(folder: Path) -> None:
    assert [record["round"] for record in read_run(folder).rounds] == [0, 1, 2]
    assert write_report(folder).is_file()
    assert [finding.what for finding in check_run(folder) if not finding.well] == []


def test_it_goes_on_to_the_same_end(folder: Path) -> None:
    before = (folder / "rounds.jsonl").read_bytes()
    finished = run(load_recipe(folder / "recipe.toml"), folder, Observer(), resume=True)
    assert (folder / "rounds.jsonl").read_bytes().startswith(before), "what was recorded stays"
    assert finished.status["state"] == "done"
    assert finished.status["resumed"] == 1
    expected = [json.loads(line) for line in (BEFORE / "expected_rounds.jsonl").read_text().splitlines()]
    for found, then in zip(finished.rounds, expected, strict=True):
        assert found["central_loss"] == pytest.approx(then["central_loss"], rel=1e-6)
    tensors, wanted = (load_file(path) for path in (folder / "adapters/last/adapter_model.safetensors",
                                                    BEFORE / "expected.safetensors"))  # fmt: skip
    assert tensors.keys() == wanted.keys()
    # Another processor than the one that wrote it may round otherwise.
    assert all(torch.allclose(tensors[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
    assert not [finding for finding in check_run(folder) if not finding.well]
