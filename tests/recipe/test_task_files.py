"""Files of tasks are read as strictly as recipes."""

from pathlib import Path

import pytest

from fedloom.errors import RecipeError
from fedloom.recipe.task_files import load_tasks, shipped_tasks

TASK = """
[[task]]
name = "one"
source = "rows.jsonl"
kind = "choice"
prompt = "{q}"
choices = "c"
answer = "{a}"
"""


def write(folder: Path, text: str, name: str = "tasks.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_source_is_found_beside_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    file = write(tmp_path, TASK)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (found,) = load_tasks([file]).tasks
    assert found.source == str(tmp_path / "rows.jsonl")
    (tmp_path / "elsewhere" / "other.jsonl").touch()
    (found,) = load_tasks([file], ["one=other.jsonl"]).tasks
    assert found.source == str(tmp_path / "elsewhere" / "other.jsonl")


@pytest.mark.parametrize("name", shipped_tasks())
def test_every_file_that_ships_is_read(name: str) -> None:
    assert load_tasks([name]).tasks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TASK.replace("prompt", "promt"), "tasks.toml: task one: unknown key `promt`; did you mean `prompt`?"),
        (TASK.replace('"choice"', '"chioce"'), "task one: `kind`: input should be 'choice'"),
        (TASK.replace('kind = "choice"', ""), "task one: `kind` is missing"),
        (TASK.replace('answer = "{a}"', ""), 'kind "choice" needs answer'),
        (TASK + 'pattern = "x"', 'kind "choice" does not use pattern'),
        (TASK.replace('"{q}"', '"none"'), "`prompt`: names no column"),
        (TASK.replace('"c"', '["{c"]'), "`choices`: has a brace that stands alone"),
        (TASK.replace('"c"', '["{c}"]'), "choices are two or more"),
        (TASK + 'chat = false\nsystem = "Hm."', "chat = false does not use system"),
        (TASK + "letters = true", "letters = true goes with {lettered}"),
        (TASK.replace("{q}", "{q}{lettered}"), "letters = true goes with {lettered}"),
        (TASK + "limit = 0", "`limit`: input should be greater than or equal to 1, not 0"),
        (TASK + TASK, '"one" is the name of two'),
        (f'average = "one"\n{TASK}', '"one" is the name of two'),
        ("averages = 1\n" + TASK, "unknown key `averages`; did you mean `average`?"),
        ("", "`task` is missing"),
        ("task = 3", "`task`: input should be a list"),
        (TASK.replace("[[task]]", "[task]"), "`task`: each task begins with [[task]], in two brackets"),
        (
            f'average = "all"\n{TASK}[[task]]\nname="r"\nsource="x"\nkind="exact"\nprompt="{{q}}"\nanswer="{{a}}"',
            "average: choice and exact are counted each in another way: leave it out",
        ),
        (TASK + 'words = ["x"]', 'kind "choice" does not use words'),
        ("task = [3]", "task 1: input should be a table"),
        ("[[task]", "not valid TOML"),
        (
            '[[task]]\nname="r"\nsource="x"\nkind="regex"\nprompt="{q}"\npattern="("',
            "`pattern`: is no regular expression",
        ),
        (
            '[[task]]\nname="r"\nsource="x"\nkind="regex"\nprompt="{q}"\npattern="(a)(b)"',
            "`pattern`: has more than one group",
        ),
    ],
)
def test_what_is_wrong_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_tasks([write(tmp_path, text)])
    assert message in str(error.value)


def test_names_stand_for_one_task_in_all_files(tmp_path: Path) -> None:
    files = [write(tmp_path, TASK), write(tmp_path, TASK, "more.toml")]
    with pytest.raises(RecipeError, match='"one" is the name of two tasks'):
        load_tasks(files)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't read the file of tasks"):
        load_tasks([tmp_path / "none.toml"])
    with pytest.raises(RecipeError, match='no shipped file of tasks is named "first-step"; did you mean `first-steps`'):
        load_tasks(["first-step"])
    with pytest.raises(RecipeError, match="'two=x' is not TASK=SOURCE; the tasks are: one"):
        load_tasks([write(tmp_path, TASK)], ["two=x"])
