"""Reading files of tasks: TOML becomes frozen, validated tasks, as a recipe is read. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fedloom.errors import RecipeError
from fedloom.recipe.loading import absolute_source, explain_key, find_text, read_shipped, read_toml, show_value
from fedloom.recipe.task_section import Task, TaskFile

FOLDER = "shipped_tasks"
"""Folder of the files of tasks that ship."""


class Tasks(NamedTuple):
    """The tasks of a file, or those of several."""

    tasks: tuple[Task, ...]
    averages: dict[str, tuple[str, ...]]
    """Name of a mean -> the names of its tasks, which count alike."""


def shipped_tasks() -> dict[str, str]:
    """Return the TOML text of each file of tasks in the package, by its name, in alphabetical order."""
    return read_shipped(FOLDER)


def load_tasks(sources: Sequence[str | Path], places: Sequence[str] = ()) -> Tasks:
    """Read files of tasks, or shipped ones by their names; a relative source is found beside its file.

    Each of `places` is `TASK=SOURCE`: where a task's rows are read from instead, in the working folder.

    Raises:
        RecipeError: no such file, not TOML, an unknown key or a bad value, or a name that two tasks have.
    """
    files = [_load(source) for source in sources]
    tasks = [task for file in files for task in file.task]
    names = [task.name for task in tasks] + [file.average for file in files if file.average]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f'"{twice[0]}" is the name of two tasks', where="tasks", mend="rename one, or leave one out")
    for place in places:
        name, _, source = place.partition("=")
        if name not in [task.name for task in tasks] or not source:
            known = ", ".join(task.name for task in tasks)
            raise RecipeError(f"{place!r} is not TASK=SOURCE", where="--source", mend=f"the tasks are: {known}")
        # Keys of a hub's data set say nothing of a file.
        there = {"source": absolute_source(source, Path.cwd()), "revision": None, "subset": None, "split": None}
        tasks = [task.model_copy(update=there) if task.name == name else task for task in tasks]
    averages = {file.average: tuple(task.name for task in file.task) for file in files if file.average}
    return Tasks(tuple(tasks), averages)


def _load(source: str | Path) -> TaskFile:
    text, where = find_text(source, shipped_tasks(), "file of tasks")
    values = read_toml(text, where)
    is_shipped = where != str(source)
    beside = Path(str(resources.files("fedloom.recipe") / FOLDER)) if is_shipped else Path(where).expanduser().parent
    tables = values.get("task")
    for table in tables if isinstance(tables, list) else ():
        if isinstance(table, dict) and isinstance(table.get("source"), str):
            table["source"] = absolute_source(table["source"], beside)
    try:
        return TaskFile.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where, tables) from None


def _explain(error: ValidationError, where: str, tables: Any) -> RecipeError:
    """Turn one of pydantic's complaints into an error of one line, with the file and the task."""
    # A mistyped key is missing under its right name too, and what may be of two kinds is no text beside what is wrong.
    order = ("extra_forbidden", "value_error")
    first = min(error.errors(include_url=False), key=lambda one: (*order, one["type"]).index(one["type"]))
    inside = first["loc"][:1] == ("task",) and len(first["loc"]) > 1
    if inside:
        number = int(first["loc"][1])
        named = tables[number].get("name") if isinstance(tables[number], dict) else None
        where = f"{where}: task {named if isinstance(named, str) else number + 1}"
    words = [str(part) for part in first["loc"][2 if inside else 0 :]]
    # A location also names the member of a union, or the place in a list.
    fields = Task.model_fields if inside else TaskFile.model_fields
    key = ".".join(words[: 1 if words and words[0] in fields else None])
    return explain_key(first, key, where, list(fields), show_value(first["input"]))
