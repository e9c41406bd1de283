"""Vocabulary of a tokenizer as llama.cpp reads it in a GGUF file.

It knows byte-level BPE by the way in which texts are split into words first, as GPT-2's and Llama 3's, and BPE over
whole texts with bytes for what is in no token, as SentencePiece's of Llama 2 and Mistral.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.errors import ModelError
from fedloom.model.gguf_layout import CONVERT

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in llama.cpp."""
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS % r"\p{N}{1,3}": "llama-bpe", WORDS % r"\p{N}": "qwen2"}
"""Pattern by which a tokenizer splits words -> llama.cpp's name for it."""
BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
"""Step of a tokenizer that makes blanks visible, as SentencePiece has them."""
PREFIX = "tokenizer.ggml."


def vocabulary_of(tokenizer: Any, size: int) -> dict[str, Any]:
    """Return a tokenizer as the keys of a GGUF file, with their values; unused tokens fill it up to `size`.

    Raises:
        ModelError: llama.cpp has none that splits texts as this one does, as far as fedloom knows.
    """
    told = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = told.get("model") or {}
    split, prefix = _name_split(told, model), _begins_words(told, model)
    if split is None and prefix is None:
        raise ModelError(
            "fedloom knows no tokenizer of llama.cpp that splits texts as this model's does",
            where="model.source",
            mend=CONVERT,
        )
    added = {token["id"]: token for token in told.get("added_tokens", ())}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [by_id.get(number, f"[unused {number}]") for number in range(size)]
    kinds = [NORMAL if number in by_id else UNUSED for number in range(size)]
    for number, token in added.items():
        tokens[number] = token["content"]
        kinds[number] = CONTROL if token["special"] else USER_DEFINED
    if split is None:
        kinds = [_kind_of_piece(*pair, model.get("unk_token")) for pair in zip(tokens, kinds, strict=True)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    first, last = ends_of(tokenizer)
    numbers = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {
        f"{PREFIX}model": "gpt2" if split else "llama",
        f"{PREFIX}pre": split or "default",
        f"{PREFIX}tokens": tokens,
        f"{PREFIX}token_type": kinds,
        **({f"{PREFIX}merges": merges} if split else {f"{PREFIX}scores": _scores_of(tokens, merges)}),
        **{f"{PREFIX}{name}_token_id": number for name, number in numbers.items() if number is not None},
        f"{PREFIX}add_bos_token": first,
        f"{PREFIX}add_eos_token": last,
        f"{PREFIX}add_space_prefix": bool(prefix),
    }


def ends_of(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a tokenizer begins each text with its BOS, and ends it with its EOS."""
    tokens = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and tokens[0] == tokenizer.bos_token_id
    return begins, len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id


def _name_split(told: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the way in which a tokenizer splits texts into words; None where it has none."""
    rule = told.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule]) if rule.get("type") == "Sequence" else [rule]
    *before, last = steps
    # llama.cpp leaves out NFC for the models that have it, as its own converter does.
    if (told.get("normalizer") or {}).get("type") not in (None, "NFC") or model.get("type") != "BPE":
        return None
    # An empty list of merges has no place in a GGUF file.
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or not model["merges"]:
        return None
    match before:
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}] if not last["use_regex"]:
            return SPLITS.get(pattern)
        case [{"type": "Digits", "individual_digits": True}] if last["use_regex"]:
            return "smollm"
        case [] if last["use_regex"]:
            return "gpt-2"
    return None


def _begins_words(told: Mapping[str, Any], model: Mapping[str, Any]) -> bool | None:
    """Return whether a tokenizer like SentencePiece's writes a blank before a text; None where it is not like that."""
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not model["merges"]:
        return None
    match told.get("normalizer"), told.get("pre_tokenizer"):
        case None, {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
            return bool(scheme != "never")
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}, None:
            return True if blanks == BLANKS else None
        case blanks, None if blanks == BLANKS:
            return False
    return None


def _scores_of(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return a score for each token: SentencePiece merges the best first, which is the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _kind_of_piece(token: str, kind: int, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    return BYTE if kind == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token) else kind
