"""The command `fedloom audit` on an owner's documents, and what it leaves: figures, and no word of a document."""

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support.marks import first
from support.random_texts import random_texts, write_texts
from support.tiny import make_recipe

from fedloom.audit.command import audit_to
from fedloom.audit.rehearsal import halve, rehearse
from fedloom.audit.statistics import NOT_TRIED, YES
from fedloom.cli import main
from fedloom.data.documents import Document
from fedloom.deployment.client.policy import Policy
from fedloom.errors import DataError, RecipeError
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.privacy import NOT_PRIVATE
from fedloom.report.audit_page import WORDS, build_page, describe_audit, give_verdict
from fedloom.report.document import to_html

KEY = b"k" * 32
LEAKY = {
    "adapter": {"rank": 8, "alpha": 16, "targets": "all-linear"},
    "training": {"batch_size": 4, "learning_rate": 3e-3, "epochs": 2},
}
PRIVATE = {"epsilon": 1.0, "delta": 1e-3}


def rehearsed(folder: Path, number: int = 16, **sections: Any) -> dict[str, Any]:
    """A rehearsal's record, of a tiny recipe on random texts."""
    texts = folder / "texts"
    if not texts.exists():
        write_texts(texts, random_texts(number))
    recipe = make_recipe(**{"data": {"max_length": 44, "documents_per_client": number}, **sections})
    return rehearse(recipe, texts, Policy(), Observer(), KEY)


def attacks_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {attack["name"]: attack for attack in record["clients"]["you"]}


class Said(Observer):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said = ""

    def show_step(self, what: str, detail: str) -> None:
        self.said += f"{what} {detail}\n"


def test_an_owner_learns_what_would_be_told_and_nobody_reads_the_documents(tmp_path: Path) -> None:
    texts = random_texts(48)
    folder = write_texts(tmp_path / "texts", texts)
    recipe = make_recipe(data={"max_length": 44, "documents_per_client": 48}, **LEAKY)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe), encoding="utf-8")
    told = Said()
    lines = list(audit_to(tmp_path / "out", str(tmp_path / "recipe.toml"), (), folder, None, {}, told))
    record = json.loads((tmp_path / "out" / "audit.json").read_text())
    page = (tmp_path / "out" / "audit.html").read_text()
    attacks = attacks_of(record)

    assert attacks["alignment"]["word"] == YES
    assert attacks["alignment"]["found"]["auc"] >= 0.95
    assert lines[0].startswith("told apart    yes: AUC ")
    assert lines[-2].startswith("verdict       whoever sees the updates can tell which documents are in: ask for")
    assert lines[-1].endswith("audit.html")
    assert list(attacks) == list(WORDS)

    for words in WORDS.values():
        assert words.question in page
    assert "What it means" in page
    assert "What it does not mean" in page
    assert not re.search(r"<script|<link|src=|url\(|http", page), "nothing of it is loaded from anywhere"
    everything = json.dumps(record) + page + told.said + "\n".join(lines)
    for text in texts:
        assert text[:12] not in everything
        assert text[-12:] not in everything
    assert str(tmp_path / "texts") not in everything


@pytest.mark.long
def test_with_a_bound_it_stands_beside_each_attack(tmp_path: Path) -> None:
    record = rehearsed(tmp_path, 24, privacy=PRIVATE, **LEAKY)
    attacks = attacks_of(record)
    assert record["privacy"]["epsilon"] <= 1
    for name in ("alignment", "loss"):
        assert attacks[name]["bound"]["auc"] < 0.8
        assert attacks[name]["word"] != YES
    assert 0 < attacks["canaries"]["bound"]["remembered_of_once"] < 0.2
    lines = describe_audit(record)
    assert any(line.startswith("bound         ε = ") for line in lines)
    assert "at most" in lines[0]
    page = to_html(build_page(record), {})
    assert "At most, by any attack" in page
    assert f"{attacks['loss']['bound']['auc']:.3f}" in page


