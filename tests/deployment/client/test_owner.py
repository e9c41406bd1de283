"""A server that asks for more than an honest one does: without a policy file, its questions come to nothing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.marks import first
from support.tiny import make_recipe

from fedloom.deployment.client import account, client_model
from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.messages import pack_adapter, pack_recipe, pack_task
from fedloom.experiment.building import load_adapted_model
from fedloom.host.frames import Frame
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


def worker_of(data: Path, policy: Policy | None = None, file: Path | None = None) -> Worker:
    journal = Journal(data.parent / "alice.journal.jsonl")
    return Worker("alice", data, policy or Policy(), journal, server="fed.example.org:8443", policy_file=file)


def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data.parent / "alice.journal.jsonl").read_text().splitlines()]


def ask(do: str, recipe: Recipe = RECIPE, frame: Frame | None = None, **told: Any) -> Frame:
    """Write a question as a server does that writes its own."""
    frame = frame or Frame({})
    asked = {"do": do, "recipe": pack_recipe(recipe), "seconds": 600.0}
    return replace(frame, manifest={**frame.manifest, **asked, **told})


def adapters(count: int) -> list[Frame]:
    """Write different adapters of `RECIPE`."""
    adapter = load_adapted_model(RECIPE, open_model(RECIPE.model.source)).read()
    return [pack_adapter(replace(adapter, weights_P=adapter.weights_P + number)) for number in range(count)]


def training(round: int, packed: Frame, recipe: Recipe = RECIPE, judge: bool = False, **told: Any) -> Frame:
    adapter = load_adapted_model(recipe, open_model(recipe.model.source)).read()
    task = ClientTask(round, 0, adapter, recipe.training, rounds=recipe.federation.rounds, seed=7)
    return ask("train", recipe, pack_task(task, packed), judge=judge, **told)


Screen = pytest.CaptureFixture[str]


def check_refusal(answer: Frame, word: str, why: str, screen: Screen) -> None:
    """Check that one word travels, and that the owner is shown the reason."""
    assert answer == Frame({"name": "alice", "refused": word})
    (said,) = (line for line in screen.readouterr().out.splitlines() if line.startswith("refused "))
    assert why in said
    assert said.endswith(f"(told: {word})")


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("min_documents", {"data": {"documents_per_client": 1, "client_holdout": 0.0}}),
        ("min_documents", {"data": {"documents_per_client": 8, "client_holdout": 0.8}}),
        ("min_holdout_documents", {"data": {"documents_per_client": 8, "client_holdout": 0.1}}),
        ("min_length", {"data": {"max_length": 2}}),
        ("max_length", {"data": {"max_length": 2**17}}),
        ("text", {"data": {"text": "ssn"}}),
    ],
)
def test_documents_are_not_counted_a_few_at_a_time(
    key: str, sections: dict[str, Any], data: Path, capsys: Screen
) -> None:
    """Finding 1: texts were read by the hashes of one document of 2, 4, 6 … tokens."""
    answer = worker_of(data).answer(ask("meet", make_recipe(**sections)))
    check_refusal(answer, "policy", f"policy.{key}: its policy ", capsys)


def test_recipes_are_in_the_journal_and_limited(data: Path, capsys: Screen) -> None:
    """Finding 1: 24 recipes were met, whatever the policy, and no line of the journal said so."""
    worker = worker_of(data, Policy(max_meets_a_day=2))
    answers = [worker.answer(ask("meet", make_recipe(seed=seed))) for seed in (1, 2, 3)]
    assert ["documents" in answer.manifest for answer in answers] == [True, True, False]
    check_refusal(answers[2], "day", "policy.max_meets_a_day: its policy allows 2 recipes a day", capsys)
    met = [line for line in lines(data) if line["kind"] == "meet"]
    assert len({line["run"] for line in met}) == 2
    assert {(line["server"], line["recipe"]) for line in met} == {("fed.example.org:8443", "test")}
    # Over a worker that was started anew, too; and one that was met before is.
    fourth = worker_of(data, Policy(max_meets_a_day=2)).answer(ask("meet", make_recipe(seed=4)))
    check_refusal(fourth, "day", "policy.max_meets_a_day", capsys)
    again = worker_of(data, Policy(max_meets_a_day=2)).answer(ask("meet", make_recipe(seed=2)))
    assert "documents" in again.manifest


@pytest.mark.parametrize("do", ["meet", "evaluate", "train"])
def test_no_question_reads_documents_without_a_line(do: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []

    def gather(*given: Any) -> Any:
        written.append([line["kind"] for line in lines(data)])
        return gather_client(*given)

    monkeypatch.setattr(client_model, "gather_client", gather)
    (packed,) = adapters(1)
    question = {"meet": ask("meet"), "evaluate": ask("evaluate", frame=packed), "train": training(1, packed)}[do]
    assert "refused" not in worker_of(data).answer(question).manifest
    assert written == [["meet"]], "the line was there when they were read"


@pytest.mark.parametrize("asked", [ask("evaluate"), ask("train"), ask("leave")])
def test_a_question_that_is_none_reads_nothing(asked: Frame, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_model, "gather_client", lambda *_: pytest.fail("the documents were read"))
    assert worker_of(data).answer(asked).manifest["refused"] == "question"
    assert not (data.parent / "alice.journal.jsonl").exists()


def test_scores_are_in_the_journal_and_limited(data: Path, capsys: Screen) -> None:
    """Finding 10: 20 adapters of 20 were scored, in no journal and under no limit."""
    worker = worker_of(data, Policy(max_scores_a_day=2))
    packed = adapters(3)
    scores = [worker.answer(ask("evaluate", frame=one)).manifest["score"] for one in (*packed, packed[0])]
    assert [score is not None for score in scores] == [True, True, False, True]
    assert [line["kind"] for line in lines(data)] == ["meet", "score", "score", "score"]
    assert "policy.max_scores_a_day: its policy allows 2 scores a day" in capsys.readouterr().out


def test_a_score_that_is_asked_for_again_counts_once(data: Path) -> None:
    """A round that ends with an adapter and the next one that begins with it ask twice, a new worker once more."""
    policy = Policy(max_scores_a_day=1)
    first, second = adapters(2)
    worker = worker_of(data, policy)
    told = [worker.answer(ask("evaluate", frame=first, seconds=seconds)) for seconds in (600.0, 500.0)]
    told.append(worker_of(data, policy).answer(ask("evaluate", frame=first)))
    first_told, *others = (answer.manifest["score"] for answer in told)
    assert first_told is not None
    assert others == [first_told] * 2
    assert worker_of(data, policy).answer(ask("evaluate", frame=second)).manifest["score"] is None


@pytest.mark.parametrize("policy", first([Policy(tell_holdout_loss=False), Policy(max_scores_a_day=1)]))
def test_a_training_does_not_tell_the_loss_that_may_not_be_told(policy: Policy, data: Path) -> None:
    """Finding 4: `judge` told it, and `evaluate` did not."""
    worker = worker_of(data, policy)
    first, second = adapters(2)
    worker.answer(ask("evaluate", frame=first))
    report = worker.answer(training(1, second, judge=True)).manifest["report"]
    assert (report["holdout_loss_before"], report["holdout_loss_after"]) == (None, None)
    judged = worker_of(data).answer(training(1, second, judge=True)).manifest["report"]
    assert judged["holdout_loss_before"] > 0
    assert judged["holdout_loss_after"] > 0


def test_the_loss_after_a_round_is_a_score_like_any_other(data: Path) -> None:
    """The limit held for the loss before a round alone: each judged round told another one for nothing."""
    (packed,) = adapters(1)
    worker_of(data).answer(training(1, packed, judge=True))
    scored = [line["task"] for line in lines(data) if line["kind"] == "score"]
    assert len(set(scored)) == 2
    (data.parent / "alice.journal.jsonl").unlink()
    one = worker_of(data, Policy(max_scores_a_day=1))
    report = one.answer(training(1, packed, judge=True)).manifest["report"]
    assert report["steps"] > 0
    assert report["holdout_loss_after"] is None


def test_rounds_are_counted_whatever_number_a_server_gives_them(data: Path, capsys: Screen) -> None:
    """Finding 10: eight different tasks, all called round 1, were all trained."""
    worker = worker_of(data, Policy(max_rounds=2))
    answers = [worker.answer(training(1, packed)) for packed in adapters(3)]
    assert ["report" in answer.manifest for answer in answers] == [True, True, False]
    check_refusal(answers[2], "policy", "policy.max_rounds: its policy allows 2 rounds of a recipe", capsys)


def test_whole_models_and_any_matrix_are_refused_without_a_file(data: Path, capsys: Screen) -> None:
    """Finding 10: `full` trained from weights that the server sent whole."""
    whole = make_recipe(adapter={"method": "full", "rank": None, "alpha": None})
    check_refusal(worker_of(data).answer(ask("meet", whole)), "policy", "policy.methods", capsys)
    matrix = make_recipe(federation={"lora_rule": "fedex"})
    check_refusal(worker_of(data).answer(ask("meet", matrix)), "policy", "policy.lora_rules", capsys)
    assert "documents" in worker_of(data, Policy(methods=("full",))).answer(ask("meet", whole)).manifest


def test_an_adapter_is_looked_at_when_it_is_on_the_model(data: Path, capsys: Screen) -> None:
    large = make_recipe(adapter={"rank": 64, "targets": "all-linear"})
    check_refusal(worker_of(data).answer(ask("meet", large)), "policy", "policy.max_trained", capsys)
    assert "documents" in worker_of(data, Policy(max_trained=1.0)).answer(ask("meet", large)).manifest


def test_rows_of_the_embedding_are_not_trained_by_a_method_that_is_allowed(data: Path, capsys: Screen) -> None:
    """Finding 10: the rows that change are the words of the documents."""
    options = {"token_indices": [*range(0, 256, 4)]}
    rows = make_recipe(adapter={"method": "trainable_tokens", "rank": None, "alpha": None, "options": options})
    policy = Policy(methods=("trainable_tokens",))
    check_refusal(worker_of(data, policy).answer(ask("meet", rows)), "policy", "policy.train_embedding", capsys)
    allowed = Policy(methods=("trainable_tokens",), train_embedding=True)
    assert "documents" in worker_of(data, allowed).answer(ask("meet", rows)).manifest


def test_the_hash_that_is_shown_pins_the_weights(data: Path, capsys: Screen) -> None:
    worker_of(data).answer(ask("meet"))
    (entry,) = (line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("model "))
    assert "documents" in worker_of(data, Policy(models=(entry,))).answer(ask("meet")).manifest
    other = make_recipe(adapter={"rank": 4}, seed=9)
    assert "documents" in worker_of(data, Policy(models=(entry,))).answer(ask("meet", other)).manifest
    wrong = Policy(models=(entry[:-4] + "0000",))
    capsys.readouterr()
    check_refusal(worker_of(data, wrong).answer(ask("meet")), "model", "with other weights than these", capsys)


def test_its_owner_sees_what_was_asked_and_what_was_told(data: Path, capsys: Screen) -> None:
    worker = worker_of(data)
    facts = worker.answer(ask("meet")).manifest
    for question in (ask("evaluate", frame=adapters(1)[0]), training(2, adapters(1)[0])):
        worker.answer(question)
    worker.answer(ask("meet", make_recipe(training={"epochs": 99})))
    run = lines(data)[0]["run"]
    said = capsys.readouterr().out
    for line in (
        f'asked     fed.example.org:8443: to read and count the documents for "test" (run {run[:16]})',
        f"told      {facts['train_documents']} documents, {facts['blocks']} blocks,"
        f" {facts['tokens']} tokens to train on; {facts['holdout_documents']} documents held out",
        "told      the loss on the hold-out; each time that it is told is in the journal",
        f"round 2   training, of 2 rounds: 1 epoch, {-(-facts['blocks'] // 2)} steps",
        "told      the adapter of round 2, ",
        "refused   policy.max_epochs: its policy allows 20 epochs a round, not 99",
    ):
        assert f"{line}" in said


def test_a_round_is_two_lines_to_its_owner(data: Path, capsys: Screen) -> None:
    """It was eleven, of which the losses on the hold-out that were asked for and told had most."""
    worker = worker_of(data)
    worker.answer(ask("meet"))
    worker.answer(ask("evaluate", frame=adapters(1)[0]))
    capsys.readouterr()
    worker.answer(training(1, adapters(1)[0], judge=True))
    worker.answer(ask("evaluate", frame=adapters(1)[0]))
    begun, told = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"round 1   training, of 2 rounds: 1 epoch, \d+ steps", begun)
    number = r"\d\.\d{4}"
    losses = rf"loss {number} → {number}, on the hold-out {number} → {number}"
    assert re.fullmatch(rf"told      the adapter of round 1, [\d.]+ k?B: \d+ steps in 0:\d\d, {losses}", told)


def test_a_round_that_is_cut_short_stands_in_the_journal_as_what_it_was(data: Path, capsys: Screen) -> None:
    """Whole epochs of all documents stood there, whatever training.max_steps left of them."""
    short = make_recipe(training={"engine": "reference", "epochs": 2, "max_steps": 3})
    report = worker_of(data).answer(training(1, adapters(1)[0], short)).manifest["report"]
    noted = lines(data)[-1]
    assert (noted["steps"], noted["tokens"]) == (report["steps"], report["tokens"])
    assert noted["steps"] == 3
    assert "epochs" not in noted
    assert "round 1   training, of 2 rounds: 3 steps\n" in capsys.readouterr().out


def test_what_is_kept_in_every_round_is_said_once_and_again_when_it_changes(data: Path, capsys: Screen) -> None:
    worker = worker_of(data, Policy(max_scores_a_day=1))
    worker.answer(ask("meet"))
    capsys.readouterr()
    for packed in adapters(3):
        worker.answer(ask("evaluate", frame=packed))
    assert [line[:10].strip() for line in capsys.readouterr().out.splitlines()] == ["told", "kept"]


@pytest.mark.parametrize("file", [None, Path("mine/policy.toml")])
def test_its_owner_is_told_all_that_refuses_a_run_and_what_to_do(file: Path | None, data: Path, capsys: Screen) -> None:
    """The first rule alone was named: whoever changed it met the next one."""
    wishes: dict[str, Any] = {"model": {"source": "owner/name"}, "training": {"epochs": 99}, "data": {"text": "ssn"}}
    answer = worker_of(data, Policy(), file).answer(ask("meet", make_recipe(**wishes)))
    assert answer == Frame({"name": "alice", "refused": "model"})
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        'refused   policy.models: its policy does not name "owner/name"; policy.text: its policy does not allow the'
        ' column "ssn" to be read for text; policy.max_epochs: its policy allows 20 epochs a round, not 99'
        " (told: model)",
        "mend      if you mean to allow that, change models, text (or --text), max_epochs in "
        + (str(file) if file else "a policy file (fedloom join --write-policy FILE writes one)"),
        "waiting   for another run of this server; to be asked for this one again, leave (Ctrl-C) and join anew",
    ]


def test_rounds_of_a_recipe_and_of_a_day_are_refused_together(data: Path, capsys: Screen) -> None:
    worker = worker_of(data, Policy(max_rounds=2, max_rounds_a_day=2))
    told = [worker.answer(training(1, packed)).manifest for packed in adapters(3)]
    assert told[2] == {"name": "alice", "refused": "day"}
    said = capsys.readouterr().out
    assert "policy.max_rounds_a_day: its policy allows 2 rounds a day" in said
    assert "; policy.max_rounds: its policy allows 2 rounds of a recipe" in said
    assert "change max_rounds_a_day, max_rounds in a policy file" in said


def test_a_key_of_the_servers_recipe_is_said_to_be_the_servers(data: Path, capsys: Screen) -> None:
    worker_of(data).answer(ask("meet", make_recipe(data={"max_length": 4096})))
    said = capsys.readouterr().out
    assert "refused   data.max_length: 4096 tokens are more than the model's 256; at most 256 (told: model)" in said
    assert "mend      data.max_length is a key of the server's recipe: its owner can change it" in said
    assert "waiting   for another run" in said


def test_a_run_that_is_over_is_said_and_written_down(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Screen
) -> None:
    now = [1000.0]
    monkeypatch.setattr(account.time, "monotonic", lambda: now[0])
    worker = worker_of(data)
    worker.answer(ask("meet", seconds=300.0))
    now[0] += 599
    worker.account.look()
    assert "ended" not in capsys.readouterr().out
    now[0] += 1
    worker.account.look()
    worker.account.look()
    assert capsys.readouterr().out.count("no question came for 10:00") == 1
    # It goes on, and after its last round it is over sooner.
    worker.answer(training(2, adapters(1)[0]))
    now[0] += 60
    worker.account.look()
    assert "its last round was trained, and no question came for 1:00" in capsys.readouterr().out
    worker.answer(ask("meet"))
    worker.answer(ask("meet", make_recipe(seed=8)))
    assert "another recipe came" in capsys.readouterr().out
    ends = [line for line in lines(data) if line["kind"] == "end"]
    assert len(ends) == 3
    assert len({line["run"] for line in ends}) == 1


@pytest.mark.parametrize(("seconds", "silence"), [(20.0, 40.0), (3000.0, 6000.0), (1e9, account.LONGEST_SECONDS)])
def test_the_time_for_an_answer_says_when_a_run_is_over(
    seconds: float, silence: float, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says any number does not keep a run from its end for longer than a day."""
    now = [1000.0]
    monkeypatch.setattr(account.time, "monotonic", lambda: now[0])
    worker = worker_of(data)
    worker.answer(ask("meet", seconds=seconds))
    now[0] += silence - 1
    worker.account.look()
    assert [line["kind"] for line in lines(data)] == ["meet"]
    now[0] += 1
    worker.account.look()
    assert [line["kind"] for line in lines(data)] == ["meet", "end"]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Clock by which a training takes 301 seconds."""
    now = [1000.0]
    monkeypatch.setattr(account.time, "monotonic", lambda: now[0])
    train = client_model.ClientModel.train

    def slow(*given: Any, **more: Any) -> Frame:
        now[0] += 301
        return train(*given, **more)

    monkeypatch.setattr(client_model.ClientModel, "train", slow)
    return now


def test_the_silence_after_the_last_round_begins_when_it_is_trained(
    now: list[float], data: Path, capsys: Screen
) -> None:
    worker = worker_of(data)
    assert "report" in worker.answer(training(2, adapters(1)[0])).manifest
    now[0] += 59
    worker.account.look()
    assert "ended" not in capsys.readouterr().out
    now[0] += 1
    worker.account.look()
    assert "its last round was trained, and no question came for 1:00" in capsys.readouterr().out


def test_a_last_round_that_was_given_up_was_not_trained(now: list[float], data: Path, capsys: Screen) -> None:
    worker = worker_of(data)
    check_refusal(worker.answer(training(2, adapters(1)[0], seconds=300.0)), "late", "given up", capsys)
    now[0] += 60
    worker.account.look()
    assert "ended" not in capsys.readouterr().out, "the server asks for it again"
    assert [line["kind"] for line in lines(data)] == ["meet", "train", "give_up"]


def test_a_recipe_that_is_refused_does_not_end_the_run_that_goes_on(data: Path) -> None:
    worker = worker_of(data)
    worker.answer(ask("meet"))
    worker.answer(ask("meet", make_recipe(training={"epochs": 99})))
    worker.answer(ask("evaluate", frame=adapters(1)[0]))
    assert [line["kind"] for line in lines(data)] == ["meet", "score"]
    assert len({line["run"] for line in lines(data)}) == 1


def test_a_length_at_which_all_but_one_document_are_the_same_trains_nobody(tmp_path: Path, capsys: Screen) -> None:
    """Eleven forms with one heading: what the hold-out has as well is dropped, and the only note is left."""
    heading = "form of the clinic, to be filled in by hand, one for each visit. " * 2
    rows = [heading + f"note {number}" for number in range(11)] + [
        "a note without a heading, which is one of a kind " * 3
    ]
    path = tmp_path / "private.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    worker = worker_of(path)
    for seed in range(4):
        recipe = make_recipe(data={"max_length": 64, "near_duplicate": 1.0, "client_holdout": 0.3}, seed=seed)
        assert worker.answer(ask("meet", recipe)).manifest["refused"] in ("policy", "documents")
    assert "policy.min_documents" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-opt"])
def test_an_adapter_on_the_head_is_one_on_the_words(shape: str, data: Path, capsys: Screen) -> None:
    recipe = make_recipe(model={"source": f"random:{shape}"}, adapter={"targets": ["lm_head"], "rank": 1})
    assert worker_of(data).answer(ask("meet", recipe)).manifest["refused"] == "policy"
    assert "policy.train_embedding" in capsys.readouterr().out


def test_steps_of_one_document_are_refused(data: Path, capsys: Screen) -> None:
    recipe = make_recipe(training={"batch_size": 1})
    assert worker_of(data).answer(ask("meet", recipe)).manifest["refused"] == "policy"
    assert "policy.min_batch_size" in capsys.readouterr().out


def test_what_was_worked_on_is_told_in_sums(data: Path) -> None:
    """Steps of one size each: a batch's own tokens could be the length of a document."""
    answer = worker_of(data).answer(training(1, adapters(1)[0]))
    tokens = [row[1] for row in answer.manifest["progress"]]
    assert max(tokens) - min(tokens) <= 1
    assert sum(tokens) == answer.manifest["report"]["tokens"]


