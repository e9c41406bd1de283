"""What leaves a client of a private run: the same bytes, whatever one document says, but for the noised weights."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.liars import LyingServer
from support.marks import CI, first
from support.tiny import make_recipe

from fedloom.data.documents import Documents
from fedloom.deployment.client import client_model, documents
from fedloom.deployment.client.client_model import ClientModel
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.own_documents import HOLDOUT, TRAIN
from fedloom.deployment.client.policy import Policy, PrivacyPolicy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.message_fields import ANSWERS, PRIVATE_ANSWERS
from fedloom.deployment.message_kinds import Field, Kind, Listing, Record, Row, as_private, hide
from fedloom.deployment.messages import read_answer
from fedloom.evaluation.held_out import Score, evaluate
from fedloom.host.frames import Frame
from fedloom.model.source import open_model
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientUpdate, WorkLog

PRIVATE = {"epsilon": 8.0, "delta": 1e-3}
POISON = "§"
"""Text whose tokens have an embedding that is no number."""
TEXTS = [f"{n} is a text of a patient: " + f"word{n} " * (n + 9) for n in range(8)]
HELD = [f"{n} is held out: " + f"other{n} " * (n + 9) for n in range(3)]
Written = str | tuple[str, Any]
"""Text, or whose it is and the text."""
Files = dict[str, list[Written]]
SPLIT: Files = {TRAIN: TEXTS, HOLDOUT: HELD}
WHOLE: Files = {"rows.jsonl": [*TEXTS, *HELD]}


OF_AUTHORS: list[Written] = [(f"author{n % 7}", text) for n, text in enumerate([*TEXTS, *HELD])]
"""Rows of seven authors, of whom four have two and the others one."""
BY_AUTHOR: Files = {TRAIN: OF_AUTHORS, HOLDOUT: [("author7", HELD[0] * 2), ("author8", HELD[1] * 2)]}
WHOLE_BY_AUTHOR: Files = {"rows.jsonl": [*OF_AUTHORS, ("author7", "seven"), ("author8", "eight, and more")]}


def with_text(files: Files, name: str, place: int, text: str) -> Files:
    return {**files, name: [*files[name][:place], text, *files[name][place + 1 :]]}


def with_texts(files: Files, name: str, author: str, *texts: Any) -> Files:
    """Give an author other texts, as many as there are, in the place of the first one."""
    rows = files[name]
    place = next(place for place, row in enumerate(rows) if row[0] == author)
    before, after = ([row for row in part if row[0] != author] for part in (rows[:place], rows[place:]))
    return {**files, name: [*before, *((author, text) for text in texts), *after]}


CASES: dict[str, tuple[Files, Files]] = {
    "longer": (SPLIT, with_text(SPLIT, TRAIN, 2, TEXTS[2] * 3)),
    "empty": (SPLIT, with_text(SPLIT, TRAIN, 2, "")),
    "no number": (SPLIT, with_text(SPLIT, TRAIN, 2, TEXTS[2][:30] + POISON)),
    "one letter": (SPLIT, with_text(SPLIT, TRAIN, 7, "a")),
    "held out as well": (SPLIT, with_text(SPLIT, TRAIN, 5, HELD[1])),
    "a copy": (SPLIT, with_text(SPLIT, TRAIN, 5, TEXTS[0])),
    "held out, longer": (SPLIT, with_text(SPLIT, HOLDOUT, 0, "so. " + HELD[0] * 2)),
    "held out, empty": (SPLIT, with_text(SPLIT, HOLDOUT, 0, "")),
    "held out, a copy": (SPLIT, with_text(SPLIT, HOLDOUT, 0, TEXTS[3])),
    "whole, shorter": (WHOLE, with_text(WHOLE, "rows.jsonl", 4, "a few words")),
    "whole, empty": (WHOLE, with_text(WHOLE, "rows.jsonl", 4, "")),
    "whole, a copy": (WHOLE, with_text(WHOLE, "rows.jsonl", 4, TEXTS[1])),
}
"""What a client has, and what another has that differs from it in one document."""
OTHERS = [text for author, text in OF_AUTHORS if author == "author1"]
BY_UNIT: dict[str, tuple[Files, Files]] = {
    f"author, {name}": (files, with_texts(files, file, author, *texts))
    for files, file, name, author, texts in (
        (BY_AUTHOR, TRAIN, "nothing", "author2", [""]),
        (BY_AUTHOR, TRAIN, "more documents", "author2", [f"{n} more of it, and longer" for n in range(9)]),
        (BY_AUTHOR, TRAIN, "one document", "author2", TEXTS[2:3]),
        (BY_AUTHOR, TRAIN, "another text", "author2", [TEXTS[2] * 3, "a few words"]),
        (BY_AUTHOR, TRAIN, "nothing, several times", "author2", ["", " ", "a"]),
        (BY_AUTHOR, TRAIN, "no number", "author2", [TEXTS[2][:30] + POISON, TEXTS[2]]),
        (BY_AUTHOR, TRAIN, "no text", "author2", [{"a": 1}, None]),
        (BY_AUTHOR, TRAIN, "another's texts", "author2", OTHERS),
        (BY_AUTHOR, TRAIN, "another's texts, turned round", "author2", OTHERS[::-1]),
        (BY_AUTHOR, TRAIN, "held out as well", "author2", [HELD[0] * 2]),
        (BY_AUTHOR, HOLDOUT, "held out, more", "author7", [HELD[0] * 2, *TEXTS]),
        (BY_AUTHOR, HOLDOUT, "held out, nothing", "author7", [""]),
        *(
            (WHOLE_BY_AUTHOR, "rows.jsonl", f"whole, {name} of {author}", author, texts)
            for author in ("author2", "author3", "author5", "author8")
            for name, texts in (("nothing", [""]), ("more", [f"{n} more of it, and longer" for n in range(9)]))
        ),
    )
}
"""What a client has, and what another has that differs from it in all that one author wrote."""


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a token whose embedding is no number: a document with it has no loss and no gradient."""
    begin = ClientModel.__init__

    def begin_poisoned(self: ClientModel, *given: Any) -> None:
        begin(self, *given)
        token = open_model("random:tiny-llama").tokenizer(POISON)["input_ids"][-1]
        self._adapted.base.get_input_embeddings().weight.data[token] = float("nan")

    monkeypatch.setattr(ClientModel, "__init__", begin_poisoned)


