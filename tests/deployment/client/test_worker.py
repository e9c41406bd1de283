"""Worker of a client: what it takes as a question, what it never tells."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_recipe

from fedloom.deployment.client.display import say
from fedloom.deployment.client.documents import gather_client, write_splits
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.own_documents import HOLDOUT, TRAIN
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.messages import pack_adapter, pack_recipe, pack_task, unpack_facts
from fedloom.errors import DataError
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.preparation import prepare
from fedloom.host import failpoints
from fedloom.host.frames import Frame
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.training.jobs import ClientTask

RECIPE = make_recipe(training={"engine": "reference"}, model={"dtype": "float32"})
SECRET = "a text that nobody else may see"


def write_rows(path: Path, count: int) -> Path:
    rows = [json.dumps({"text": f"{n} is {SECRET}: " + f"word{n} " * (n + 5)}) for n in range(count)]
    path.write_text("\n".join(rows) + "\n")
    return path


def worker_of(path: Path, policy: Policy | None = None) -> Worker:
    """Make a worker as `fedloom join` starts it, with its journal beside the documents."""
    return Worker("alice", path, policy or Policy(), Journal(path.parent / "alice.journal.jsonl"))


def kinds(folder: Path) -> list[str]:
    """Kinds of the lines in the journal of `worker_of`."""
    return [json.loads(line)["kind"] for line in (folder / "alice.journal.jsonl").read_text().splitlines()]


def task(round: int, **changed: Any) -> Frame:
    """Write a round's question, as a server asks it."""
    adapter = load_adapted_model(RECIPE, open_model(RECIPE.model.source)).read()
    packed = pack_task(
        replace(ClientTask(round, 0, adapter, RECIPE.training, rounds=2, seed=7), **changed), pack_adapter(adapter)
    )
    return replace(packed, manifest={**packed.manifest, **asking("train"), "judge": False})


def asking(do: str) -> dict[str, Any]:
    return {"do": do, "recipe": pack_recipe(RECIPE), "seconds": 600.0}


def test_it_says_what_it_holds_and_nothing_of_it(tmp_path: Path) -> None:
    worker = worker_of(write_rows(tmp_path / "private.jsonl", 12))
    answer = worker.answer(Frame(asking("meet")))
    facts = unpack_facts(answer)
    assert (facts.name, facts.train_documents, facts.holdout_documents) == ("alice", 6, 2)
    assert SECRET not in json.dumps(answer.manifest)
    assert "private" not in json.dumps(answer.manifest)


@pytest.mark.parametrize("content", [None, "not json\n", '{"other": 1}\n', ""])
def test_what_is_wrong_with_its_documents_is_told_here_alone(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "private.jsonl"
    if content is not None:
        path.write_text(content)
    answer = worker_of(path).answer(Frame(asking("meet")))
    assert answer.manifest == {"name": "alice", "refused": "documents"}
    assert "private.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"recipe": None}, "recipe: not a table"),
        ({"recipe": {"data": 1}}, "recipe: lacks model"),
        ({"do": "leave"}, "does not know the question"),
        ({"do": ["meet"]}, "does not know the question"),
        ({"do": "train", "training": {"epochs": 99}}, "lacks layout, residual"),
        ({"do": "evaluate", "layout": "0" * 64, "residual": {}}, "the adapter is for another model"),
    ],
)
def test_a_question_that_is_none_is_refused(
    asked: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = worker_of(write_rows(tmp_path / "private.jsonl", 12))
    assert worker.answer(Frame({**asking("meet"), **asked})).manifest == {"name": "alice", "refused": "question"}
    assert why in capsys.readouterr().out


def test_what_a_server_says_can_not_command_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say("model", "\x1b]0;owned\x07")
    assert capsys.readouterr().out == "model     \\x1b]0;owned\\x07\n"


def test_a_policy_is_kept_before_anything_is_read(tmp_path: Path) -> None:
    for policy, word in ((Policy(models=("another",)), "model"), (Policy(methods=("ia3",)), "policy")):
        worker = worker_of(tmp_path / "not there", policy)
        assert worker.answer(Frame(asking("meet"))).manifest["refused"] == word


def test_a_task_trains_as_its_recipe_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "private.jsonl", 12)
    longer = task(1, training=RECIPE.training.model_copy(update={"epochs": 9}))
    assert worker_of(data).answer(longer).manifest["refused"] == "question"
    assert "the task is not as its recipe says" in capsys.readouterr().out