@pytest.mark.long  # a second rehearsal
def test_an_owner_who_wants_more_noise_audits_with_it(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", random_texts(16))
    recipe = make_recipe(data={"max_length": 44, "documents_per_client": None}, privacy=PRIVATE)
    told = {}
    for least in (0.1, 50.0):
        policy = Policy.model_validate({"privacy": {"min_noise_multiplier": least}})
        told[least] = rehearse(recipe, folder, policy, Observer(), KEY)["privacy"]
    assert told[0.1]["noise_multiplier"] < 50.0 == told[50.0]["noise_multiplier"]
    assert told[50.0]["epsilon"] < told[0.1]["epsilon"]


def test_noise_of_the_seed_is_never_called_private(tmp_path: Path) -> None:
    record = rehearsed(tmp_path, privacy={**PRIVATE, "noise": "seed"})
    assert NOT_PRIVATE in html.unescape(to_html(build_page(record), {}))
    assert any(NOT_PRIVATE in line for line in describe_audit(record))


@pytest.mark.parametrize("allowed", ["tokenizer", "server"])
def test_an_owner_is_told_that_join_would_refuse_the_recipe_that_is_audited(allowed: str, tmp_path: Path) -> None:
    """It said that documents are read as by `fedloom join`, which reads none of such a recipe."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    recipe = make_recipe(data={"prompt": "{prompt}", "completion": "{completion}", "chat_template": "{{ messages }}"})
    told = Said()
    with pytest.raises((DataError, RecipeError)):  # too few documents, after all that is said before
        rehearse(recipe, tmp_path / "rows.jsonl", Policy(chat_template=allowed), told, KEY, Path("mine.toml"))
    refused = "fedloom join would not train by this recipe: the policy allows no chat template but the tokenizer's"
    mend = 'change chat_template (to the template itself, or to "server" for any of a recipe without [privacy]) in mine'
    assert (refused in told.said) == (mend in told.said) == (allowed == "tokenizer")
    assert ("read as fedloom join would if the policy allowed it\n" in told.said) == (allowed == "tokenizer")


@pytest.mark.long  # two rehearsals
def test_the_same_key_gives_the_same_audit_and_another_key_other_halves(tmp_path: Path) -> None:
    one, same = (rehearsed(tmp_path, privacy=PRIVATE) for _ in range(2))
    assert one["clients"] == same["clients"]
    documents = [Document(text, "") for text in random_texts(20)]
    assert halve(documents, KEY) != halve(documents, b"other")


def test_all_of_an_author_fall_on_one_side() -> None:
    documents = [Document(text, "", unit=f"a{n % 7}") for n, text in enumerate(random_texts(20))]
    for key in (b"a", b"b", b"c", b"d"):
        sides = [{document.unit for document in half} for half in halve(documents, key)]
        assert all(sides)
        assert not sides[0] & sides[1]


@pytest.mark.long  # two rehearsals
def test_a_recipe_that_protects_authors_is_audited_by_authors(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text, "author": f"a{n % 12}"}) for n, text in enumerate(random_texts(36))]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    recipe = make_recipe(data={"max_length": 44, "documents_per_client": None}, privacy={**PRIVATE, "unit": "author"})
    record = rehearse(recipe, tmp_path / "rows.jsonl", Policy(), Observer(), KEY)
    assert record["privacy"]["unit"] == "author"
    assert (record["members"], record["others"]) == (18, 18)
    found = attacks_of(record)["alignment"]["found"]
    assert (found["members"], found["others"]) == (6, 6), "one text of each: what one wrote hangs together"
    page = html.unescape(to_html(build_page(record), {}))
    assert "for all documents of one author together" in page
    assert "Of one author" in page
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**json.loads(row), "author": "ann"}) for row in rows))
    with pytest.raises(DataError, match='1 value of "author", of which half is left out'):
        rehearse(recipe, tmp_path / "rows.jsonl", Policy(min_documents=1), Observer(), KEY)


def test_copies_of_a_document_fall_on_one_side() -> None:
    documents = [Document(text, "") for text in [*random_texts(10), *["one  text"] * 5, "one text"]]
    for key in (b"a", b"b", b"c", b"d"):
        members, others = halve(documents, key)
        assert len(members) + len(others) == 16
        assert {document.text for document in members}.isdisjoint({document.text for document in others})
        assert sum("one" in document.text and " " in document.text for document in members) in (0, 6)


@pytest.mark.parametrize(
    "sections",
    first(
        [
            {"federation": {"rounds": 2, "lora_rule": "fedsa"}},
            {"federation": {"rounds": 2, "lora_rule": "ffa"}},
            {"federation": {"rounds": 2, "lora_rule": "rolora"}},
            {"federation": {"rounds": 2, "lora_rule": "fedex"}},
            {"adapter": {"method": "full", "rank": None, "alpha": None}},
            {"adapter": {"method": "ia3", "rank": None, "alpha": None}},
            {"adapter": {"dora": True}},
            {"data": {"max_length": 44, "documents_per_client": 16, "window": "pack"}},
            {"data": {"max_length": 16, "documents_per_client": 16, "window": "blocks"}},
            {"training": {"optimizer": "sgd", "learning_rate": 0.1, "engine": "reference", "optimizer_state": "keep"}},
            {"training": {"proximal_mu": 0.1, "proximal_schedule": "adaptive", "batch_size": 4}},
            {"model": {"source": "random:tiny-gpt2"}},
        ]
    ),
)
def test_whatever_a_recipe_trains_is_attacked(sections: dict[str, Any], tmp_path: Path) -> None:
    record = rehearsed(tmp_path, **sections)
    attacks = attacks_of(record)
    assert attacks["alignment"]["word"] != NOT_TRIED
    assert attacks["loss"]["word"] != NOT_TRIED
    for attack in attacks.values():
        assert (attack["word"] == NOT_TRIED) == ("why" in attack)
    assert len(describe_audit(record)) == len(WORDS) + 1
    assert build_page(record).sections


def test_a_document_of_several_blocks_counts_once(tmp_path: Path) -> None:
    """Its blocks tell of each other, so they would make few documents look like many."""
    window = {"max_length": 12, "documents_per_client": 16, "window": "blocks"}
    attacks = attacks_of(rehearsed(tmp_path, data=window, federation={"rounds": 1}))
    for name in ("alignment", "loss"):
        assert (attacks[name]["found"]["members"], attacks[name]["found"]["others"]) == (8, 8)


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at least 8 that differ are needed.*documents_per_client"):
        rehearsed(tmp_path, 7, data={"max_length": 44, "documents_per_client": 7, "client_holdout": 0.0})


def test_a_bound_that_so_few_documents_can_t_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one over the 8 documents"):
        rehearsed(tmp_path, privacy={"epsilon": 1.0, "delta": 0.2})


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["fedloom", "audit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--data: a rehearsal needs documents" in refusal(["tiny"], monkeypatch, capsys)
    assert "no such file or folder" in refusal(["tiny", "--data", str(tmp_path / "none")], monkeypatch, capsys)
    assert "not a run directory" in refusal([str(tmp_path)], monkeypatch, capsys)
    assert "a finished run has its own" in refusal([str(tmp_path), "--data", str(tmp_path)], monkeypatch, capsys)


def test_a_verdict_says_no_only_where_every_attack_does() -> None:
    def record(*words: str) -> dict[str, Any]:
        return {"clients": {"you": [{"name": name, "word": word} for name, word in zip(WORDS, words, strict=True)]}}

    assert "nothing bounds what others find" in give_verdict(record("no", "no", "no", "not tried", "no"))
    assert "too few documents to say" in give_verdict(record("no", "no", "no", "no", "too few documents to say"))
    assert "(repeated)" in give_verdict(record("no", "no", "no", "no", "yes"))
    assert "which documents are in" in give_verdict(record("no", "yes", "no", "no", "no"))
