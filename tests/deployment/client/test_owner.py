"""A server that asks for more than an honest one does: without a policy file, its questions come to nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_recipe

from fedloom.deployment.client import account
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.frames import Frame
from fedloom.deployment.messages import pack_adapter, pack_recipe, pack_task
from fedloom.experiment.building import load_adapted_model
from fedloom.model.source import open_model
from fedloom.recipe.recipe import Recipe
from fedloom.training.jobs import ClientTask

RECIPE = make_recipe(training={"engine": "reference"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{n} is a text: " + f"word{n} " * (n + 9), "ssn": f"{n:09}"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def worker_of(data: Path, policy: Policy | None = None) -> Worker:
    journal = Journal(data.parent / "alice.journal.jsonl")
    return Worker("alice", data, policy or Policy(), journal, "fed.example.org:8443")


def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data.parent / "alice.journal.jsonl").read_text().splitlines()]


def ask(do: str, recipe: Recipe = RECIPE, frame: Frame | None = None, **told: Any) -> Frame:
    """Write a question as a server does that writes its own."""
    frame = frame or Frame({})
    return replace(frame, manifest={**frame.manifest, "do": do, "recipe": pack_recipe(recipe), **told})


def adapters(count: int) -> list[Frame]:
    """Write different adapters of `RECIPE`."""
    adapter = load_adapted_model(RECIPE, open_model(RECIPE.model.source)).read()
    return [pack_adapter(replace(adapter, weights_P=adapter.weights_P + number)) for number in range(count)]


def training(round: int, packed: Frame, recipe: Recipe = RECIPE) -> Frame:
    adapter = load_adapted_model(recipe, open_model(recipe.model.source)).read()
    task = ClientTask(round, 0, adapter, recipe.training, rounds=recipe.federation.rounds, seed=7)
    return ask("train", recipe, pack_task(task, packed))


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("min_documents", {"data": {"documents_per_client": 1, "client_holdout": 0.0}}),
        ("min_documents", {"data": {"documents_per_client": 8, "client_holdout": 0.8}}),
        ("min_holdout_documents", {"data": {"documents_per_client": 8, "client_holdout": 0.1}}),
        ("min_length", {"data": {"max_length": 2}}),
        ("max_length", {"data": {"max_length": 10**13}}),
        ("text", {"data": {"text": "ssn"}}),
    ],
)
def test_documents_are_not_counted_a_few_at_a_time(key: str, sections: dict[str, Any], data: Path) -> None:
    """Finding 1: texts were read by the hashes of one document of 2, 4, 6 … tokens."""
    answer = worker_of(data).answer(ask("meet", make_recipe(**sections)))
    assert answer.manifest.keys() == {"name", "error"}
    assert f"policy.{key}" in answer.manifest["error"]


def test_recipes_are_in_the_journal_and_limited(data: Path) -> None:
    """Finding 1: 24 recipes were met, whatever the policy, and no line of the journal said so."""
    worker = worker_of(data, Policy(max_meets_a_day=2))
    answers = [worker.answer(ask("meet", make_recipe(seed=seed))) for seed in (1, 2, 3)]
    assert ["documents" in answer.manifest for answer in answers] == [True, True, False]
    assert "policy.max_meets_a_day: its policy allows 2 recipes a day" in answers[2].manifest["error"]
    met = [line for line in lines(data) if line["kind"] == "meet"]
    assert len({line["run"] for line in met}) == 2
    assert {(line["server"], line["recipe"]) for line in met} == {("fed.example.org:8443", "test")}
    # Over a worker that was started anew, too; and one that was met before is.
    assert "error" in worker_of(data, Policy(max_meets_a_day=2)).answer(ask("meet", make_recipe(seed=4))).manifest
    again = worker_of(data, Policy(max_meets_a_day=2)).answer(ask("meet", make_recipe(seed=2)))
    assert "documents" in again.manifest


@pytest.mark.parametrize("do", ["evaluate", "train", "leave"])
def test_no_question_reads_documents_without_a_line(do: str, data: Path) -> None:
    worker_of(data).answer(ask(do))
    assert [line["kind"] for line in lines(data)] == ["meet"]


def test_scores_are_in_the_journal_and_limited(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finding 10: 20 adapters of 20 were scored, in no journal and under no limit."""
    worker = worker_of(data, Policy(max_scores_a_day=2))
    packed = adapters(3)
    scores = [worker.answer(ask("evaluate", frame=one)).manifest["score"] for one in (*packed, packed[0])]
    assert [score is not None for score in scores] == [True, True, False, True]
    assert [line["kind"] for line in lines(data)] == ["meet", "score", "score", "score"]
    assert "policy.max_scores_a_day: its policy allows 2 scores a day" in capsys.readouterr().out


@pytest.mark.parametrize("policy", [Policy(tell_holdout_loss=False), Policy(max_scores_a_day=1)])
def test_a_training_does_not_tell_the_loss_that_may_not_be_told(policy: Policy, data: Path) -> None:
    """Finding 4: `judge` told it, and `evaluate` did not."""
    worker = worker_of(data, policy)
    first, second = adapters(2)
    worker.answer(ask("evaluate", frame=first))
    question = training(1, second)
    answer = worker.answer(replace(question, manifest={**question.manifest, "judge": True}))
    assert answer.manifest["report"]["holdout_loss_before"] is None
    assert answer.manifest["report"]["holdout_loss_after"] is None
    judged = worker_of(data).answer(replace(question, manifest={**question.manifest, "judge": True}))
    assert judged.manifest["report"]["holdout_loss_after"] is not None


