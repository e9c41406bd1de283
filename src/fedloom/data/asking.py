"""Questions of a task as a model meets them: their tokens, and those of each choice behind its question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.data.formats import Form
from fedloom.data.marked_tokens import tokenize_form
from fedloom.data.prompting import Prompting
from fedloom.data.rows import UnreadableError
from fedloom.data.task_rows import Question, TaskRows
from fedloom.data.tokens import TokenBlocks, check_vocabulary, stack_blocks
from fedloom.errors import DataError
from fedloom.text import list_reasons

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data
    from fedloom.recipe.task_section import Task

TOO_LONG = "longer than the model takes"
LONGEST_TOKEN = 100
"""Characters that a token has at most, on average over a text."""
LARGEST = 100_000
"""Tokens of a question or an answer, of a model that says of no end."""
COLUMN = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Asking:
    """A run's own way to ask: its tokenizer, the most tokens that its model takes, and its documents' templates."""

    data: Data
    tokenizer: Any
    longest: int | None
    """Tokens of a question and its answer together; None where there is no end."""
    vocabulary_size: int


@dataclass(frozen=True)
class AskedTask:
    """A task as a model meets it."""

    rows: TaskRows
    questions: tuple[Question, ...]
    """Questions that are asked: those that the model is long enough for."""
    prompts: tuple[list[int], ...]
    """Tokens of each question."""
    options: TokenBlocks
    """Each choice of each question behind it, one question after another; the choice counts."""
    stops: tuple[int, ...]
    """Tokens that end an answer."""
    skipped: Mapping[str, int]
    """Number of rows that are not asked, by reason."""
    room: int | None
    """The most tokens of a question with its answer."""

    @property
    def task(self) -> Task:
        """Return the task's declaration."""
        return self.rows.task


def ask(rows: TaskRows, how: Asking) -> AskedTask:
    """Return a task's questions as a model meets them.

    Raises:
        DataError: the chat template takes none of them, or no question is short enough.
    """
    task, skipped = rows.task, Counter(rows.skipped)
    questions, prompts, pieces, masks = [], [], [], []
    data = how.data.model_copy(update={"prompt": None, "system": task.system or how.data.system})
    with closing(Prompting(data, how.tokenizer, chats=asks_in_chat(task, how.data))) as prompting:
        for question in rows.questions:
            try:
                _check_length(question, how)
                text = prompting.write_turns([{"role": "user", "content": question.prompt}])
                tokens = prompting.tokens(text)
                # Before its choices, of which each would be tokenised with the whole question.
                if not tokens or (how.longest is not None and len(tokens) >= how.longest):
                    raise UnreadableError(TOO_LONG if tokens else "empty")
                options = list(_options(text, question, how, whole=prompting.is_chat))
            except UnreadableError as reason:
                skipped[str(reason)] += 1
                continue
            questions.append(question)
            prompts.append(tokens)
            pieces += [piece_T for piece_T, _ in options]
            masks += [mask_T for _, mask_T in options]
    if not questions:
        raise DataError(
            f"no question can be asked ({list_reasons(skipped)})",
            where=f"task {task.name}",
            mend="use shorter ones, or ask them otherwise",
        )
    blocks = stack_blocks(pieces, masks, max(map(len, pieces), default=1))
    for used in (blocks.tokens_NT, torch.tensor([token for prompt in prompts for token in prompt])):
        check_vocabulary(used, how.tokenizer, how.vocabulary_size)
    return AskedTask(rows, tuple(questions), tuple(prompts), blocks, tuple(prompting.stops), dict(skipped), how.longest)


def _check_length(question: Question, how: Asking) -> None:
    """Refuse what no model could take, before it is tokenised: a row of some megabytes takes minutes.

    Raises:
        UnreadableError
    """
    room = LONGEST_TOKEN * (how.longest or LARGEST)
    if any(len(text) > room for text in (question.prompt, *question.choices, *question.answers)):
        raise UnreadableError(TOO_LONG)


def asks_in_chat(task: Task, data: Data) -> bool:
    """Return whether a task is asked in a chat template: as it says, or as the run was trained."""
    return data.is_chat if task.chat is None else task.chat


def warn_of_template(task: Task, data: Data) -> str:
    """Say that a task is not asked as the run's documents are written; an empty text where it is."""
    in_chat = asks_in_chat(task, data)
    if data.is_chat != in_chat:
        trained, asked = ("in", "without") if data.is_chat else ("without", "in")
        return f"asked {asked} a chat template, and the run was trained {trained} one"
    if not in_chat and data.prompt is not None and COLUMN.sub("{}", data.prompt) != COLUMN.sub("{}", task.prompt):
        return "asked by another template than data.prompt, by which the run was trained"
    return ""


def _options(text: str, question: Question, how: Asking, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens, [T], of each choice behind its question, and which of them are the choice's, [T].

    Raises:
        UnreadableError: a choice has no token of its own, or the model is not long enough for it.
    """
    # As a person would write it; a chat template begins the answer itself.
    blank = "" if whole or text[-1:].isspace() else " "
    for choice in question.choices:
        form = Form(f"{text}{blank}{choice}", ((len(text), len(text) + len(blank) + len(choice)),), is_whole=whole)
        tokens_T, counted_T = tokenize_form(form, how.tokenizer, None)
        if not counted_T[1:].any():
            raise UnreadableError("with a choice that has no token of its own")
        if how.longest is not None and len(tokens_T) > how.longest:
            raise UnreadableError(TOO_LONG)
        yield tokens_T, counted_T
