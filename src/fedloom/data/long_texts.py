"""Tokens of a text of any length, in memory that does not grow with it beyond the tokens themselves.

A tokenizer holds a text many times over while it is at work: a text of 10 million characters takes it gigabytes. Most
split a text into words first, from left to right, and make tokens of each word by itself. For those, a long text is
tokenised in pieces that overlap and are joined where a word begins in both: what lies behind such a place does not
depend on what lies before it. Texts of other tokenizers are tokenised whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST_MEAN_TOKEN = 100
"""Characters for each wanted token in the first head of a document that is tried for its first block."""
PIECE = 200_000
"""Characters that are tokenised at once."""
OVERLAP = 4_000
"""Characters that a piece has in common with the next."""
AGREEING = 32
"""Tokens behind a place that two pieces must have in common there."""

BY_CHARACTERS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"})
"""Splitters of which each cut depends on the characters beside it alone."""
NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend"})
"""Changes of a text in which no character depends on a far one."""


class Token(NamedTuple):
    """A token with its place in the text."""

    begin: int
    end: int
    token: int
    starts_word: bool


def tokenize_all(text: str, tokenizer: Any) -> Tensor:
    """Return every token of a text, [T], those included that the tokenizer puts before and behind a text."""
    pieces = _tokenize_in_pieces(text, tokenizer) if len(text) > PIECE and splits_words_first(tokenizer) else None
    if pieces is None:
        pieces = [torch.tensor(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])]
    return torch.cat([piece.to(torch.int64) for piece in pieces])


@lru_cache(maxsize=1)  # its whole vocabulary is written out to be looked at
def splits_words_first(tokenizer: Any) -> bool:
    """Return whether a tokenizer splits a text into words from left to right, and makes tokens of each by itself."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = parts["model"], parts["normalizer"]
    splitters = _parts_of(parts["pre_tokenizer"], "pretokenizers")
    by_bytes = any(part["type"] == "ByteLevel" for part in splitters)
    # What has no token is left out by such a model, and places behind it are told wrongly.
    drops = model["type"] == "BPE" and not by_bytes and not model.get("unk_token") and not model.get("byte_fallback")
    if drops or any(part["type"] not in NORMALIZERS for part in _parts_of(normalizer, "normalizers")):
        return False
    # Cuts by characters, then at most one by a pattern: with two, a word of the second may begin inside of one of the
    # first that was cut elsewhere.
    while splitters and splitters[0]["type"] in BY_CHARACTERS:
        splitters = splitters[1:]
    if splitters and splitters[-1]["type"] == "ByteLevel" and not splitters[-1].get("use_regex", True):
        splitters = splitters[:-1]
        if not splitters:
            return False
    return len(splitters) <= 1 and all(map(_splits_by_pattern, splitters)) and parts["pre_tokenizer"] is not None


def _splits_by_pattern(part: Mapping[str, Any]) -> bool:
    match part["type"]:
        case "ByteLevel":
            return bool(part.get("use_regex", True))
        case "Metaspace":
            return bool(part.get("split", True))
        case "Split":
            pattern = part["pattern"].get("Regex") or part["pattern"].get("String", "")
            return part["behavior"] in ("Isolated", "Removed") and "(?<" not in pattern
    return False


def _parts_of(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Return a part of a tokenizer as the list of what it is made of."""
    if part is None:
        return []
    return [inner for one in part[name] for inner in _parts_of(one, name)] if part["type"] == "Sequence" else [part]


def _tokenize_in_pieces(text: str, tokenizer: Any) -> list[Tensor] | None:
    """Return the tokens in several parts, or None where no word begins in two pieces alike or marks are not clear."""
    if (marks := _find_marks(text[:OVERLAP], tokenizer)) is None:
        return None
    before, behind = marks
    parts = [torch.tensor(before)]
    tokens, start = _tokenize_piece(text, 0, tokenizer), PIECE - OVERLAP
    while start + OVERLAP < len(text):
        following = _tokenize_piece(text, start, tokenizer)
        if (seam := _find_seam(tokens, following, start + OVERLAP // 2)) is None:
            return None
        parts.append(torch.tensor([token.token for token in tokens[: seam[0]]]))
        tokens, start = following[seam[1] :], start + PIECE - OVERLAP
    return [*parts, torch.tensor([token.token for token in tokens]), torch.tensor(behind)]


def _find_marks(text: str, tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Return the tokens that are put before and behind every text; None where they can't be told from a text's own."""
    marked = tokenizer(text, verbose=False)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    places = [place for place in range(len(marked) - len(plain) + 1) if marked[place : place + len(plain)] == plain]
    return (marked[: places[0]], marked[places[0] + len(plain) :]) if plain and len(places) == 1 else None


def _tokenize_piece(text: str, start: int, tokenizer: Any) -> list[Token]:
    found = tokenizer(
        text[start : start + PIECE],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    words = found.word_ids()
    starts = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
    return [
        Token(start + begin, start + end, token, starts_word)
        for (begin, end), token, starts_word in zip(found["offset_mapping"], found["input_ids"], starts, strict=True)
    ]


def _find_seam(tokens: list[Token], following: list[Token], middle: int) -> tuple[int, int] | None:
    """Return the places in two lists at which the second may go on for the first, near a character of the text."""
    begins = following[0].begin if following else middle
    # Near the beginning of the second piece, a word may be the rest of one that was cut.
    places = {
        token: place
        for place, token in enumerate(takewhile(lambda token: token.begin < begins + OVERLAP, following))
        if token.starts_word and place
    }
    able = [place for place, token in enumerate(tokens) if token in places]
    for here in sorted(able, key=lambda place: abs(tokens[place].begin - middle)):
        there = places[tokens[here]]
        if len(tokens) - here > AGREEING and tokens[here : here + AGREEING] == following[there : there + AGREEING]:
            return here, there
    return None
