"""A client's worker: what it takes as a question, what it never tells."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_recipe

from fedloom.deployment.documents import HOLDOUT, TRAIN, gather_client, write_splits
from fedloom.deployment.policy import Policy
from fedloom.deployment.wire import Frame
from fedloom.deployment.worker import Worker
from fedloom.display import Display
from fedloom.errors import DataError
from fedloom.federation.packing import unpack_facts
from fedloom.preparation import prepare

RECIPE = make_recipe(training={"engine": "reference"}, model={"dtype": "float32"})
SECRET = "a text that nobody else may see"


def told(**sections: Any) -> dict[str, Any]:
    recipe = RECIPE.model_dump(mode="json", exclude_unset=True)
    del recipe["data"]["source"]
    return {**recipe, **sections}


def write_rows(path: Path, count: int) -> Path:
    rows = [json.dumps({"text": f"{n} is {SECRET}: " + f"word{n} " * (n + 5)}) for n in range(count)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_it_says_what_it_holds_and_nothing_of_it(tmp_path: Path) -> None:
    worker = Worker("alice", write_rows(tmp_path / "private.jsonl", 12), Policy())
    answer = worker.answer(Frame({"do": "meet", "recipe": told()}))
    facts = unpack_facts(answer.manifest)
    assert (facts["name"], facts["train_documents"], facts["holdout_documents"]) == ("alice", 6, 2)
    assert SECRET not in json.dumps(answer.manifest)
    assert "private" not in json.dumps(answer.manifest)


@pytest.mark.parametrize("content", [None, "not json\n", '{"other": 1}\n', ""])
def test_what_is_wrong_with_its_documents_is_told_here_alone(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "private.jsonl"
    if content is not None:
        path.write_text(content)
    answer = Worker("alice", path, Policy()).answer(Frame({"do": "meet", "recipe": told()}))
    assert answer.manifest == {"name": "alice", "error": "its documents can't be used: its owner sees why"}
    assert "private.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"do": "meet"}, "recipe is none"),
        ({"do": "meet", "recipe": {"data": 1}}, "recipe is none"),
        ({"do": "leave", "recipe": told()}, "no question"),
        ({"do": "train", "recipe": told(), "training": {"epochs": 99}}, "the task is not the recipe's"),
        ({"do": "evaluate", "recipe": told()}, "an adapter of another model"),
    ],
)
def test_a_question_that_is_none_is_refused(asked: dict[str, Any], why: str, tmp_path: Path) -> None:
    worker = Worker("alice", write_rows(tmp_path / "private.jsonl", 12), Policy())
    assert why in worker.answer(Frame(asked)).manifest["error"]


def test_a_policy_is_kept_before_anything_is_read(tmp_path: Path) -> None:
    worker = Worker("alice", tmp_path / "not there", Policy(models=("another",)))
    answer = worker.answer(Frame({"do": "meet", "recipe": told()}))
    assert "does not allow the base model" in answer.manifest["error"]


def test_a_local_runs_split_is_what_its_clients_hold(tmp_path: Path) -> None:
    clients = prepare(RECIPE, Display()).clients
    for folder, expected in zip(write_splits(RECIPE, tmp_path / "split", Display()), clients, strict=True):
        _, _, found, _ = gather_client(RECIPE, folder)
        for ours, theirs in ((found.train, expected.train), (found.holdout, expected.holdout)):
            assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
            assert ours.lengths_N.tolist() == theirs.lengths_N.tolist()


def test_a_split_of_the_owners_is_taken_as_it_stands(tmp_path: Path) -> None:
    write_rows(tmp_path / TRAIN, 5)
    (tmp_path / HOLDOUT).write_text("")
    _, documents, blocks, _ = gather_client(RECIPE, tmp_path)
    assert (len(documents.train), len(documents.holdout), len(blocks.holdout)) == (5, 0, 0)


def test_a_client_with_nothing_to_train_on_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        gather_client(RECIPE, write_rows(tmp_path / "one.txt", 0))
