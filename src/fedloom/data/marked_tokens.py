"""Tokens of a text of which only parts count, with a mark for each token that does.

A text is tokenised once and whole, so that its tokens are those that a model meets; which of them count is told by the
places of their characters. A token that reaches from a prompt into its answer counts: the answer's beginning is in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.data.long_texts import LONGEST_MEAN_TOKEN
from fedloom.errors import DataError

if TYPE_CHECKING:
    from fedloom.data.formats import Form


def tokenize_form(form: Form, tokenizer: Any, wanted: int | None) -> tuple[Tensor, Tensor]:
    """Return a text's first tokens, [T], and which of them count, [T]: more than `wanted` if it has them, or all.

    Raises:
        DataError: an end is to be learnt, and the tokenizer has no token for it.
    """
    length = len(form.text) if wanted is None else LONGEST_MEAN_TOKEN * wanted
    # A long text is cut as a plain one is: twice the wanted tokens keep those that are used away from the cut.
    while len((found := _mark(form, form.text[:length], tokenizer))[0]) < 2 * (wanted or 0) and length < len(form.text):
        length *= 2
    tokens, counted = found
    if length < len(form.text):
        # What counts behind the cut is lost within any block of `wanted` tokens, and is to be seen as such.
        counted[-1] = counted[-1] or form.counted is None or form.counted[-1][1] > length
    elif form.ends:
        end = tokenizer.eos_token_id
        if end is None:
            raise DataError("the tokenizer has no token for an end", where="data.end", mend="set it to false")
        if not tokens or tokens[-1] != end:
            tokens.append(end)
            counted.append(True)
        counted[-1] = True
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(counted, dtype=torch.bool)


def _mark(form: Form, text: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return a text's tokens, and whether each counts."""
    told = {"add_special_tokens": not form.is_whole, "return_attention_mask": False, "verbose": False}
    if form.counted is None:
        tokens = tokenizer(text, **told)["input_ids"]
        return tokens, [True] * len(tokens)
    if not getattr(tokenizer, "is_fast", False):
        return _mark_by_prefix(form, text, tokenizer, told)
    found = tokenizer(text, return_offsets_mapping=True, **told)
    counted, told_to = [], 0
    for begin, end in found["offset_mapping"]:
        # Some tokenizers leave blanks out of the places that they tell, and have an empty one for blanks alone: those
        # stand behind the token before. Special tokens that stand for no text have an empty one at the beginning.
        begin, told_to = min(begin, told_to) if begin == end else begin, max(told_to, end)
        counted.append(any(begin < last and first < end for first, last in form.counted) and begin < end)
    return found["input_ids"], counted


def _mark_by_prefix(form: Form, text: str, tokenizer: Any, told: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Do the same with a tokenizer that does not tell places: by how many tokens a text has up to each."""
    tokens = tokenizer(text, **told)["input_ids"]
    counted = [False] * len(tokens)
    for first, last in form.counted or ():
        begin, end = (_common(tokens, tokenizer(text[:place], **told)["input_ids"]) for place in (first, last))
        if last >= len(text):
            end = len(tokens)
        counted[begin:end] = [True] * (end - begin)
    return tokens, counted


def _common(tokens: list[int], prefix: list[int]) -> int:
    """Return how many tokens two texts have in common at their beginnings."""
    return next(
        (place for place, (one, other) in enumerate(zip(tokens, prefix, strict=False)) if one != other),
        min(len(tokens), len(prefix)),
    )
