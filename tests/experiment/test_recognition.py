"""What a file's rows are, where a recipe does not say: seen in the first row, and written into the recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedloom
from fedloom.cli import app
from fedloom.data.documents import load_documents
from fedloom.errors import DataError, RecipeError
from fedloom.experiment.recognition import open_recipe
from fedloom.recipe.data_section import Data
from fedloom.recipe.loading import recipe_to_toml

CHAT = [{"role": "user", "content": "say 7"}, {"role": "assistant", "content": "ok."}]
SHARED = [{"from": "human", "value": "say 7"}, {"from": "gpt", "value": "ok."}]
QUESTION = {"prompt": "{prompt}", "completion": "{completion}"}
ALPACA = {key: getattr(fedloom.load_recipe("alpaca").data, key) for key in ("prompt", "completion")}


def write(folder: Path, row: Any, *, data: str = "", name: str = "rows.jsonl") -> Path:
    (folder / name).write_text(json.dumps(row) + "\n" if name.endswith("l") else json.dumps([row]))
    recipe = folder / "mine.toml"
    recipe.write_text(f'name = "mine"\n[model]\nsource = "random:tiny-llama"\n[data]\nsource = "{name}"\n{data}')
    return recipe


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": CHAT, "id": 3}, {"messages": "messages"}),
        ({"conversations": SHARED}, {"messages": "conversations"}),
        ({"prompt": "say 7", "completion": "ok."}, QUESTION),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {**QUESTION, "chat_template": "tokenizer"}),
        ({"instruction": "say 7", "input": "", "output": "ok."}, ALPACA),
        ({"instruction": "say 7", "input": None, "output": "ok."}, ALPACA),
        ({"instruction": "say 7", "output": "ok."}, ALPACA),
        ({"instruction": "say 7", "input": "in words"}, {}),
        ({"text": "say 7", "messages": CHAT}, {}),
        ({"messages": "say 7"}, {}),
        ({"messages": []}, {}),
        ({"prompt": "say 7"}, {}),
        ({"prompt": "say 7", "completion": 7}, {}),
        ([1, 2], {}),
    ],
)
def test_the_first_row_says_what_is_read(tmp_path: Path, row: Any, keys: dict[str, str], name: str) -> None:
    data = open_recipe(write(tmp_path, row, name=name)).data
    written = {key: getattr(data, key) for key in ("messages", "prompt", "completion", "chat_template")}
    assert {key: value for key, value in written.items() if value is not None} == keys


def test_rows_are_recognised_from_python_too(tmp_path: Path) -> None:
    assert fedloom.load_recipe(write(tmp_path, {"messages": CHAT})).data.messages == "messages"


@pytest.mark.parametrize("written", ['text = "text"', 'messages = "talk"', 'prompt = "{prompt}"'])
def test_what_a_recipe_says_stands(tmp_path: Path, written: str) -> None:
    row = {"messages": CHAT, "prompt": "say 7", "completion": "ok.", "talk": SHARED}
    recipe = write(tmp_path, row, data=written)
    assert not {"completion", "chat_template"} & open_recipe(recipe).data.model_fields_set
    assert open_recipe(recipe).data.messages == ("talk" if "talk" in written else None)


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"messages": CHAT}, "chat_template = '{{ messages }}'"),
        ({"messages": CHAT}, 'system = "Be brief."'),
        ({"conversations": SHARED}, 'loss = "assistant"'),
        ({"prompt": "say 7", "completion": "ok."}, 'loss = "completion"'),
        ({"prompt": "say 7", "completion": "ok."}, "chat_template = '{{ messages }}'"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "chat_template = '{{ messages }}'"),
    ],
)
def test_a_key_that_only_such_rows_have_needs_no_column_named(tmp_path: Path, row: Any, written: str) -> None:
    """What a key can't be combined with is said of what was found, not of the plain text that it is without it."""
    data = open_recipe(write(tmp_path, row, data=written)).data
    assert not data.is_plain
    assert data.own_template == ("{{ messages }}" if "chat_template" in written else None)


