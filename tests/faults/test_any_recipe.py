"""Any change to a valid recipe's values loads or is a RecipeError of one line; no other exception."""

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import make_recipe

from fedloom.errors import RecipeError
from fedloom.recipe import loading as loader
from fedloom.recipe.loading import load_recipe, recipe_to_toml, shipped_recipes
from fedloom.recipe.recipe import Recipe

RECIPES = {name: tomllib.loads(text) for name, text in shipped_recipes().items()}
RECIPES["resolved"] = {
    key: value
    for key, value in make_recipe(
        federation={"strategy": {"kind": "fedavgm", "momentum": 0.5}, "early_stop": {"patience": 2}},
        data={"partition": {"kind": "dirichlet", "by": "package", "alpha": 0.5}},
    )
    .model_dump(mode="json", exclude_none=True)
    .items()
    if value is not None
}

SCALARS = st.one_of(
    st.booleans(),
    st.integers(min_value=-(2**63), max_value=2**63 - 1),
    st.floats(),
    st.text(max_size=30),
    st.dates(),
    st.sampled_from(["auto", "", "0", "1e400", "\x00", "../..", "random:tiny-llama", "dirichlet", "krum", "cuda:-1"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def paths_in(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every section and key of a recipe."""
    found = []
    for key, value in values.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths_in(value, (*prefix, key))
    return found


def like(value: object) -> st.SearchStrategy[Any]:
    """Values of the same type, small enough to be allowed now and then; anything at all where there is none."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 300)
    if isinstance(value, float):
        return st.floats(0, 1)
    return st.sampled_from(["a", "adamw", "linear", "report", "blocks", "b c"]) if isinstance(value, str) else VALUES


@st.composite
def changed_recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with one or two of its values altered, replaced, removed, renamed or added to."""
    values = copy.deepcopy(RECIPES[draw(st.sampled_from(sorted(RECIPES)))])
    for _ in range(draw(st.integers(1, 2))):
        paths = paths_in(values)
        if not paths:
            break
        *sections, key = draw(st.sampled_from(paths))
        table = values
        for section in sections:
            table = table[section]
        match draw(st.sampled_from(["alter", "alter", "alter", "replace", "replace", "remove", "rename", "add"])):
            case "alter":
                table[key] = draw(like(table[key]))
            case "replace":
                table[key] = draw(VALUES)
            case "remove":
                del table[key]
            case "rename":
                table[draw(st.text(min_size=1, max_size=12))] = table.pop(key)
            case "add":
                table[draw(st.text(min_size=1, max_size=12))] = draw(VALUES)
    return values


def check(text: str, path: Path) -> bool:
    """Whether a recipe loads; where it does, what is written of it loads to the same."""
    path.write_bytes(text.encode("utf-8"))
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert len(refusal.splitlines()) == 1
        return False
    assert isinstance(recipe, Recipe)
    path.write_bytes(recipe_to_toml(recipe).encode("utf-8"))
    assert load_recipe(path) == recipe
    return True


@pytest.mark.long
@settings(max_examples=400, deadline=None, derandomize=True)
@given(values=changed_recipes())
def test_any_change_of_a_recipe_loads_or_is_a_recipe_error(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(tomlkit.dumps(values), tmp_path_factory.getbasetemp() / "changed.toml")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(shipped_recipes())),
    place=st.floats(0, 1),
    length=st.integers(0, 20),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_any_edit_of_a_recipes_text_loads_or_is_a_recipe_error(
    name: str, place: float, length: int, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = shipped_recipes()[name]
    start = int(place * len(whole))
    check(whole[:start] + text + whole[start + length :], tmp_path_factory.getbasetemp() / "edited.toml")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200))
def test_any_bytes_load_or_are_a_recipe_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_the_recipes_that_are_changed_load(tmp_path: Path) -> None:
    assert all(check(tomlkit.dumps(values), tmp_path / "whole.toml") for values in RECIPES.values())


def test_a_loader_that_lets_an_exception_through_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin that these tests must not let through: it takes any table for a recipe's values."""

    def careless(error: Any, *_: object) -> Exception:
        return error

    monkeypatch.setattr(loader, "_recipe_error", careless)
    with pytest.raises(ValueError, match="validation error"):
        check('name = "a"\n', tmp_path / "careless.toml")
