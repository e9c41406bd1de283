"""Text that a model writes on from prompts, token by token, with the likeliest ones or drawn: many prompts at once.

Letters: B prompts of a batch, V vocabulary, K adapters, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.stacked_lora import Stack
from fedloom.evaluation.batches import halve
from fedloom.evaluation.decoding import Batch, Choose, Ending, decode, stacks, way_of
from fedloom.model.shortage import SHORT, is_shortage
from fedloom.progress import Progress, Watch, ignore
from fedloom.seeds import derive_seed


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token: the likeliest at a temperature of 0, else drawn with this seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Probability that the likeliest tokens which are drawn from have together (Holtzman et al. 2020, arXiv 1904.09751,
    section 3.1)."""
    seed: int = 0


LIKELIEST = Sampling()


@dataclass(frozen=True)
class Prompt:
    """Tokens that a model goes on from, and the most tokens that it may write."""

    tokens: Sequence[int]
    room: int


@dataclass(frozen=True)
class Answer:
    """Text that a model wrote behind a prompt, without the end."""

    text: str
    tokens: tuple[int, ...]
    """Tokens that were written, the end among them."""
    ended: bool
    """True where a stop or a word ended it, and not the room."""


@dataclass(frozen=True)
class Writing:
    """Way to write answers: the choice of tokens, the end of an answer, and how many are written at once."""

    stops: Sequence[int] = ()
    words: Sequence[str] = ()
    """Words that end an answer and are no part of it."""
    sampling: Sampling = LIKELIEST
    batch_size: int = 16
    """Answers that are written at once, of all adapters together."""


Complete = Callable[[Sequence[Prompt], Writing], list[str]]
"""A function from prompts, and the way to write, to answers."""


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
    writing = Writing(stops, sampling=sampling)
    streamer = _Streamer(tokenizer, say) if say else None
    batch = _batch([(0, Prompt(tokens, room))], 1, writing, tokenizer)
    (found,) = decode(adapted, batch, way_of(adapted), streamer)
    return _answer(found, batch, writing, tokenizer).text


def write_all(
    adapted: AdaptedModel, tokenizer: Any, prompts: Sequence[Prompt], writing: Writing, *, watch: Watch = ignore
) -> list[Answer]:
    """Return what the model, as it is now, writes behind each prompt, in their order.

    An answer does not depend on the prompts beside it, beyond rounding: what is drawn for a prompt comes from the seed
    and from its number. Where memory runs out, batches become smaller.

    Raises:
        ModelError: memory runs out with a single prompt.
    """
    return _write(adapted, tokenizer, prompts, writing, 1, watch)[0]


def complete_all(adapted: AdaptedModel, tokenizer: Any, watch: Watch = ignore) -> Complete:
    """Return a function that writes answers as `write_all` does, with the model as it is then."""

    def complete(prompts: Sequence[Prompt], writing: Writing) -> list[str]:
        return [answer.text for answer in write_all(adapted, tokenizer, prompts, writing, watch=watch)]

    return complete


def write_with_each(
    adapted: AdaptedModel,
    tokenizer: Any,
    adapters: Sequence[Adapter | None],
    prompts: Sequence[Prompt],
    writing: Writing,
    *,
    watch: Watch = ignore,
) -> list[list[Answer]]:
    """Return what each adapter writes behind each prompt; None is the base model, which a whole model has no more.

    Plain LoRA's adapters share a pass, in which the base model is an adapter of zeros; others follow one another, and
    so do those with a residual, which belongs to the model. Which of them the model has afterwards is not said.

    Raises:
        ModelError: memory runs out with a single prompt.
    """
    assert not (adapted.is_whole and None in adapters), "a whole model's base is the adapter that it began with"
    found: dict[int, list[Answer]] = {}
    for group in _groups(adapted, adapters, writing.batch_size):
        chosen = [adapters[number] for number in group]
        if len(chosen) > 1:
            answers = _write_stacked(adapted, tokenizer, chosen, prompts, writing, watch)
        else:
            with _with(adapted, chosen[0]):
                answers = [write_all(adapted, tokenizer, prompts, writing, watch=watch)]
        found |= zip(group, answers, strict=True)
    return [found[number] for number in range(len(adapters))]


def _with(adapted: AdaptedModel, adapter: Adapter | None) -> AbstractContextManager[None]:
    """Put an adapter into the model, or have it be the base model inside."""
    if adapter is None:
        return adapted.as_base(_zeros(adapted), _zeros(adapted))
    adapted.load(adapter)
    return nullcontext()


def _zeros(adapted: AdaptedModel) -> Adapter:
    return Adapter(adapted.layout, torch.zeros(adapted.layout.size, dtype=adapted.weights_P.dtype))


def _groups(adapted: AdaptedModel, adapters: Sequence[Adapter | None], most: int) -> Iterator[list[int]]:
    """Yield the numbers of adapters that can share a pass, at most so many."""
    alike = [number for number, adapter in enumerate(adapters) if adapter is None or adapter.residual is None]
    if len(alike) < 2 or not stacks(adapted):
        alike = []
    for start in range(0, len(alike), most):
        yield alike[start : start + most]
    yield from ([number] for number in range(len(adapters)) if number not in alike)