def change(data: Path, how: str) -> None:
    """Change a client's documents in a folder, as its owner may at any moment."""
    match how:
        case "added":
            (data / "more.txt").write_text("another text that came later, of some length, with words of its own")
        case "removed":
            (data / "3.txt").unlink()
        case "edited":
            (data / "3.txt").write_text("what stood here was wrong, and is now another text of about that length")


@pytest.fixture
def folder(data: Path) -> Path:
    folder = data.parent / "private"
    folder.mkdir()
    for number, line in enumerate(data.read_text().splitlines()):
        (folder / f"{number}.txt").write_text(json.loads(line)["text"])
    return folder


CHANGES = ["added", "removed", "edited"]


@pytest.mark.parametrize("how", first(CHANGES))
def test_documents_that_change_in_a_run_are_said_and_written_down(how: str, folder: Path, capsys: Screen) -> None:
    packed, twin = adapters(1)[0], folder.parent / "twin"
    shutil.copytree(folder, twin)
    honest = worker_of(twin)
    expected = [honest.answer(training(number, packed)).payload for number in (1, 2)]
    (folder.parent / "alice.journal.jsonl").unlink()
    worker = worker_of(folder)
    told = worker.answer(ask("meet")).manifest["documents"]
    first = worker.answer(training(1, packed, documents=told))
    assert "outdated" not in capsys.readouterr().out
    change(folder, how)
    second = worker.answer(training(2, packed, documents=told))
    assert "outdated  the documents were changed since they were read: this run goes on" in capsys.readouterr().out
    assert [first.payload, second.payload] == expected, "what was counted is trained, whatever became of it"
    rounds = [line for line in lines(folder) if line["kind"] == "train"]
    assert [line.get("outdated", False) for line in rounds] == [False, True]


