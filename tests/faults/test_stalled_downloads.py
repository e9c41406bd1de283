"""A hub that answers and then hangs in the middle of a file: given up in time, by one line, with nothing left over."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from support.hub_here import Hub, ask_here, environment_of, files_of, open_hub
from support.marks import first

from fedloom import downloads
from fedloom.errors import ModelError
from fedloom.model.loading import load_model
from fedloom.model.source import open_model

NAME, ROWS = "someone/model", "someone/rows"
STOPPED = r"the download stopped: nothing more came in 2 s, after [\d.]+ k?B; check the network and the hub"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model, pickle = load_model(open_model("random:tiny-opt"), dtype="float32", device=torch.device("cpu")), io.BytesIO()
    torch.save({"x": torch.zeros(100_000)}, pickle)
    return {**files_of(model, tmp_path_factory.mktemp("model")), "pytorch_model.bin": pickle.getvalue()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[Hub]:
    monkeypatch.setattr(downloads, "STALL_SECONDS", 2.0)
    with open_hub() as here:
        ask_here(here, tmp_path, monkeypatch)
        here.add_model(NAME, files)
        rows = "".join(json.dumps({"text": f"text {number} " * 50}) + "\n" for number in range(500))
        here.add_dataset(ROWS, {"data.jsonl": rows.encode()})
        yield here
    assert not [
        child for child in psutil.Process().children(recursive=True) if "huggingface_hub" in child.cmdline()[-2]
    ]


@pytest.mark.long
@pytest.mark.parametrize("ending", first(["model.safetensors", "tokenizer.json"]))
def test_a_model_that_stops_coming_is_given_up(ending: str, hub: Hub) -> None:
    hub.drips[ending] = 1
    started = time.monotonic()
    with pytest.raises(ModelError, match=STOPPED):
        load_model(open_model(NAME), dtype="float32", device=torch.device("cpu"))
    assert time.monotonic() - started < 30


@pytest.mark.long
def test_so_is_a_pickle_that_is_to_be_converted(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add_model(NAME, {name: content for name, content in files.items() if not name.endswith(".safetensors")})
    hub.drips["pytorch_model.bin"] = 1
    with pytest.raises(ModelError, match=STOPPED):
        open_model(NAME, convert=True)


@pytest.mark.slow
def test_what_comes_slowly_is_waited_for_and_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "STALL_SECONDS", 4.0)  # the process begins within it
    monkeypatch.setattr(downloads, "LEAST_BYTES", 20_000)
    monkeypatch.setattr(downloads, "TELL_SECONDS", 1.0)
    hub.drips["model.safetensors"] = 4_000
    said: list[str] = []
    model = load_model(open_model(NAME), dtype="float32", device=torch.device("cpu"), say=said.append)
    assert sum(value.numel() for value in model.parameters()) > 80_000
    assert any(line.startswith(f"downloading {NAME}: ") and line.endswith("/s") for line in said)
    assert len(hub.downloads("model.safetensors")) == 1, "once, though it is opened after it was fetched"
    asked = len(hub.downloads(""))
    load_model(open_model(NAME), dtype="float32", device=torch.device("cpu"))
    assert len(hub.downloads("")) == asked, "nothing is downloaded twice"


@pytest.mark.long
def test_the_command_ends_with_one_line(hub: Hub, tmp_path: Path) -> None:
    """A thread that hangs in a download would keep the process from ending."""
    hub.drips["model.safetensors"] = 1
    code = "import fedloom.downloads as d, fedloom.cli; d.STALL_SECONDS = 2.0; fedloom.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "tiny", f"model.source={NAME}", "--out", str(tmp_path / "run")],
        env=environment_of(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "the download stopped" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


READER = """
import sys
from fedloom import downloads
from fedloom.data.documents import load_documents
from fedloom.errors import DataError
from fedloom.recipe.loading import load_recipe
downloads.STALL_SECONDS = downloads.FIRST_ROW_SECONDS = 5.0
try:
    load_documents(load_recipe("tiny", ["data.source=someone/rows"]).data, 7, *map(int, sys.argv[1:]))
except DataError as error:
    print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize("at_most", first([[], ["400"]], rest=pytest.mark.slow), ids=["whole", "streamed"])
def test_a_data_set_that_stops_coming_is_given_up(at_most: list[str], hub: Hub, tmp_path: Path) -> None:
    hub.drips["data.jsonl"] = 1
    done = subprocess.run(
        [sys.executable, "-c", READER, *at_most],
        env=environment_of(hub, tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "StalledError" in done.stdout or "no row came in 5 s" in done.stdout, done.stderr


def test_rows_come_in_order_with_their_errors_and_the_rest_is_left() -> None:
    assert list(downloads.wait_for_rows(range(1000))) == list(range(1000))

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("a row")

    rows = downloads.wait_for_rows(broken())
    assert next(rows) == 1
    with pytest.raises(ValueError, match="a row"):
        next(rows)

    read = []

    def endless() -> Iterator[int]:
        while True:
            read.append(len(read))
            yield read[-1]

    few = downloads.wait_for_rows(endless())
    assert [next(few), next(few)] == [0, 1]
    few.close()
    time.sleep(0.5)
    before = len(read)
    time.sleep(0.5)
    assert len(read) == before <= 3 + downloads.ROWS_AHEAD
