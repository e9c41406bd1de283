"""Questions of a task: rows, filled into the task's templates, with what counts as the right answer."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from fedloom.data.documents import open_rows
from fedloom.data.formats import value_in
from fedloom.data.known_rows import KNOWN, read_known
from fedloom.data.rows import Row, UnreadableError, find_value
from fedloom.errors import DataError
from fedloom.host.files import hash_json
from fedloom.recipe.data_section import Data
from fedloom.recipe.task_section import COMPLETION, LETTERED, Task
from fedloom.recipe.templates import parse_template
from fedloom.seeds import derive_seed
from fedloom.text import list_reasons

SPLIT_SEED = 42
"""Seed of the split that `test_share` repeats."""


@dataclass(frozen=True)
class Question:
    """A question as it is asked, and the answers that are right."""

    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    """Choices as a model is to write them: their texts, or their letters."""
    right: int = 0
    """Number of the choice that is right."""
    program: tuple[str, str] | None = None
    """Program around what is written, where that is code."""


@dataclass(frozen=True)
class TaskRows:
    """A task with its questions."""

    task: Task
    questions: tuple[Question, ...]
    columns: tuple[tuple[str, ...], ...]
    """Columns that each question's prompt is made of, as they stand in its row."""
    skipped: Mapping[str, int]
    """Number of rows that gave no question, by reason."""
    revision: str

    @property
    def digest(self) -> str:
        """Return a hash of all that is asked and how it is counted: the same figure of the same thing has the same."""
        told = self.task.model_dump(mode="json", exclude={"source", "revision", "subset", "split", "files"})
        return hash_json([told, [asdict(question) for question in self.questions]])


def load_task(task: Task) -> TaskRows:
    """Read a task's rows.

    Raises:
        DataError: the source can't be had or lacks a column, or no row is a question.
    """
    where = f"task {task.name}"
    try:
        source = open_rows(_as_data(task), derive_seed(0, "tasks"), None)
        found, skipped = _read(task, list(source.open_rows))
    except DataError as error:
        raise DataError(str(error), where=where) from error
    if not found:
        why = list_reasons(skipped) or "nothing there"
        raise DataError(f"no row is a question ({why})", where=where, mend="check its source and its templates")
    questions, columns = zip(*found, strict=True)
    return TaskRows(task, questions, columns, dict(skipped), source.revision)


def _as_data(task: Task) -> Data:
    """Return the part of a recipe by which the rows are read: each of their columns stands in a template."""
    told = {**task.told, "source": _in_a_package(task.source)}
    return Data(**told, prompt="".join(f"{{{column}}}" for column in _columns(task)))


def _in_a_package(source: str) -> str:
    """Return the path of a file that a package brings, for `package:NAME/FILE`; any other source as it is.

    Raises:
        DataError: the package is not installed, or has no such file.
    """
    scheme, _, place = source.partition(":")
    if scheme != "package":
        return source
    name, _, file = place.partition("/")
    # Found, and not imported: nothing of it is carried out.
    found = find_spec(name) if name.isidentifier() else None
    path = Path(found.origin or "").parent / file if found else None
    if path is None or ".." in Path(file).parts or not path.is_file():
        raise DataError(
            f"the package {name} is not installed, or has no such file",
            where=f'source = "{source}"',
            mend=f"pip install {name.replace('_', '-')}",
        )
    return str(path)


def _columns(task: Task) -> list[str]:
    """Return the columns that are read, each once."""
    texts = [task.prompt, task.answer or "", *(task.choices if isinstance(task.choices, tuple) else ())]
    texts += (task.program or "").split(COMPLETION)
    named = [column for text in texts for column in parse_template(text).columns if column != LETTERED]
    named += [task.choices] if isinstance(task.choices, str) else []
    if task.rows_of:
        made = {"question", "choices", "answer"}
        named = [*(column for column in named if column not in made), *KNOWN[task.rows_of].columns]
    return list(dict.fromkeys([*named, *task.only]))


def _read(task: Task, rows: list[Any]) -> tuple[list[tuple[Question, tuple[str, ...]]], Counter[str]]:
    """Return the questions that rows give, with the columns of each, and how many rows give none, by reason."""
    if task.test_share:
        drawn = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
        rows = [rows[place] for place in drawn[: math.ceil(task.test_share * len(rows))]]
    if task.limit:
        # Files are often in the order of their labels.
        random.Random(derive_seed(0, "tasks")).shuffle(rows)
    questions: list[tuple[Question, tuple[str, ...]]] = []
    skipped: Counter[str] = Counter()
    for _, open_row in rows:
        if len(questions) == task.limit:
            break
        try:
            row = open_row()
            if all(str(find_value(row, column)) in values for column, values in task.only.items()):
                row = read_known(row, task.rows_of) if task.rows_of else row
                questions.append((_question(task, row), _columns_of_prompt(task, row)))
        except UnreadableError as reason:
            skipped[str(reason)] += 1
    return questions, skipped


def _question(task: Task, row: Row) -> Question:
    """Return the question of a row.

    Raises:
        UnreadableError: it lacks a column, or its answer is none of the choices.
    """
    choices = tuple(_choices(task, row))
    if task.letters and len(choices) > len(ascii_uppercase):
        raise UnreadableError("with more choices than letters")
    letters = tuple(chr(ord("A") + number) for number in range(len(choices)))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    prompt = parse_template(task.prompt).fill(partial(value_in, {**row, LETTERED: listed}))
    answers = tuple(_answers(task, row))
    _check_unicode(prompt, *choices, *answers)
    if task.program:
        before, behind = (parse_template(part).fill(partial(value_in, row)) for part in task.program.split(COMPLETION))
        _check_unicode(before, behind)
        return Question(prompt, answers, program=(before, behind))
    if not choices:
        return Question(prompt, answers)
    names = {"text": choices, "letter": letters, "index": tuple(map(str, range(len(choices))))}[task.answer_as]
    if len(answers) > 1:
        raise UnreadableError("with several answers, of which a choice has one")
    if answers[0] not in names:
        raise UnreadableError("without an answer among the choices")
    right, said = names.index(answers[0]), letters if task.letters else choices
    if names.count(answers[0]) > 1 or said.count(said[right]) > 1:
        raise UnreadableError("with its answer twice among the choices")
    return Question(prompt, (said[right],), said, right)


def _columns_of_prompt(task: Task, row: Row) -> tuple[str, ...]:
    found = [find_value(row, column) for column in parse_template(task.prompt).columns if column != LETTERED]
    return tuple(value for value in found if isinstance(value, str) and value.strip())


def _choices(task: Task, row: Row) -> Iterator[str]:
    if isinstance(task.choices, tuple):
        for text in task.choices:
            yield parse_template(text).fill(partial(value_in, row))
    elif task.choices:
        found = find_value(row, task.choices)
        if (
            not isinstance(found, list)
            or len(found) < 2
            or not all(isinstance(one, str | int | float) for one in found)
        ):
            raise UnreadableError(f"without two choices or more in column {task.choices}")
        yield from map(str, found)


def _answers(task: Task, row: Row) -> Iterator[str]:
    if task.answer is None:
        return
    template = parse_template(task.answer)
    found = find_value(row, template.only_column) if template.only_column else None
    if isinstance(found, list) and found and all(isinstance(one, str | int | float) for one in found):
        yield from map(str, found)
    else:
        yield template.fill(partial(value_in, row))


def _check_unicode(*texts: str) -> None:
    # JSON can escape half of a surrogate pair, which is a str in Python but no text.
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise UnreadableError("not valid Unicode") from None
