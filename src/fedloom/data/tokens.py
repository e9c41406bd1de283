"""Blocks of tokens: documents cut to a fixed length, padded on the right, with the positions that count in the loss.

Of a plain text every token counts; of a prompt with its answer, the answer's. Padding never counts, and then attention
needs no mask: a real token never looks at padding that stands to its right.
A recipe that replays a program which counted padding masks it, as that program did: what stands at padding depends on
what it sees, and some models take their positions from the mask. Blocks that several texts share (`packing`) have a
mask too, which tells them apart.

Letters: N blocks, B sequences in a batch, T tokens in a block.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom.data.long_texts import LONGEST_MEAN_TOKEN, tokenize_all
from fedloom.data.marked_tokens import tokenize_form
from fedloom.errors import DataError
from fedloom.host.machine import free_memory
from fedloom.text import count, format_bytes

if TYPE_CHECKING:
    from fedloom.data.documents import Document
    from fedloom.recipe.data_section import Data

IGNORED = -100
"""Label of a position that does not count, the default of torch's cross-entropy."""
BYTES = 9
"""Bytes of a position in a block: a token, and whether it counts."""


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of one client, or of a hold-out."""

    tokens_NT: Tensor
    """Tokens as int64, padded on the right."""
    lengths_N: Tensor
    """Real tokens of each block, as int64."""
    counted_NT: Tensor
    """True at positions that count as labels; beyond a block's length only where padding counts."""
    dropped: int = 0
    """Documents that gave no block: fewer than two tokens leave nothing to predict."""
    unanswered: int = 0
    """Documents that gave no block because nothing that counts is left within the length of one."""
    cut: int = 0
    """Documents of which a part that counts was cut off, and another is left."""
    cut_tokens: int = 0
    """Tokens that were cut off plain texts; of what was not read of a long one, as many as its beginning has."""
    texts_NT: Tensor | None = None
    """Number of the text that each position belongs to, from 1 in each block, and 0 at padding; None where every block
    is a text of its own."""
    units_N: Tensor | None = None
    """Number of the unit that each block belongs to; None where each block is one."""
    repeated: int = 0
    """Units that were left out because another one has the same blocks."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.tokens_NT.shape[0]

    @property
    def num_tokens(self) -> int:
        """Return the number of real tokens that count."""
        return int(self.tokens_of_each.sum())

    @cached_property
    def tokens_of_each(self) -> Tensor:
        """Real tokens of each block that count, [N]."""
        return (self.counted_NT & self.is_real).sum(1)

    @property
    def owners(self) -> Tensor:
        """Number of the unit that each block belongs to, [N], its own where each is one."""
        return torch.arange(len(self)) if self.units_N is None else self.units_N

    @property
    def num_units(self) -> int:
        """Return the number of units in the blocks."""
        return len(self.owners.unique())

    @property
    def firsts(self) -> Tensor:
        """Return the row of each unit's first block, in order, [U]."""
        first: dict[int, int] = {}
        for row, unit in enumerate(self.owners.tolist()):
            first.setdefault(unit, row)
        return torch.tensor([*first.values()], dtype=torch.int64)

    @property
    def num_texts(self) -> int:
        """Return the number of texts in the blocks."""
        return len(self) if self.texts_NT is None else int(self.texts_NT.amax(1).sum())

    @property
    def is_real(self) -> Tensor:
        """Return true where no padding stands."""
        return torch.arange(self.tokens_NT.shape[1]) < self.lengths_N[:, None]

    @cached_property
    def widths(self) -> Tensor:
        """Width to which each block is needed, [N]: up to its last position that counts."""
        places_T = torch.arange(1, self.tokens_NT.shape[1] + 1)
        return (self.counted_NT * places_T).amax(1)

    @cached_property
    def pad_counts(self) -> bool:
        """True where some padding counts in the loss."""
        return bool((self.counted_NT & ~self.is_real).any())

    @property
    def needs_mask(self) -> bool:
        """True where attention to all that stands to the left would be wrong."""
        return self.pad_counts or self.texts_NT is not None

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors that the blocks consist of, by which they can be told from others."""
        counted_N = self.counted_NT.sum(1)
        first_NT = torch.arange(self.counted_NT.shape[1]) < counted_N[:, None]
        # What counts is told as a number where it is the first positions: so runs of plain text have it.
        counted = counted_N if torch.equal(first_NT, self.counted_NT) else self.counted_NT
        # Units by their order: their numbers hang on documents that were left out, which a client elsewhere never had.
        units_N = None if self.units_N is None else self.units_N.unique(return_inverse=True)[1]
        others = [tensor for tensor in (self.texts_NT, units_N) if tensor is not None]
        return [self.tokens_NT, self.lengths_N, counted, *others]

    def take(self, rows: Tensor) -> TokenBlocks:
        """Return the blocks of these rows, by number or where true; what was left out stays on record."""
        names = ("tokens_NT", "lengths_N", "counted_NT", "texts_NT", "units_N")
        held = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: tensor[rows] for name, tensor in held.items()})


@dataclass(frozen=True)
class Batch:
    """Input of a step: tokens, the labels of the same positions, and the number of real tokens that count."""

    tokens_BT: Tensor
    labels_BT: Tensor
    """Tokens once more, with IGNORED at positions that do not count; the loss shifts them by one."""
    mask_BT: Tensor | None
    """Attention mask: 0 at padding, and elsewhere the number of the text that a token belongs to, which is 1 where a
    block has one alone; None where no padding counts and no texts share a block, and so no mask is needed."""
    num_tokens: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        mask_BT = self.mask_BT if self.mask_BT is None else self.mask_BT.to(device)
        return Batch(self.tokens_BT.to(device), self.labels_BT.to(device), mask_BT, self.num_tokens)


def join_blocks(parts: Sequence[TokenBlocks]) -> TokenBlocks:
    """Join the blocks of several into one, in their order; all of them are packed, or none is. No unit is in two."""
    owners, behind = [], 0
    for part in parts:
        owners.append(part.owners + behind)
        behind += int(part.owners.max()) + 1 if len(part) else 0
    texts = [part.texts_NT for part in parts if part.texts_NT is not None]
    assert len(texts) in (0, len(parts)), "packed blocks beside others"
    return TokenBlocks(
        tokens_NT=torch.cat([part.tokens_NT for part in parts]),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        counted_NT=torch.cat([part.counted_NT for part in parts]),
        dropped=sum(part.dropped for part in parts),
        unanswered=sum(part.unanswered for part in parts),
        cut=sum(part.cut for part in parts),
        cut_tokens=sum(part.cut_tokens for part in parts),
        texts_NT=torch.cat(texts) if texts else None,
        units_N=torch.cat(owners) if any(part.units_N is not None for part in parts) else None,
    )


def distinct_blocks(blocks: TokenBlocks) -> set[bytes]:
    """Return the real tokens of each block as bytes, each once: all that a model sees of them."""
    return set(_real_tokens(blocks))


def count_copies(blocks: TokenBlocks) -> int:
    """Return the most units that have one block in common: 1 where none has another's."""
    found = set(zip(blocks.owners.tolist(), _real_tokens(blocks), strict=True))
    return max(Counter(tokens for _, tokens in found).values(), default=0)


