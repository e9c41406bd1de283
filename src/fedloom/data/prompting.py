"""The way from a question to the tokens that a model goes on from: written as in training, up to the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fedloom.data.chat_renderer import ChatRenderer, RenderError
from fedloom.data.formats import own_chat_template, special_tokens
from fedloom.data.rows import find_value
from fedloom.errors import DataError
from fedloom.recipe.templates import parse_template

if TYPE_CHECKING:
    from fedloom.recipe.data_section import Data

Message = dict[str, Any]
PROBE = "fedloom"
"""Answer that a chat template is tried with, to see what ends a turn."""


class Prompting:
    """Prompts of a run: as its documents have them, or plain. To be closed when there are no more questions."""

    def __init__(self, data: Data, tokenizer: Any, *, chats: bool) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._renderer = ChatRenderer(data.own_template or own_chat_template(tokenizer), tokenizer) if chats else None
        self.stops = self._find_stops()
        """Tokens that end an answer."""

    @property
    def is_chat(self) -> bool:
        """Return whether questions and answers are a conversation."""
        return self._renderer is not None

    def close(self) -> None:
        """End what renders conversations."""
        if self._renderer:
            self._renderer.close()

    def write(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens up to the assistant's next turn, or those of the last message where there are no turns.

        Raises:
            DataError: the template does not take these messages, or lacks a column.
        """
        return self.tokens(self.render(messages))

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that `write` gives the tokens of.

        Raises:
            DataError: as `write`.
        """
        try:
            return self.write_turns(messages)
        except RenderError as error:
            raise DataError(f"a conversation {error}", where="data.chat_template", mend="ask otherwise") from None

    def write_turns(self, messages: Sequence[Message]) -> str:
        """Return that text, where one of many that the template does not take may be left out.

        Raises:
            RenderError: the template does not take these messages.
            DataError: they lack a column, or the template comes to no end.
        """
        if self._renderer is None:
            return self._fill(messages[-1]["content"])
        # A recipe with a prompt asks by it in a chat as well.
        messages = [
            {**one, "content": self._fill(one["content"])} if one["role"] == "user" else one for one in messages
        ]
        if self._data.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self._data.system}, *messages]
        (text,), _ = self._renderer.render(messages, [(len(messages), True)])
        return text

    def _fill(self, asked: str) -> str:
        """Return the run's prompt with the question in it: a text for its only column, or JSON for several.

        Raises:
            DataError: it has several columns, and the question is no object with them.
        """
        if self._data.prompt is None:
            return asked
        template = parse_template(self._data.prompt)
        needed = template.needed
        alone = needed or template.columns
        row = dict.fromkeys(alone, asked) if len(alone) == 1 else None
        told: Any = None
        if row is None or asked.lstrip().startswith("{"):
            with suppress(ValueError, RecursionError):
                told = json.loads(asked)
        # An object without any of the columns is a question about an object.
        if isinstance(told, dict) and any(find_value(told, name) is not None for name in template.columns):
            row = told
        if row is None or any(find_value(row, name) is None for name in needed):
            raise DataError(
                f"the run's prompt has the columns {', '.join(template.columns)}",
                where="PROMPT",
                mend="give them as JSON: " + json.dumps(dict.fromkeys(template.columns, "...")),
            )
        values = {name: find_value(row, name) for name in template.columns}
        return template.fill(lambda name, _: "" if values[name] is None else str(values[name]))

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text that `render` gave."""
        whole = self.is_chat  # special tokens stand in it already
        tokens: list[int] = self._tokenizer(text, add_special_tokens=not whole, verbose=False)["input_ids"]
        # A tokenizer may end every text; a prompt is the beginning of one.
        end = self._tokenizer.eos_token
        if not whole and tokens and tokens[-1] == self._tokenizer.eos_token_id and not text.endswith(end or "\0"):
            tokens = tokens[:-1]
        return tokens

    def _find_stops(self) -> list[int]:
        """Return the tokenizer's end, and the special token by which the chat template ends a turn."""
        tokenizer = self._tokenizer
        stops = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        if self._renderer:
            talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
            try:
                (text,), _ = self._renderer.render(talk, [(2, False)])
            except RenderError:
                return stops
            behind = text.rpartition(PROBE)[2]
            ends = [token for token in special_tokens(tokenizer) if token in behind]
            if ends:
                stops.append(tokenizer.convert_tokens_to_ids(min(ends, key=behind.index)))
        return list(dict.fromkeys(stops))
