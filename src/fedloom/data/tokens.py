"""Documents become fixed-length blocks of tokens, padded on the right, with what counts in the loss.

Padding never counts, unless a recipe replays a program that counted it. Attention needs no mask: under a causal
mask a real token never looks at padding that stands to its right.

Letters: N blocks, B sequences in a batch, T tokens in a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.errors import DataError

if TYPE_CHECKING:
    from fedloom.data.documents import Document
    from fedloom.recipe.sections import Data

IGNORED = -100
"""The label of a position that does not count, as in torch's cross-entropy."""


LONGEST_MEAN_TOKEN = 1000
"""Characters a token, of the head of a document that is tokenised where only its first block is wanted."""


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of one client, or of a hold-out.

    `tokens_NT` is right-padded int64, `lengths_N` the tokens of each block that are real, `counted_N` the positions
    of each block that count as labels (more than its length only where padding is to count).
    """

    tokens_NT: Tensor
    lengths_N: Tensor
    counted_N: Tensor
    dropped: int = 0
    """Documents that gave no block: fewer than two tokens leave nothing to predict."""

    def __len__(self) -> int:
        return self.tokens_NT.shape[0]

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.lengths_N.sum())


@dataclass(frozen=True)
class Batch:
    """A step's input `tokens_BT` and the labels of the same positions `labels_BT` (IGNORED where none counts)."""

    tokens_BT: Tensor
    labels_BT: Tensor
    num_tokens: int

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens_BT.to(device), self.labels_BT.to(device), self.num_tokens)


def join_blocks(parts: Sequence[TokenBlocks]) -> TokenBlocks:
    """All blocks of several as those of one."""
    return TokenBlocks(
        tokens_NT=torch.cat([part.tokens_NT for part in parts]),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        counted_N=torch.cat([part.counted_N for part in parts]),
        dropped=sum(part.dropped for part in parts),
    )


def distinct_blocks(blocks: TokenBlocks) -> set[bytes]:
    """What a model sees of these blocks: their real tokens."""
    return set(_real_tokens(blocks))


def without_blocks(blocks: TokenBlocks, others: set[bytes]) -> TokenBlocks:
    """The blocks whose tokens are not among the others': truncation makes one of two files that begin alike."""
    rows = torch.tensor([tokens not in others for tokens in _real_tokens(blocks)], dtype=torch.bool)
    return replace(
        blocks, tokens_NT=blocks.tokens_NT[rows], lengths_N=blocks.lengths_N[rows], counted_N=blocks.counted_N[rows]
    )


def take_batch(blocks: TokenBlocks, rows: Tensor) -> Batch:
    """The blocks of these rows, cut to the widest of them: padding that nobody needs is not computed."""
    counted_B = blocks.counted_N[rows]
    width = int(counted_B.max())
    tokens_BT = blocks.tokens_NT[rows, :width]
    labels_BT = tokens_BT.masked_fill(torch.arange(width) >= counted_B[:, None], IGNORED)
    return Batch(tokens_BT, labels_BT, int(blocks.lengths_N[rows].sum()))


def tokenize_documents(documents: Iterable[Document], tokenizer: Any, data: Data) -> TokenBlocks:
    """Each document's first block, or all of its blocks, as the recipe says.

    A tokenizer without a padding token works: what stands in the padding is masked, not recognised.
    """
    pad = 0  # any token: it is masked, unless it is to count
    if data.pad_in_loss:
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    pieces: list[list[int]] = []
    dropped = 0
    for document in documents:
        # Cut here and not by the tokenizer, some of which cut at the left.
        if data.window == "truncate":
            tokens = _tokenize_head(document.text, tokenizer, data.max_length)
            end = data.max_length
        else:
            tokens = _tokenize(document.text, tokenizer)
            end = len(tokens)
        blocks = [tokens[start : start + data.max_length] for start in range(0, end, data.max_length)]
        usable = [block for block in blocks if len(block) > 1]
        dropped += not usable
        pieces.extend(usable)
    lengths_N = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    tokens_NT = torch.full((len(pieces), data.max_length), pad, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        tokens_NT[row, : len(piece)] = torch.tensor(piece)
    counted_N = torch.full_like(lengths_N, data.max_length) if data.pad_in_loss else lengths_N
    return TokenBlocks(tokens_NT, lengths_N, counted_N, dropped)


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    tokens: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return tokens


def _tokenize_head(text: str, tokenizer: Any, wanted: int) -> list[int]:
    """The text's first tokens, at least `wanted` where it has them, in a time that its length has no part in.

    The head ends as many tokens again behind the last that is wanted, where a cut through a word can't reach it.
    """
    length = LONGEST_MEAN_TOKEN * wanted
    while len(tokens := _tokenize(text[:length], tokenizer)) < 2 * wanted and length < len(text):
        length *= 2
    return tokens


def _real_tokens(blocks: TokenBlocks) -> Iterator[bytes]:
    """Each block's tokens without its padding, as something to compare."""
    for tokens_T, length in zip(blocks.tokens_NT, blocks.lengths_N.tolist(), strict=True):
        yield tokens_T[:length].numpy().tobytes()


def check_vocabulary(blocks: TokenBlocks, vocabulary_size: int) -> None:
    """Refuse tokens that the base model has no embedding for.

    Raises:
        DataError: the tokenizer and the model do not belong together.
    """
    if len(blocks) and (largest := int(blocks.tokens_NT.max())) >= vocabulary_size:
        raise DataError(
            f"token {largest} is outside the base model's vocabulary of {vocabulary_size}",
            where="model.source",
            mend="use a model and the tokenizer that belongs to it",
        )


@dataclass(frozen=True)
class ClientBlocks:
    """What one client holds."""

    train: TokenBlocks
    holdout: TokenBlocks
