"""Blocks of tokens: documents cut to a fixed length, padded on the right, with the positions that count in the loss.

Padding never counts, and then attention needs no mask: a real token never looks at padding that stands to its right.
A recipe that replays a program which counted padding masks it, as that program did: what stands at padding depends on
what it sees, and some models take their positions from the mask.

Letters: N blocks, B sequences in a batch, T tokens in a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.data.long_texts import tokenize_all
from fedloom.errors import DataError

if TYPE_CHECKING:
    from fedloom.data.documents import Document
    from fedloom.recipe.sections import Data

IGNORED = -100
"""Label of a position that does not count, the default of torch's cross-entropy."""

LONGEST_MEAN_TOKEN = 100
"""Characters for each wanted token in the first head of a document that is tried for its first block."""


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of one client, or of a hold-out."""

    tokens_NT: Tensor
    """Tokens as int64, padded on the right."""
    lengths_N: Tensor
    """Real tokens of each block, as int64."""
    counted_N: Tensor
    """Positions of each block that count as labels; more than its length only where padding counts."""
    dropped: int = 0
    """Documents that gave no block: fewer than two tokens leave nothing to predict."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.tokens_NT.shape[0]

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens, padding left out."""
        return int(self.lengths_N.sum())

    @property
    def pad_counts(self) -> bool:
        """Return whether some padding counts in the loss."""
        return bool((self.counted_N > self.lengths_N).any())


@dataclass(frozen=True)
class Batch:
    """Input of a step: tokens, the labels of the same positions, and the number of real tokens."""

    tokens_BT: Tensor
    labels_BT: Tensor
    """Tokens once more, with IGNORED at positions that do not count; the loss shifts them by one."""
    mask_BT: Tensor | None
    """Attention mask, 1 at real tokens and 0 at padding; None where no padding counts, and so no mask is needed."""
    num_tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        mask_BT = self.mask_BT if self.mask_BT is None else self.mask_BT.to(device)
        return Batch(self.tokens_BT.to(device), self.labels_BT.to(device), mask_BT, self.num_tokens)


def join_blocks(parts: Sequence[TokenBlocks]) -> TokenBlocks:
    """Join the blocks of several into one, in their order."""
    return TokenBlocks(
        tokens_NT=torch.cat([part.tokens_NT for part in parts]),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        counted_N=torch.cat([part.counted_N for part in parts]),
        dropped=sum(part.dropped for part in parts),
    )


def distinct_blocks(blocks: TokenBlocks) -> set[bytes]:
    """Return the real tokens of each block as bytes, each once: all that a model sees of them."""
    return set(_real_tokens(blocks))


def without_blocks(blocks: TokenBlocks, others: set[bytes]) -> TokenBlocks:
    """Return the blocks whose real tokens are not among the others'."""
    # Documents without a copy can still give the same block: truncation keeps no more than their common beginning.
    rows = torch.tensor([tokens not in others for tokens in _real_tokens(blocks)], dtype=torch.bool)
    return replace(
        blocks, tokens_NT=blocks.tokens_NT[rows], lengths_N=blocks.lengths_N[rows], counted_N=blocks.counted_N[rows]
    )


def take_batch(blocks: TokenBlocks, rows: Tensor) -> Batch:
    """Return the blocks of these rows as a batch, cut to the widest of them."""
    counted_B, lengths_B = blocks.counted_N[rows], blocks.lengths_N[rows]
    # Padding beyond the widest block would be computed and then ignored.
    places_T = torch.arange(int(counted_B.max()))
    tokens_BT = blocks.tokens_NT[rows, : len(places_T)]
    labels_BT = tokens_BT.masked_fill(places_T >= counted_B[:, None], IGNORED)
    mask_BT = (places_T < lengths_B[:, None]).long() if blocks.pad_counts else None
    return Batch(tokens_BT, labels_BT, mask_BT, int(lengths_B.sum()))


def tokenize_documents(documents: Iterable[Document], tokenizer: Any, data: Data) -> TokenBlocks:
    """Cut documents into blocks of at most `max_length` tokens: the first of each document, or all, by the recipe.

    A tokenizer needs no padding token: positions of padding are masked by their place, not recognised by their token.
    """
    pad = 0  # any token would do: padding is masked, unless it is to count
    if data.pad_in_loss:
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    pieces: list[Tensor] = []
    dropped = 0
    for document in documents:
        # Cut here and not by the tokenizer, some of which cut at the left.
        if data.window == "truncate":
            blocks = [_tokenize_head(document.text, tokenizer, data.max_length)[: data.max_length]]
        else:
            blocks = list(tokenize_all(document.text, tokenizer).split(data.max_length))
        usable = [block for block in blocks if len(block) > 1]
        dropped += not usable
        pieces.extend(usable)
    lengths_N = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    tokens_NT = torch.full((len(pieces), data.max_length), pad, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        tokens_NT[row, : len(piece)] = piece
    counted_N = torch.full_like(lengths_N, data.max_length) if data.pad_in_loss else lengths_N
    return TokenBlocks(tokens_NT, lengths_N, counted_N, dropped)


def _tokenize_head(text: str, tokenizer: Any, wanted: int) -> Tensor:
    """Return a text's first tokens, at least `wanted` if it has them, in a time that does not grow with its length."""
    length = LONGEST_MEAN_TOKEN * wanted
    # The head is cut anywhere, perhaps through a word, which changes the tokens near its end: twice the wanted number
    # keeps those that are used away from the cut.
    while len(tokens := tokenize_all(text[:length], tokenizer)) < 2 * wanted and length < len(text):
        length *= 2
    return tokens


def _real_tokens(blocks: TokenBlocks) -> Iterator[bytes]:
    """Yield each block's tokens without its padding, as bytes that can be compared."""
    for tokens_T, length in zip(blocks.tokens_NT, blocks.lengths_N.tolist(), strict=True):
        yield tokens_T[:length].numpy().tobytes()


def check_vocabulary(tokens: Tensor, tokenizer: Any, vocabulary_size: int) -> None:
    """Refuse tokens that the base model has no embedding for.

    Raises:
        DataError: the tokenizer and the model do not belong together; names the token where it is a special one.
    """
    # On a GPU an index out of range is found later, without a word of its cause, and spoils the process.
    if tokens.numel() and (largest := int(tokens.max())) >= vocabulary_size:
        special = f" ({tokenizer.convert_ids_to_tokens(largest)})" if largest in tokenizer.all_special_ids else ""
        raise DataError(
            f"token {largest}{special} is outside the base model's vocabulary of {vocabulary_size}",
            where="model.source",
            mend="use a model and the tokenizer that belongs to it",
        )


@dataclass(frozen=True)
class ClientBlocks:
    """Token blocks of one client: those it trains on, and its own hold-out."""

    train: TokenBlocks
    holdout: TokenBlocks
