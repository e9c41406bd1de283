"""A private run on one machine: what is promised is in the plan and on record, and going on spends nothing twice."""

import io
import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import tiny
from support.marks import first
from support.quick_runs import attempt, make_recipe

from fedloom.errors import DataError, FedloomError, RecipeError, RunError
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.central import set_run_terms
from fedloom.experiment.preparation import gather, prepare
from fedloom.experiment.private import SECRET, Rations, open_rations, set_client_terms
from fedloom.experiment.run import plan, run
from fedloom.experiment.sweep import sweep
from fedloom.monitoring.display import render_plan
from fedloom.monitoring.observer import Observer
from fedloom.privacy.accounting import epsilon
from fedloom.privacy.noise import derive_key
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.plan import explain_audit
from fedloom.records.privacy import NO_BOUND, NOT_PRIVATE, explain_privacy, list_promises
from fedloom.records.run import read_run
from fedloom.report import figures
from fedloom.report.run_report import write_report
from fedloom.training.jobs import ClientTask

PRIVATE = {"epsilon": 8.0, "delta": 1e-3}


def private(folder: Path, **changes: Any) -> Any:
    sections: dict[str, Any] = {"privacy": PRIVATE, "federation": {"rounds": 3}, **changes}
    return make_recipe(folder, **sections)


def test_a_plan_says_what_is_promised(tmp_path: Path) -> None:
    recipe = private(tmp_path)
    told = plan(recipe).privacy
    assert (told["unit"], told["delta"], told["noise"]) == ("document", 1e-3, "secret")
    for client in told["clients"].values():
        spent = epsilon(client["rate"], client["noise_multiplier"], 3 * client["steps"], 1e-3)
        assert client["epsilon"] == spent <= 8
        assert client["rate"] == min(1, recipe.training.batch_size / client["units"])
    given = plan(private(tmp_path, privacy={"noise_multiplier": 5.0, "delta": 1e-3})).privacy
    assert all(client["noise_multiplier"] == 5.0 for client in given["clients"].values())
    assert given["noise_over_signal"] > told["noise_over_signal"]


def test_what_was_spent_is_on_record_and_no_loss_of_a_client_is(tmp_path: Path) -> None:
    finished = run(private(tmp_path), tmp_path / "run", Observer())
    worst = max(told["epsilon"] for told in finished.plan["privacy"]["clients"].values())
    spent = [record["epsilon"] for record in finished.rounds]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(worst)
    for record in finished.rounds:
        assert record["client_losses"] == {}
        assert "train_loss" not in record
    for report in finished.clients:
        assert not [key for key in report if "loss" in key and key != "proximal_loss"]
        assert report["tokens"] == 0
    assert not (tmp_path / "run" / SECRET).exists(), "removed once the run is done"
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"have spent ε = {spent[-1]:.3g}" in text
    assert "Not promised" in text
    assert NOT_PRIVATE not in text
    assert "ε = " in (tmp_path / "run" / "adapters" / "best" / "README.md").read_text()


def test_a_run_without_a_bound_says_so(tmp_path: Path) -> None:
    finished = run(make_recipe(tmp_path), tmp_path / "run", Observer())
    sentence = NO_BOUND.partition(" (")[0]
    assert sentence in (finished.folder / "report.md").read_text()
    assert sentence in (finished.folder / "adapters" / "best" / "README.md").read_text()


def test_noise_of_the_seed_is_never_called_private(tmp_path: Path) -> None:
    finished = run(private(tmp_path, privacy={**PRIVATE, "noise": "seed"}), tmp_path / "run", Observer())
    for file in ("report.md", "adapters/best/README.md"):
        assert NOT_PRIVATE in (finished.folder / file).read_text()
    again = run(private(tmp_path, privacy={**PRIVATE, "noise": "seed"}), tmp_path / "again", Observer())
    assert finished.rounds[-1]["adapter_sha256"] == again.rounds[-1]["adapter_sha256"]


