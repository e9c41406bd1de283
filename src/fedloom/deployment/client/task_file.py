"""File of tasks that a client's owner holds: `fedloom join --tasks`. No torch here.

What can't be counted as right or wrong is refused, and so is what would run a program that a model wrote.
"""

from __future__ import annotations

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.message_fields import TASK_LETTERS, TASKS
from fedloom.errors import DataError, RecipeError
from fedloom.recipe.task_files import load_tasks
from fedloom.recipe.task_section import Task

COUNTED = ("choice", "exact", "regex")
"""Kinds of tasks whose answers are right or wrong: of others there is no count that could be told."""


def describe_tasks(file: str, policy: Policy) -> str:
    """Read a file of tasks, and say which there are and what of them will be told.

    Raises:
        DataError: it is none, or has a task that a client does not ask.
    """
    names = ", ".join(task.name for task in read_task_file(file))
    told = "how many answers are right goes to the server, and nothing else of them"
    return f"{names}: {told if policy.tell_tasks else 'they are not asked: policy.tell_tasks'}"


def read_task_file(file: str) -> tuple[Task, ...]:
    """Read a file of tasks, or one that ships by its name, without its rows.

    Raises:
        DataError: it is none, or has a task that a client does not ask.
    """
    try:
        tasks = load_tasks([file]).tasks
    except RecipeError as error:
        raise DataError(error.what, where=f"--tasks {error.where}", mend=error.mend) from None
    if len(tasks) > TASKS:
        raise DataError(f"it has {len(tasks)} tasks, and {TASKS} may be told of", where=f"--tasks {file}")
    for task in tasks:
        where = f"--tasks {file}: task {task.name[:TASK_LETTERS]}"
        if task.kind == "code":
            raise DataError(
                "a client runs no program that a model wrote", where=where, mend="leave it out: fedloom evaluate has it"
            )
        if task.kind not in COUNTED:
            raise DataError(
                f'kind "{task.kind}" is a mean, and only whole numbers of right answers are told',
                where=where,
                mend=f"use one of: {', '.join(COUNTED)}",
            )
        if len(task.name) > TASK_LETTERS:
            raise DataError(f"a name that is told has up to {TASK_LETTERS} letters", where=where, mend="shorten it")
    return tasks
