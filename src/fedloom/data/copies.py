"""Copies of held-out documents: exact, near, or with the same prompt. They are found here; `splits` deals with them."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any

from fedloom.data.documents import Document, normalise

NUM_PERMUTATIONS = 128
"""Hash functions of a MinHash."""
SHINGLE_WORDS = 5
"""Words in a run of words that documents are compared by."""
COMPARED_CHARACTERS = 200_000
"""Characters at a document's head by which near duplicates are found; comparing 10 million would take gigabytes."""
LONGEST_MEAN_WORD = 12
"""Characters; where words are longer on average, they are sentences of a script without spaces."""


class HeldOut:
    """An index of the held-out documents of both sides, to find copies among them."""

    def __init__(self, near_duplicate: float) -> None:
        from datasketch import MinHashLSH

        self._near_duplicate = near_duplicate
        self._texts: dict[str, set[str]] = {"central": set(), "holdout": set()}
        self._prompts: dict[str, set[str]] = {"central": set(), "holdout": set()}
        self._shingles: dict[tuple[str, int], set[int]] = {}
        self._text_of: dict[tuple[str, int], str] = {}
        self._met: set[str] = set()
        """Texts and prompts that `was_found` looks for."""
        self._index = MinHashLSH(num_perm=NUM_PERMUTATIONS, params=_bands(near_duplicate))

    def add(self, side: str, documents: Iterable[Document]) -> None:
        """Add documents to a side, `central` or `holdout`; exact copies within it are kept once."""
        for document in documents:
            text = normalise(document.text)
            self._prompts[side].add(normalise(document.prompt))
            if text not in self._texts[side]:
                self._texts[side].add(text)
                key = (side, len(self._shingles))
                self._shingles[key] = _shingles(text)
                self._text_of[key] = text
                self._index.insert(key, _min_hash(self._shingles[key]))

    def find(self, document: Document, *, remember: bool = False) -> dict[str, str]:
        """Return the kind of copy that each side has of a document: "exact", "near", "prompt" or "".

        With `remember`, `was_found` knows of the copies on the side `holdout` from then on.
        """
        text, prompt = normalise(document.text), normalise(document.prompt)
        shingles = _shingles(text)
        candidates = self._index.query(_min_hash(shingles))
        copies = [key for key in candidates if self._similarity(shingles, key) >= self._near_duplicate]
        near = {side for side, _ in copies}
        if remember:
            self._met.update((text, prompt), (self._text_of[key] for key in copies if key[0] == "holdout"))
        asked = {side for side, prompts in self._prompts.items() if prompt and prompt in prompts}
        return {
            side: "exact" if text in texts else "near" if side in near else "prompt" if side in asked else ""
            for side, texts in self._texts.items()
        }

    def was_found(self, document: Document) -> bool:
        """Return whether a document of the side `holdout` is a copy of one that was to be remembered."""
        text, prompt = normalise(document.text), normalise(document.prompt)
        return text in self._met or bool(prompt and prompt in self._met)

    def _similarity(self, shingles: set[int], key: tuple[str, int]) -> float:
        """Return the Jaccard similarity: the size of the intersection over that of the union."""
        other = self._shingles[key]
        return len(shingles & other) / len(shingles | other)


@cache  # chosen by some thousand integrals
def _bands(near_duplicate: float) -> tuple[int, int]:
    """Return the number of bands of the index, and of hash values in each, for documents as similar as that."""
    from datasketch import MinHashLSH

    # Candidates are checked exactly, so the index may propose too many but must miss none: it looks well below the
    # threshold (at the threshold itself it would miss one in ten), and its weights (false positives, false negatives)
    # count a missed copy nine times.
    chosen = MinHashLSH(threshold=0.75 * near_duplicate, num_perm=NUM_PERMUTATIONS, weights=(0.1, 0.9))
    return int(chosen.b), int(chosen.r)


def _shingles(text: str) -> set[int]:
    """Return hashes of every run of words, or of characters in a script without spaces between words."""
    text = text[:COMPARED_CHARACTERS]
    words = re.findall(r"\w+|[^\w\s]", text)
    if len(text) > LONGEST_MEAN_WORD * len(words):
        words = list(text)
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    # Not hash(): Python salts it, so the candidates would differ from process to process.
    return {zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode()) for start in starts}


def _min_hash(shingles: set[int]) -> Any:
    sketch = _empty_sketch().copy()
    sketch.update_batch(shingles)
    return sketch


@cache  # its hash functions are drawn, which takes longer than a document does
def _empty_sketch() -> Any:
    from datasketch import MinHash

    # Shingles are 32-bit hashes already: hashed again by SHA-1, as is the default, they would cost more and gain
    # nothing.
    return MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)
