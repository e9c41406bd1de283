"""Tasks for tests: a file of rows and a file of tasks beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit

from fedloom.data.asking import AskedTask, Asking, ask
from fedloom.data.task_rows import load_task
from fedloom.recipe.task_section import Task

CHOICE = {"kind": "choice", "prompt": "{q}", "choices": "c", "answer": "{a}"}


def write_tasks(
    folder: Path, rows: Sequence[dict[str, Any]], *tasks: dict[str, Any], file: str = "tasks.toml", **top: Any
) -> Path:
    """Write rows and tasks that ask them; a task has what `CHOICE` has, unless it says otherwise."""
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = [
        {"name": "task", "source": "questions.jsonl", **(CHOICE if "kind" not in task else {}), **task}
        for task in tasks
    ]
    (folder / file).write_text(tomlkit.dumps({**top, "task": told}), encoding="utf-8")
    return folder / file


def ask_rows(folder: Path, rows: Sequence[dict[str, Any]], how: Asking, **task: Any) -> AskedTask:
    """Return rows as a model meets them, in one task."""
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = {"name": "task", "source": str(folder / "asked.jsonl"), **(CHOICE if "kind" not in task else {}), **task}
    return ask(load_task(Task.model_validate(told)), how)
