"""Recognition of what a file's rows are, where a recipe does not say: a text, a conversation, or a question's answer.

Only a file is looked at, and its first row alone. The recipe that comes of it says what was found, and so does the one
that a run keeps: nothing is guessed twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.data.documents import load_documents
from fedloom.data.rows import CHATS, UnreadableError, format_of, read_rows
from fedloom.errors import DataError
from fedloom.progress import Say
from fedloom.recipe.loading import load_recipe
from fedloom.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fedloom.data.rows import Row
    from fedloom.recipe.data_section import Data


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


ANSWERED = {"prompt": "{prompt}", "completion": "{completion}"}
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

[[### Input:
{input}

]]### Response:
"""
"""Prompt of Alpaca's rows, as the recipe `alpaca` has it."""
WITHOUT_INPUT = re.sub(r"\[\[.*\]\]", "", ALPACA, flags=re.DOTALL)
"""The same for a table that has no column of inputs."""
KINDS: tuple[tuple[dict[str, str], Callable[[Any], bool]], ...] = (
    *(({"messages": name}, _is_chat) for name in CHATS),
    (ANSWERED, _is_text),
    ({**ANSWERED, "chat_template": "tokenizer"}, _is_chat),
    *(({"prompt": prompt, "completion": "{output}"}, _is_text) for prompt in (ALPACA, WITHOUT_INPUT)),
)
"""Keys of `data` that rows may be read by, in the order in which they are tried, and what the columns that they need
must hold: the shapes of `messages`, of ShareGPT, of TRL and of Alpaca."""


def open_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = (), say: Say | None = None) -> Recipe:
    """Read a recipe as `load_recipe` does; where it names no columns, its file's first row says which ones are read.

    `say` is told what a choice leaves out of the recipe; with nobody to tell, that is refused.

    Raises:
        RecipeError: as `load_recipe`.
        DataError: as `recognise_rows`.
    """
    return load_recipe(source, overrides, recognise_rows, say)


def recognise_rows(data: Data) -> dict[str, str]:
    """Return the keys of `data` by which a file's rows are read; none where the recipe has some, or nothing fits.

    Raises:
        DataError: a file has neither texts nor what a key of the recipe that is for conversations alone needs.
    """
    if not data.is_plain or "text" in data.model_fields_set or _first_row(data) is not None:
        return {}
    for keys, fits in KINDS:
        unsaid = {key: value for key, value in keys.items() if key not in data.model_fields_set}
        told = data.model_copy(update=unsaid)
        row = _first_row(told)
        if row is not None and all(fits(row[column]) for column in told.needed_columns):
            return unsaid
    _check_file(data)
    return {}


def _check_file(data: Data) -> None:
    """Refuse a file without texts where a recipe wants conversations: the keys would be blamed for the file's fault.

    Raises:
        DataError: as `load_documents`, of texts.
    """
    unsaid: dict[str, Any] = {key: None for key in ("chat_template", "system", "loss") if key in data.model_fields_set}
    if unsaid and format_of(Path(data.source)):
        # One text is enough, whatever the rows before it are.
        load_documents(data.model_copy(update={**unsaid, "max_bad_fraction": 1.0}), None, at_most=1)


def _first_row(data: Data) -> Row | None:
    """Return the first row of a file; None where there is none, or it lacks a column that is named."""
    path = Path(data.source)
    try:
        if not path.is_file() or format_of(path) is None:
            return None
        _, open_row = next(read_rows(path, path.name, data))
        row = open_row()
    # Whatever is wrong with the file is told when it is read whole.
    except (StopIteration, DataError, UnreadableError, OSError):
        return None
    return row if all(column in row for column in data.needed_columns) else None
