"""The JSON Schema that editors check recipes by: it is the code's, takes what ships, and refuses what is wrong."""

import subprocess
import sys
import tomllib
from importlib import resources
from typing import Any

import pytest
from pydantic import BaseModel
from support.json_schema import jsonschema

from fedloom.errors import RecipeError
from fedloom.recipe.loading import load_recipe, shipped_recipes
from fedloom.recipe.methods import METHODS
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.schema import SCHEMA_FILE, recipe_schema, schema_text

SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def with_override(override: str) -> dict[str, Any]:
    """Return the values of `tiny` with one key set to what is written, whatever it is."""
    values = tomllib.loads(shipped_recipes()["tiny"])
    dotted, _, value = override.partition("=")
    *sections, key = dotted.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
    table[key] = tomllib.loads(f"value = {value}")["value"]
    return values


def test_the_schema_that_ships_is_the_codes() -> None:
    shipped = resources.files("fedloom.recipe") / "shipped" / SCHEMA_FILE
    assert shipped.read_text(encoding="utf-8") == schema_text(), (
        f"the schema is out of date: fedloom schema > src/fedloom/recipe/shipped/{SCHEMA_FILE}"
    )


def test_the_command_prints_it_and_no_more() -> None:
    printed = subprocess.run([sys.executable, "-m", "fedloom", "schema"], check=True, capture_output=True, text=True)
    assert printed.stdout == schema_text()
    assert printed.stderr == ""


def test_the_schema_is_one_and_every_terminal_can_print_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert schema_text().isascii()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_names_the_schema_beside_it_and_keeps_to_it(name: str) -> None:
    text = shipped_recipes()[name]
    assert text.startswith(f"#:schema ./{SCHEMA_FILE}\n")
    VALIDATOR.validate(tomllib.loads(text))


def test_every_key_is_explained_and_no_other_is_allowed() -> None:
    def check(schema: dict[str, Any], section: type[BaseModel]) -> None:
        assert schema["additionalProperties"] is False
        beside = ["sweep"] if section is Recipe else []  # no part of a run's recipe
        assert list(schema["properties"]) == [*section.model_fields, *beside]
        for key, field in section.model_fields.items():
            part = schema["properties"][key]
            assert part["description"]
            if field.default is not None and not field.is_required() and field.default_factory is None:
                default = part["default"]
                assert (tuple(default) if isinstance(default, list) else default) == field.default
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(part, field.annotation)

    check(SCHEMA, Recipe)


def test_the_methods_are_those_that_are_not_refused() -> None:
    choices = SCHEMA["properties"]["adapter"]["properties"]["method"]["enum"]
    assert choices == [name for name, method in METHODS.items() if not method.refused]


WRONG = {
    "an unknown key": "sede=3",
    "an unknown section": "trainning.epochs=3",
    "an unknown key of a section": "training.epoch=3",
    "an unknown key of an inline table": 'data.partition={kind = "iid", bye = "a"}',
    "an unknown key of a section that is left out by default": "federation.early_stop={patience = 3, delta = 1}",
    "text for a number": 'training.epochs="3"',
    "a fraction for a count": "federation.rounds=2.5",
    "a number for a switch": "model.dtype=32",
    "a number for yes or no": "adapter.dora=1",
    "yes for a number": "training.batch_size=true",
    "a number below its range": "training.batch_size=0",
    "a number above its range": "data.client_holdout=1.0",
    "a choice that is none": 'federation.strategy={kind = "fedaverage"}',
    "a method that is none": 'adapter.method="lorra"',
    "a method that is refused": 'adapter.method="adalora"',
    "a list without names": "adapter.targets=[]",
    "a list of numbers for names": "adapter.targets=[1]",
    "a word for a list": 'adapter.targets="q_proj"',
    "a rank that is none": "federation.client_ranks=[4, 0, 4]",
    "a name that is no folder's": 'name="a/b"',
    "a table for a value": "seed={value = 3}",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_package_refuses_the_schema_refuses(case: str) -> None:
    assert not VALIDATOR.is_valid(with_override(WRONG[case]))
    with pytest.raises(RecipeError):
        load_recipe("tiny", [WRONG[case]])


@pytest.mark.parametrize("missing", ["name", "model", "data"])
def test_a_section_without_defaults_must_be_there(missing: str) -> None:
    values = tomllib.loads(shipped_recipes()["tiny"])
    del values[missing]
    assert not VALIDATOR.is_valid(values)


RIGHT = (
    'adapter.targets="all-linear"',
    "adapter.options={init_lora_weights = 'gaussian', rank_pattern = {q_proj = 8}}",
    "adapter.alpha=16",
    "training.max_gradient_norm=1",
    'data.partition={kind = "natural", by = "package"}',
    "federation.early_stop={patience = 3}",
    'federation={lora_rule = "svd", client_ranks = [2, 4, 4]}',
    'baselines=["local", "pooled"]',
)


@pytest.mark.parametrize("override", RIGHT)
def test_what_the_package_takes_the_schema_takes(override: str) -> None:
    load_recipe("tiny", [override])
    VALIDATOR.validate(with_override(override))