@pytest.mark.long
def test_two_private_runs_have_other_noise(tmp_path: Path) -> None:
    shas = {run(private(tmp_path), tmp_path / name, Observer()).rounds[-1]["adapter_sha256"] for name in "ab"}
    assert len(shas) == 2


@pytest.mark.parametrize("where", first(["training.stepped", "record.client", "state.renamed"], every=2))
def test_a_run_that_goes_on_ends_where_it_would_have(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, secret = private(tmp_path), b"s" * 32
    monkeypatch.setattr("fedloom.experiment.private.os.urandom", lambda size: secret)
    whole = run(recipe, tmp_path / "whole", Observer())
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "parts", f"{where}=raise@3")
    assert (tmp_path / "parts" / SECRET).read_bytes() == secret
    assert stat.S_IMODE((tmp_path / "parts" / SECRET).stat().st_mode) == 0o600
    monkeypatch.undo()
    assert not attempt(recipe, tmp_path / "parts")
    found = read_run(tmp_path / "parts").rounds
    for name in ("adapter_sha256", "epsilon"):
        assert [record[name] for record in found] == [record[name] for record in whole.rounds]  # type: ignore[literal-required]


@pytest.mark.long
def test_engines_agree_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The engine is among the facts of a task: two that round differently must not answer with the same noise.
    monkeypatch.setattr("fedloom.experiment.private.derive_key", lambda secret, *facts: derive_key(secret, *facts[:2]))
    found = []
    for engine in ("reference", "batched"):
        recipe = private(
            tmp_path,
            privacy={**PRIVATE, "noise": "seed"},
            model={"dtype": "float64"},
            adapter={"dropout": 0.0},
            training={"engine": engine},
        )
        found.append(run(recipe, tmp_path / engine, Observer()).rounds[-1]["central_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_a_task_has_a_key_of_its_own(tmp_path: Path) -> None:
    recipe = private(tmp_path)
    prepared = prepare(recipe, Observer())
    rations = open_rations(recipe, prepared.clients, tmp_path)
    assert rations is not None
    start = load_adapted_model(recipe, prepared.source).read()
    task = ClientTask(round=1, client=0, adapter=start, training=recipe.training, rounds=3, seed=recipe.seed)
    other_start = type(start)(start.layout, start.weights_P + 1e-6)
    others = [
        {"round": 2}, {"client": 1}, {"adapter": other_start}, {"trial": 1}, {"seed": 99},
        {"training": recipe.training.model_copy(update={"proximal_mu": 0.5})},
    ]  # fmt: skip
    keys = [rations(task).key, *(rations(ClientTask(**{**vars(task), **other})).key for other in others)]
    assert len(set(keys)) == len(keys)
    assert rations(task).key == keys[0]
    # Other documents, and another secret.
    swapped = (prepared.clients[1], prepared.clients[0], *prepared.clients[2:])
    assert Rations(recipe, swapped, (tmp_path / SECRET).read_bytes())(task).key != keys[0]
    assert Rations(recipe, prepared.clients, bytes(32))(task).key != keys[0]


def test_a_damaged_secret_is_refused(tmp_path: Path) -> None:
    recipe = private(tmp_path)
    prepared = prepare(recipe, Observer())
    (tmp_path / SECRET).write_bytes(b"short")
    with pytest.raises(RunError, match="secret of a private run is damaged"):
        open_rations(recipe, prepared.clients, tmp_path)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training": {"max_gradient_norm": 1.0}}, "training.max_gradient_norm"),
        ({"data": {"window": "pack"}}, "data.window"),
        ({"data": {"pad_in_loss": True}}, "data.pad_in_loss"),
        ({"data": {"central_holdout": 0}}, "data.central_holdout"),
        ({"baselines": ["local"]}, "baselines"),
        ({"contributions": True}, "contributions"),
        ({"personalise": {"epochs": 1}}, "personalise"),
        ({"federation": {"strategy": {"kind": "fedavg", "weight_by": "tokens"}}}, "federation.strategy.weight_by"),
        ({"privacy": {"delta": 1e-3}}, "privacy"),
        ({"privacy": {**PRIVATE, "noise_multiplier": 1.0}}, "privacy"),
        ({"privacy": {"epsilon": 1.0}}, "privacy.delta"),
        ({"privacy": {"epsilon": 0.0, "delta": 1e-3}}, "privacy.epsilon"),
        ({"privacy": {**PRIVATE, "max_norm": 0.0}}, "privacy.max_norm"),
        ({"privacy": {**PRIVATE, "delta": 1.0}}, "privacy.delta"),
    ],
    ids=str,
)
def test_what_would_break_the_promise_is_refused(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises((FedloomError, ValueError)) as caught:
        private(tmp_path, **changes)
    assert key.rpartition(".")[2] in str(caught.value)


def test_a_delta_that_gives_a_document_away_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"privacy\.delta: 0\.5 is more than one over the \d+ documents"):
        plan(private(tmp_path, privacy={"epsilon": 1.0, "delta": 0.5}))