def unit_of(files: Files) -> str:
    return "author" if any(isinstance(row, tuple) for rows in files.values() for row in rows) else "document"


def client(folder: Path, files: Files) -> Worker:
    """Start a client of one name and one secret with these files; where they say whose they are, it protects that."""
    data = folder / "data"
    data.mkdir(parents=True)
    for name, rows in files.items():
        told = [{"text": row} if isinstance(row, str) else {"author": row[0], "text": row[1]} for row in rows]
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in told))
    secret = folder / "alice.journal.secret"
    secret.write_bytes(b"s" * 32)
    secret.chmod(0o600)
    unit = unit_of(files)
    policy = Policy() if unit == "document" else Policy(privacy=PrivacyPolicy(unit=unit))
    return Worker("alice", data, policy, Journal(folder / "alice.journal.jsonl"))


def converse(worker: Worker, engine: str = "reference") -> Iterator[tuple[str, Frame]]:
    """Ask a client all that there is to ask, and yield its answers."""
    owner = worker.account.policy.privacy
    recipe = make_recipe(
        training={"engine": engine, "batch_size": 3},
        data={"max_length": 128, "documents_per_client": None},
        privacy={**PRIVATE, "unit": owner.unit if owner else "document"},
    )
    server = LyingServer(worker.answer, recipe)
    yield "meet", server.ask(server.question("meet"))
    for round in (1, 2):
        yield "evaluate", server.ask(server.question("evaluate"))
        yield "train", server.ask(server.question("train", round=round, judge=True))
    yield "meet", server.ask(server.question("meet"))


NOISED = ("proximal_loss", "proximal_ratio", "drift")
"""Numbers of a report that are reckoned from noised weights and gradients alone, as the weights that are sent are."""


def told(do: str, answer: Frame) -> str:
    """Return what a server sees of an answer, but for what is noised, and for a keyed hash that nobody can read."""
    seen = dict(answer.manifest)
    if do == "meet":
        assert len(seen.pop("documents")) == 64
    if do == "train":
        seen["report"] = {name: value for name, value in seen["report"].items() if name not in NOISED}
    return json.dumps([do, seen, len(answer.payload)])


