"""Uploads to a hub of this machine: what goes there, who can read it, and what never does."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from support.hub_here import Hub, ask_here, open_hub
from support.hub_uploads import TOKEN
from support.small_models import write_small_model
from support.tiny import make_recipe
from typer.testing import CliRunner

from fedloom import run
from fedloom.cli import app
from fedloom.errors import RunError
from fedloom.experiment.building import load_base
from fedloom.handover import export
from fedloom.handover.finished_run import recipe_of
from fedloom.handover.push import push
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.records.run import Run

# Of the hub's client, about itself.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
NAME = "someone/my-adapter"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("private-home")
    model = write_small_model(folder / "secret-model")
    (folder / "patients.jsonl").write_text("".join(f'{{"text": "a text number {n} of many"}}\n' for n in range(40)))
    data = {"source": str(folder / "patients.jsonl")}
    recipe = make_recipe(model={"source": str(model)}, data=data, federation={"rounds": 1})
    return run(recipe, folder / "run", Observer())


def spoil(write: Callable[..., tuple[torch.nn.Module, float]], *arguments: Any, **named: Any) -> Any:
    """Write a folder in which a weight is another than the run's."""
    opened, tolerance = write(*arguments, **named)
    next(opened.parameters()).data += 1
    return opened, tolerance


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with open_hub() as here:
        ask_here(here, tmp_path, monkeypatch)
        # The hub's own protocol for large files is a program of its own; this hub knows the one before it.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield here


def uploaded(hub: Hub) -> dict[str, bytes]:
    return hub.models[NAME].references["main"][-1].files


def test_an_adapter_is_private_and_opens_from_the_hub(finished: Run, hub: Hub, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(finished.folder), NAME])
    assert result.exit_code == 0, result.output
    assert f"{hub.address}/{NAME}" in result.output
    assert hub.models[NAME].private
    assert uploaded(hub).keys() == FILES
    folder = Path(snapshot_download(NAME, token=TOKEN))
    base = load_base(recipe_of(finished.folder), open_model(recipe_of(finished.folder).model.source))
    assert PeftModel.from_pretrained(base, folder)


def test_nothing_of_this_machine_and_of_the_documents_goes_there(finished: Run, hub: Hub) -> None:
    push(finished.folder, NAME)
    whole = b"".join(uploaded(hub).values())
    for word in (str(finished.folder.parent), "private-home", "a text number"):
        assert word.encode() not in whole
    card = uploaded(hub)["README.md"].decode()
    assert "PATH-OF-THIS-FOLDER" not in card
    assert f'PeftModel.from_pretrained(model, "{NAME}")' in card
    assert json.loads(uploaded(hub)["adapter_config.json"])["base_model_name_or_path"] == "local: secret-model"


def test_what_others_left_in_the_adapters_folder_stays_here(finished: Run, hub: Hub) -> None:
    best = finished.folder / "adapters" / "best"
    left, link = best / ".README.md.swp", best / "documents"
    left.write_text("a text number that somebody looked at")
    link.symlink_to(finished.folder.parent / "patients.jsonl")
    try:
        push(finished.folder, NAME)
    finally:
        left.unlink()
        link.unlink()
    assert uploaded(hub).keys() == FILES


def test_the_report_goes_only_where_it_is_asked_for(finished: Run, hub: Hub) -> None:
    push(finished.folder, NAME, with_report=True)
    assert uploaded(hub).keys() == FILES | {"report.html"}
    assert uploaded(hub)["report.html"] == (finished.folder / "report.html").read_bytes()


@pytest.mark.long
def test_a_model_that_was_trained_whole_is_one_too(finished: Run, hub: Hub, tmp_path: Path) -> None:
    recipe = recipe_of(finished.folder)
    method = make_recipe(adapter={"method": "full", "rank": None, "alpha": None}).adapter
    whole = run(recipe.model_copy(update={"adapter": method}), tmp_path / "run", Observer())
    push(whole.folder, NAME, public=True)
    assert not hub.models[NAME].private
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= uploaded(hub).keys()
    assert b"private-home" not in b"".join(uploaded(hub).values())


def test_it_is_public_only_where_that_is_said(finished: Run, hub: Hub) -> None:
    hub.add_model(NAME, {"README.md": b"mine"})
    with pytest.raises(RunError, match="this repository is public; name another, or say --public"):
        push(finished.folder, NAME)
    assert uploaded(hub) == {"README.md": b"mine"}
    push(finished.folder, NAME, public=True)
    assert uploaded(hub).keys() == FILES
    hub.models[NAME].private = True
    with pytest.raises(RunError, match="this repository is private; leave --public out"):
        push(finished.folder, NAME, public=True)
    push(finished.folder, NAME)


@pytest.mark.parametrize("name", ["alone", "../up", "a/b/c", "someone/..", "some one/x", "https://hub/x/y", "-/x", ""])
def test_a_name_that_is_none_asks_nobody(name: str, finished: Run, hub: Hub) -> None:
    with pytest.raises(RunError, match="NAME: not a name of a model on the hub; write it as OWNER/NAME"):
        push(finished.folder, name)
    assert hub.asked == []


def test_what_the_hub_does_not_take_is_one_line(
    finished: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"other/x: .* did not take it \(HfHubHTTPError\); .*HF_TOKEN"):
        push(finished.folder, "other/x")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(RunError, match=r"did not take it \(\w+\); .*hf auth login") as caught:
        push(finished.folder, NAME)
    assert "hf_another" not in str(caught.value) + "".join(capsys.readouterr())
    assert NAME not in hub.models
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE is set"):
        push(finished.folder, NAME)


def test_what_is_not_proven_is_not_uploaded(finished: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.handover.export._write_folder", partial(spoil, export._write_folder))
    with pytest.raises(RunError, match="does not match the run's adapter"):
        push(finished.folder, NAME)
    assert NAME not in hub.models
    with pytest.raises(RunError, match="the run has no report; write it first: fedloom report"):
        push(finished.folder / "none", NAME, with_report=True)
