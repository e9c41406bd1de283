"""Signed questions: what a client's worker takes from the kit's server alone, and answers once."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny import make_recipe

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from fedloom.deployment import signing
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.messages import ask_within, pack_adapter, pack_recipe, pack_task
from fedloom.deployment.signing import Signer, Verifier, make_signing_key
from fedloom.errors import DeploymentError, MessageError
from fedloom.experiment.building import load_adapted_model
from fedloom.host.frames import Frame
from fedloom.model.source import open_model
from fedloom.training.jobs import ClientTask

QUESTION = Frame({"do": "train", "learning_rate": 0.1, "name": "ünïcode"}, b"\0\1\2\3" * 100)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_signing_key(tmp_path / "signing.key")
    return tmp_path / "signing.key"


def verifier(key: Path, client: str = "alice", kind: type[Verifier] = Verifier) -> Verifier:
    return kind(make_signing_key(key), client)


def on_its_way(frame: Frame) -> Frame:
    """Read and write a frame's words, as each process does that passes it on."""
    return Frame(json.loads(json.dumps(frame.manifest)), frame.payload)


def test_a_question_arrives_as_it_was_asked_whatever_carries_it(key: Path) -> None:
    signer, client = Signer(key), verifier(key)
    for _ in range(3):
        assert client.open(on_its_way(on_its_way(signer.sign(QUESTION, "alice", 60)))) == QUESTION


class ForgetsTheSignature(Verifier):
    """The twin: it takes what says that it is signed."""

    def _check_signature(self, frame: Frame) -> str:
        return str(frame.manifest["signed"])


class ForgetsTheName(Verifier):
    """The twin: it answers what the server asks anybody."""

    def open(self, frame: Frame) -> Frame:
        self._client = json.loads(frame.manifest["signed"])["client"]
        return super().open(frame)


class ForgetsThePayload(Verifier):
    """The twin: it looks at the words alone."""

    def open(self, frame: Frame) -> Frame:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signing, "hash_pieces", lambda _: json.loads(frame.manifest["signed"])["payload"])
            return super().open(frame)


class ForgetsWhatItAnswered(Verifier):
    """The twin: it knows no question again."""

    def _take_once(self, question: str, until: object) -> None:
        super()._take_once(question, until)
        self._known.clear()


class ForgetsTheEnd(Verifier):
    """The twin: a question is good for ever."""

    def _take_once(self, question: str, until: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signing, "CLOCKS_SECONDS", float("inf"))
            super()._take_once(question, until)


class ForgetsThatItForgot(Verifier):
    """The twin: what it has no room for any more, it takes again."""

    def _take_once(self, question: str, until: object) -> None:
        super()._take_once(question, until)
        self._forgotten_until = float("-inf")


def by_another_key(signer: Signer, client: Verifier, folder: Path) -> Frame:
    make_signing_key(folder / "mallory.key")
    return Signer(folder / "mallory.key").sign(QUESTION, "alice", 60)


def with_other_words(signer: Signer, client: Verifier, folder: Path) -> Frame:
    told = signer.sign(QUESTION, "alice", 60).manifest
    return Frame({**told, "signed": told["signed"].replace("0.1", "0.9")}, QUESTION.payload)


def to_bob(signer: Signer, client: Verifier, folder: Path) -> Frame:
    return signer.sign(QUESTION, "bob", 60)


def with_other_numbers(signer: Signer, client: Verifier, folder: Path) -> Frame:
    return replace(signer.sign(QUESTION, "alice", 60), payload=b"\xff" * len(QUESTION.payload))


def a_second_time(signer: Signer, client: Verifier, folder: Path) -> Frame:
    frame = signer.sign(QUESTION, "alice", 60)
    client.open(frame)
    client.open(signer.sign(QUESTION, "alice", 60))
    return frame


def after_its_end(signer: Signer, client: Verifier, folder: Path) -> Frame:
    return signer.sign(QUESTION, "alice", -signing.CLOCKS_SECONDS - 1)


def when_it_is_no_longer_remembered(signer: Signer, client: Verifier, folder: Path) -> Frame:
    frame = signer.sign(QUESTION, "alice", 60)
    client.open(frame)
    for _ in range(signing.MOST_KNOWN):
        client.open(signer.sign(QUESTION, "alice", 61))
    return frame


ATTACKS: list[tuple[Callable[[Signer, Verifier, Path], Frame], str, type[Verifier]]] = [
    (by_another_key, "not signed by the kit's server", ForgetsTheSignature),
    (with_other_words, "not signed by the kit's server", ForgetsTheSignature),
    (to_bob, "to another client", ForgetsTheName),
    (with_other_numbers, "other numbers", ForgetsThePayload),
    (a_second_time, "it is answered once", ForgetsWhatItAnswered),
    (after_its_end, "too late .* clock is ahead", ForgetsTheEnd),
    (when_it_is_no_longer_remembered, "it is answered once", ForgetsThatItForgot),
]


