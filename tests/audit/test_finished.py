"""`fedloom audit RUN`: what a finished run's kept adapters tell, client by client, and what can't be known from it."""

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.random_texts import random_texts, write_texts
from support.tiny import make_recipe

from fedloom.audit.command import audit_to
from fedloom.audit.finished import audit_run, kept_adapters
from fedloom.audit.statistics import NO, NOT_TRIED, TOO_FEW, YES
from fedloom.errors import RunError
from fedloom.experiment.run import run
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import read_run
from fedloom.report.audit_page import NOBODY_CAN_TELL, build_page, give_verdict
from fedloom.report.document import to_html


def recipe_on(folder: Path, **sections: Any) -> Recipe:
    """A recipe of two clients with 20 documents each to train on, on random texts that all learn by heart."""
    return make_recipe(
        **{
            "adapter": {"rank": 8, "alpha": 16, "targets": "all-linear"},
            "data": {
                "source": str(folder), "max_length": 44, "clients": 2, "documents_per_client": 24,
                "client_holdout": 0.17, "central_holdout": 20,
            },
            "training": {"batch_size": 4, "learning_rate": 3e-3, "epochs": 2},
            "federation": {"rounds": 3, "keep_every": 1},
            **sections,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    texts = write_texts(folder / "texts", random_texts(80))
    run(recipe_on(texts), folder / "run", Observer())
    return folder / "run"


def test_each_clients_documents_are_told_from_others_by_what_is_kept(finished: Path) -> None:
    lines = list(audit_to(None, str(finished), (), None, None, {}, Observer()))
    record = json.loads((finished / "audit.json").read_text())
    assert record["adapters"] == [0, 1, 2, 3]
    assert set(record["clients"]) == {"0", "1", "all together"}
    recorded = dict(zip("01", read_run(finished).plan["clients"], strict=True))
    for client in "01":
        attacks = {attack["name"]: attack for attack in record["clients"][client]}
        assert attacks["alignment"]["word"] == YES
        held = recorded[client]
        assert attacks["alignment"]["found"]["members"] == held["train_documents"]
        assert attacks["alignment"]["found"]["others"] == held["holdout_documents"] + 20
    canaries, _ = record["clients"]["all together"]
    assert (canaries["name"], canaries["word"]) == ("canaries", NOT_TRIED)
    assert sum(line.startswith("told apart    client ") for line in lines) == 2
    page = html.unescape((finished / "audit.html").read_text())
    assert NOBODY_CAN_TELL["run"][0].partition(",")[0] in page
    for text in random_texts(80):
        assert text[:12] not in page + json.dumps(record) + "\n".join(lines)


@pytest.mark.long  # a rehearsal with one repeats it
def test_a_run_with_a_bound_has_it_beside_the_attacks(finished: Path, tmp_path: Path) -> None:
    recipe = recipe_on(finished.parent / "texts", privacy={"epsilon": 1.0, "delta": 1e-3})
    run(recipe, tmp_path / "run", Observer())
    record = audit_run(tmp_path / "run", Observer())
    assert record["privacy"]["epsilon"] <= 1
    for client in "01":
        assert all(attack["bound"]["auc"] < 0.8 for attack in record["clients"][client][:2])
        assert all(attack["word"] != YES for attack in record["clients"][client])


def test_the_best_and_the_last_adapter_are_one_where_they_are_the_same(finished: Path) -> None:
    kept = kept_adapters(read_run(finished))
    assert [round for round, _ in kept] == [0, 1, 2, 3]


def test_the_clients_with_the_most_documents_are_looked_at(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.audit.finished.MOST_CLIENTS", 1)
    record = audit_run(finished, Observer())
    most = max((0, 1), key=lambda client: read_run(finished).plan["clients"][client]["train_documents"])
    assert list(record["clients"]) == [str(most), "all together"]
    assert record["clients_left_out"] == 1


def test_without_adapters_of_rounds_the_best_and_the_last_are_what_is_kept(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for folder in (tmp_path / "run" / "adapters").glob("round-*"):
        shutil.rmtree(folder)
    run = read_run(tmp_path / "run")
    assert [round for round, _ in kept_adapters(run)] == sorted({0, run.best_round, 3})


def test_a_run_whose_adapters_are_gone_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for folder in (tmp_path / "run" / "adapters").iterdir():
        if folder.name != "initial":
            shutil.rmtree(folder)
    with pytest.raises(RunError, match="kept no adapter that was trained"):
        audit_run(tmp_path / "run", Observer())
    shutil.rmtree(tmp_path / "run" / "adapters")
    with pytest.raises(RunError, match="kept no adapter that was trained"):
        audit_run(tmp_path / "run", Observer())


@pytest.mark.parametrize("round", range(4))
def test_an_adapter_that_was_changed_is_not_audited_as_the_runs(round: int, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    place = dict(kept_adapters(read_run(tmp_path / "run")))[round]
    shutil.copy(finished / "adapters" / f"round-{2 if round == 1 else 1}" / "adapter_model.safetensors", place)
    with pytest.raises(RunError, match=rf"{place.name}: another adapter than the one on record"):
        audit_run(tmp_path / "run", Observer())


@pytest.mark.long
def test_a_run_on_other_documents_is_refused(finished: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", random_texts(80))
    run(recipe_on(texts, federation={"rounds": 1}), tmp_path / "run", Observer())
    (texts / "0003.txt").write_text("another text, of about the same length", encoding="utf-8")
    with pytest.raises(RunError, match=r"documents of this run are not those .* each owner audits the recipe"):
        audit_run(tmp_path / "run", Observer())


@pytest.mark.parametrize("window", ["blocks", "pack"])
def test_a_document_of_several_blocks_or_of_a_part_of_one_counts_once(window: str, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", random_texts(50, length=20))
    data = {
        "source": str(texts), "max_length": 14 if window == "blocks" else 44, "window": window,
        "clients": 2, "documents_per_client": 15, "client_holdout": 0.4, "central_holdout": 20,
    }  # fmt: skip
    run(recipe_on(texts, data=data, federation={"rounds": 1}), tmp_path / "run", Observer())
    record, plan = audit_run(tmp_path / "run", Observer()), read_run(tmp_path / "run").plan
    for client in "01":
        found, held = record["clients"][client][0]["found"], plan["clients"][int(client)]
        assert (found["members"], found["others"]) == (held["train_documents"], held["holdout_documents"] + 20)


def test_a_run_with_too_few_documents_is_refused(tmp_path: Path) -> None:
    run(make_recipe(data={"documents_per_client": 3}, federation={"rounds": 1}), tmp_path / "run", Observer())
    with pytest.raises(RunError, match="no client has 4 documents"):
        audit_run(tmp_path / "run", Observer())


def clients_protected(noise: str, word: str) -> dict[str, Any]:
    """An audit's record of a run that protects whole clients, whose one attack says a word."""
    found = {
        "auc": 0.9, "auc_low": 0.8, "auc_high": 1.0, "recognised": 0.5, "false_alarms": 0.0, "members": 4, "others": 4,
    }  # fmt: skip
    return {
        "kind": "run", "recipe": "clients", "model": "random", "method": "lora", "rounds": 2, "seconds": 1.0,
        "fedloom": "0", "finished": "now", "privacy": None,
        "of_clients": {"epsilon": 8.0, "delta": 1e-4, "noise": noise},
        "clients": {"0": [{"name": "alignment", "word": word, "found": found, "bound": {}}]},
    }  # fmt: skip


def test_a_run_that_protects_whole_clients_is_not_told_to_have_no_privacy_section() -> None:
    page = to_html(build_page(clients_protected("secret", YES)), {})
    assert "the recipe has no [privacy]" not in page
    assert "ε = 8, δ = 0.0001 for each client as a whole" in page
    assert "a smaller privacy.epsilon makes that less" in give_verdict(clients_protected("secret", YES))
    assert "ask for [privacy]" in give_verdict(clients_protected("seed", YES))
    assert "NOT PRIVATE" in to_html(build_page(clients_protected("seed", YES)), {})


def test_too_few_documents_are_not_called_nothing_found() -> None:
    """With a bound, too: who reads "nothing" thinks of an attack that could have found something."""
    few = {**clients_protected("secret", TOO_FEW), "privacy": {"noise": "secret"}}
    assert give_verdict(few) == (
        "too few documents to say that nothing is told; what no attack can exceed is the bound"
    )
    assert give_verdict({**few, "clients": clients_protected("secret", NO)["clients"]}).startswith(
        "these attacks found"
    )


@pytest.mark.long
def test_what_was_promised_of_clients_is_on_the_record_of_a_runs_audit(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", random_texts(80))
    recipe = recipe_on(
        texts,
        data={
            "source": str(texts), "max_length": 44, "clients": 2, "documents_per_client": 24, "client_holdout": 0.0,
            "central_holdout": 20,
        },
        federation={"rounds": 2, "keep_every": 1, "strategy": {"weight_by": "equal"}},
        privacy={"unit": "client", "epsilon": 8.0, "delta": 0.1},
    )  # fmt: skip
    run(recipe, tmp_path / "run", Observer())
    told = audit_run(tmp_path / "run", Observer())["of_clients"]
    assert (told["delta"], told["noise"]) == (0.1, "secret")
    assert told["epsilon"] == pytest.approx(read_run(tmp_path / "run").rounds[-1]["epsilon"])