def without_copies(blocks: TokenBlocks) -> TokenBlocks:
    """Return the blocks without units that are equal to an earlier one in every block, which are counted.

    Only whole units: of two that have a block in common, each would decide over what the other one is. The order of a
    unit's blocks counts for nothing: it hangs on how many documents others have, where those are shuffled.
    """
    owners, held = blocks.owners.tolist(), defaultdict[int, list[tuple[bytes, bytes]]](list)
    for unit, tokens, counted_T in zip(owners, _real_tokens(blocks), blocks.counted_NT, strict=True):
        held[unit].append((tokens, counted_T.numpy().tobytes()))
    first: dict[tuple[tuple[bytes, bytes], ...], int] = {}
    kept = {unit for unit, its in held.items() if first.setdefault(tuple(sorted(its)), unit) == unit}
    rows = torch.tensor([unit in kept for unit in owners], dtype=torch.bool)
    return replace(blocks.take(rows), repeated=blocks.repeated + len(held) - len(kept))


def without_blocks(blocks: TokenBlocks, others: set[bytes]) -> TokenBlocks:
    """Return the blocks whose real tokens are not among the others'."""
    # Documents without a copy can still give the same block: truncation keeps no more than their common beginning.
    rows = torch.tensor([tokens not in others for tokens in _real_tokens(blocks)], dtype=torch.bool)
    return blocks.take(rows)


def take_batch(blocks: TokenBlocks, rows: Tensor) -> Batch:
    """Return the blocks of these rows as a batch, cut to the widest of them.

    Where padding does not count, it is each block's own first token: that of padding has an embedding of zeros in some
    models, of which a norm has no slope.
    """
    # What stands beyond the widest block would be computed and then ignored.
    width = int(blocks.widths[rows].max())
    tokens_BT = blocks.tokens_NT[rows, :width]
    labels_BT = tokens_BT.masked_fill(~blocks.counted_NT[rows, :width], IGNORED)
    is_real_BT = torch.arange(width) < blocks.lengths_N[rows, None]
    mask_BT = None
    if blocks.pad_counts:
        mask_BT = is_real_BT.long()
    else:
        tokens_BT = torch.where(is_real_BT, tokens_BT, tokens_BT[:, :1])
    if blocks.texts_NT is not None:
        mask_BT = blocks.texts_NT[rows, :width]
        # The first token of a text has nothing before it from which it could be predicted.
        labels_BT[:, 1:][mask_BT[:, 1:] != mask_BT[:, :-1]] = IGNORED
    return Batch(tokens_BT, labels_BT, mask_BT, int(blocks.tokens_of_each[rows].sum()))


