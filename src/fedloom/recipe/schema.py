"""The recipe's JSON Schema, made from the models that check a recipe, so that editors complete and check it too.

It knows keys, types, ranges and choices. Settings that can't be combined are refused by `load_recipe` alone. No torch
here.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from fedloom.recipe.loading import SWEEP_TABLE
from fedloom.recipe.recipe import Recipe

SCHEMA_FILE = "recipe.schema.json"
"""Its name beside the recipes: their first line, `#:schema ./recipe.schema.json`, leads an editor there."""


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe, draft 2020-12, its sections in the order in which they stand in a recipe."""
    schema = Recipe.model_json_schema(schema_generator=_TomlSchema)
    sections = schema.pop("$defs")
    schema["properties"][SWEEP_TABLE] = {"type": "object", "description": "axes of `fedloom sweep`: lists of values"}
    return {"$schema": _TomlSchema.schema_dialect, "title": "fedloom recipe", **_inline(schema, sections)}


def schema_text() -> str:
    """Return the schema as the text of a file."""
    # ASCII alone: the output of `fedloom schema > FILE` is in the terminal's encoding, which need not be UTF-8.
    return json.dumps(recipe_schema(), indent=2) + "\n"


class _TomlSchema(GenerateJsonSchema):
    """A schema of what can be written in TOML, which has no null: a key without a value is left out."""

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        left_out = schema.get("default") is None
        return self.generate_inner(schema["schema"]) if left_out else super().default_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # "On Bad Row" says nothing that `on_bad_row` does not


def _inline(part: Any, sections: dict[str, Any]) -> Any:
    """Put each section where it is referred to, once each: not every editor shows a description beside a `$ref`."""
    if isinstance(part, list):
        return [_inline(item, sections) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        section = sections[part["$ref"].removeprefix("#/$defs/")]
        part = {**section, **{key: value for key, value in part.items() if key != "$ref"}}
    # Names of our classes, in contrast to a property that is called `title`, are strings.
    return {key: _inline(value, sections) for key, value in part.items() if key != "title" or isinstance(value, dict)}
