"""Paths in a recipe: beside its file, absolute from then on, so that a run goes on from anywhere."""

import os
from pathlib import Path

import pytest

from fedloom.experiment.run import run
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import load_recipe, recipe_to_toml
from fedloom.records.run import read_run

RECIPE = """
name = "beside"
[model]
source = "{model}"
[adapter]
rank = 2
[data]
source = "{data}"
max_length = 32
clients = 2
client_holdout = 0
central_holdout = 2
[training]
engine = "reference"
[federation]
rounds = 1
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A recipe with its documents beside it."""
    folder = tmp_path / "study"
    (folder / "docs").mkdir(parents=True)
    for number in range(8):
        (folder / "docs" / f"{number}.txt").write_text(f"document {number} " * (3 + number))
    (folder / "recipe.toml").write_text(RECIPE.format(model="random:tiny-opt", data="docs"))
    return folder


def test_a_path_is_found_beside_the_recipe_and_the_run_goes_on_from_another_folder(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "docs").mkdir(parents=True)  # a folder of the same name where the person stands
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load_recipe("../study/recipe.toml")
    assert Path(recipe.data.source) == study / "docs"
    run(recipe, "run", Observer())
    monkeypatch.chdir("/")
    kept = load_recipe(tmp_path / "elsewhere" / "run" / "recipe.toml", ["federation.rounds=2"])
    assert kept.data.source == recipe.data.source
    went_on = load_recipe(tmp_path / "elsewhere" / "run" / "recipe.toml")
    assert run(went_on, tmp_path / "elsewhere" / "run", Observer(), resume=True).status["state"] == "done"


def test_an_overrides_path_starts_in_the_working_folder(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (study.parent / "mine").mkdir()
    monkeypatch.chdir(study.parent)
    assert load_recipe(study / "recipe.toml", ["data.source=mine"]).data.source == str(study.parent / "mine")
    assert load_recipe("tiny", ["data.source=./mine"]).data.source == str(study.parent / "mine")


def test_a_home_folder_becomes_absolute(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(study))
    assert load_recipe("tiny", ["data.source=~/docs"]).data.source == str(study / "docs")
    assert run(load_recipe("~/recipe.toml"), "~/run", Observer()).folder == read_run("~/run").folder == study / "run"


@pytest.mark.parametrize("model", ["gpt2", "random:tiny-opt", "owner/name"])
def test_names_stay_names_beside_files_that_are_called_like_them(model: str, study: Path) -> None:
    (study / model.replace("/", os.sep)).parent.mkdir(exist_ok=True)
    (study / model).write_text("a note")
    (study / "recipe.toml").write_text(RECIPE.format(model=model, data="python:stdlib"))
    recipe = load_recipe(study / "recipe.toml")
    assert (recipe.model.source, recipe.data.source) == (model, "python:stdlib")


def test_an_absolute_recipe_reads_as_itself(study: Path, tmp_path: Path) -> None:
    recipe = load_recipe(study / "recipe.toml")
    (tmp_path / "copy.toml").write_text(recipe_to_toml(recipe))
    assert load_recipe(tmp_path / "copy.toml") == recipe
