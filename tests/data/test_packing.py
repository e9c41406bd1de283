"""Short texts in shared blocks: every text whole and once, as full as best fit makes them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.tiny import count_answers, make_blocks

from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import IGNORED, TokenBlocks, join_blocks, take_batch


def blocks_of(lengths: list[int], width: int) -> TokenBlocks:
    """Blocks whose tokens are all different."""
    lengths_N = torch.tensor(lengths)
    tokens_NT = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    real_NT = torch.arange(width) < lengths_N[:, None]
    return TokenBlocks(tokens_NT * real_NT, lengths_N, real_NT, dropped=2, unanswered=3, cut=4)


def texts_of(blocks: TokenBlocks) -> list[tuple[list[int], list[bool]]]:
    """Tokens of every text, and which of them count."""
    assert blocks.texts_NT is not None
    return [
        (tokens_T[texts_T == text].tolist(), counted_T[texts_T == text].tolist())
        for tokens_T, counted_T, texts_T in zip(blocks.tokens_NT, blocks.counted_NT, blocks.texts_NT, strict=True)
        for text in range(1, int(texts_T.max()) + 1)
    ]


@given(st.lists(st.integers(2, 12), min_size=1, max_size=40))
def test_every_text_is_there_once_and_whole(lengths: list[int]) -> None:
    apart = blocks_of(lengths, 12)
    packed = pack_blocks(apart)
    whole = [(row[:length].tolist(), [True] * length) for row, length in zip(apart.tokens_NT, lengths, strict=True)]
    assert sorted(texts_of(packed)) == sorted(whole)
    assert (packed.num_texts, packed.num_tokens) == (len(lengths), apart.num_tokens)
    assert (packed.dropped, packed.unanswered, packed.cut) == (2, 3, 4)
    assert packed.texts_NT is not None
    assert torch.equal(packed.texts_NT > 0, packed.is_real), "padding stands behind the last text alone"
    assert packed.lengths_N.sum() == sum(lengths)
    # Two blocks that both are less than half full would be one.
    assert sum(2 * length <= 12 for length in packed.lengths_N.tolist()) <= 1


def test_each_text_goes_into_the_fullest_block_that_has_room() -> None:
    packed = pack_blocks(blocks_of([3, 7, 5, 2, 6], 10))
    assert [[len(tokens) for tokens, _ in texts_of(packed.take(torch.tensor([row])))] for row in range(3)] == [
        [7, 3],
        [6, 2],
        [5],
    ]


def test_marks_go_with_their_texts_and_no_text_predicts_the_next() -> None:
    apart = count_answers(make_blocks(9, 16))
    packed = pack_blocks(apart)
    together = take_batch(packed, torch.arange(len(packed)))
    alone = take_batch(apart, torch.arange(len(apart)))
    assert together.num_tokens == alone.num_tokens
    assert together.mask_BT is not None
    learnt = [
        batch.labels_BT[:, 1:][batch.labels_BT[:, 1:] != IGNORED].sort().values.tolist() for batch in (together, alone)
    ]
    assert learnt[0] == learnt[1]
    begins = together.mask_BT[:, 1:] != together.mask_BT[:, :-1]
    assert begins.any()
    assert (together.labels_BT[:, 1:][begins] == IGNORED).all()


def test_of_a_plain_text_the_first_token_is_no_label_either() -> None:
    packed = pack_blocks(blocks_of([4, 4, 3], 12))
    batch = take_batch(packed, torch.tensor([0]))
    assert batch.labels_BT[0].eq(IGNORED).nonzero()[:, 0].tolist() == [4, 8]
    assert batch.num_tokens == 11, "they count as tokens of their text, as they do where it stands alone"


def test_packed_blocks_are_joined_and_taken_with_their_texts() -> None:
    one, two = (pack_blocks(make_blocks(6, 16, seed=seed)) for seed in (1, 2))
    joined = join_blocks([one, two])
    assert texts_of(joined) == texts_of(one) + texts_of(two)
    assert texts_of(joined.take(torch.tensor([len(one)]))) == texts_of(two.take(torch.tensor([0])))
    with pytest.raises(AssertionError, match="packed blocks beside others"):
        join_blocks([one, make_blocks(2, 16)])
