"""A recipe is what was written, or an error that says what is wrong and where."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from support.marks import first
from support.tiny import make_recipe

from fedloom.errors import RecipeError
from fedloom.recipe.data_section import PARTITION_KEYS
from fedloom.recipe.loading import describe_keys, load_recipe, nearest, recipe_to_toml, shipped_recipes
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.schema import recipe_schema

SHORTEST = """\
name = "short"

[model]
source = "random:tiny-llama"

[data]
source = "python:stdlib"
"""

PARTITION_VALUES = {"by": "package", "alpha": 0.5, "shards_per_client": 2}

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "own.toml"
        path.write_bytes(text.encode("utf-8"))
        return path

    return write_file


def override(*overrides: str) -> Recipe:
    return load_recipe("tiny", overrides)


def dotted_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys = []
    for key, field in section.model_fields.items():
        keys.append(prefix + key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += dotted_keys(field.annotation, f"{prefix}{key}.")
    return keys


def test_what_is_left_out_has_its_default(write: Write) -> None:
    recipe = load_recipe(write(SHORTEST))
    assert (recipe.name, recipe.description, recipe.seed) == ("short", "", 42)
    assert (recipe.model.dtype, recipe.model.device, recipe.model.revision) == ("auto", "auto", None)
    assert (recipe.adapter.method, recipe.adapter.rank, recipe.adapter.targets) == ("lora", 16, None)
    assert (recipe.data.clients, recipe.data.client_holdout, recipe.data.central_holdout) == (3, 0.2, 100)
    assert (recipe.data.duplicates, recipe.data.pad_in_loss, recipe.data.partition.kind) == ("drop", False, "iid")
    assert (recipe.training.optimizer, recipe.training.proximal_mu, recipe.training.engine) == ("adamw", 0.0, "auto")
    assert (recipe.federation.fraction, recipe.federation.strategy.kind) == (1.0, "fedavg")
    assert recipe.evaluation.batch_size == 8


@pytest.mark.parametrize("section", ["", "model", "adapter", "data", "data.partition", "federation.strategy"])
def test_a_recipe_is_frozen(section: str) -> None:
    part: Any = make_recipe()
    for name in section.split(".") if section else []:
        part = getattr(part, name)
    for key in type(part).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, getattr(part, key))


@pytest.mark.parametrize(
    ("text", "unknown", "near", "line"),
    [
        ("sede = 3\n" + SHORTEST, "sede", "seed", 1),
        (SHORTEST + "clientz = 3\n", "data.clientz", "clients", 8),
        (SHORTEST + "\n[trainning]\nepochs = 3\n", "trainning", "training", 9),
        (SHORTEST + "\n[training]\nepochs = 3\n# epoch = 4\nepoch = 5 # five\n", "training.epoch", "epochs", 12),
        (SHORTEST + "\n[data.partition]\nkind = 'iid'\nalhpa = 3\n", "data.partition.alhpa", "alpha", 11),
        (SHORTEST + "partition = { kind = 'iid', bye = 'a' }\n", "data.partition.bye", "by", 8),
        (SHORTEST + "partition.kind = 'iid'\npartition.bye = 'a'\n", "data.partition.bye", "by", 9),
        ("federation.strategy.kindd = 'fedavg'\n" + SHORTEST, "federation.strategy.kindd", "kind", 1),
        (SHORTEST + "\n[federation]\n[federation.strategy]\nkindd = 1\n", "federation.strategy.kindd", "kind", 11),
        (SHORTEST + '\n  [ training ]  # what a client does\n  "epoch" = 5\n', "training.epoch", "epochs", 10),
        (SHORTEST + "\n[ data . partition ]\nalhpa = 3\n", "data.partition.alhpa", "alpha", 10),
        (SHORTEST.replace("\n", "\r\n") + "clientz = 3\r\n", "data.clientz", "clients", 8),
        ('description = """\n[data]\nclientz = 1\n"""\n' + SHORTEST + "clientz = 3\n", "data.clientz", "clients", 12),
        ('description = "one\u2028line"\n' + SHORTEST + "clientz = 3\n", "data.clientz", "clients", 9),
    ],
    ids=[
        "root",
        "section",
        "unknown section",
        "comments",
        "table",
        "inline table",
        "dotted in a section",
        "dotted at the root",
        "deep table",
        "quoted and indented",
        "blanks in a header",
        "CRLF",
        "after a text with lines",
        "after a line separator",
    ],
)
def test_an_unknown_key_names_the_nearest_the_file_and_the_line(
    write: Write, text: str, unknown: str, near: str, line: int
) -> None:
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:{line}: unknown key `{unknown}`; did you mean `{near}`?"


def test_a_key_that_is_near_to_none_lists_them_all(write: Write) -> None:
    with pytest.raises(RecipeError, match="choose one of: batch_size"):
        load_recipe(write(SHORTEST + "\n[evaluation]\nxyz = 1\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SHORTEST + "clients = 0\n", (":8: ", "`data.clients`", "greater than or equal to 1", "not 0")),
        (SHORTEST + '\n[adapter]\nrank = "16"\n', (":10: ", "`adapter.rank`", "valid integer", "not '16'")),
        (SHORTEST + "\n[adapter]\ntargets = [\n  'q',\n  3,\n]\n", (":10: ", "`adapter.targets`", "valid string")),
        (SHORTEST + "partition = { kind = 'idd' }\n", (":8: ", "`data.partition.kind`", "'iid'", "'shard'", "'idd'")),
        (SHORTEST + "partition = { kind = 'natural' }\n", (":8: ", '`data.partition`: kind "natural" needs by')),
        ("model = 3\n" + SHORTEST.replace("[model]", "[evaluation]").replace('source = "r', "#"), (":1: ", "`model`")),
    ],
)
def test_a_bad_value_names_its_key_and_its_line(write: Write, text: str, words: tuple[str, ...]) -> None:
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("name", '""', ("letters, digits",)),
        ("name", '"a/b"', ("letters, digits", "a/b")),
        ("name", '".."', ("letters, digits",)),
        ("name", '"a\\n"', ("letters, digits",)),
        ("name", "3", ("valid string", "not 3")),
        ("name", "1979-05-27", ("valid string",)),
        ("description", "true", ("valid string", "not True")),
        ("seed", "-1", ("greater than or equal to 0", "not -1")),
        ("seed", "1.0", ("valid integer", "not 1.0")),
        ("seed", "true", ("valid integer", "not True")),
        ("seed", '"42"', ("valid integer", "not '42'")),
        ("model", "3", ("not 3",)),
        ("model.source", '""', ("at least 1 character",)),
        ("model.dtype", "float16", ("'float32'", "'bfloat16'", "'float64'", "not 'float16'")),
        ("model.device", "gpu", ("should be 'auto', 'cpu', 'cuda' or one GPU as 'cuda:0', not 'gpu'",)),
        ("model.device", "cuda:", ("'cuda:0'",)),
        ("adapter.method", "ia4", ("`ia3`", "not 'ia4'")),
        ("adapter.rank", "0", ("greater than or equal to 1", "not 0")),
        ("adapter.rank", "2.5", ("valid integer", "not 2.5")),
        ("adapter.alpha", "0", ("greater than 0",)),
        ("adapter.alpha", "inf", ("finite",)),
        ("adapter.rslora", "1", ("valid boolean", "not 1")),
        ("personalise", "true", ("input should be a table, not True",)),
        ("adapter.dropout", "1.0", ("less than 1",)),
        ("adapter.dropout", "-0.1", ("greater than or equal to 0",)),
        ("adapter.targets", "3", ("not 3",)),
        ("adapter.targets", '["q", 3]', ("valid string", "not 3")),
        ("data.source", '""', ("at least 1 character",)),
        ("data.max_length", "1", ("greater than or equal to 2", "not 1")),
        ("data.window", "slide", ("'truncate'", "'blocks'", "'pack'", "not 'slide'")),
        ("data.clients", "0", ("greater than or equal to 1",)),
        ("data.documents_per_client", "0", ("greater than or equal to 1",)),
        ("data.client_holdout", "1", ("less than 1",)),
        ("data.client_holdout", "nan", ("finite",)),
        ("data.central_holdout", "-1", ("greater than or equal to 0",)),
        ("data.duplicates", "keep", ("'drop'", "'report'", "not 'keep'")),
        ("data.near_duplicate", "0", ("greater than 0",)),
        ("data.near_duplicate", "1.01", ("less than or equal to 1",)),
        ("data.partition.kind", "random", ("'iid'", "'natural'", "not 'random'")),
        ("training.engine", "fast", ("'auto'", "'reference'")),
        ("training.devices", "some", ("should be \"all\" or a list of devices, not 'some'",)),
        ("training.devices", '["gpu:7"]', ("should be 'cpu', 'cuda' or one GPU as 'cuda:0', not 'gpu:7'",)),
        ("training.devices", "[]", ("list should not be empty",)),
        ("training.epochs", "0", ("greater than or equal to 1",)),
        ("training.epochs", "[1]", ("valid integer", "not [1]")),
        ("training.batch_size", "0", ("greater than or equal to 1",)),
        ("training.learning_rate", "0.0", ("greater than 0",)),
        ("training.learning_rate", "fast", ("valid number", "not 'fast'")),
        ("training.schedule", "step", ("'constant'", "'linear'", "'cosine'")),
        ("training.schedule_scope", "epoch", ("'round'", "'run'")),
        ("training.optimizer", "adam", ("'adamw'", "'sgd'")),
        ("training.optimizer_state", "drop", ("'reset'", "'keep'")),
        ("training.weight_decay", "-0.1", ("greater than or equal to 0",)),
        ("training.max_gradient_norm", "0", ("greater than 0",)),
        ("training.proximal_mu", "-1", ("greater than or equal to 0",)),
        ("federation.rounds", "0", ("greater than or equal to 1",)),
        ("federation.fraction", "0", ("greater than 0",)),
        ("federation.fraction", "1.5", ("less than or equal to 1",)),
        ("federation.strategy.kind", "fedsgd", ("'fedavg'",)),
        ("federation.strategy.weight_by", "clients", ("'examples'", "'tokens'")),
        ("evaluation.batch_size", "0", ("greater than or equal to 1",)),
    ],
)
def test_a_bad_override_names_its_key_and_what_is_allowed(section: str, value: str, words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        override(f"{section}={value}")
    for word in (f"override: `{section}`", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (SHORTEST.replace('name = "short"', ""), "name"),
        (SHORTEST.replace('source = "random:tiny-llama"', ""), "model.source"),
        (SHORTEST.replace('source = "python:stdlib"', ""), "data.source"),
        ('name = "short"\n[data]\nsource = "python:stdlib"\n', "model"),
        ("", "name"),
    ],
)
def test_a_missing_key_is_named(write: Write, text: str, missing: str) -> None:
    path = write(text)
    with pytest.raises(RecipeError, match=f"`{missing}` is missing; it has no default: set it") as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


TOO_LARGE = [
    *(f"training.{key}=1e40" for key in ("learning_rate", "learning_rate_end", "weight_decay", "proximal_mu")),
    f"adapter.alpha={10**40}",
]
"""Factors that float32 can't hold."""


