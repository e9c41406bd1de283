"""The way from a row to the text that a model learns from, and to the part of it that counts.

A row is one column of text, a prompt with its answer, or a conversation. Which characters count is found in the text,
before any token is: an answer by where its prompt ends, an assistant's turn by what the chat template writes up to it
and through it, so that no search for the answer's words can find them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fedloom.data.chat_renderer import ChatRenderer
from fedloom.data.rows import A_LIST, NOT_KEPT, Row, UnreadableError, find_value
from fedloom.errors import DataError
from fedloom.recipe.templates import RowTemplate, parse_template

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data

Spans = tuple[tuple[int, int], ...]
"""Characters of a text, from and up to."""
Message = dict[str, Any]

EMPTY = "empty"
"""Reason of a skipped row that is not a bad one: an empty text teaches nothing, and nothing is wrong with it."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
"""Role by ShareGPT's words and its descendants' -> role as templates know it."""
KNOWN = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Form:
    """Text of a row, and what of it is learnt."""

    text: str
    counted: Spans | None = None
    """Characters that count in the loss; None is all of them."""
    is_whole: bool = False
    """True where special tokens stand in the text already, so that a tokenizer adds none."""
    ends: bool = False
    """True where an end-of-sequence is to be learnt behind it."""

    @property
    def prompt(self) -> str:
        """Return what stands before the first part that counts."""
        return self.text[: self.counted[0][0]] if self.counted else ""


class RowFormat:
    """The format of a recipe's rows. `open_tokenizer` is asked once, when the first conversation comes."""

    def __init__(self, data: Data, open_tokenizer: Callable[[], Any] | None = None) -> None:
        self._data, self._open_tokenizer = data, open_tokenizer
        self._renderer: ChatRenderer | None = None
        self._end: str | None = None
        self._specials: list[str] = []

    def close(self) -> None:
        """End what renders conversations, if any came."""
        if self._renderer:
            self._renderer.close()
            self._renderer = None

    def __call__(self, row: Row) -> Form:
        """Return what a row teaches.

        Raises:
            UnreadableError: the row lacks a column, or is no conversation that the template takes.
            DataError: the tokenizer has no chat template, or the recipe's is none.
        """
        data = self._data
        if data.messages is not None:
            return self._of_conversation(_messages_of(find_value(row, data.messages), data.messages))
        if data.prompt is None:
            return Form(_text_in(row, data.text), ends=data.ends)
        prompt, completion = parse_template(data.prompt), parse_template(data.completion or "")
        if data.is_chat:
            before, found = _turns_of(row, prompt, "user"), _turns_of(row, completion, "assistant")
            return self._of_conversation([*before, *found], answers_from=len(before))
        if completion.only_column is not None and isinstance(find_value(row, completion.only_column), list):
            raise UnreadableError(A_LIST)
        asked, answer = (part.fill(partial(value_in, row)) for part in (prompt, completion))
        if data.completion is None:
            return Form(asked, ends=data.ends)
        if not answer.strip():
            raise UnreadableError(EMPTY)
        counted = None if data.learns == "all" else ((len(asked), len(asked) + len(answer)),)
        return Form(asked + answer, counted, ends=data.ends)

    def _of_conversation(self, messages: list[Message], answers_from: int = 0) -> Form:
        data = self._data
        if data.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": data.system}, *messages]
            answers_from += 1
        # A conversation that ends with a question teaches nothing by its end.
        while messages and messages[-1]["role"] != "assistant" and data.learns != "all":
            messages = messages[:-1]
        spoken = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [turn for turn in spoken if turn >= answers_from]
        if data.learns == "completion" and data.completion is None:
            turns = turns[-1:]
        if not turns and data.learns != "all":
            raise UnreadableError("without a turn of the assistant")
        renderer = self._open_renderer()
        whole = (len(messages), False)
        if data.learns == "all":
            texts, _ = renderer.render(messages, [whole])
            return Form(texts[0], None, is_whole=True, ends=data.ends)
        asked = [whole, *((turn + more, not more) for turn in turns for more in (0, 1))]
        (text, *parts), marked = renderer.render(messages, asked)
        counted = _spans_by_prefix(text, list(zip(parts[::2], parts[1::2], strict=True)), self._end)
        if counted is None:
            counted = tuple(marked)
            if len(counted) != len(spoken):
                raise UnreadableError(NOT_KEPT)
            counted = self._with_end(text, counted[-len(turns) :])
        for turn, (begin, end) in zip(turns, counted, strict=True):
            said = str(messages[turn].get("content") or "").rpartition("</think>")[2].strip()
            if any(words not in text[begin:end] for words in (said, *_names_called(messages[turn]))):
                raise UnreadableError("whose answer the chat template changes or leaves out")
        # Where the template ends an answer with a special token, a model learns from that to stop. One that is said in
        # the answer, an HTML tag say, is no end of it.
        last = text[slice(*counted[-1])]
        closed = self._first_special(last.rpartition(said)[2] if said else last)
        return Form(text, counted, is_whole=True, ends=data.ends and not closed)

    def _with_end(self, text: str, counted: Spans) -> Spans:
        """Return spans that a template marks, each with the end of its turn, where that comes next behind it."""
        # Behind the last turn there is no other that it could begin.
        end = self._first_special(text[counted[-1][1] :]) if self._data.ends else None
        if end is None:
            return counted
        blanks = {last: len(text[last:]) - len(text[last:].lstrip()) for _, last in counted}
        return tuple(
            (first, last + blanks[last] + len(end) if text.startswith(end, last + blanks[last]) else last)
            for first, last in counted
        )

    def _first_special(self, text: str) -> str | None:
        """Return the first special token in a text."""
        found = [token for token in self._specials if token in text]
        return min(found, key=text.index, default=None)

    def _open_renderer(self) -> ChatRenderer:
        if self._renderer is None:
            assert self._open_tokenizer is not None, "a conversation, and nobody to ask for a tokenizer"
            tokenizer = self._open_tokenizer()
            self._end, self._specials = tokenizer.eos_token, special_tokens(tokenizer)
            self._renderer = ChatRenderer(self._data.own_template or own_chat_template(tokenizer), tokenizer)
        return self._renderer


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the tokens of a tokenizer that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [*{*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}]


