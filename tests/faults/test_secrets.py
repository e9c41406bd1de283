"""Neither what a document says nor a token reaches a record, a report, an error or the screen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import make_recipe

from fedloom.data import documents as loader
from fedloom.errors import FedloomError
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe

CANARY = "the quick xylophone jumps over 4711 lazy zithers"
TOKEN = "hf_" + "XyLoPhOnE" * 4
PASSWORD = "pa55phrase"
SECRETS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": TOKEN,
    "WANDB_API_KEY": "a1b2c3d4e5f6" * 3,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-xylophone",
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "HF_ENDPOINT": f"http://someone:{PASSWORD}@127.0.0.1:9",
}
NEEDLES = [CANARY, CANARY[:20], *SECRETS.values(), PASSWORD]


def write_documents(path: Path, *more: str) -> Path:
    texts = [f"document {number} says {number * 7919}: {CANARY}" for number in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "".join(more))
    return path


def fedloom(recipe: Recipe, folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """A whole command, as a person runs it, with secrets all around."""
    (folder / "mine.toml").write_text(recipe_to_toml(recipe))
    return subprocess.run(
        [sys.executable, "-m", "fedloom", "run", "mine.toml", "--out", "run", *arguments],
        cwd=folder,
        env={**os.environ, **SECRETS},
        capture_output=True,
        timeout=240,
    )


def find_secrets(*contents: bytes) -> list[str]:
    return [needle for needle in NEEDLES if any(needle.encode() in content for content in contents)]


def everything_in(folder: Path) -> list[bytes]:
    """Every file's name and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path).encode() for path in files] + [path.read_bytes() for path in files]


@pytest.mark.long
def test_a_whole_run_leaves_no_trace_of_them(tmp_path: Path) -> None:
    path = write_documents(tmp_path / "private.jsonl", '{"text": ["' + CANARY + '"]}\n')
    recipe = make_recipe(
        data={"source": str(path), "documents_per_client": None, "max_bad_fraction": 0.1}, federation={"rounds": 1}
    )
    done = fedloom(recipe, tmp_path, "--log", "tensorboard")
    assert done.returncode == 0, done.stderr
    kept = everything_in(tmp_path / "run")
    assert len(kept) > 30
    assert find_secrets(done.stdout, done.stderr, *kept) == []
    assert b"not text" in done.stdout, "the bad row is counted, not quoted"


FAILURES = {
    "a bad row": ({"on_bad_row": "error"}, {}, "a bad row, private.jsonl:41: not valid JSON"),
    "too many bad rows": ({"max_bad_fraction": 0}, {}, "one of them private.jsonl:41"),
    "no such column": ({"text": "content", "max_bad_fraction": 1}, {}, "without text in column content"),
    "a hub with a password": ({}, {"source": "nobody/nothing"}, "http://…@127.0.0.1:9"),
    "a source with a password": ({}, {"source": f"https://someone:{PASSWORD}@hub.example/model"}, "https://…@hub"),
    "a source with a token": ({"source": f"https://hub.example/data?token={TOKEN}"}, {}, "?token=…"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_an_error_tells_none_of_them(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fedloom import run
    from fedloom.monitoring.observer import Observer

    data, model, words = FAILURES[case]
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    path = write_documents(tmp_path / "private.jsonl", '{"text": "' + CANARY)
    data = {"source": str(path), "max_bad_fraction": 0.1, **data}
    with pytest.raises(FedloomError) as caught:
        run(make_recipe(data=data, model=model), tmp_path / "run", Observer())
    assert words in str(caught.value)
    shown = capfd.readouterr()
    assert find_secrets(str(caught.value).encode(), shown.out.encode(), shown.err.encode()) == []


def test_a_loader_that_quotes_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The twin that these tests must not let through: it says which text it could not use."""

    def quote(row: loader.Row, origin: str, data: object, form: object, unit: object) -> loader.Document:
        raise loader.UnreadableError(f"unusable: {row['text']}")

    monkeypatch.setattr(loader, "_to_document", quote)
    monkeypatch.setitem(FAILURES, "quoting", ({"on_bad_row": "error"}, {}, "a bad row, private.jsonl:"))
    with pytest.raises(AssertionError, match="xylophone"):
        test_an_error_tells_none_of_them("quoting", tmp_path, monkeypatch, capfd)
