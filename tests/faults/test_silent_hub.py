"""A hub that takes a connection and never answers: asked once, within a time limit; then the local cache is all."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from support.marks import first
from support.tiny import make_recipe

from fedloom import hub
from fedloom.data.documents import load_documents
from fedloom.errors import DataError, FedloomError, ModelError
from fedloom.model.source import open_model
from fedloom.recipe.data_section import Data

LIMIT_SECONDS = 0.3
COMMIT = "c" * 40


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of such a hub, which everybody here now asks; the caches are empty."""
    server = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []
    asked: list[bytes] = []

    def take() -> None:
        while True:
            try:
                taken.append(server.accept()[0])
            except OSError:
                return
            asked.append(taken[-1].recv(1000).split(b"\r\n")[0])

    thread = threading.Thread(target=take)
    thread.start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", LIMIT_SECONDS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield address
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)
    for connection in taken:
        connection.close()
    assert not thread.is_alive()
    # The hub's client also asks for a list of programs that use it, once, for three seconds at most.
    assert len([line for line in asked if b"/api/agent" not in line]) == 1, asked


def data_of(**keys: object) -> Data:
    return make_recipe(data={"source": "nobody/nothing", **keys}).data


@pytest.mark.parametrize("at_most", [None, 5])
def test_a_data_set_of_a_hub_that_hangs_is_given_up_in_time(at_most: int | None, silent: str) -> None:
    check_given_up(silent, lambda: load_documents(data_of(), 7, at_most), DataError, "not in the local cache")


def test_a_model_of_a_hub_that_hangs_is_given_up_in_time(silent: str) -> None:
    check_given_up(silent, lambda: open_model("nobody/nothing"), ModelError, "not complete in the local cache")


def check_given_up(address: str, ask: object, kind: type[FedloomError], words: str) -> None:
    assert callable(ask)
    started = time.perf_counter()
    with pytest.raises(kind, match=words) as caught:
        ask()
    assert time.perf_counter() - started < LIMIT_SECONDS + 15, "imports take seconds on a busy machine"
    for word in ("nobody/nothing", address, "Timeout", "check the name and the network"):
        assert word in str(caught.value)


@pytest.fixture
def cached(silent: str, tmp_path: Path) -> str:
    """The data set nobody/nothing as `datasets` keeps it after a download: twenty texts, at a commit."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"text number {number}"}) + "\n" for number in range(20)))
    builder = datasets.load_dataset_builder("json", data_files=str(source), cache_dir=str(tmp_path / "made"))
    builder.download_and_prepare()
    kept = tmp_path / "cache" / "nobody___nothing" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, kept)
    for path in kept.glob("json-*"):
        path.rename(kept / path.name.replace("json-", "nothing-"))
    facts = json.loads((kept / "dataset_info.json").read_text())
    facts |= {"config_name": "default", "dataset_name": "nothing", "builder_name": "json"}
    (kept / "dataset_info.json").write_text(json.dumps(facts))
    return COMMIT


@pytest.mark.parametrize("at_most", [None, 12])
@pytest.mark.parametrize("revision", first([None, COMMIT]))
def test_a_data_set_in_the_local_cache_is_used_at_its_commit(
    at_most: int | None, revision: str | None, cached: str
) -> None:
    found = load_documents(data_of(**({"revision": revision} if revision else {})), 7, at_most)
    assert len(found.documents) == (at_most or 20)
    assert found.revision == cached


def test_another_commit_than_the_recipe_names_is_not_used(cached: str) -> None:
    with pytest.raises(DataError, match=f"data.revision: the local cache holds another commit, {cached}"):
        load_documents(data_of(revision="d" * 40), 7)


def test_nothing_stays_offline_afterwards(silent: str) -> None:
    with hub.without_hub():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(DataError):
        load_documents(data_of(), 7)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
