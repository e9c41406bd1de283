"""Talk with a run's adapter: a prompt that it goes on from, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch

from fedloom.data.prompting import Message, Prompting
from fedloom.data.tokens import check_vocabulary
from fedloom.errors import RunError
from fedloom.evaluation.generation import LIKELIEST, Sampling, write_on
from fedloom.experiment.building import load_adapted_model, open_source
from fedloom.handover.finished_run import adapter_folder, open_adapter, recipe_of
from fedloom.text import show_controls

BASE, TRAINED = "--- base model ---\n", "--- with the adapter ---\n"
FORGOTTEN = "— more than the model takes was said: what came first is forgotten —\n"


class Speaker:
    """A run's model, ready to answer as it was trained to: in the format of the run's documents, unless `plain`."""

    def __init__(
        self, folder: str | Path, *, which: str | int = "best", plain: bool = False, base: bool = False
    ) -> None:
        """Load the base model and the adapter; with `base`, so that the base model can be asked as well.

        Raises:
            RunError: there is no such run or adapter, or it is not the one on record.
        """
        recipe = recipe_of(Path(folder))
        adapter_folder(Path(folder), which)  # before the base model is loaded
        self._opened = open_source(recipe)
        self._adapted = load_adapted_model(recipe, self._opened)
        self._start = self._adapted.read() if base else None
        self._trained = open_adapter(self._adapted, Path(folder), which)
        self._adapted.load(self._trained)
        data = recipe.data.model_copy(update={"prompt": None}) if plain else recipe.data
        self.prompting = Prompting(data, self._opened.tokenizer, chats=data.is_chat and not plain)
        self.goes_on = plain or data.is_plain
        """True where an answer goes on from the prompt itself, so that both are one text."""

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.prompting.close()

    def has_room(self, messages: Sequence[Message], room: int) -> bool:
        """Return whether an answer to messages may have so many tokens, or half of what the model takes at most."""
        longest = self._opened.max_length
        if longest is None:
            return True
        return len(self.prompting.write(messages)) + self._adapted.prompt_length + min(room, longest // 2) <= longest

    def answer(
        self,
        messages: Sequence[Message],
        *,
        base: bool = False,
        room: int = 80,
        sampling: Sampling = LIKELIEST,
        say: Callable[[str], object] | None = None,
    ) -> str:
        """Return the answer to messages, by the base model alone with `base`; `say` gets it piece by piece.

        Raises:
            RunError: the prompt is empty, or too long for the model.
            DataError: it has a token that the base model has no embedding for, or a form that the run's has not.
        """
        opened, adapted = self._opened, self._adapted
        tokens = self.prompting.write(messages)
        if not tokens:
            raise RunError("the prompt is empty", where="PROMPT", mend="write a word or more")
        check_vocabulary(torch.tensor(tokens), opened.tokenizer, opened.vocabulary_size)
        longest = opened.max_length
        room = room if longest is None else min(room, longest - len(tokens) - adapted.prompt_length)
        if room < 1:
            raise RunError(
                f"the prompt has {len(tokens)} tokens, and the model takes at most {longest} with its answer",
                where="PROMPT",
                mend="shorten it",
            )
        how: AbstractContextManager[None] = nullcontext()
        if base:
            assert self._start is not None, "opened without the base model"
            how = adapted.as_base(self._start, self._trained)
        with how:
            return write_on(
                adapted,
                opened.tokenizer,
                tokens,
                room=room,
                stops=self.prompting.stops,
                sampling=sampling,
                say=say,
            )


def generate(
    folder: str | Path,
    prompt: str,
    *,
    base: bool = False,
    max_new_tokens: int = 80,
    which: str | int = "best",
    plain: bool = False,
    sampling: Sampling = LIKELIEST,
    say: Callable[[str], object] | None = None,
) -> None:
    """Answer a prompt with a run's adapter; with `base`, first without it. With `plain`, go on from it as it stands.

    `say` gets the text piece by piece; by default it is printed.

    Raises:
        RunError: there is no such run or adapter, or the prompt is empty or too long for the model.
        DataError: the prompt has a token that the base model has no embedding for.
    """
    say = say or _print
    with Speaker(folder, which=which, plain=plain, base=base) as speaker:
        asked = [{"role": "user", "content": prompt}]
        for alone in (True, False) if base else (False,):
            if base:
                say(BASE if alone else TRAINED)
            if speaker.goes_on:
                say(prompt)
            speaker.answer(asked, base=alone, room=max_new_tokens, sampling=sampling, say=say)


def chat(
    folder: str | Path,
    lines: Iterator[str],
    *,
    base: bool = False,
    max_new_tokens: int = 400,
    which: str | int = "best",
    system: str | None = None,
    sampling: Sampling = LIKELIEST,
    say: Callable[[str], object] | None = None,
) -> None:
    """Answer each line, with all that was said before where the run's documents are conversations.

    With `base`, the base model answers too, in a conversation of its own. What no longer fits into the model is
    forgotten, the oldest question with its answer first.

    Raises:
        RunError, DataError: as `generate`.
    """
    say = say or _print
    with Speaker(folder, which=which, base=base) as speaker:
        if system is not None and not speaker.prompting.is_chat:
            raise RunError("this run's documents are no conversations", where="--system", mend="leave it out")
        first = [{"role": "system", "content": system}] if system is not None else []
        told = {alone: list(first) for alone in ((True, False) if base else (False,))}
        for line in lines:
            for alone, messages in told.items():
                if base:
                    say(BASE if alone else TRAINED)
                messages.append({"role": "user", "content": line})
                if speaker.prompting.is_chat and _forget(speaker, messages, len(first), max_new_tokens):
                    say(FORGOTTEN)
                said = speaker.answer(messages, base=alone, room=max_new_tokens, sampling=sampling, say=say)
                messages.append({"role": "assistant", "content": said})


def _forget(speaker: Speaker, messages: list[Message], begin: int, room: int) -> bool:
    """Drop the oldest questions with their answers until the last one's has room; return whether there were any."""
    told = len(messages)
    while len(messages) > begin + 1 and not speaker.has_room(messages, room):
        del messages[begin : begin + 2]
    return len(messages) < told


def _print(text: str) -> None:
    """Print text with control characters made visible: a model could write a terminal's escape sequence."""
    print(show_controls(text), end="", flush=True)