def tokenize_documents(
    documents: Iterable[Document], tokenizer: Any, data: Data, *, units: bool = False
) -> TokenBlocks:
    """Cut documents into blocks of at most `max_length` tokens: the first of each document, or all, by the recipe.

    With `units`, the blocks know their unit: their document, or all documents of its `unit`.

    A tokenizer needs no padding token: positions of padding are masked by their place, not recognised by their token.

    Raises:
        DataError: there is no room for blocks of that length.
    """
    pad = 0  # any token would do: padding is masked, unless it is to count
    if data.pad_in_loss:
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    pieces: list[Tensor] = []
    masks: list[Tensor] = []
    owners: list[int] = []
    named: dict[str, int] = {}
    dropped = unanswered = cut = cut_tokens = 0
    for number, document in enumerate(documents):
        if document.form is not None:
            whole_T, counted_T = tokenize_form(
                document.form, tokenizer, None if data.window == "blocks" else data.max_length
            )
            behind = 0
        else:
            whole_T, behind = _tokenize_plain(document.text, tokenizer, data)
            counted_T = torch.ones_like(whole_T, dtype=torch.bool)
        # Cut here and not by the tokenizer, some of which cut at the left.
        length = max(1, len(whole_T)) if data.window == "blocks" else data.max_length
        blocks = list(
            zip(whole_T[:length].split(data.max_length), counted_T[:length].split(data.max_length), strict=True)
        )
        long_enough = [(tokens_T, marks_T) for tokens_T, marks_T in blocks if len(tokens_T) > 1]
        # The first token of a block has nothing before it from which it could be predicted.
        usable = [(tokens_T, marks_T) for tokens_T, marks_T in long_enough if marks_T[1:].any()]
        dropped += not long_enough
        unanswered += bool(long_enough) and not usable
        cut += bool(usable and (behind or counted_T[length:].any()))
        cut_tokens += behind
        pieces.extend(tokens_T for tokens_T, _ in usable)
        masks.extend(marks_T for _, marks_T in usable)
        unit = number if document.unit is None else named.setdefault(document.unit, number)
        owners.extend([unit] * len(usable))
    _check_room(len(pieces), data.max_length)
    stacked = stack_blocks(pieces, masks, data.max_length, padding=pad, padding_counts=data.pad_in_loss)
    units_N = torch.tensor(owners) if units and len(set(owners)) < len(owners) else None
    return replace(stacked, dropped=dropped, unanswered=unanswered, cut=cut, cut_tokens=cut_tokens, units_N=units_N)


def stack_blocks(
    pieces: Sequence[Tensor],
    masks: Sequence[Tensor],
    max_length: int,
    *,
    padding: int = 0,
    padding_counts: bool = False,
) -> TokenBlocks:
    """Return pieces of tokens, [T] each, and their marks of what counts as blocks of one length."""
    lengths_N = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    tokens_NT = torch.full((len(pieces), max_length), padding, dtype=torch.int64)
    counted_NT = torch.full(tokens_NT.shape, padding_counts)
    for row, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
        tokens_NT[row, : len(piece)] = piece
        counted_NT[row, : len(piece)] = mask
    return TokenBlocks(tokens_NT, lengths_N, counted_NT)


def _check_room(blocks: int, length: int) -> None:
    """Refuse blocks that free memory can't hold: each is padded to the whole length."""
    needed, free = blocks * length * BYTES, free_memory()
    if needed > free:
        raise DataError(
            f"{count(blocks, 'block')} of {length} tokens take {format_bytes(needed)} of the {format_bytes(free)} free",
            where="data.max_length",
            mend="lower it",
        )


def _tokenize_plain(text: str, tokenizer: Any, data: Data) -> tuple[Tensor, int]:
    """Return a plain text's tokens, [T], as many as are needed, and how many are cut off."""
    if data.window == "blocks":
        return tokenize_all(text, tokenizer), 0
    tokens_T, whole = _tokenize_head(text, tokenizer, data.max_length)
    return tokens_T[: data.max_length], max(0, whole - data.max_length)


def _tokenize_head(text: str, tokenizer: Any, wanted: int) -> tuple[Tensor, int]:
    """Return a text's first tokens, at least `wanted` if it has them, and how many it has, reckoned from those.

    That takes a time which does not grow with the text's length.
    """
    length = LONGEST_MEAN_TOKEN * wanted
    # The head is cut anywhere, perhaps through a word, which changes the tokens near its end: twice the wanted number
    # keeps those that are used away from the cut.
    while len(tokens := tokenize_all(text[:length], tokenizer)) < 2 * wanted and length < len(text):
        length *= 2
    return tokens, round(len(tokens) * max(1, len(text) / length))


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