@pytest.mark.parametrize("setting", TOO_LARGE, ids=lambda setting: setting.partition("=")[0])
def test_what_no_step_in_float32_can_hold_is_refused(setting: str) -> None:
    key, _, _ = setting.partition("=")
    with pytest.raises(RecipeError, match=rf"{re.escape(key)}.*less than or equal to 1000000000000000000000000000000"):
        load_recipe("tiny", [setting])


@pytest.mark.parametrize("alpha", ["1e40", 10**400], ids=["exponent", "digits"])
def test_an_alpha_of_one_layer_is_held_to_the_same(alpha: object) -> None:
    with pytest.raises(RecipeError, match=r"no alpha of options\.alpha_pattern should be above 1e\+30"):
        load_recipe("tiny", [f"adapter.options.alpha_pattern={{q_proj={alpha}}}"])
    load_recipe("tiny", ["adapter.options.alpha_pattern={q_proj=1e30}"])


def numbers_of(schema: dict[str, Any], key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The keys that may be a number, and what the schema says of each."""
    for name, part in schema.get("properties", {}).items():
        yield from numbers_of(part, f"{key}.{name}" if key else name)
    for part in schema.get("anyOf", ()):
        yield from numbers_of(part, key)
    if schema.get("type") in ("integer", "number"):
        yield key, schema


NUMBERS = dict(numbers_of(recipe_schema()))
UNBOUNDED = {"seed"}
"""Whole numbers that nothing is computed of."""


def test_no_count_is_too_large_for_a_float() -> None:
    assert len(NUMBERS) > 50
    counts = {key for key, part in NUMBERS.items() if part["type"] == "integer"}
    assert {key for key in counts if not {"maximum", "exclusiveMaximum"} & set(NUMBERS[key])} == UNBOUNDED


@pytest.mark.parametrize("key", first(sorted(NUMBERS.keys() - UNBOUNDED), keep=5))
def test_a_number_of_400_digits_is_a_line(key: str) -> None:
    with pytest.raises(RecipeError, match=r"less than|valid number|is missing"):
        load_recipe("tiny", [f"{key}={10**400}"])


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + shipped_recipes()["tiny"].replace("\n", "\r\n").encode())
    assert load_recipe(path) == load_recipe("tiny")


@pytest.mark.parametrize("line", [r'source = "C:\users\me\docs"', r'source = "D:\x"', r'source = "a\c" # a path'])
def test_a_backslash_in_double_quotes_says_how_to_write_a_path(line: str, write: Write) -> None:
    with pytest.raises(RecipeError, match=r"not valid TOML.*; write a path with slashes, or in single quotes"):
        load_recipe(write(f"name = 'x'\n[data]\n{line}\n"))


@pytest.mark.parametrize(
    "text",
    ["{}", "name: short", "name = short", 'name = "a"\nname = "b"', "[data", "seed = 007", '"' * 3, "\x00"],
)
def test_what_is_not_toml_is_an_error_with_its_place(write: Write, text: str) -> None:
    path = write(text)
    with pytest.raises(RecipeError, match="not valid TOML") as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


HUGE = {"digits": "1" * 5_000, "hexadecimal": "0x" + "f" * 5_000, "nested": "[" * 5_000 + "]" * 5_000}
"""Valid TOML that Python can't read or print without more ado."""


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", ["training.learning_rate", "adapter.targets"])
def test_a_huge_value_is_an_error(write: Write, key: str, value: str) -> None:
    with pytest.raises(RecipeError):
        override(f"{key}={value}")
    with pytest.raises(RecipeError):
        load_recipe(write(f"{key} = {value}\n{SHORTEST}"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nowhere.toml", "No such file"),
        ("no/where", "No such file"),
        ("~nobody-of-that-name/own.toml", "can't read the recipe"),
        ("a\x00b.toml", "can't read the recipe"),
        ("a" * 300 + ".toml", "too long"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(source: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe(source)


def test_a_folder_and_a_file_that_is_not_utf8_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="directory"):
        load_recipe(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("written", "key", "expected"),
    [
        ("seed=3", "seed", 3),
        ("seed=1_000", "seed", 1000),
        ("training.epochs = 5", "training.epochs", 5),
        ("training.learning_rate=2.5e-4", "training.learning_rate", 2.5e-4),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("training.proximal_mu=0", "training.proximal_mu", 0.0),
        ("adapter.rslora=true", "adapter.rslora", True),
        ("adapter.targets=['a', \"b\"]", "adapter.targets", ("a", "b")),
        ('adapter.targets=["k_proj"]', "adapter.targets", ("k_proj",)),
        ("adapter.targets=all-linear", "adapter.targets", "all-linear"),
        ("model.source=facebook/opt-350m", "model.source", "facebook/opt-350m"),
        ("model.source = facebook/opt-350m", "model.source", "facebook/opt-350m"),
        ("model.source='a = b'", "model.source", "a = b"),
        ("model.source=a=b", "model.source", "a=b"),
        ('model.source="3"', "model.source", "3"),
        ("data.source=~/texts/*.md", "data.source", "~/texts/*.md"),
        ("data.files=**/*.py", "data.files", "**/*.py"),
        ("description=", "description", ""),
        ("description=two words, and é", "description", "two words, and é"),
        ("training={epochs = 2}", "training.epochs", 2),
        ("training={epochs = 2}", "training.batch_size", 2),
        ("data.partition={kind = 'natural', by = 'package'}", "data.partition.by", "package"),
        ("federation.strategy.weight_by=tokens", "federation.strategy.weight_by", "tokens"),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(written: str, key: str, expected: object) -> None:
    found: Any = override(written)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", "is not an override; write section.key=value"),
        ("training.epochs", "is not an override; write section.key=value"),
        ("=3", "is not an override"),
        (".seed=3", "is not an override"),
        ("training.=3", "is not an override"),
        ("training..epochs=3", "is not an override"),
        ("name.first=3", '"name" is a value, not a section'),
        ("adapter.targets.first=3", '"targets" is a value, not a section'),
        ("training.epochs=1\nbatch_size=2", "training.epochs"),
        # A command line that is not UTF-8; no file could hold it.
        ("description=\udcff", "is not an override"),
    ],
)
def test_a_bad_override_string_is_an_error(written: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        override(written)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("sede=3", "override: unknown key `sede`; did you mean `seed`?"),
        ("training.epoch=3", "override: unknown key `training.epoch`; did you mean `epochs`?"),
        ("trainning.epochs=3", "override: unknown key `trainning`; did you mean `training`?"),
        (
            "federation.strategy.kindd=a",
            "override: unknown key `federation.strategy.kindd`; did you mean `kind`?",
        ),
    ],
)
def test_an_unknown_override_key_names_the_nearest(written: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        override(written)
    assert str(caught.value) == message


def test_a_missing_partition_key_blames_the_override_that_asks_for_it() -> None:
    with pytest.raises(RecipeError, match=r"^override: `data\.partition`"):
        override("data.partition.kind=dirichlet")


ANSWERED = ["data.prompt={q}", "data.completion={a}"]


@pytest.mark.parametrize("rows", [[], ["data.prompt={q}"], ANSWERED], ids=["text", "prompt", "answer"])
def test_a_system_message_where_there_is_no_conversation_is_refused_by_its_name(rows: list[str]) -> None:
    """It would change nothing, in silence."""
    with pytest.raises(RecipeError, match=r"^data\.system: only a conversation has"):
        load_recipe("tiny", [*rows, "data.system=Be brief."])


@pytest.mark.parametrize("rows", [["data.messages=m"], [*ANSWERED, "data.chat_template=tokenizer"]])
def test_a_conversation_may_have_a_system_message(rows: list[str]) -> None:
    assert load_recipe("tiny", [*rows, "data.system=Be brief."]).data.system == "Be brief."


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(write: Write) -> None:
    path = write(SHORTEST + "clients = 5\n")
    assert load_recipe(path).data.clients == 5
    recipe = load_recipe(path, ["data.clients=6", "data.clients=7", "training.epochs=2"])
    assert (recipe.data.clients, recipe.training.epochs) == (7, 2)
    assert recipe.data.source == "python:stdlib"
    assert load_recipe(path).data.clients == 5


def test_an_override_can_mend_the_file(write: Write) -> None:
    assert load_recipe(write(SHORTEST + "clients = 0\n"), ["data.clients=2"]).data.clients == 2
    assert load_recipe(write(""), ["name=a", "model.source=b", "data.source=c"]).model.source == "b"


def test_an_error_in_the_file_is_not_blamed_on_an_override(write: Write) -> None:
    path = write(SHORTEST + "clients = 0\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["data.central_holdout=3"])
    assert str(caught.value).startswith(f"{path}:8: ")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_and_survives_being_written(write: Write, name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    written = recipe_to_toml(recipe)
    again = load_recipe(write(written))
    assert again == recipe
    assert again.model_fields_set == recipe.model_fields_set
    assert recipe_to_toml(again) == written


def test_overrides_survive_being_written(write: Write) -> None:
    recipe = override(
        "adapter.targets=all-linear",
        "training.learning_rate=1e-7",
        "training.max_gradient_norm=1",
        "data.partition={kind = 'dirichlet', by = 'package', alpha = 0.1}",
        "federation.strategy.weight_by=tokens",
    )
    assert load_recipe(write(recipe_to_toml(recipe))) == recipe


def test_a_recipe_is_written_without_its_defaults(write: Write) -> None:
    assert load_recipe(write(SHORTEST)).model_dump(exclude_unset=True) == {
        "name": "short",
        "model": {"source": "random:tiny-llama"},
        "data": {"source": "python:stdlib"},
    }
    assert recipe_to_toml(load_recipe(write(SHORTEST))).strip() == SHORTEST.strip()


@pytest.mark.parametrize(
    ("name", "near"), [("quikstart", "quickstart"), ("tinny", "tiny"), ("opt350m-lora-fedprox-3", "opt350m-lora")]
)
def test_an_unknown_shipped_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert f'no shipped recipe is named "{name}"; did you mean `{near}' in str(caught.value)


def test_a_name_that_is_near_to_none_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("zzz")
    for name in ("choose one of", *shipped_recipes()):
        assert name in str(caught.value)


def test_nearest_suggests_one_word_or_lists_all() -> None:
    assert nearest("epoch", ["epochs", "rounds"]) == "did you mean `epochs`?"
    assert nearest("zzz", ["epochs", "rounds"]) == "choose one of: epochs, rounds"


@pytest.mark.parametrize("kind", PARTITION_KEYS)
def test_each_kind_of_partition_takes_what_it_needs_and_no_more(kind: str) -> None:
    needed = PARTITION_KEYS[kind]
    for given_keys in ({*needed} - {key} for key in [*needed, None]):
        table = ", ".join([f"kind = '{kind}'", *(f"{key} = {PARTITION_VALUES[key]!r}" for key in given_keys)])
        missing = [key for key in needed if key not in given_keys]
        if missing:
            with pytest.raises(RecipeError, match=f'`data.partition`: kind "{kind}" needs {missing[0]}'):
                override(f"data.partition={{{table}}}")
        else:
            assert override(f"data.partition={{{table}}}").data.partition.kind == kind
    complete = ", ".join([f"kind = '{kind}'", *(f"{key} = {PARTITION_VALUES[key]!r}" for key in needed)])
    for spare in set(PARTITION_VALUES) - set(needed):
        with pytest.raises(RecipeError, match=f'kind "{kind}" does not use {spare}'):
            override(f"data.partition={{{complete}, {spare} = {PARTITION_VALUES[spare]!r}}}")


def test_every_key_is_described() -> None:
    text = describe_keys()
    sections = ("model", "adapter", "data", "data.partition", "training", "federation", "federation.strategy")
    for key in set(dotted_keys()) - {
        *sections,
        "evaluation",
        "report",
        "federation.early_stop",
        "model.quantization_options",
        "personalise",
        "privacy",
    }:
        assert f"| `{key}` |" in text
    assert "None" not in text


def test_importing_the_recipe_does_not_import_torch() -> None:
    program = "import sys, fedloom.recipe.loading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.booleans().map(lambda value: str(value).lower()),
    st.sampled_from(["auto", "'lora'", '"iid"', "[]", "{}", "['q_proj']", "[[1]]", "{kind = 'natural'}", "1979-05-27"]),
    st.text(max_size=20),
)
KEYS = st.one_of(st.sampled_from(dotted_keys()), st.text(max_size=10), st.lists(st.text(max_size=5)).map(".".join))
LINES = st.one_of(
    st.builds("{} = {}".format, KEYS, VALUES),
    st.builds("[{}]".format, KEYS),
    st.sampled_from(SHORTEST.splitlines()),
    st.text(max_size=20),
)

few_hundred = settings(max_examples=200, deadline=None, derandomize=True)


@few_hundred
@given(text=st.one_of(st.text(), st.lists(LINES).map("\n".join), LINES.map(lambda line: f"{line}\n{SHORTEST}")))
def test_any_text_loads_or_is_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8"))
    try:
        recipe = load_recipe(path)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


@few_hundred
@given(overrides=st.lists(st.one_of(st.text(), st.builds("{}={}".format, KEYS, VALUES)), min_size=1, max_size=3))
def test_any_override_loads_or_is_a_recipe_error(overrides: list[str]) -> None:
    try:
        recipe = override(*overrides)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


@few_hundred
@given(text=st.text())
def test_any_description_survives_being_written(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "described.toml"
    recipe = make_recipe(description=text)
    path.write_bytes(recipe_to_toml(recipe).encode("utf-8"))
    assert load_recipe(path) == recipe