def _write_stacked(
    adapted: AdaptedModel,
    tokenizer: Any,
    adapters: Sequence[Adapter | None],
    prompts: Sequence[Prompt],
    writing: Writing,
    watch: Watch,
) -> list[list[Answer]]:
    weights_KP = torch.stack([(adapter or _zeros(adapted)).weights_P for adapter in adapters])
    stack = Stack(adapted)
    # A residual from before would stay in the model.
    adapted.load_residual(_zeros(adapted))
    stack.bind(weights_KP.to(adapted.weights_P))
    with stack.installed():
        return _write(adapted, tokenizer, prompts, writing, len(adapters), watch)


def _write(
    adapted: AdaptedModel, tokenizer: Any, prompts: Sequence[Prompt], writing: Writing, K: int, watch: Watch
) -> list[list[Answer]]:
    """Return each adapter's answers; the rows of a batch are adapter by adapter, all with the same prompts."""
    way, size = way_of(adapted), max(1, writing.batch_size // K)
    # Longest first: where memory runs out, it does so at once.
    waiting = sorted(enumerate(prompts), key=lambda pair: len(pair[1].tokens), reverse=True)
    longest = max((len(prompt.tokens) + prompt.room for prompt in prompts), default=0)
    found: list[dict[int, Answer]] = [{} for _ in range(K)]
    while waiting:
        taken = _take(waiting, size, longest, pads=way.pads)
        batch = _batch(taken, K, writing, tokenizer)
        try:
            written = decode(adapted, batch, way)
        except SHORT as error:
            if not is_shortage(error):
                raise
            written = []
        # Not in the handler above: the error that it holds keeps the memory of what was under way.
        if not written:
            if adapted.give_back():
                continue
            size = halve(len(taken), adapted.device, "answer a single prompt", mend="shorten it, or write less")
            continue
        answers = iter(_answer(tokens, batch, writing, tokenizer) for tokens in written)
        for own in found:
            own.update((number, next(answers)) for number, _ in taken)
        waiting = waiting[len(taken) :]
        watch(Progress("ask", sum(map(len, written)), len(taken)))
    return [[own[number] for number in range(len(prompts))] for own in found]


def _take(
    waiting: Sequence[tuple[int, Prompt]], size: int, longest: int, *, pads: bool
) -> Sequence[tuple[int, Prompt]]:
    """Return the first few prompts as a batch: of one length, unless it `pads`.

    A batch goes on until its last answer has ended, and no prompt of it may become longer than the longest wants to be:
    the model may have no position for it.
    """
    width, most = len(waiting[0][1].tokens), 0
    for count, (_, prompt) in enumerate(waiting[:size]):
        most = max(most, prompt.room)
        if width + most > longest or (len(prompt.tokens) != width and not pads):
            return waiting[:count]
    return waiting[:size]


def _batch(taken: Sequence[tuple[int, Prompt]], K: int, writing: Writing, tokenizer: Any) -> Batch:
    """Return a batch of K answers to each prompt, adapter by adapter; with a prompt comes its number."""
    assert all(prompt.tokens and prompt.room > 0 for _, prompt in taken), "a prompt without tokens, or without room"
    rooms = [prompt.room for _, prompt in taken]
    choose: Choose = _likeliest
    if writing.sampling.temperature > 0:
        choose = _drawn([number for number, _ in taken] * K, max(rooms), writing.sampling)
    ending = Ending(writing.stops, writing.words)
    return Batch([prompt.tokens for _, prompt in taken] * K, rooms * K, choose, ending, tokenizer)


def _answer(tokens: list[int], batch: Batch, writing: Writing, tokenizer: Any) -> Answer:
    ended = batch.has_ended(tokens)
    text = str(tokenizer.decode(tokens[:-1] if tokens[-1] in writing.stops else tokens, skip_special_tokens=True))
    for word in writing.words:
        text = text.partition(word)[0]
    return Answer(text, tuple(tokens), ended)


def _likeliest(step: int, scores_BV: Tensor) -> Tensor:
    return scores_BV.argmax(-1)


def _drawn(numbers: Sequence[int], steps: int, sampling: Sampling) -> Choose:
    """Return a choice by chance: by numbers from 0 to 1 that come from the seed and from the prompt's own number."""
    chances_BS = torch.stack(
        [
            torch.rand(steps, generator=torch.Generator().manual_seed(derive_seed(sampling.seed, "generation", number)))
            for number in numbers
        ]
    )

    def choose(step: int, scores_BV: Tensor) -> Tensor:
        shares_BV, tokens_BV = (
            (scores_BV.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        )
        sums_BV = shares_BV.cumsum(-1)
        # All whose likelier ones fall short of top_p; the first always.
        sums_BV = sums_BV.where((sums_BV - shares_BV < sampling.top_p), 0.0).cummax(-1).values
        wanted_B1 = chances_BS[:, step : step + 1].to(sums_BV) * sums_BV[:, -1:]
        places_B1 = torch.searchsorted(sums_BV, wanted_B1, right=True).clamp(max=sums_BV.shape[-1] - 1)
        chosen_B: Tensor = tokens_BV.gather(1, places_B1)[:, 0]
        return chosen_B

    return choose


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Streamer that passes on each piece of text as soon as it is complete."""

    def __init__(self, tokenizer: object, say: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of text; transformers calls this."""
        self._say(text + ("\n" if stream_end else ""))
