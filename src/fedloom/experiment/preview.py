"""Preview of what a model will see and of what it will learn, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedloom.text import count, list_some

if TYPE_CHECKING:
    from fedloom.data.documents import Document
    from fedloom.data.tokens import TokenBlocks
    from fedloom.recipe.data_section import Data

BARS = 8
"""Bars of a histogram."""
BAR_WIDTH = 40
"""Characters of the longest bar."""
COLUMNS_SHOWN = 10
"""Columns without use that are named."""
WHAT = {"completion": "the answer", "assistant": "what the assistant says", "all": "all of it"}


@dataclass(frozen=True)
class Piece:
    """Piece of a block as a model sees it, and whether it counts in the loss."""

    text: str
    counts: bool
    begins: bool
    """True where a text begins behind another one in the same block."""


def pieces_of(blocks: TokenBlocks, row: int, tokenizer: Any) -> list[Piece]:
    """Return a block's real tokens as text again, in pieces that count and pieces that do not."""
    length = int(blocks.lengths_N[row])
    tokens, marks = blocks.tokens_NT[row, :length].tolist(), blocks.counted_NT[row, :length].tolist()
    texts = [1] * length if blocks.texts_NT is None else blocks.texts_NT[row, :length].tolist()
    pieces, before = [], 1
    for (text, counts), run in groupby(zip(texts, marks, tokens, strict=True), key=lambda place: place[:2]):
        pieces.append(Piece(tokenizer.decode([token for *_, token in run]), counts, text != before))
        before = text
    return pieces


def describe_learning(data: Data, parts: Sequence[TokenBlocks], others: Sequence[str]) -> str:
    """Say what is learnt of all clients' blocks, and what is lost on the way; an empty text for plain ones.

    `others` are the columns that no template uses.
    """
    return "" if data.is_plain and not data.ends and data.window != "pack" else "; ".join(_facts(data, parts, others))


def describe_client(
    data: Data, blocks: TokenBlocks, documents: Sequence[Document], others: Sequence[str]
) -> Iterator[str]:
    """Yield lines about what one client trains on: shares, what was lost, repeated prompts, lengths."""
    yield from _facts(data, [blocks], others)
    if repeated := _repeated(documents):
        yield f"{count(repeated, 'document')} with a prompt that another one has"
    lengths = _lengths_of_texts(blocks)
    yield f"tokens of {count(len(lengths), 'text')}, of {data.max_length} at most:"
    yield from histogram(lengths, data.max_length)


def _lengths_of_texts(blocks: TokenBlocks) -> list[int]:
    """Return the tokens of every text: of a block, where it is not shared."""
    if blocks.texts_NT is None:
        return list(blocks.lengths_N.tolist())
    return [length for texts_T in blocks.texts_NT for length in texts_T.bincount()[1:].tolist()]


def histogram(lengths: Sequence[int], most: int) -> Iterator[str]:
    """Yield a line for each range of lengths, with a bar as long as it has many."""
    width = -(-most // BARS)
    bars = Counter((length - 1) // width for length in lengths)
    largest = max(bars.values(), default=1)
    for bar in range(-(-most // width)):
        drawn = "█" * -(-bars[bar] * BAR_WIDTH // largest)
        yield f"{bar * width + 1:>7,}–{min((bar + 1) * width, most):<7,} {drawn} {bars[bar]:,}"


def _facts(data: Data, parts: Sequence[TokenBlocks], others: Sequence[str]) -> Iterator[str]:
    counted, real = (sum(part.num_tokens for part in parts), sum(int(part.lengths_N.sum()) for part in parts))
    share = f", {counted:,} of {real:,} tokens ({100 * counted / max(1, real):.0f} %)" if data.learns != "all" else ""
    share = share if parts else ""  # of clients elsewhere
    yield f"{WHAT[data.learns]}{' with its end' if data.ends else ''}{share}"
    if data.window == "pack" and parts:
        texts, blocks = sum(part.num_texts for part in parts), sum(map(len, parts))
        full = 100 * real / max(1, blocks * data.max_length)
        yield f"{count(texts, 'text')} packed into {count(blocks, 'block')}, {full:.0f} % full"
    if cut := sum(part.cut for part in parts):
        yield f"{count(cut, 'answer') if data.learns != 'all' else count(cut, 'text')} cut at data.max_length"
    if unanswered := sum(part.unanswered for part in parts):
        yield f"{count(unanswered, 'document')} dropped: nothing of the answer within data.max_length"
    if others:
        yield f"columns without use: {list_some(others, COLUMNS_SHOWN)}"


def _repeated(documents: Sequence[Document]) -> int:
    """Return how many documents have a prompt that an earlier one has."""
    prompts = [" ".join(document.prompt.split()) for document in documents if document.prompt]
    return len(prompts) - len(set(prompts))