@pytest.mark.long
def test_a_sweep_of_private_runs_keeps_their_secrets_apart(tmp_path: Path) -> None:
    recipe = tmp_path / "private.toml"
    recipe.write_text(recipe_to_toml(private(tmp_path)))
    sweep(str(recipe), ["privacy.epsilon=8.0,4.0"], tmp_path / "sweep", display=Observer())
    runs = [read_run(folder.parent) for folder in sorted((tmp_path / "sweep").glob("*/plan.json"))]
    assert len(runs) == 2
    noise = {one.plan["privacy"]["clients"]["0"]["noise_multiplier"] for one in runs}
    assert len(noise) == 2
    assert not [*(tmp_path / "sweep").glob(f"*/{SECRET}")]


@pytest.mark.long
def test_a_report_of_an_interrupted_run_says_what_was_spent(tmp_path: Path) -> None:
    assert not attempt(private(tmp_path), tmp_path / "run")
    rounds = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[:2]
    (tmp_path / "run" / "rounds.jsonl").write_text("\n".join(rounds) + "\n")
    write_report(tmp_path / "run")
    assert f"have spent ε = {json.loads(rounds[-1])['epsilon']:.3g}" in (tmp_path / "run" / "report.md").read_text()


def write_authors(folder: Path, authors: int = 12, each: int = 5) -> Path:
    """Documents by authors, as many of each, in an order that mixes them."""
    rows = [
        {"text": f"{author} {number} " + f"word{author * 31 + number} " * 9, "author": f"author {author}"}
        for number in range(each)
        for author in range(authors)
    ]
    path = folder / "authors.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_author(folder: Path, **changes: Any) -> Any:
    """A private recipe whose clients have whole authors."""
    data = {
        "source": str(write_authors(folder)),
        "partition": {"kind": "natural", "by": "author"},
        "duplicates": "report",  # texts so alike are copies to the audit
        "client_holdout": 0.3,
        **changes.pop("data", {}),
    }
    return private(folder, data=data, **{"privacy": {**PRIVATE, "unit": "author", "noise": "seed"}, **changes})


def authors_of(documents: Any) -> set[str]:
    return {document.unit for document in documents}


