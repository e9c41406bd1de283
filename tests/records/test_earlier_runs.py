"""Run directories that earlier versions wrote, and were killed over after round 2.

`before/run` is of the commit that chose what a client holds out by a keyed hash, and goes on here to the same end:
`before/expected*` is what that commit made of it without a kill. `before/first` is of commit 0376450, which chose it
by the documents' places: it is read, and not gone on with.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedloom import load_recipe, read_run, run
from fedloom.errors import RunError
from fedloom.monitoring.observer import Observer
from fedloom.records.check import check_run
from fedloom.report.run_report import write_report

BEFORE = Path(__file__).parent / "before"


@pytest.fixture(params=["run"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(BEFORE / request.param, tmp_path / "run")
    shutil.copy(BEFORE / "documents.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("folder", ["run", "first"], indirect=True)
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


@pytest.mark.parametrize("folder", ["first"], indirect=True)
def test_clients_that_held_out_other_documents_do_not_go_on(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    with pytest.raises(
        RunError, match=r"chose otherwise what a client holds out.*go on with the fedloom that began it"
    ):
        run(load_recipe(folder / "recipe.toml"), folder, Observer(), resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
