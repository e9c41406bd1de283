"""Questions of tasks that stand among the documents that are trained on: an adapter may know their answers by heart.

They are compared as the audit of a split compares exact copies: in Unicode NFC and with white space folded. A question
inside a longer text, or in other words, is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from fedloom.data.documents import normalise
from fedloom.data.splits import ClientDocuments
from fedloom.data.task_rows import TaskRows

DIGEST_BYTES = 8
"""Bytes of a text's hash: of a million texts and as many questions, two others have the same once in ten million."""


def digest_trained(clients: Iterable[ClientDocuments]) -> frozenset[bytes]:
    """Return hashes of what clients train on: of each document the text, what is asked in it, and its columns."""
    return frozenset(
        _digest(text)
        for part in clients
        for document in part.train
        for text in (document.text, document.prompt, *_texts_in(document.row))
        if text.strip()
    )


def count_seen(rows: TaskRows, trained: frozenset[bytes]) -> int:
    """Return how many of a task's questions are among what is trained on.

    A question is there as it is asked, alone or with an answer behind it; or with all the columns that it is made of.
    """
    return sum(
        any(_digest(text) in trained for text in (question.prompt, *_answered(question.prompt, question.answers)))
        or (bool(columns) and all(_digest(text) in trained for text in columns))
        for question, columns in zip(rows.questions, rows.columns, strict=True)
    )


def _answered(prompt: str, answers: Iterable[str]) -> Iterator[str]:
    for answer in answers:
        yield f"{prompt} {answer}"


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text inside a row, in no order: those of a conversation's messages too."""
    # Not by calling itself: a row may be nested more deeply than functions may.
    left = [value]
    while left:
        match left.pop():
            case str() as text:
                yield text
            case dict() as parts:
                left += parts.values()
            case list() as parts:
                left += parts


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normalise(text).encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()