def test_rounds_are_counted_whatever_number_a_server_gives_them(data: Path) -> None:
    """Finding 10: eight different tasks, all called round 1, were all trained."""
    worker = worker_of(data, Policy(max_rounds=2))
    answers = [worker.answer(training(1, packed)) for packed in adapters(3)]
    assert ["report" in answer.manifest for answer in answers] == [True, True, False]
    assert "policy.max_rounds: its policy allows 2 rounds of a recipe" in answers[2].manifest["error"]


def test_whole_models_and_any_matrix_are_refused_without_a_file(data: Path) -> None:
    """Finding 10: `full` trained from weights that the server sent whole."""
    whole = make_recipe(adapter={"method": "full", "rank": None, "alpha": None})
    assert "policy.methods" in worker_of(data).answer(ask("meet", whole)).manifest["error"]
    matrix = make_recipe(federation={"lora_rule": "fedex"})
    assert "policy.lora_rules" in worker_of(data).answer(ask("meet", matrix)).manifest["error"]
    assert "documents" in worker_of(data, Policy(methods=("full",))).answer(ask("meet", whole)).manifest


def test_an_adapter_is_looked_at_when_it_is_on_the_model(data: Path) -> None:
    large = make_recipe(adapter={"rank": 64, "targets": "all-linear"})
    assert "policy.max_trained" in worker_of(data).answer(ask("meet", large)).manifest["error"]
    assert "documents" in worker_of(data, Policy(max_trained=1.0)).answer(ask("meet", large)).manifest


def test_rows_of_the_embedding_are_not_trained_by_a_method_that_is_allowed(data: Path) -> None:
    """Finding 10: the rows that change are the words of the documents."""
    options = {"token_indices": [*range(0, 256, 4)]}
    rows = make_recipe(adapter={"method": "trainable_tokens", "rank": None, "alpha": None, "options": options})
    policy = Policy(methods=("trainable_tokens",))
    assert "policy.train_embedding" in worker_of(data, policy).answer(ask("meet", rows)).manifest["error"]
    allowed = Policy(methods=("trainable_tokens",), train_embedding=True)
    assert "documents" in worker_of(data, allowed).answer(ask("meet", rows)).manifest


def test_the_hash_that_is_shown_pins_the_weights(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker_of(data).answer(ask("meet"))
    (entry,) = (line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("model "))
    assert "documents" in worker_of(data, Policy(models=(entry,))).answer(ask("meet")).manifest
    other = make_recipe(adapter={"rank": 4}, seed=9)
    assert "documents" in worker_of(data, Policy(models=(entry,))).answer(ask("meet", other)).manifest
    wrong = Policy(models=(entry[:-4] + "0000",))
    assert "with other weights than these" in worker_of(data, wrong).answer(ask("meet")).manifest["error"]


def test_its_owner_sees_what_was_asked_and_what_was_told(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = worker_of(data)
    facts = worker.answer(ask("meet")).manifest
    for question in (ask("evaluate", frame=adapters(1)[0]), training(2, adapters(1)[0])):
        worker.answer(question)
    worker.answer(ask("meet", make_recipe(training={"epochs": 99})))
    run = lines(data)[0]["run"]
    said = capsys.readouterr().out
    for line in (
        f'asked     fed.example.org:8443: to read and count the documents for "test" (run {run})',
        f"told      6 documents, 6 blocks, {facts['tokens']} tokens to train on; 2 documents held out",
        "asked     for the loss of an adapter on the hold-out",
        "told      the loss on the hold-out",
        "asked     to train round 2 of 2: 1 epoch, 3 steps",
        "told      the adapter of round 2, ",
        "refused   policy.max_epochs: its policy allows 20 epochs a round, not 99",
    ):
        assert f"{line}" in said


def test_a_run_that_is_over_is_said_and_written_down(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(account.time, "monotonic", lambda: now[0])
    recipe = make_recipe(training={"engine": "reference"}, federation={"round_deadline": 300.0})
    worker = worker_of(data)
    worker.answer(ask("meet", recipe))
    now[0] += 599
    worker.account.look()
    assert "ended" not in capsys.readouterr().out
    now[0] += 1
    worker.account.look()
    worker.account.look()
    assert capsys.readouterr().out.count("no question came for 10:00") == 1
    # It goes on, and after its last round it is over sooner.
    worker.answer(training(2, adapters(1)[0], recipe))
    now[0] += 60
    worker.account.look()
    assert "its last round was trained, and no question came for 1:00" in capsys.readouterr().out
    worker.answer(ask("meet", recipe))
    worker.answer(ask("meet", make_recipe(seed=8)))
    assert "another recipe came" in capsys.readouterr().out
    ends = [line for line in lines(data) if line["kind"] == "end"]
    assert len(ends) == 3
    assert len({line["run"] for line in ends}) == 1


def test_a_recipe_that_is_refused_does_not_end_the_run_that_goes_on(data: Path) -> None:
    worker = worker_of(data)
    worker.answer(ask("meet"))
    worker.answer(ask("meet", make_recipe(training={"epochs": 99})))
    worker.answer(ask("evaluate", frame=adapters(1)[0]))
    assert [line["kind"] for line in lines(data)] == ["meet", "score"]
    assert len({line["run"] for line in lines(data)}) == 1
