"""A client's machine opens a pickle at its owner's word, and never at a server's."""

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import make_recipe

from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.messages import pack_recipe, unpack_recipe
from fedloom.errors import ModelError
from fedloom.experiment.building import open_source
from fedloom.model.conversion import convert_model
from fedloom.model.loading import load_model
from fedloom.model.source import byte_tokenizer, open_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pickle, and an empty cache."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    made = load_model(open_model("random:tiny-llama"), dtype="float32", device=torch.device("cpu"))
    made.config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.long
def test_a_server_gives_no_leave_to_open_a_pickle(model: Path, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for number in range(8):
        (documents / f"{number}.txt").write_text(f"text {number} " * (number + 3))
    recipe = make_recipe(model={"source": str(model), "convert": True})
    assert not unpack_recipe(pack_recipe(recipe)).model.convert, "it is not told"
    with pytest.raises(ModelError, match=f"never opened unasked; fedloom convert {model}"):
        gather_client(recipe, documents)  # and counts for nothing, should a server tell it
    assert not (tmp_path / "cache").exists()
    convert_model(str(model), None, str)
    theirs, ours = gather_client(recipe, documents).source, open_source(recipe)
    assert theirs.weights == ours.weights
    shutil.rmtree(tmp_path / "cache")
    assert open_source(recipe).weights == ours.weights, "its owner's own recipe does"