Conversation = list[tuple[str, Frame]]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Files, str], Conversation]:
    """Return what a client with these files tells; it is asked once for all that are held to it."""
    told: dict[tuple[int, str], Conversation] = {}

    def find(files: Files, engine: str) -> Conversation:
        key = id(files), engine
        if key not in told:
            told[key] = [*converse(client(tmp_path_factory.mktemp("usual"), files), engine)]
        return told[key]

    return find


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
@pytest.mark.parametrize("case", first(sorted(CASES, key=lambda case: case not in ("empty", "no number")), keep=2))
def test_two_clients_that_differ_in_one_document_tell_the_same_but_for_noised_weights(
    case: str, engine: str, usual: Callable[[Files, str], Conversation], tmp_path: Path
) -> None:
    our, their = CASES[case]
    ours, theirs = usual(our, engine), [*converse(client(tmp_path, their), engine)]
    check_alike(ours, theirs, trained=TRAIN in our and not case.startswith("held out,"))


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
@pytest.mark.parametrize("case", first(BY_UNIT, keep=2))
def test_two_clients_that_differ_in_one_author_tell_the_same_but_for_noised_weights(
    case: str, engine: str, usual: Callable[[Files, str], Conversation], tmp_path: Path
) -> None:
    our, their = BY_UNIT[case]
    ours, theirs = usual(our, engine), [*converse(client(tmp_path, their), engine)]
    check_alike(ours, theirs, trained=TRAIN in our and ", held out," not in case)


def check_alike(ours: Conversation, theirs: Conversation, *, trained: bool) -> None:
    """Hold what two clients tell to be the same but for the weights, which differ where that is `trained` on."""
    assert [told(*answer) for answer in ours] == [told(*answer) for answer in theirs]
    for do, answer in ours:
        read_answer(answer, do, private=True)  # a refusal would be the same for both, too
    if trained:
        assert [answer.payload for _, answer in ours] != [answer.payload for _, answer in theirs], "it is trained on"


def test_of_the_authors_that_are_tried_some_are_held_out_of_a_whole_file(tmp_path: Path) -> None:
    recipe = make_recipe(data={"max_length": 128, "documents_per_client": None}, privacy={**PRIVATE, "unit": "author"})
    found = documents.gather_client(recipe, client(tmp_path, WHOLE_BY_AUTHOR)._places.data).documents
    held = {document.unit for document in found.holdout} & {"author2", "author3", "author5", "author8"}
    assert 0 < len(held) < 4


BAD = {"not JSON": "{", "no object": "[]", "another column": '{"other": "words"}', "no text": '{"text": {"a": 1}}'}
"""Rows that can't be read."""


