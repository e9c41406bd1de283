"""A client that has nothing to train on is left out and reported; an error is where too few are left."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.marks import first
from support.tiny import make_recipe

from fedloom import run
from fedloom.errors import DataError, RecipeError
from fedloom.experiment.run import plan
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe

WORDS = "the text of number {} has words of its own such as {}"


def write_clients(path: Path, **texts: list[str]) -> Path:
    rows = [{"text": text, "owner": owner} for owner, held in texts.items() for text in held]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(owner: int, count: int = 12) -> list[str]:
    return [WORDS.format(1000 * owner + number, (owner + 1) * 7919 * (number + 3)) for number in range(count)]


def recipe_of(path: Path, clients: int, **sections: Any) -> Recipe:
    data = {
        "source": str(path),
        "clients": clients,
        "central_holdout": 0,
        "documents_per_client": None,
        "partition": {"kind": "natural", "by": "owner"},
        **sections.pop("data", {}),
    }
    return make_recipe(data=data, federation={"rounds": 1, **sections.pop("federation", {})}, **sections)


USELESS = {
    "texts of a letter": ["x", "y", "z"],
    "one text of a letter": ["x"],
    "one text of blanks and a letter": ["x", " \t", ""],
}


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
@pytest.mark.parametrize("texts", USELESS.values(), ids=USELESS)
def test_the_others_go_on_and_the_run_says_who_was_left_out(texts: list[str], engine: str, tmp_path: Path) -> None:
    path = write_clients(tmp_path / "a.jsonl", a=texts_of(0), b=texts, c=texts_of(1))
    finished = run(recipe_of(path, 3, training={"engine": engine}), tmp_path / "run", Observer())
    assert finished.status["state"] == "done"
    assert [client["steps"] > 0 for client in finished.plan["clients"]] == [True, True, False]
    assert finished.plan["clients_per_round"] == 2
    (why,) = finished.plan["left_out"]
    assert why.startswith("client 2 of 3: ")
    assert "too short" in why
    assert [record["clients"] for record in finished.rounds] == [[], [0, 1]]
    assert all(client["examples"] > 0 for client in finished.clients)
    assert "1 of them left out with nothing to train on" in (finished.folder / "report.html").read_text()


def test_a_client_of_one_document_trains_on_it_and_holds_out_none(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "a.jsonl", a=texts_of(0), b=texts_of(1, count=1))
    planned = plan(recipe_of(path, 2))
    (several, one) = [(client.train_documents, client.holdout_documents) for client in planned.clients]
    assert min(several) > 0
    assert one == (1, 0)
    assert planned.left_out == ()


@pytest.mark.long
def test_a_client_whose_documents_are_all_copies_of_held_out_text_is_left_out(tmp_path: Path) -> None:
    head = "the very same beginning of a text that goes on for long "
    held = [head + text for text in texts_of(0)]
    path = write_clients(tmp_path / "a.jsonl", a=held, b=texts_of(1), c=[head + "and ends here so"])
    planned = plan(recipe_of(path, 3))
    assert sum(client.steps > 0 for client in planned.clients) == 1, (
        "the first client's own texts begin as its held-out ones do, too"
    )
    assert any("equal to held-out text within data.max_length" in why for why in planned.left_out)
    (warning,) = [warning for warning in planned.warnings if "left out" in warning]
    assert warning.startswith("2 clients with nothing to train on left out")


def test_where_all_are_copies_the_key_that_keeps_them_is_named(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "a.jsonl", a=["the same words again and again"] * 12)
    changes = {"data": {"central_holdout": 2, "client_holdout": 0, "partition": {"kind": "iid"}}}
    with pytest.raises(DataError, match=r'dropped as a copy .*, or data.duplicates = "report"$'):
        plan(recipe_of(path, 2, **changes))
    changes["data"]["duplicates"] = "report"
    assert all(client.steps for client in plan(recipe_of(path, 2, **changes)).clients)


def test_where_none_is_left_it_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "a.jsonl", a=["x"] * 4, b=["y"] * 4, c=texts_of(0, count=2))
    with pytest.raises(DataError, match=r"no client has anything to train on: client \d of 2: .*too short"):
        plan(
            recipe_of(
                path,
                2,
                data={"central_holdout": 2, "client_holdout": 0, "partition": {"kind": "iid"}},
                seed=find_seed(path),
            )
        )


def find_seed(path: Path) -> int:
    """A seed with which both long texts are held out centrally."""
    from fedloom.data.documents import load_documents

    for seed in range(1000):
        head = load_documents(recipe_of(path, 2).data, seed).documents[:2]
        if all(len(document.text) > 1 for document in head):
            return seed
    raise AssertionError("no such seed")


def test_where_only_a_client_that_is_left_out_holds_anything_out_it_is_an_error(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "a.jsonl", a=texts_of(0, count=1), b=["x", "y", "long enough"])
    for seed in range(30):
        recipe = recipe_of(path, 2, data={"client_holdout": 0.34}, seed=seed)
        try:
            planned = plan(recipe)
        except DataError as error:
            said = str(error)
            break
        assert len(planned.clients) == 2, "the long text of the second client is trained on"
    assert said.startswith("data.central_holdout, data.client_holdout: nothing is held out")


def test_where_too_few_are_left_for_the_strategy_it_is_an_error(tmp_path: Path) -> None:
    owners = {f"owner{number}": texts_of(number) for number in range(4)}
    path = write_clients(tmp_path / "a.jsonl", **owners, last=["x"])
    krum = {"strategy": {"kind": "krum", "malicious": 1}}
    with pytest.raises(RecipeError, match="needs 5 clients in a round, and 4 take part"):
        plan(recipe_of(path, 5, federation=krum))
