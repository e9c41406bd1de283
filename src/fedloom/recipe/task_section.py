"""Section of a file of tasks: what a model is asked, of which rows, and how its answers are counted. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedloom.recipe.data_section import Template
from fedloom.recipe.section import NAME, Section
from fedloom.recipe.templates import parse_template

COMPLETION = "{completion}"
"""Place in a program where what a model wrote stands."""
LETTERED = "lettered"
"""Name that the choices have in a prompt, a line each behind a letter."""
RowsOf = Literal["mmlu", "pubmedqa", "medqa", "medmcqa", "careqa", "fpb", "fiqa", "tfns"]
Rule = Literal["flowertune-letter", "flowertune-boolean", "flowertune-sentiment"]
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "choice": ("choices", "letters", "answer_as", "rule"),
    "exact": ("max_new_tokens", "words"),
    "regex": ("max_new_tokens", "words", "pattern"),
    "f1": ("max_new_tokens", "words"),
    "rouge": ("max_new_tokens", "words"),
    "code": ("max_new_tokens", "program", "words", "tries", "temperature", "seconds"),
}
"""Keys that each kind of task has beside those of all."""
ALIKE = {"choice", "regex"}
"""Kinds whose measures have a mean: both have an accuracy. Any other kind has measures of its own alone."""


def _to_tuple(value: object) -> object:
    # TOML has lists only, and a strict frozen section wants tuples.
    return tuple(value) if isinstance(value, list) else value


def _to_tables(value: object) -> object:
    if isinstance(value, dict):
        raise ValueError("each task begins with [[task]], in two brackets")
    return _to_tuple(value)


def _check_piece(text: str) -> str:
    parse_template(text)
    return text


def _check_pattern(text: str) -> str:
    try:
        groups = re.compile(text).groups
    except (re.error, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    if groups > 1:
        raise ValueError("has more than one group: the answer is the only one, or the whole match")
    return text


def _check_program(text: str) -> str:
    if text.count(COMPLETION) != 1:
        raise ValueError(f"needs {COMPLETION} once, where what was written stands")
    for part in text.split(COMPLETION):
        parse_template(part)
    return text


Piece = Annotated[str, AfterValidator(_check_piece)]
"""A text that may have columns in it, and need not."""
Texts = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_to_tuple)]


class Task(Section):
    """A task: questions made of rows, and how answers to them are counted."""

    name: str = Field(pattern=NAME, description="name of the task in records and reports")
    source: str = Field(min_length=1, description="whatever `data.source` of a recipe takes; `.jsonl` beside this file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    subset: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of a hub data set; `train` if left out")
    files: str | None = Field(None, description="glob inside a folder")
    rows_of: RowsOf | None = Field(
        None,
        description="a data set's own form of rows, which is read as columns `question`, `choices` and `answer`:"
        " `mmlu`, `pubmedqa`, `medqa`, `medmcqa`, `careqa`, `fpb`, `fiqa` or `tfns`",
    )
    only: dict[str, Texts] = Field({}, description="columns, each with the values that a row must have one of")
    test_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the rows that is asked: the test part of `train_test_split(SHARE, seed=42)` of datasets",
    )
    kind: Literal["choice", "exact", "regex", "f1", "rouge", "code"] = Field(
        description="the likeliest of some choices; an answer in words that is the same, that a pattern finds, that has"
        " the same words (F1), or words in the same order (ROUGE-L); a program that is run"
    )
    prompt: Template = Field(description="the question, with columns as `{question}`, as in `data.prompt`")
    system: str | None = Field(None, description="system message in a chat; that of the run if left out")
    chat: bool | None = Field(
        None,
        description="asked in the run's chat template, or the tokenizer's; if left out, where the run was trained on"
        " conversations",
    )
    choices: Annotated[str | tuple[Piece, ...], BeforeValidator(_to_tuple)] | None = Field(
        None, description="the column that holds a list of choices, or a list of choices with columns in braces"
    )
    letters: bool = Field(
        False, description="the choices stand in the prompt as `{lettered}`, and the answer is a letter of them"
    )
    answer: Template | None = Field(
        None, description="the right answer; a column may hold a list of answers that are all right"
    )
    answer_as: Literal["text", "letter", "index"] = Field(
        "text", description="form of `answer` beside choices: their text, a letter from A, or a number from 0"
    )
    pattern: Annotated[str, AfterValidator(_check_pattern)] | None = Field(
        None, description="regular expression that finds the answer: its only group, or the whole match (`regex`)"
    )
    rule: Rule | None = Field(
        None,
        description="a board's own way to let choices be written and to read them, counted beside the likeliest:"
        " `flowertune-letter`, `flowertune-boolean` or `flowertune-sentiment`",
    )
    program: Annotated[str, AfterValidator(_check_program)] | None = Field(
        None,
        description="Python program that comes to its end where the answer is right, with columns, and `{completion}`"
        " where what was written stands (`code`)",
    )
    words: Texts | None = Field(None, description="words at which what was written is cut off, a line's end say")
    tries: int = Field(1, ge=1, le=1000, description="answers to each question, for pass@k (`code`)")
    temperature: float = Field(0.0, ge=0, le=10, description="temperature at which tries are drawn; 0 is the likeliest")
    seconds: float = Field(3.0, gt=0, le=3600, description="time that a program has (`code`)")
    limit: int | None = Field(None, ge=1, description="questions, drawn the same for every run; all if left out")
    max_new_tokens: int = Field(64, ge=1, le=4096, description="the most tokens of an answer in words")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> Task:
        own = {key for keys in KIND_KEYS.values() for key in keys} - {*KIND_KEYS[self.kind]}
        if spare := [key for key in Task.model_fields if key in own and key in self.model_fields_set]:
            raise ValueError(f'kind "{self.kind}" does not use {" and ".join(spare)}')
        known = {"choice": ("choices", "answer"), "regex": ("pattern",), "code": ("program",)}
        needed = known.get(self.kind, ("answer",))
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f'kind "{self.kind}" needs {" and ".join(missing)}')
        if self.kind == "code" and self.answer is not None:
            raise ValueError("code is judged by its program, and has no answer to compare with")
        if self.tries > 1 and not self.temperature:
            raise ValueError("tries are all the same at a temperature of 0: set one, 0.8 say")
        if self.chat is False and self.system is not None:
            raise ValueError("chat = false does not use system: only a chat has such a message")
        if isinstance(self.choices, tuple) and len(self.choices) < 2:
            raise ValueError("choices are two or more")
        if self.letters != (f"{{{LETTERED}}}" in self.prompt):
            raise ValueError(f"letters = true goes with {{{LETTERED}}} in the prompt, where the choices stand")
        return self

    @property
    def told(self) -> dict[str, Any]:
        """Return the keys that say which rows are read, as they are given: those of a recipe's `data`."""
        keys = ("source", "revision", "subset", "split", "files")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


class TaskFile(Section):
    """A file of tasks."""

    average: str | None = Field(
        None,
        pattern=NAME,
        description="name under which the mean over the file's tasks is shown, each with the same weight",
    )
    task: Annotated[tuple[Task, ...], BeforeValidator(_to_tables)] = Field(min_length=1, description="the tasks")

    @model_validator(mode="after")
    def _has_each_name_once(self) -> TaskFile:
        names = [task.name for task in self.task] + ([self.average] if self.average else [])
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f'"{twice[0]}" is the name of two')
        kinds = {task.kind for task in self.task}
        if self.average and len({*kinds} - ALIKE) + bool(kinds & ALIKE) > 1:
            raise ValueError(f"average: {' and '.join(sorted(kinds))} are counted each in another way: leave it out")
        return self
