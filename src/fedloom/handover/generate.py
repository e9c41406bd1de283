"""Text generation with a run's adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TextStreamer

from fedloom.data.tokens import check_vocabulary
from fedloom.errors import RunError
from fedloom.experiment.building import load_adapted_model, open_source
from fedloom.handover.finished_run import adapter_folder, recipe_of
from fedloom.text import show_controls


def generate(
    folder: str | Path,
    prompt: str,
    *,
    base: bool = False,
    max_new_tokens: int = 80,
    which: str = "best",
    say: Callable[[str], object] | None = None,
) -> None:
    """Continue a prompt with a run's adapter, always with the likeliest token; with `base`, first without the adapter.

    `say` gets the text piece by piece; by default it is printed.

    Raises:
        RunError: there is no such run or adapter, or the prompt is empty or too long for the model.
        DataError: the prompt has a token that the base model has no embedding for.
    """
    folder, say = Path(folder), say or _print
    recipe = recipe_of(folder)
    source = adapter_folder(folder, which)
    opened = open_source(recipe)
    adapted = load_adapted_model(recipe, opened)
    inputs = opened.tokenizer(prompt, return_tensors="pt")["input_ids"].to(adapted.device)
    # A tokenizer may end every document; a prompt is the beginning of one.
    end = opened.tokenizer.eos_token_id
    if inputs.shape[1] and inputs[0, -1] == end and not prompt.endswith(opened.tokenizer.eos_token):
        inputs = inputs[:, :-1]
    if inputs.shape[1] == 0:
        raise RunError("the prompt is empty", where="PROMPT", mend="write a word or more")
    check_vocabulary(inputs, opened.tokenizer, opened.vocabulary_size)
    longest = opened.max_length
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - inputs.shape[1] - adapted.prompt_length)
    if room < 1:
        raise RunError(
            f"the prompt has {inputs.shape[1]} tokens, and the model takes at most {longest} with its answer",
            where="PROMPT",
            mend="shorten it",
        )
    adapted.model.eval()

    def write() -> None:
        """Continue the prompt with the model as it is now."""
        streamer = _Streamer(opened.tokenizer, say)
        padding = next((t for t in (opened.tokenizer.pad_token_id, end) if t is not None), None)
        with torch.inference_mode(), warnings.catch_warnings():
            # Transformers warns about its own settings.
            warnings.simplefilter("ignore")
            adapted.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=padding,
                streamer=streamer,
            )

    if base:
        say("--- base model ---\n")
        # A whole model is still the base model: what was trained is not loaded yet.
        with nullcontext() if adapted.is_whole else adapted.model.disable_adapter():
            write()
        say("--- with the adapter ---\n")
    adapted.load(adapted.open(source))
    write()


def _print(text: str) -> None:
    """Print text with control characters made visible: a model could write a terminal's escape sequence."""
    print(show_controls(text), end="", flush=True)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Streamer that passes on each piece of text as soon as it is complete."""

    def __init__(self, tokenizer: object, say: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text; transformers calls this."""
        self._say(text + ("\n" if stream_end else ""))