@pytest.mark.parametrize(("attack", "why", "twin"), ATTACKS, ids=[attack.__name__ for attack, *_ in ATTACKS])
def test_a_stolen_or_changed_question_is_refused_and_its_twin_takes_it(
    attack: Callable[[Signer, Verifier, Path], Frame],
    why: str,
    twin: type[Verifier],
    key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signing, "MOST_KNOWN", 8)
    signer = Signer(key)
    client = verifier(key)
    with pytest.raises(MessageError, match=why):
        client.open(on_its_way(attack(signer, client, tmp_path)))
    assert len(client._known) <= signing.MOST_KNOWN
    broken = verifier(key, kind=twin)
    assert broken.open(on_its_way(attack(signer, broken, tmp_path))).manifest["do"] == "train"


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"do": "meet", "recipe": {}},
        {"signed": "{}"},
        {"signed": "{}", "signature": ""},
        {"signed": "{}", "signature": "no digits"},
        {"signed": {"do": "meet"}, "signature": "00" * 64},
        {"signed": "\ud800", "signature": "00" * 64},
    ],
)
def test_what_is_not_signed_is_not_read(manifest: dict[str, object], key: Path) -> None:
    with pytest.raises(MessageError, match="not signed"):
        verifier(key).open(Frame(manifest))


@pytest.mark.parametrize(
    "told",
    [
        [],
        {"client": "alice"},
        {"until": float("nan")},
        {"until": float("inf")},
        {"until": "soon"},
        {"until": None},
        {"question": "meet"},
        {"more": 1},
    ],
)
def test_nonsense_that_the_server_itself_signed_is_refused(told: object, key: Path) -> None:
    signer = Signer(key)
    known = json.loads(signer.sign(Frame({}), "alice", 60).manifest["signed"])
    text = json.dumps(told if told == [] or told == {"client": "alice"} else {**known, **told})  # type: ignore[dict-item]
    signature = signer._key.sign(signing.PURPOSE + text.encode()).hex()
    with pytest.raises(MessageError):
        verifier(key).open(Frame({"signed": text, "signature": signature}))


def test_a_key_that_signs_is_no_other_kind_and_is_there(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="not there; approve each client's request again"):
        Signer(tmp_path / "signing.key")
    (tmp_path / "signing.key").write_text("nothing of a key")
    with pytest.raises(DeploymentError, match="can't be read"):
        Signer(tmp_path / "signing.key")


def test_a_question_asked_again_is_answered_again_and_a_stolen_one_is_not(key: Path, tmp_path: Path) -> None:
    """The server signs anew what it asks again; whoever recorded the first one has nothing else to send."""
    recipe = make_recipe(training={"engine": "reference"}, model={"dtype": "float32"})
    adapter = load_adapted_model(recipe, open_model(recipe.model.source)).read()
    packed = pack_task(ClientTask(1, 0, adapter, recipe.training, rounds=2, seed=7), pack_adapter(adapter))
    told = {"do": "train", "judge": False, "recipe": pack_recipe(recipe)}
    question = ask_within(replace(packed, manifest={**packed.manifest, **told}), 60)
    data, journal = tmp_path / "documents.jsonl", tmp_path / "alice.journal.jsonl"
    data.write_text("".join(json.dumps({"text": f"word{row} " * (row + 5)}) + "\n" for row in range(12)))
    worker = Worker("alice", data, Policy(), Journal(journal), verifier(key).open)
    signer = Signer(key)

    first = signer.sign(question, "alice", 60)
    answer = worker.answer(first)
    assert "report" in answer.manifest
    assert worker.answer(signer.sign(ask_within(question, 50), "alice", 60)) is answer, "it is not worked out again"
    stolen = worker.answer(first)
    assert stolen.manifest == {"name": "alice", "refused": "question"}
    assert not stolen.payload
    assert worker.answer(question).manifest == {"name": "alice", "refused": "question"}
    late = signer.sign(ask_within(question, 70), "alice", -3600)
    assert worker.answer(late).manifest == {"name": "alice", "refused": "late"}, "as where its clock is an hour ahead"
    assert [json.loads(line)["kind"] for line in journal.read_text().splitlines()] == ["meet", "train"], "trained once"


def test_signing_costs_a_round_nothing(key: Path) -> None:
    """Hold both sides together to half a second for an adapter of 16 MB: it is hashed, not signed."""
    question, signer, client = replace(QUESTION, payload=bytes(2**24)), Signer(key), verifier(key)
    spent = time.process_time()
    client.open(signer.sign(question, "alice", 60))
    assert time.process_time() - spent < 0.5


def test_a_question_of_one_run_is_none_of_the_next(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of `serve` with one key, and a client that stays: what it answered in one, it answers no more."""
    first, second, client = Signer(key), Signer(key), verifier(key)
    asked = [first.sign(QUESTION, "alice", 60) for _ in range(3)]
    again = [second.sign(QUESTION, "alice", 60) for _ in range(3)]
    assert len({frame.manifest["signed"] for frame in (*asked, *again)}) == 6, "two runs share no question"
    for frame in (*asked[:2], *again[:2]):
        assert client.open(frame) == QUESTION
    for frame in (*asked[:2], *again[:2]):
        with pytest.raises(MessageError, match="was here before"):
            client.open(frame)
    # One that was held back on its way is as good as its time is long, and no longer.
    assert client.open(asked[2]) == QUESTION
    now = time.time()
    monkeypatch.setattr(signing.time, "time", lambda: now + 60 + signing.CLOCKS_SECONDS + 1)
    for held in (asked[2], again[2]):
        with pytest.raises(MessageError, match="too late"):
            client.open(held)