@pytest.mark.parametrize("key", ["chat_template = '{{ messages }}'", 'system = "Be brief."', 'loss = "assistant"'])
@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("rows.jsonl", '[{"text": "a"}]', "if it is one list of rows, name the file .json"),
        ("rows.jsonl", '{\n "text": "a"\n}', "write each row as one line, or all as a list"),
        ("rows.jsonl", '{"text": "\xe9"}', "save the file as UTF-8"),
        ("rows.jsonl", '{"question": "a", "answer": "b"}', "in data.messages; there are answer, question"),
        ("rows.csv", "question,answer\na,b", "a question's and its answer's in data.prompt and data.completion"),
        ("rows.json", '{"text": "a"}\n{"text": "b"}', "name it .jsonl if each line is a row"),
        ("none.jsonl", None, "no such file or folder"),
    ],
)
def test_what_is_wrong_with_a_file_comes_before_a_key_for_conversations(
    name: str, words: str | None, told: str, key: str, tmp_path: Path
) -> None:
    """The key was blamed for there being none, and its owner sent to a column that is not there."""
    recipe = write(tmp_path, {}, data=key)
    recipe.write_text(recipe.read_text().replace("rows.jsonl", name))
    if words is not None:
        (tmp_path / name).write_text(words, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        open_recipe(recipe)
    assert told in str(caught.value)


def test_a_chat_template_on_texts_is_told_all_that_it_could_write(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set data\.prompt and data\.completion, or data\.messages, or leave it out"):
        open_recipe(write(tmp_path, {"text": "say 7"}, data="chat_template = '{{ messages }}'"))


def test_what_was_found_is_written_down_and_read_again(tmp_path: Path) -> None:
    found = open_recipe(write(tmp_path, {"messages": CHAT}))
    kept = tmp_path / "kept.toml"
    kept.write_text(recipe_to_toml(found))
    (tmp_path / "rows.jsonl").write_text('{"text": "other rows now"}\n')
    assert open_recipe(kept).data.messages == "messages"


def test_a_table_of_columns_is_recognised_too(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nsay 7,ok.\n")
    recipe = write(tmp_path, {})
    assert open_recipe(recipe, [f"data.source={tmp_path / 'rows.csv'}"]).data.completion == "{completion}"


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("instruction,input,output\nsay 7,in words,ok.\nsay 8,,ok.\n", "\n\n### Input:\nin words\n\n### Response:\n"),
        ("instruction,output\nsay 7,ok.\n", "Instruction:\nsay 7\n\n### Response:\n"),
    ],
)
def test_a_table_of_instructions_may_have_no_inputs(table: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(table)
    data = open_recipe(write(tmp_path, {}), [f"data.source={tmp_path / 'rows.csv'}"]).data
    found = load_documents(data, 7)
    assert any(text in form.prompt for document in found.documents if (form := document.form))
    assert not found.skipped


def test_a_later_row_may_have_an_input_where_the_first_has_none(tmp_path: Path) -> None:
    recipe = write(tmp_path, {"instruction": "say 7", "output": "ok."})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"instruction": "say 8", "input": "in words", "output": "ok."}\n')
    found = load_documents(open_recipe(recipe).data, 7)
    assert sum("### Input:\nin words" in document.text for document in found.documents) == 1


def test_a_header_of_other_names_says_which_keys_name_them(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nsay 7,ok.\n")
    source = str(tmp_path / "rows.csv")
    with pytest.raises(
        DataError, match=r"first line, the header: a text's in data\.text, a question's and its answer's"
    ):
        load_documents(Data(source=source), 7)
    with pytest.raises(DataError, match=r"name a column of the file's first line, the header$"):
        load_documents(Data(source=source, text="body"), 7)


@pytest.mark.parametrize(
    ("name", "words"), [("rows.csv", "question,answer\nsay 7,ok."), ("rows.jsonl", '{"question": "q", "answer": "a"}')]
)
def test_columns_that_are_there_are_listed_where_a_template_names_another(
    name: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(words)
    source = str(tmp_path / name)
    with pytest.raises(DataError, match=r"; there are answer, question$"):
        load_documents(Data(source=source, prompt="{question}", completion="{answr}"), 7)


def test_a_first_line_without_a_named_column_may_be_a_text_and_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("xylophone,zither\nsay 7,ok.\n")
    with pytest.raises(DataError) as caught:
        load_documents(Data(source=str(tmp_path / "rows.csv"), prompt="{question}", completion="{answr}"), 7)
    assert "xylophone" not in str(caught.value)


def test_what_is_refused_then_names_the_key_that_was_found(tmp_path: Path) -> None:
    recipe = write(tmp_path, {"messages": CHAT}, data="pad_in_loss = true")
    result = CliRunner().invoke(app, ["plan", str(recipe)])
    assert "data.pad_in_loss" in str(result.exception)


@pytest.mark.parametrize(
    ("row", "mend"),
    [
        ({"messages": CHAT}, 'set data.messages = "messages"'),
        ({"conversations": SHARED}, 'set data.messages = "conversations"'),
        ({"prompt": "say 7", "completion": "ok."}, 'set data.prompt = "{prompt}" and data.completion = "{completion}"'),
        ({"instruction": "say 7", "output": "ok."}, "set data.prompt and data.completion as `fedloom recipes alpaca`"),
        ({"body": "say 7"}, "name their columns: a text's in data.text, a question's"),
        ({"text": 7}, "check data.text"),
    ],
    ids=["messages", "sharegpt", "trl", "alpaca", "other", "a-number"],
)
def test_a_source_that_is_no_file_is_told_the_key(tmp_path: Path, row: Any, mend: str) -> None:
    """Of a folder or a data set of the hub, the error says it."""
    (tmp_path / "part.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_documents(Data.model_validate({"source": str(tmp_path)}), 7)
    assert mend in str(caught.value)


def test_a_column_of_conversations_with_another_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    with pytest.raises(DataError, match=r'set data\.messages = "messages", the column of conversations'):
        load_documents(Data(source=str(tmp_path / "rows.jsonl"), messages="conversations"), 7)


def test_a_name_that_no_file_can_have_is_told_by_whoever_reads_the_documents(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'name = "mine"\n[model]\nsource = "random:tiny-llama"\n[data]\nsource = "{"a" * 5000}"\n')
    data = open_recipe(str(recipe)).data
    assert data.is_plain
    with pytest.raises(DataError, match="not a valid path"):
        load_documents(data, 0)