def own_chat_template(tokenizer: Any) -> str:
    """Return the chat template that a tokenizer brings.

    Raises:
        DataError: it has none.
    """
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        own = own.get("default")
    if not own:
        raise DataError(
            "the base model's tokenizer has none, and conversations are written by one",
            where="data.chat_template",
            mend="name a file, or use an instruct model",
        )
    return str(own)


def _spans_by_prefix(text: str, parts: Sequence[tuple[str, str]], end: str | None) -> Spans | None:
    """Return where in a text each turn stands, by what is written before it and with it; None if that changes."""
    spans = []
    for before, through in parts:
        # Some templates end whatever they write, and only the last turn of a conversation stays so.
        if end and not text.startswith(through):
            through = through.removesuffix(end)
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            return None
        stop = len(through)
        # Some templates write the end of a turn at the beginning of the next: it belongs to the turn that it ends.
        if end and end not in through[len(before) :] and text.startswith(end, stop):
            stop += len(end)
        spans.append((len(before), stop))
    return tuple(spans)


def _messages_of(value: object, column: str) -> list[Message]:
    """Return a column's conversation, with roles and contents as templates know them.

    Raises:
        UnreadableError: it is none.
    """
    if not isinstance(value, list) or not value:
        raise UnreadableError(f"without messages in column {column}" if not value else "not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise UnreadableError("with a message that is not an object")
        role, content = (
            message.get(one) if message.get(one) is not None else message.get(other)
            for one, other in (("role", "from"), ("content", "value"))
        )
        role = ROLES.get(role, role) if isinstance(role, str) else None
        if role not in KNOWN:
            raise UnreadableError("with a message of another role than system, user, assistant or tool")
        if not isinstance(content, str) and not _names_called(message):
            raise UnreadableError("with a message whose content is not text")
        others = {key: given for key, given in message.items() if key not in ("role", "from", "content", "value")}
        # Tables give every message the columns that one of them has.
        messages.append({**{k: v for k, v in others.items() if v is not None}, "role": role, "content": content or ""})
    return messages


def _names_called(message: Mapping[str, Any]) -> list[str]:
    """Return the names of the functions that a message calls."""
    calls = message.get("tool_calls")
    found = (
        [call.get("function", call) for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else ()
    )
    names = (function.get("name") for function in found if isinstance(function, Mapping))
    return [name for name in names if isinstance(name, str)]


def _turns_of(row: Row, template: RowTemplate, role: str) -> list[Message]:
    """Return what a template writes of a row as one message, or the messages that its only column has."""
    column = template.only_column
    if column is not None and isinstance(found := find_value(row, column), list):
        return _messages_of(found, column)
    text = template.fill(partial(value_in, row))
    if role == "assistant" and not text.strip():
        raise UnreadableError(EMPTY)
    return [{"role": role, "content": text}]


def _text_in(row: Row, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str):
        raise UnreadableError(f"without text in column {column}" if text is None else "not text")
    # A byte order mark and NULs (padding of some writers) are no white space to Python, and blank to a reader.
    if all(character.isspace() or character in "\ufeff\x00" for character in text):
        raise UnreadableError(EMPTY)
    return text


def value_in(row: Row, name: str, optional: bool) -> str:
    """Return a column's text for a template; what is missing is empty where it may be left out."""
    value = find_value(row, name)
    if value is None or value != value:
        if not optional:
            raise UnreadableError(f"without text in column {name}")
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise UnreadableError(f"not text in column {name}")
    return value