def test_all_of_an_author_are_one_unit_of_a_run(tmp_path: Path) -> None:
    recipe = by_author(tmp_path)
    material = gather(recipe, Observer())
    told = plan(recipe).privacy
    assert told["unit"] == "author"
    for number, documents in enumerate(material.splits.clients):
        assert authors_of(documents.holdout)
        assert not authors_of(documents.train) & authors_of(documents.holdout), "an author is on one side"
        client = told["clients"][str(number)]
        assert client["units"] == len(authors_of(documents.train)) < len(documents.train)
        assert client["rate"] == min(1, recipe.training.batch_size / client["units"])
        assert client["steps"] == -(-client["units"] // recipe.training.batch_size)
        spent = epsilon(client["rate"], client["noise_multiplier"], 3 * client["steps"], 1e-3)
        assert client["epsilon"] == spent
    finished = run(recipe, tmp_path / "run", Observer())
    for report in finished.clients:
        client = told["clients"][str(report["client"])]
        assert (report["examples"], report["steps"]) == (client["units"], client["steps"])
    text = (tmp_path / "run" / "report.md").read_text()
    assert "all documents of any one author together" in text
    assert "one person's texts under two values of author" in text
    assert "Values of author" in text
    assert "any one document" not in text
    card = (tmp_path / "run" / "adapters" / "best" / "README.md").read_text()
    assert "for all documents of one author together" in card


@pytest.mark.long
def test_a_sweep_reads_the_documents_anew_for_another_unit(tmp_path: Path) -> None:
    recipe = tmp_path / "private.toml"
    recipe.write_text(recipe_to_toml(by_author(tmp_path, federation={"rounds": 1})))
    sweep(str(recipe), ["privacy.unit=document,author"], tmp_path / "sweep", display=Observer())
    told = [json.loads(path.read_text())["privacy"] for path in (tmp_path / "sweep").glob("*/plan.json")]
    units = {one["unit"]: one["clients"]["0"]["units"] for one in told}
    assert units["document"] > 2 * units["author"] > 0


@pytest.mark.long
def test_engines_agree_on_a_run_by_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.experiment.private.derive_key", lambda secret, *facts: derive_key(secret, *facts[:2]))
    found = []
    for engine in ("reference", "batched"):
        recipe = by_author(tmp_path, model={"dtype": "float64"}, adapter={"dropout": 0.0}, training={"engine": engine})
        found.append(run(recipe, tmp_path / engine, Observer()).rounds[-1]["central_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("value", [None, "", " \n"], ids=repr)
def test_a_row_of_nobody_is_refused(value: str | None, tmp_path: Path) -> None:
    recipe = by_author(tmp_path, data={"partition": {"kind": "iid"}})
    row = json.dumps({"text": "words of somebody", "author": value})
    path = Path(recipe.data.source)
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(DataError, match=r"authors\.jsonl:61: without a value in column author") as caught:
        plan(recipe)
    assert "somebody" not in str(caught.value)


def test_a_unit_of_no_column_is_refused(tmp_path: Path) -> None:
    recipe = by_author(tmp_path, privacy={**PRIVATE, "unit": "writer"})
    with pytest.raises(DataError, match="without a value in column writer"):
        plan(recipe)
    table = tmp_path / "authors.csv"
    table.write_text("text,author\nsome words,ann\n")
    with pytest.raises(DataError, match=r'no column "writer", which privacy\.unit names'):
        plan(by_author(tmp_path, privacy={**PRIVATE, "unit": "writer"}, data={"source": str(table)}))


@pytest.mark.parametrize(
    ("column", "data"), [("text", {}), ("question", {"prompt": "{question}", "completion": "{answer}"})]
)
def test_a_column_that_texts_are_made_of_is_no_unit(column: str, data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="how many units a client has, which is told, would say how many of them"):
        by_author(tmp_path, privacy={**PRIVATE, "unit": column}, data=data)


@pytest.mark.long
def test_a_document_of_several_blocks_is_one_unit(tmp_path: Path) -> None:
    recipe = private(tmp_path, data={"window": "blocks"})
    clients = prepare(recipe, Observer()).clients
    told = plan(recipe).privacy["clients"]
    for number, held in enumerate(clients):
        assert len(held.train) > held.train.num_units == told[str(number)]["units"]
    spent = run(recipe, tmp_path / "run", Observer()).clients
    assert all(report["examples"] == told[str(report["client"])]["units"] for report in spent)


@pytest.mark.long
def test_copies_at_a_client_are_left_out_or_told(tmp_path: Path) -> None:
    plan_of = {}
    for duplicates in ("drop", "report"):
        recipe = private(tmp_path, data={"duplicates": duplicates, "clients": 1, "client_holdout": 0.0})
        path = Path(recipe.data.source)
        rows = path.read_text().splitlines()[:30]
        path.write_text("\n".join([*rows, *rows[:3], *rows[:3]]) + "\n")
        plan_of[duplicates] = plan(recipe)
    dropped, kept = (plan_of[name].privacy for name in ("drop", "report"))
    assert dropped["copies"] == 1
    assert dropped["repeated"] > 0
    assert (kept["copies"], kept["repeated"]) == (3, 0)
    assert kept["clients"]["0"]["units"] - dropped["clients"]["0"]["units"] >= dropped["repeated"]
    told = kept["clients"]["0"]["epsilon"]
    assert f"3 documents of a client have the same text, for which ε is {3 * told:.3g}" in explain_privacy(kept)
    assert "same text" not in explain_privacy(dropped)
    assert f"{dropped['repeated']} document" in explain_privacy(dropped)
    assert any(f"ε is {3 * told:.3g} and δ 1" in line for line in list_promises(kept, None))


@pytest.mark.long
def test_a_plan_says_what_hold_outs_lost(tmp_path: Path) -> None:
    recipe = private(tmp_path, data={"near_duplicate": 0.5, "client_holdout": 0.4})
    path = Path(recipe.data.source)
    rows = path.read_text().splitlines()
    near = [json.dumps({"text": f"{json.loads(row)['text']} more"}) for row in rows]
    path.write_text("\n".join([*rows, *near]) + "\n")
    told, plain = plan(recipe), plan(recipe.model_copy(update={"privacy": None}))
    assert f"{sum(told.audit.given_up)} taken out of hold-outs" in explain_audit(told)
    assert sum(told.audit.given_up) > 0 == sum(plain.audit.given_up)
    assert "hold-outs" not in explain_audit(plain)


@pytest.mark.parametrize("units", [7, 15, 17])
def test_the_delta_that_an_error_proposes_is_taken(units: int) -> None:
    """To one digit, one over 15 is 0.07, and that was refused once more."""
    for too_large, told in (
        (tiny.make_recipe(privacy={"epsilon": 1.0, "delta": 0.9}), set_client_terms),
        (
            tiny.make_recipe(
                privacy={"epsilon": 1.0, "delta": 0.9, "unit": "client"},
                data={"client_holdout": 0.0},
                federation={"strategy": {"weight_by": "equal"}},
            ),
            set_run_terms,
        ),
    ):
        with pytest.raises(RecipeError) as refused:
            told(too_large, units)
        proposed = float(refused.value.mend.split()[2].rstrip(","))
        told(set_key(too_large, proposed), units)


def set_key(recipe: Any, delta: float) -> Any:
    """The recipe with another δ."""
    return recipe.model_copy(update={"privacy": recipe.privacy.model_copy(update={"delta": delta})})


@pytest.mark.long
def test_tokens_that_no_client_told_are_not_shown_as_none(tmp_path: Path) -> None:
    planned, screen = plan(private(tmp_path)), io.StringIO()
    untold = replace(planned, clients=[replace(client, tokens=0) for client in planned.clients])
    for each in (planned, untold):
        Console(file=screen, width=200).print(render_plan(each))
    first, second = [line for line in screen.getvalue().splitlines() if line.startswith("work")]
    assert re.search(r"and [\d,]+ tokens", first)
    assert "token" not in second
    finished = run(private(tmp_path), tmp_path / "run", Observer())
    assert "tokens/s" not in figures.throughput(untold_tokens(finished.folder), "training")


def untold_tokens(folder: Path) -> Any:
    """A run whose clients told no tokens, as those on other machines do."""
    found = read_run(folder)
    return replace(found, clients=[{**record, "tokens": 0} for record in found.clients])
