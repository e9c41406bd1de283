"""Axes of a sweep, from a recipe's own table and typed: what each value is, and what it brings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.errors import RecipeError
from fedloom.recipe.axes import Axis, axes_of, collect_axes, combine, value_of
from fedloom.recipe.loading import load_recipe, shipped_recipes

Write = Callable[[str], Path]

STUDY = """
[sweep]
seed = [1, 2, 3]
training.proximal_mu = [0, 0.1, 1e-5]
training.optimizer = ["adamw", "sgd"]
"federation.early_stop" = [{patience = 1, min_delta = 0.5}, {patience = 5}]
adapter.targets = [["q_proj"], "all-linear"]

[sweep.adapter.method]
lora = {}
vera = { training.learning_rate = 5e-3, adapter.rank = 64 }
prompt_tuning = { adapter.options.num_virtual_tokens = 8, training.learning_rate = 0.1 }
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(table: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(shipped_recipes()["tiny"] + table)
        return path

    return write_file


def test_a_table_has_lists_of_values_and_values_that_bring_keys(write: Write) -> None:
    axes = {axis.key: axis.choices for axis in axes_of(write(STUDY))}
    assert {key: list(choices) for key, choices in axes.items()} == {
        "seed": ["1", "2", "3"],
        "training.proximal_mu": ["0", "0.1", "1e-05"],
        "training.optimizer": ["adamw", "sgd"],
        "federation.early_stop": ['{"patience" = 1, "min_delta" = 0.5}', '{"patience" = 5}'],
        "adapter.targets": ['["q_proj"]', "all-linear"],
        "adapter.method": ["lora", "vera", "prompt_tuning"],
    }
    assert axes["adapter.method"]["lora"] == []
    assert axes["adapter.method"]["vera"] == ["training.learning_rate=0.005", "adapter.rank=64"]
    assert "adapter.options.num_virtual_tokens=8" in axes["adapter.method"]["prompt_tuning"]


def test_a_value_with_its_keys_is_a_recipe(write: Write) -> None:
    path = write(STUDY)
    [axis] = [axis for axis in axes_of(path) if axis.key == "adapter.method"]
    said: list[str] = []
    found = load_recipe(path, combine([(axis, "prompt_tuning")]), say=lambda what, detail: said.append(detail))
    assert found.adapter.options == {"num_virtual_tokens": 8}
    assert found.training.learning_rate == 0.1
    assert not any("learning_rate" in line for line in said), "it has one of its own"


def test_what_is_typed_takes_the_place_of_the_tables_and_comes_on_top(write: Write) -> None:
    axes = collect_axes(write(STUDY), ["seed=7", "training.epochs=1,2"])
    assert next(axis.key for axis in axes) == "seed"
    assert {axis.key: list(axis.choices) for axis in axes if axis.key in ("seed", "training.epochs")} == {
        "seed": ["7"],
        "training.epochs": ["1", "2"],
    }


def test_a_key_that_is_set_twice_is_refused() -> None:
    method = Axis("adapter.method", {"vera": ["training.learning_rate=0.1"]})
    for key in ("training.learning_rate", "training"):
        with pytest.raises(RecipeError, match="is set twice"):
            combine([(method, "vera"), (Axis(key, {"1": ()}), "1")])


def test_a_path_in_the_table_begins_beside_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "ours.jsonl").write_text("{}")
    [axis] = axes_of(write('[sweep]\ndata.source = ["ours.jsonl", "python:stdlib"]'))
    assert list(axis.choices) == [str(tmp_path / "ours.jsonl"), "python:stdlib"]


@pytest.mark.parametrize("text", ["a b", "", " a", "1", "true", "x,y", 'say "a"', "it's", "[x", "ü", "facebook/opt"])
def test_a_text_of_the_table_is_the_same_text_as_an_override(text: str, write: Write) -> None:
    [axis] = axes_of(write(f"[sweep]\ndescription = [{json.dumps(text, ensure_ascii=False)}]"))
    [value] = axis.choices
    assert value_of(value) == text
    assert list(collect_axes(write(""), [f"description={value}"])[0].choices) == [value]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("[sweep]\nseed = 3", "sweep.seed: it is neither a list of values nor a table of them"),
        ("[sweep]\nseed = []", "sweep.seed: it has no value"),
        ("[sweep]\nseed = [1, 1]", "has a value twice"),
        ("[sweep.adapter.method]\nlora = 3", "sweep.adapter.method: it is neither"),
        ("[sweep]\n", "nothing to sweep over"),
    ],
)
def test_a_table_that_can_not_be_read_names_its_key(table: str, says: str, write: Write) -> None:
    with pytest.raises(RecipeError, match=says):
        collect_axes(write(table), [])


def test_one_run_of_a_recipe_with_axes_is_said_to_have_none(write: Write) -> None:
    said: list[str] = []
    assert load_recipe(write(STUDY), say=lambda what, detail: said.append(detail)) == load_recipe("tiny")
    assert said == ["the axes in [sweep] are for `fedloom sweep`: one run has none"]
    with pytest.raises(RecipeError, match="unknown key `sweep`"):
        load_recipe(write(STUDY), ["sweep.seed=1"])