@pytest.mark.parametrize("how", first(CHANGES))
@pytest.mark.parametrize("do", ["train", "evaluate"])
def test_a_worker_that_began_anew_works_with_no_documents_that_nobody_counted(
    do: str, how: str, folder: Path, capsys: Screen
) -> None:
    """Its SuperNode lives on, so the server does not ask again who it is."""
    packed, kept = adapters(1)[0], folder.parent / "kept"
    told = worker_of(folder).answer(ask("meet")).manifest["documents"]
    question = training(1, packed, documents=told) if do == "train" else ask("evaluate", frame=packed, documents=told)
    shutil.copytree(folder, kept)
    change(folder, how)
    worker = worker_of(folder)
    check_refusal(worker.answer(question), "documents", "not those that were counted for this run", capsys)
    assert {line["kind"] for line in lines(folder)} == {"meet"}, "nothing is trained, and no loss is told"
    shutil.rmtree(folder)
    kept.rename(folder)
    assert "refused" not in worker.answer(question).manifest, "what was counted is back"


@pytest.mark.parametrize("how", first(CHANGES))
def test_the_next_run_begins_with_the_documents_that_are_there_then(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(account.time, "monotonic", lambda: now[0])
    worker = worker_of(folder)
    before = worker.answer(ask("meet", seconds=300.0)).manifest
    change(folder, how)
    worker.answer(ask("evaluate", frame=adapters(1)[0], seconds=300.0))
    assert worker.answer(ask("meet", seconds=300.0)).manifest == before, "the run goes on with what was counted"
    now[0] += 601
    worker.account.look()
    after = worker.answer(ask("meet", seconds=300.0)).manifest
    assert after["documents"] != before["documents"]
    assert after == worker_of(folder).answer(ask("meet")).manifest
