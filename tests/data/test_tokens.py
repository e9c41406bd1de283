"""Blocks hold a document's tokens in order, and padding never counts unless it is asked to."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import make_recipe

from fedloom.data.documents import Document
from fedloom.data.tokens import (
    IGNORED,
    TokenBlocks,
    check_vocabulary,
    count_copies,
    join_blocks,
    take_batch,
    tokenize_documents,
    without_copies,
)
from fedloom.errors import DataError
from fedloom.model.source import byte_tokenizer

END = "<|end|>"
TEXTS = ["abcdefghijk", "lm", "nopqrst", "uvwx"]
"""11, 2, 7 and 4 tokens: a token a byte."""


def tokenize(texts: list[str], tokenizer: Any = None, **data: object) -> TokenBlocks:
    section = make_recipe(data={"max_length": 4, **data}).data
    return tokenize_documents([Document(text, "test") for text in texts], tokenizer or byte_tokenizer(), section)


def read(blocks: TokenBlocks) -> list[str]:
    """The text of each block, without its padding."""
    rows = zip(blocks.tokens_NT, blocks.lengths_N, strict=True)
    return [byte_tokenizer().decode(row[:length]) for row, length in rows]


def take_all(blocks: TokenBlocks) -> Any:
    return take_batch(blocks, torch.arange(len(blocks)))


def padded_by(token: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = token
    return tokenizer


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("truncate", ["abcd", "lm", "nopq", "uvwx"]),
        ("blocks", ["abcd", "efgh", "ijk", "lm", "nopq", "rst", "uvwx"]),
    ],
)
def test_a_window_keeps_the_first_block_or_every_block(window: str, expected: list[str]) -> None:
    blocks = tokenize(TEXTS, window=window)
    assert read(blocks) == expected
    assert blocks.lengths_N.tolist() == [len(text) for text in expected]
    assert blocks.tokens_NT.shape == (len(expected), 4)
    assert blocks.tokens_NT.dtype == torch.int64
    assert blocks.num_tokens == sum(map(len, expected))


@pytest.mark.parametrize("window", ["truncate", "blocks"])
def test_the_first_block_is_the_first_whatever_the_tokenizer_would_cut(window: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side = "left"
    assert read(tokenize(["abcdefghijk"], tokenizer, window=window))[0] == "abcd"


def test_blocks_lose_no_byte_of_a_text() -> None:
    text = "naïve 👩‍🚀 שלום e\u0301 \x00 end"
    blocks = tokenize([text], window="blocks", max_length=7)
    tokens = [row[:length] for row, length in zip(blocks.tokens_NT, blocks.lengths_N, strict=True)]
    assert byte_tokenizer().decode(torch.cat(tokens)) == text


def test_a_last_block_of_one_token_is_left_out_but_drops_no_document() -> None:
    blocks = tokenize(["abcde"], window="blocks")
    assert read(blocks) == ["abcd"]
    assert blocks.dropped == 0


@pytest.mark.parametrize("window", ["truncate", "blocks"])
def test_documents_with_fewer_than_two_tokens_are_dropped_and_counted(window: str) -> None:
    blocks = tokenize(["", "a", "bc", "d"], window=window)
    assert read(blocks) == ["bc"]
    assert blocks.dropped == 3


@pytest.mark.parametrize(("texts", "dropped"), [([], 0), (["", "a"], 2)])
@pytest.mark.parametrize("pad_in_loss", [True, False])
def test_no_usable_document_gives_no_block(texts: list[str], dropped: int, pad_in_loss: bool) -> None:
    blocks = tokenize(texts, pad_in_loss=pad_in_loss)
    assert len(blocks) == 0
    assert blocks.tokens_NT.shape == (0, 4)
    assert (blocks.num_tokens, blocks.dropped) == (0, dropped)
    check_vocabulary(blocks.tokens_NT, byte_tokenizer(), 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_on_the_right(side: str) -> None:
    tokenizer = padded_by(END)
    tokenizer.padding_side = side
    blocks = tokenize(["ab"], tokenizer)
    first, second = tokenizer("ab")["input_ids"]
    assert blocks.tokens_NT.tolist() == [[first, second, 0, 0]]


def test_padding_that_counts_is_the_tokenizers_and_its_end_without_one() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id is None
    assert tokenize(["ab"], tokenizer).tokens_NT[0, 2:].tolist() == [0, 0], "masked, so any token does"
    counted = tokenize(["ab"], tokenizer, pad_in_loss=True)
    assert counted.tokens_NT[0, 2:].tolist() == [tokenizer.eos_token_id] * 2


def test_a_tokenizer_without_any_special_token_pads_with_zeros() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    blocks = tokenize(["ab"], tokenizer)
    assert blocks.tokens_NT[0, 2:].tolist() == [0, 0]
    assert take_all(blocks).labels_BT.shape == (1, 2)


@pytest.mark.parametrize("pad_in_loss", [False, True])
def test_padding_counts_only_where_it_is_asked_to(pad_in_loss: bool) -> None:
    blocks = tokenize(TEXTS, pad_in_loss=pad_in_loss, max_length=8)
    assert blocks.lengths_N.tolist() == [8, 2, 7, 4]
    assert blocks.widths.tolist() == ([8, 8, 8, 8] if pad_in_loss else [8, 2, 7, 4])
    assert blocks.pad_counts == pad_in_loss
    mask_BT = take_all(blocks).mask_BT
    assert (mask_BT is not None) == pad_in_loss
    if mask_BT is not None:
        assert mask_BT.sum(1).tolist() == blocks.lengths_N.tolist()
        assert mask_BT[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_batch_is_cut_to_its_widest_block() -> None:
    blocks = tokenize(TEXTS, max_length=16)
    for rows, width in (([1], 2), ([1, 3], 4), ([3, 2, 1], 7), ([0, 1, 2, 3], 11)):
        batch = take_batch(blocks, torch.tensor(rows))
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (len(rows), width)
        assert batch.num_tokens == sum(len(TEXTS[row]) for row in rows)
        for tokens_T, row in zip(batch.tokens_BT.tolist(), rows, strict=True):
            length = int(blocks.lengths_N[row])
            assert tokens_T[:length] == blocks.tokens_NT[row, :length].tolist()
            assert tokens_T[length:] == [tokens_T[0]] * (width - length), "filled up with its own first token"


# Without a padding token, and with one that is the end of the text.
@pytest.mark.parametrize("pad_token", [None, END])
def test_labels_are_ignored_exactly_on_padding(pad_token: str | None) -> None:
    blocks = tokenize([*TEXTS, f"ab{END}", f"{END}{END}", f"a{END}b{END}c"], padded_by(pad_token), max_length=16)
    assert blocks.lengths_N.tolist() == [11, 2, 7, 4, 3, 2, 5]
    batch = take_all(blocks)
    padding_BT = torch.arange(11) >= blocks.lengths_N[:, None]
    assert torch.equal(batch.labels_BT == IGNORED, padding_BT)
    assert torch.equal(batch.labels_BT[~padding_BT], batch.tokens_BT[~padding_BT])


def test_an_end_inside_the_text_stays_a_label_where_it_is_the_padding() -> None:
    tokenizer = padded_by(END)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    batch = take_all(tokenize([f"a{END}b{END}", "abcdefgh"], tokenizer, max_length=8))
    assert (batch.labels_BT[0] == end).tolist() == [False, True, False, True, False, False, False, False]
    assert batch.labels_BT[0, 4:].tolist() == [IGNORED] * 4


def test_padding_that_counts_is_a_label_to_the_full_length() -> None:
    tokenizer = byte_tokenizer()
    batch = take_all(tokenize(["ab", "cde"], tokenizer, max_length=8, pad_in_loss=True))
    assert batch.labels_BT.shape == (2, 8)
    assert torch.equal(batch.labels_BT, batch.tokens_BT)
    assert batch.labels_BT[0, 2:].tolist() == [tokenizer.eos_token_id] * 6
    assert batch.num_tokens == 5


def test_taking_a_batch_leaves_the_blocks_alone() -> None:
    blocks = tokenize(TEXTS)
    before_NT = blocks.tokens_NT.clone()
    take_all(blocks).labels_BT.fill_(0)
    assert torch.equal(blocks.tokens_NT, before_NT)


def test_a_batch_moves_whole() -> None:
    batch = take_all(tokenize(TEXTS)).to(torch.device("meta"))
    assert batch.tokens_BT.device.type == batch.labels_BT.device.type == "meta"
    assert batch.num_tokens == 14


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    blocks = tokenize(TEXTS, window="blocks")
    largest = max(byte_tokenizer()("".join(TEXTS))["input_ids"])
    check_vocabulary(blocks.tokens_NT, byte_tokenizer(), largest + 1)
    with pytest.raises(DataError) as caught:
        check_vocabulary(blocks.tokens_NT, byte_tokenizer(), largest)
    for words in ("model.source", f"token {largest} ", f"vocabulary of {largest}", "the tokenizer that belongs to it"):
        assert words in str(caught.value)


def test_blocks_that_memory_can_not_hold_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloom.data.tokens.free_memory", lambda: 4 * 9 * 4)
    assert len(tokenize(TEXTS)) == 4
    with pytest.raises(
        DataError, match=r"data\.max_length: 4 blocks of 16777216 tokens take 604\.0 MB of the 144 B free"
    ):
        tokenize(TEXTS, max_length=2**24)


def tokenize_units(texts: list[str], units: list[str | None], **data: object) -> TokenBlocks:
    documents = [Document(text, "test", unit=unit) for text, unit in zip(texts, units, strict=True)]
    return tokenize_documents(documents, byte_tokenizer(), make_recipe(data={"max_length": 4, **data}).data, units=True)


def test_blocks_know_their_unit() -> None:
    alone: list[str | None] = [None] * 4
    assert tokenize(TEXTS, window="blocks").units_N is None, "not asked for"
    assert tokenize_units(TEXTS, alone).units_N is None, "each block is a document"
    by_document = tokenize_units(TEXTS, alone, window="blocks")
    assert by_document.units_N is not None
    assert by_document.units_N.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert by_document.num_units == 4
    by_author = tokenize_units([*TEXTS, "x"], ["ann", "bob", "ann", "bob", "eve"])
    assert by_author.units_N is not None
    assert by_author.units_N.tolist() == [0, 1, 0, 1]
    assert by_author.num_units == 2, "of one whose only text gives no block, nothing is left"
    left = by_author.take(torch.tensor([False, True, False, True]))
    assert left.units_N is not None
    assert (left.units_N.tolist(), left.num_units) == ([1, 1], 1)
    assert len(by_author.tensors) == len(tokenize(TEXTS).tensors) + 1, "other units are other documents"


def test_of_units_that_are_equal_in_every_block_one_is_kept() -> None:
    texts = ["abcd", "efgh", "abcd", "ij", "abcd"]
    found = without_copies(tokenize_units(texts, [None] * 5))
    assert read(found) == ["abcd", "efgh", "ij"]
    assert found.repeated == 2
    assert count_copies(tokenize_units(texts, [None] * 5)) == 3
    assert count_copies(found) == 1


def test_the_order_of_a_units_texts_counts_for_nothing() -> None:
    """Where rows are shuffled, it hangs on how many of them others have."""
    blocks = tokenize_units(["abcd", "efgh", "ij", "efgh", "abcd"], ["ann", "ann", "bob", "eve", "eve"])
    found = without_copies(blocks)
    assert (found.repeated, found.num_units) == (1, 2)


def test_the_first_block_of_each_unit_is_found() -> None:
    assert tokenize_units(["abcd", "efgh", "ij"], ["ann", "bob", "ann"]).firsts.tolist() == [0, 1]
    assert tokenize_units(["abcd", "efgh"], [None, None]).firsts.tolist() == [0, 1]


def test_joined_blocks_keep_their_units_apart() -> None:
    of_two = tokenize_units(["abcd", "efgh", "ij"], ["ann", "bob", "ann"])
    of_none = of_two.take(torch.zeros(0, dtype=torch.int64))
    alone = tokenize_units(["abcd", "efgh"], [None, None])
    assert join_blocks([of_two, of_none, of_two, alone]).owners.unique(return_inverse=True)[1].tolist() == [
        0, 1, 0, 2, 3, 2, 4, 5,
    ]  # fmt: skip
    assert join_blocks([alone, alone]).units_N is None


def test_units_that_have_one_text_in_common_stay_whole() -> None:
    """To take it from the second would let what the first has decide over the second, beside the first itself."""
    blocks = tokenize_units(["abcd", "efgh", "abcd", "ij", "abcd", "efgh"], ["ann", "ann", "bob", "bob", "eve", "eve"])
    found = without_copies(blocks)
    assert read(found) == ["abcd", "efgh", "abcd", "ij"]
    assert (found.repeated, found.num_units) == (1, 2)
    assert count_copies(blocks) == 3
    assert count_copies(found) == 2
    assert count_copies(tokenize_units(["abcd"] * 3, ["ann"] * 3)) == 1, "one person's own"


@pytest.mark.parametrize("place", range(6))
def test_a_unit_that_is_taken_away_changes_what_is_left_by_itself_alone(place: int) -> None:
    texts = ["abcd", "efgh", "abcd", "ij", "abcd", "efgh"]
    whole = read(without_copies(tokenize_units(texts, [None] * 6)))
    left = read(without_copies(tokenize_units(texts[:place] + texts[place + 1 :], [None] * 5)))
    assert sorted(whole) in (sorted(left), sorted([*left, texts[place]]))


def test_equal_tokens_of_which_other_ones_count_are_no_copies() -> None:
    blocks = tokenize(["abcd", "abcd"])
    counted_NT = blocks.counted_NT.clone()
    counted_NT[1, 2] = False
    assert len(without_copies(replace(blocks, counted_NT=counted_NT))) == 2
    assert len(without_copies(blocks)) == 1
