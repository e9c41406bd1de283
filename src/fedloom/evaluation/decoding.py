"""Tokens behind a batch of prompts, in the fastest way whose scores are those of a plain pass.

The plain way computes the whole text anew for each token, by the call that training makes. Transformers' own `generate`
keeps what was computed of a text, and takes prompts of several lengths at once, filled up on the left. For most models
that is the same; for some it is silently not (positions counted from the filling, a recurrent state that takes it in),
so each model is tried once, and does without the short cut that is wrong for it.

Letters: B prompts of a batch, T tokens, V vocabulary, S steps, P adapter parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.stacked_lora import Stack, can_stack
from fedloom.model.attention import with_masks
from fedloom.training.assumptions import NOISE, noise_of

Choose = Callable[[int, Tensor], Tensor]
"""Choice of the next tokens, [B], from the number of those before it and their scores, [B, V]."""


@dataclass(frozen=True)
class Way:
    """Short cuts that lead to the scores of a plain pass with a model, as was tried."""

    keeps: bool = False
    """True where what was computed of a text can be kept for its next token."""
    pads: bool = False
    """True where prompts of several lengths can share a batch, filled up on the left."""


@dataclass(frozen=True)
class Ending:
    """End of an answer: one of these tokens, or one of these words in its text."""

    stops: Sequence[int] = ()
    words: Sequence[str] = ()


class Batch:
    """Prompts, and their answers while they are written: how long each may be, and where it ended."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        choose: Choose,
        ending: Ending | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Take prompts and the most tokens of each answer; a tokenizer reads the words that end one."""
        self.prompts, self.rooms = prompts, rooms
        self.width = max(map(len, prompts))
        self.lengths = list(rooms)
        """Tokens of each answer, the one that ended it among them."""
        self._choose, self._ending, self._tokenizer = choose, ending or Ending(), tokenizer
        # A token shows one byte or more, so a word has no more tokens than bytes; one before it, since some tokenizers
        # leave out a space at the start of a text.
        self._tail = 1 + max((len(word.encode()) for word in self._ending.words), default=0)
        self._open = set(range(len(prompts)))

    def tokens(self, filling: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the prompts, [B, T], filled up on the left, and the mask that is 0 there."""
        rows = [[filling] * (self.width - len(prompt)) + list(prompt) for prompt in self.prompts]
        masks = [[0] * (self.width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        return torch.tensor(rows, device=device), torch.tensor(masks, device=device)

    def choose(self, tokens_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """Return the next tokens, [B]."""
        return self._choose(tokens_BT.shape[1] - self.width, scores_BV)

    def look(self, tokens_BT: Tensor) -> Tensor:
        """Return which answers have ended, [B], and remember where."""
        written_BT = tokens_BT[:, self.width :]
        step = written_BT.shape[1]
        # Read together: a GPU is waited for once.
        for row, tail in enumerate(written_BT[:, -self._tail :].tolist()):
            if row in self._open and (step >= self.rooms[row] or self.has_ended(tail)):
                self.lengths[row] = step
                self._open.remove(row)
        return torch.tensor([row not in self._open for row in range(len(tokens_BT))], device=tokens_BT.device)

    def has_ended(self, answer: list[int]) -> bool:
        """Return whether an answer's last token ends it."""
        if answer[-1] in self._ending.stops:
            return True
        if not self._ending.words:
            return False
        text = self._tokenizer.decode(answer[-self._tail :], skip_special_tokens=True)
        return any(word in text for word in self._ending.words)


def decode(adapted: AdaptedModel, batch: Batch, way: Way, streamer: BaseStreamer | None = None) -> list[list[int]]:
    """Return the tokens behind each prompt of a batch, up to its end, by the model as it is now."""
    with torch.inference_mode(), _quiet(adapted):
        write = _write_keeping if way.keeps else _write_plainly
        tokens_BT = write(adapted, batch, streamer)
    return [row[:length] for row, length in zip(tokens_BT[:, batch.width :].tolist(), batch.lengths, strict=True)]


def _write_plainly(adapted: AdaptedModel, batch: Batch, streamer: BaseStreamer | None) -> Tensor:
    tokens_BT, mask_BT = batch.tokens(0, adapted.device)
    assert mask_BT.all(), "a plain pass has no filling"
    if streamer:
        streamer.put(tokens_BT.cpu())
    while True:
        next_B = batch.choose(tokens_BT, adapted.logits(tokens_BT)[:, -1])
        tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
        if streamer:
            streamer.put(next_B.cpu())
        if batch.look(tokens_BT).all():
            break
    if streamer:
        streamer.end()
    return tokens_BT


def _write_keeping(adapted: AdaptedModel, batch: Batch, streamer: BaseStreamer | None) -> Tensor:
    tokens_BT, mask_BT = batch.tokens(_filling(adapted), adapted.device)
    with with_masks(adapted.base) if not mask_BT.all() else nullcontext():
        found: Tensor = adapted.outer.generate(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(batch.rooms),
            do_sample=False,
            logits_processor=[_Chooser(batch)],
            stopping_criteria=[_Looker(batch)],
            streamer=streamer,
        )
    return found


class _Chooser(LogitsProcessor):  # type: ignore[misc]
    """Scores that leave the likeliest token no other choice than the batch's."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_B = self._batch.choose(input_ids, scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)


class _Looker(StoppingCriteria):  # type: ignore[misc]
    """End of a batch's answers, as transformers asks for it."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self._batch.look(input_ids)


@contextmanager
def _quiet(adapted: AdaptedModel) -> Iterator[None]:
    """Have a model write without dropout, and by nothing that its files say of writing.

    Many models bring settings of their own, a penalty for repetition for one: scores would be others than those of a
    pass.
    """
    adapted.model.eval()
    holders = [adapted.base, adapted.model]  # PEFT's model gives its own settings to the one inside
    before = [getattr(holder, "generation_config", None) for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        with warnings.catch_warnings():
            # Transformers warns about its own settings.
            warnings.simplefilter("ignore")
            yield
    finally:
        for holder, settings in zip(holders, before, strict=True):
            holder.generation_config = settings


def _filling(adapted: AdaptedModel) -> int:
    """Return the token to fill up with: the one by which some models count positions, or any."""
    own = getattr(adapted.base.config.get_text_config(), "pad_token_id", None)
    return own if isinstance(own, int) and 0 <= own < adapted.loss_head.vocabulary_size else 0


_TRIED: WeakKeyDictionary[AdaptedModel, dict[bool, Way]] = WeakKeyDictionary()
"""Ways that were found, with a trained prompt before the text and without one."""
_STACKS: WeakKeyDictionary[AdaptedModel, bool] = WeakKeyDictionary()
_LENGTHS = (12, 12, 5, 1)
"""Tokens of the prompts that a model is tried with."""
_STEPS = 3
"""Tokens written behind them: the first follows from the prompt, the others from what was kept of it."""


def way_of(adapted: AdaptedModel) -> Way:
    """Return the way to write with a model, which is tried once: in some 20 passes of a few tokens."""
    ways, prompted = _TRIED.setdefault(adapted, {}), adapted.has_prompt and not adapted.is_base
    if prompted not in ways:
        ways[prompted] = _try(adapted)
    return ways[prompted]


def stacks(adapted: AdaptedModel) -> bool:
    """Return whether several adapters can share a pass, each with prompts of its own; tried once, in 9 passes."""
    if adapted not in _STACKS:
        _STACKS[adapted] = can_stack(adapted) and _try_two(adapted)
    return _STACKS[adapted]


def _try(adapted: AdaptedModel) -> Way:
    generator = torch.Generator().manual_seed(0)
    size = adapted.loss_head.vocabulary_size
    prompts = [torch.randint(size, (length,), generator=generator).tolist() for length in _LENGTHS]
    plain_BSV = torch.cat([_scores(adapted, [prompt], Way()) for prompt in prompts])
    change = float((plain_BSV[1] - plain_BSV[0]).abs().mean())

    def agrees(rows: slice, way: Way) -> bool:
        return _agree(adapted, prompts[rows], way, plain_BSV[rows], change)

    # Two of one length: some mix the rows of what they keep. A single token after another text: some take it for one of
    # that text's, whose state they still have.
    tried = (slice(2), slice(2, 3), slice(3, 4))
    way = Way(keeps=all(agrees(rows, Way(keeps=True)) for rows in tried))
    return replace(way, pads=way.keeps and agrees(slice(4), way))


def _agree(adapted: AdaptedModel, prompts: list[list[int]], way: Way, expected_BSV: Tensor, change: float) -> bool:
    """Return whether scores are the expected ones, but for a share of a true change that rounding may make."""
    # The model's own code may stop at anything.
    try:
        found_BSV = _scores(adapted, prompts, way)
    except Exception:
        return False
    # Transformers hands scores on in float32. Of 170 tiny families, those that agree are below 3e-5, others above 5e-3.
    rounding = change * max(noise_of(adapted), NOISE[torch.float32])
    return bool((found_BSV - expected_BSV).abs().mean(dim=(1, 2)).max() <= rounding)


def _scores(adapted: AdaptedModel, prompts: list[list[int]], way: Way) -> Tensor:
    """Return the scores of each step behind prompts, [B, S, V]; the tokens that are written are always the same."""
    found: list[Tensor] = []

    def choose(step: int, scores_BV: Tensor) -> Tensor:
        found.append(scores_BV.double())
        return torch.full((len(prompts),), 1 + step, device=scores_BV.device)

    decode(adapted, Batch(prompts, [_STEPS] * len(prompts), choose), way)
    return torch.stack(found, dim=1)


def _try_two(adapted: AdaptedModel) -> bool:
    """Return whether two adapters in one pass give the scores that each gives alone."""
    way, prompt = way_of(adapted), [*range(_LENGTHS[0])]
    kept_P = adapted.weights_P.detach().clone()
    # As far from the base as trained ones.
    drawn_2P = 0.05 * torch.randn(2, len(kept_P), generator=torch.Generator().manual_seed(0)).to(kept_P)
    alone = []
    try:
        for weights_P in drawn_2P:
            adapted.weights_P.data.copy_(weights_P)
            alone.append(_scores(adapted, [prompt], Way()))
    finally:
        adapted.weights_P.data.copy_(kept_P)
    change = float((alone[1] - alone[0]).abs().mean())
    stack = Stack(adapted)
    stack.bind(drawn_2P)
    with stack.installed():
        return _agree(adapted, [prompt, prompt], way, torch.cat(alone), change)
