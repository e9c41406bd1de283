"""Tokens of a text of any length, in memory that does not grow with it beyond the tokens themselves.

A tokenizer holds a text many times over while it is at work: a text of 10 million characters takes it gigabytes. Here a
long one is tokenised in pieces that overlap, and joined only where two pieces agree: on the same tokens at the same
places, far from both cuts.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

PIECE = 200_000
"""Characters that are tokenised at once."""
OVERLAP = 4_000
"""Characters that a piece has in common with the next."""
AGREEING = 32
"""Tokens in a row that two pieces must have in common."""

Token = tuple[int, int, int]
"""First character in the text, the one behind the last, and the token."""


def tokenize_all(text: str, tokenizer: Any) -> Tensor:
    """Return every token of a text, [T], those included that the tokenizer puts before and behind a text."""
    pieces = (
        _tokenize_in_pieces(text, tokenizer) if len(text) > PIECE and getattr(tokenizer, "is_fast", False) else None
    )
    if pieces is None:
        pieces = [torch.tensor(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])]
    return torch.cat([piece.to(torch.int64) for piece in pieces])


def _tokenize_in_pieces(text: str, tokenizer: Any) -> list[Tensor] | None:
    """Return the tokens in several parts, or None where two pieces do not agree or the tokenizer marks a text oddly."""
    if (marks := _find_marks(tokenizer)) is None:
        return None
    before, behind = marks
    parts = [torch.tensor(before)]
    tokens, start = _tokenize_piece(text, 0, tokenizer), PIECE - OVERLAP
    while start + OVERLAP < len(text):
        following = _tokenize_piece(text, start, tokenizer)
        if (seam := _find_seam(tokens, following, start + OVERLAP // 2)) is None:
            return None
        parts.append(torch.tensor([token for _, _, token in tokens[: seam[0]]]))
        tokens, start = following[seam[1] :], start + PIECE - OVERLAP
    return [*parts, torch.tensor([token for _, _, token in tokens]), torch.tensor(behind)]


def _find_marks(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Return the tokens that are put before and behind every text."""
    marked = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for place in range(len(marked) - len(plain) + 1):
        if plain and marked[place : place + len(plain)] == plain:
            return marked[:place], marked[place + len(plain) :]
    return None


def _tokenize_piece(text: str, start: int, tokenizer: Any) -> list[Token]:
    found = tokenizer(
        text[start : start + PIECE],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    places = found["offset_mapping"]
    return [(start + a, start + b, token) for (a, b), token in zip(places, found["input_ids"], strict=True)]


def _find_seam(tokens: list[Token], following: list[Token], middle: int) -> tuple[int, int] | None:
    """Return the places in two lists at which the second may go on for the first, near a character of the text."""
    begins = following[0][0] if following else middle
    overlapping = next((place for place, token in enumerate(tokens) if token[0] >= begins), len(tokens))
    nearest = sorted(range(overlapping, len(tokens) - AGREEING), key=lambda place: abs(tokens[place][0] - middle))
    overlap = takewhile(lambda token: token[0] < begins + OVERLAP, following)
    places = {token: place for place, token in enumerate(overlap)}
    for here in nearest:
        there = places.get(tokens[here])
        if there is not None and tokens[here : here + AGREEING] == following[there : there + AGREEING]:
            return here + AGREEING // 2, there + AGREEING // 2
    return None