@pytest.mark.parametrize(
    "limits", first([{"on_bad_row": "error"}, {"max_bad_fraction": 0.0}], rest=CI), ids=lambda one: next(iter(one))
)
@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
@pytest.mark.parametrize("side", first([TRAIN, HOLDOUT], rest=CI))
def test_a_row_that_can_not_be_read_refuses_nothing_whatever_the_server_says(
    side: str, row: str, limits: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that chooses what a bad row is, and how many may be, would learn of each what it is like."""
    recipe = make_recipe(data={"max_length": 128, "documents_per_client": None, **limits}, privacy=PRIVATE)
    found = []
    for number, rows in enumerate(([], [row], [row] * 40)):
        worker = client(tmp_path / str(number), SPLIT)
        file = tmp_path / str(number) / "data" / side
        whole = file.read_text().splitlines()
        file.write_text("\n".join([*rows, *whole[len(rows) :]][: len(whole)]) + "\n")
        found.append(told("meet", worker.answer(LyingServer(worker.answer, recipe).question("meet"))))
    assert found[0] == found[1] == found[2]
    assert "refused" not in found[0]
    shown = capsys.readouterr().out
    assert ("1 of 8 rows give no document" in shown) == (side == TRAIN)


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_the_owner_sees_losses_that_no_frame_has(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses: list[list[tuple[str, ...]]] = []
    answers: list[list[str]] = []
    for number, files in enumerate(CASES["longer"]):
        answers.append([told(*answer) for answer in converse(client(tmp_path / str(number), files), engine)])
        shown = capsys.readouterr().out
        losses.append(
            re.findall(
                r"steps in 0:\d\d, loss (\d\.\d{4}) → (\d\.\d{4}), (\d\.\d{4}) on average; told to nobody", shown
            )
        )
        journal = (tmp_path / str(number) / "alice.journal.jsonl").read_text()
        assert len(losses[-1]) == 2, "one line a round"
        assert not [loss for line in losses[-1] for loss in line if loss in journal + "".join(answers[-1])]
    assert losses[0] != losses[1]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("field", first(["loss", "proximal_mu"]))
def test_a_loss_that_was_told_in_any_field_would_be_found(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = client_model.pack_update

    def pack_openly(update: ClientUpdate, travels: Any) -> Frame:
        packed = pack(update, travels)
        report = {**packed.manifest["report"], field: update.own_losses[0]}
        return replace(packed, manifest={**packed.manifest, "report": report})

    monkeypatch.setattr(client_model, "pack_update", pack_openly)
    ours, theirs = ([*converse(client(tmp_path / str(number), files))] for number, files in enumerate(CASES["longer"]))
    if field == "loss":  # no such field leaves at all
        assert {answer.manifest.get("refused") for do, answer in ours if do == "train"} == {"internal"}
    else:
        assert [told(*answer) for answer in ours] != [told(*answer) for answer in theirs]


def test_what_is_held_out_does_not_decide_what_is_trained_on(tmp_path: Path) -> None:
    """A held-out document that becomes a copy of another one would take that one away."""
    recipe = make_recipe(data={"max_length": 128, "documents_per_client": None}, privacy=PRIVATE)
    ours, theirs = (
        documents.gather_client(recipe, client(tmp_path / str(number), files)._places.data).blocks.train.tokens_NT
        for number, files in enumerate(CASES["held out, a copy"])
    )
    assert torch.equal(ours, theirs)


def test_weights_are_numbers_where_a_document_has_none(tmp_path: Path) -> None:
    for do, answer in converse(client(tmp_path, CASES["no number"][1])):
        if do == "train":
            assert torch.isfinite(torch.frombuffer(bytearray(answer.payload), dtype=torch.float32)).all()


# --- The table alone keeps it, whatever is worked out beneath: and each of its rows is needed.


def private_fields(kind: Kind, where: str = "") -> Iterator[str]:
    """Yield the names of the fields that a private run does not tell."""
    match kind:
        case Record(fields) | Row(fields):
            for field in fields:
                name = f"{where}.{field.name}".lstrip(".")
                if field.private:
                    yield name
                else:
                    yield from private_fields(field.kind, name)
        case Listing(inner):
            yield from private_fields(inner, where)


def telling(kind: Kind, which: str, where: str = "") -> Kind:
    """Return a private kind that tells one field all the same."""

    def change(field: Field) -> Field:
        name = f"{where}.{field.name}".lstrip(".")
        if name == which:
            return replace(field, private=None)
        return field if field.private else replace(field, kind=telling(field.kind, which, name))

    match kind:
        case Record(fields):
            return Record(tuple(map(change, fields)))
        case Row(fields):
            return Row(tuple(map(change, fields)))
        case Listing(inner, least, most):
            return Listing(telling(inner, which, where), least, most)
    return kind


def unhidden(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, Frame]]]:
    """Return what both clients of a case have worked out, with all that they know, before anything of it is hidden."""
    raw: list[tuple[str, Frame]] = []
    finish, log = WorkLog.finish, WorkLog

    def finish_openly(self: WorkLog, drift: float) -> ClientReport:
        losses = {"loss_first": self._losses[0], "loss_last": self._losses[-1], "loss_mean": sum(self._losses)}
        return replace(finish(self, drift), tokens=self._tokens, **losses)

    def score(self: ClientModel, adapter: Any) -> Score:
        return evaluate(self._adapted, adapter, self._blocks.holdout, batch_size=2)

    def keep(answer: Frame, do: str) -> Frame:
        raw.append((do, answer))
        return Frame(hide(PRIVATE_ANSWERS[do], answer.manifest), answer.payload)

    with monkeypatch.context() as patch:
        patch.setattr(log, "finish", finish_openly)
        patch.setattr(ClientModel, "_score", score)
        patch.setattr(client_model, "hide_documents", keep)
        found = []
        for number, files in enumerate(CASES[case]):
            raw = []
            for do, answer in converse(client(folder / f"{case}-{number}", files)):
                read_answer(answer, do, private=True)
            found.append(raw)
    return found


@pytest.fixture(scope="module")
def worked_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[tuple[str, Frame]]]]:
    folder, cases = tmp_path_factory.mktemp("open"), ("one letter", "held out as well", "held out, empty")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {case: unhidden(folder, case, monkeypatch) for case in cases}


def same(pair: list[list[tuple[str, Frame]]], hiding: Callable[[str], Kind]) -> bool:
    ours, theirs = (
        [told(do, Frame(hide(hiding(do), answer.manifest), answer.payload)) for do, answer in side] for side in pair
    )
    return ours == theirs


def test_the_table_hides_what_is_worked_out_beneath(worked_out: dict[str, list[list[tuple[str, Frame]]]]) -> None:
    for case, pair in worked_out.items():
        assert same(pair, lambda do: PRIVATE_ANSWERS[do]), case
        assert not same(pair, lambda do: ANSWERS[do]), case


HIDDEN = [(do, name) for do, record in ANSWERS.items() for name in private_fields(record)]


@pytest.mark.parametrize(("do", "name"), HIDDEN)
def test_a_field_that_was_told_again_would_be_found(
    do: str, name: str, worked_out: dict[str, list[list[tuple[str, Frame]]]]
) -> None:
    broken = as_private(telling(ANSWERS[do], name))
    found = [
        case
        for case, pair in worked_out.items()
        if not same(pair, lambda one: broken if one == do else PRIVATE_ANSWERS[one])
    ]
    if (do, name) in NEVER_MADE:
        assert not found, "say when it is"
    else:
        assert found


NEVER_MADE = {
    *(("meet", name) for name in ("dropped", "leaks", "shared_blocks")),
    *(("meet", "tasks"), ("tasks", "tasks"), ("tasks", "base"), ("keep", "before"), ("keep", "after")),
    *((do, f"progress.{what}") for do in ("meet", "evaluate") for what in ("tokens", "samples")),
}
"""Fields that say nothing in a private run as it is: what is held out decides over nothing, nothing is scored,
and neither tasks of a client's own nor an adapter that it goes on to are asked for."""


TOLD = {
    "meet": {"name", "version", "base", "documents", "train_documents", "blocks", "noise_multiplier", "weighs"},
    "evaluate": set(),
    "tasks": set(),
    "keep": set(),
    "train": {
        "layout",
        "own",  # of noised weights
        *(f"report.{name}" for name in ("round", "client", "examples", "steps", "proximal_mu", *NOISED)),
    },
}
"""Fields that a private run tells: none depends on what a document says but those that are noised, and a keyed hash."""
PROGRESS = {"progress.phase", "progress.round", "progress.client"}


def all_fields(kind: Kind, where: str = "") -> Iterator[str]:
    match kind:
        case Record(fields) | Row(fields):
            for field in fields:
                yield from all_fields(field.kind, f"{where}.{field.name}".lstrip("."))
        case Listing(inner):
            yield from all_fields(inner, where)
        case _:
            yield where


@pytest.mark.parametrize("do", ANSWERS)
def test_of_each_field_it_is_said_what_a_private_run_tells(do: str) -> None:
    hidden = {name for one, name in HIDDEN if one == do}
    progress = PROGRESS if do not in ("tasks", "keep") else set()
    assert {*all_fields(ANSWERS[do])} - hidden == TOLD[do] | progress


def test_units_that_were_counted_by_what_they_say_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talk(name: str) -> list[list[str]]:
        return [
            [told(*answer) for answer in converse(client(tmp_path / f"{name}{number}", files))]
            for number, files in enumerate(CASES["empty"])
        ]

    with monkeypatch.context() as patch:
        patch.setattr(documents, "_count_rows", lambda found: len(found.documents))
        ours, theirs = talk("places")
        assert ours != theirs
    finish = WorkLog.finish

    def finish_by_blocks(self: WorkLog, drift: float) -> ClientReport:
        return replace(finish(self, drift), examples=len(self.job.blocks))

    with monkeypatch.context() as patch:
        patch.setattr(WorkLog, "finish", finish_by_blocks)
        ours, theirs = talk("examples")
        assert ours != theirs


@pytest.mark.parametrize(
    ("case", "places"),
    first(
        [
            ("author, more documents", lambda found: len(found.documents)),
            ("author, nothing", lambda found: len({document.unit for document in found.documents})),
            ("author, no text", lambda found: len({document.unit for document in found.documents})),
        ]
    ),
)
def test_authors_that_were_counted_by_what_they_wrote_would_be_found(
    case: str, places: Callable[[Documents], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "count_places", places)
    ours, theirs = (
        [told(*answer) for answer in converse(client(tmp_path / str(number), files))]
        for number, files in enumerate(BY_UNIT[case])
    )
    assert ours != theirs


@pytest.mark.parametrize("engine", ["reference", "batched"])
def test_a_client_of_empty_documents_sends_noise(engine: str, tmp_path: Path) -> None:
    full = [*converse(client(tmp_path / "full", SPLIT), engine)]
    nothing = [*converse(client(tmp_path / "nothing", {TRAIN: ["a"] * len(TEXTS), HOLDOUT: HELD}), engine)]
    assert [told(*answer) for answer in full] == [told(*answer) for answer in nothing]