def test_a_task_is_held_to_the_policy_whatever_its_recipe_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "private.jsonl", 12)
    for asked in (task(1, rounds=500), task(500)):
        assert worker_of(data, Policy(max_rounds=2)).answer(asked).manifest["refused"] == "policy"
        assert "policy.max_rounds: its policy allows 2 rounds, not 500" in capsys.readouterr().out
        assert worker_of(data).answer(asked).manifest["refused"] == "question"
    assert set(kinds(tmp_path)) == {"meet"}, "no round began"


def test_every_round_stands_in_the_journal_and_nothing_of_the_documents(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "private.jsonl", 12)
    report = worker_of(data).answer(task(1)).manifest["report"]
    assert kinds(tmp_path) == ["meet", "train"]
    line = (tmp_path / "alice.journal.jsonl").read_text().splitlines()[1]
    noted = json.loads(line)
    assert set(noted) == {
        *("when", "kind", "server", "recipe", "run", "model", "round", "epochs", "steps", "tokens", "task")
    }
    assert (noted["recipe"], noted["model"], noted["round"]) == ("test", "random:tiny-llama", 1)
    assert (noted["steps"], noted["tokens"]) == (report["steps"], report["tokens"])
    assert SECRET not in line
    assert "private" not in line


def test_rounds_a_day_are_counted_over_workers_and_one_that_failed_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, policy = write_rows(tmp_path / "private.jsonl", 12), Policy(max_rounds_a_day=1)
    first, second = task(1), task(2)
    failpoints.arm("training.stepped=raise")
    try:
        assert worker_of(data, policy).answer(first).manifest["refused"] == "internal"
    finally:
        failpoints.arm("")
    assert "RuntimeError" in capsys.readouterr().err, "its owner sees all of it"
    assert worker_of(data, policy).answer(second).manifest["refused"] == "day"
    assert "max_rounds_a_day: its policy allows 1 rounds a day; the next may begin on " in capsys.readouterr().out
    # The round that was cut off is asked again: it is the same one, told whether the hold-out is scored or not.
    again = replace(first, manifest={**first.manifest, "judge": True})
    assert "report" in worker_of(data, policy).answer(again).manifest
    assert "report" in worker_of(data, Policy(max_rounds_a_day=2)).answer(second).manifest


def test_what_can_not_be_written_down_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = worker_of(write_rows(tmp_path / "private.jsonl", 12))
    (tmp_path / "alice.journal.jsonl").mkdir()
    assert worker.answer(task(1)).manifest == {"name": "alice", "refused": "journal"}
    assert "alice.journal.jsonl: the journal can't be written (Is a directory)" in capsys.readouterr().out


@pytest.mark.long
def test_a_local_runs_split_is_what_its_clients_hold(tmp_path: Path) -> None:
    recipe = make_recipe(data={"documents_per_client": 12})  # so that chance leaves five to train on
    clients = prepare(recipe, Observer()).clients
    for folder, expected in zip(write_splits(recipe, tmp_path / "split", Observer()), clients, strict=True):
        found = gather_client(recipe, folder).blocks
        for ours, theirs in ((found.train, expected.train), (found.holdout, expected.holdout)):
            assert ours.tokens_NT.tolist() == theirs.tokens_NT.tolist()
            assert ours.lengths_N.tolist() == theirs.lengths_N.tolist()


def test_a_split_of_the_owners_is_taken_as_it_stands(tmp_path: Path) -> None:
    write_rows(tmp_path / TRAIN, 5)
    (tmp_path / HOLDOUT).write_text("")
    data = gather_client(RECIPE, tmp_path)
    assert (len(data.documents.train), len(data.documents.holdout), len(data.blocks.holdout)) == (5, 0, 0)


def test_a_client_with_nothing_to_train_on_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        gather_client(RECIPE, write_rows(tmp_path / "one.txt", 0))
