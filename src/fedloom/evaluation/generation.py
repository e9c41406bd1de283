"""Text that a model writes on from a prompt, token by token, with the likeliest ones or drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.progress import Progress, Watch, ignore


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token: the likeliest at a temperature of 0, else drawn with this seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Probability that the likeliest tokens which are drawn from have together (Holtzman et al. 2020, arXiv 1904.09751,
    section 3.1)."""
    seed: int = 0


LIKELIEST = Sampling()
Complete = Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[int]], list[str]]
"""A function from the tokens of prompts, the most tokens of each answer and the tokens that end one to the answers."""


def complete_each(adapted: AdaptedModel, tokenizer: Any, watch: Watch = ignore) -> Complete:
    """Return a function that writes one answer after another, with the likeliest tokens of the model as it is then."""

    def complete(prompts: Sequence[Sequence[int]], rooms: Sequence[int], stops: Sequence[int]) -> list[str]:
        said = []
        for prompt, room in zip(prompts, rooms, strict=True):
            said.append(write_on(adapted, tokenizer, prompt, room=room, stops=stops))
            watch(Progress("evaluate", len(prompt)))
        return said

    return complete


def write_on(
    adapted: AdaptedModel,
    tokenizer: Any,
    tokens: Sequence[int],
    *,
    room: int,
    stops: Sequence[int] = (),
    sampling: Sampling = LIKELIEST,
    say: Callable[[str], object] | None = None,
) -> str:
    """Return what the model, as it is now, writes behind the tokens: at most `room` tokens, up to one of `stops`.

    `say` gets the text piece by piece.
    """
    inputs = torch.tensor([list(tokens)], device=adapted.device)
    streamer = _Streamer(tokenizer, say) if say else None
    padding = next(
        (token for token in (tokenizer.pad_token_id, *stops, tokenizer.eos_token_id) if token is not None), 0
    )
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    adapted.model.eval()
    devices = [adapted.device] if adapted.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices), warnings.catch_warnings():
        torch.manual_seed(sampling.seed)
        # Transformers warns about its own settings.
        warnings.simplefilter("ignore")
        found = adapted.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=room,
            pad_token_id=padding,
            streamer=streamer,
            **({"eos_token_id": list(stops)} if stops else {}),
            **how,
        )
    return str(tokenizer.decode(found[0, inputs.shape[1] :], skip_special_tokens=True))


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Streamer that passes on each piece of text as soon as it is complete."""

    def __init__(self, tokenizer: object, say: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text; transformers calls this."""
        self._say(text + ("\n" if stream_end else ""))
