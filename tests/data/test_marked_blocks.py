"""Blocks of answers: what is cut, what is dropped, and that every row is accounted for."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fedloom.data.documents import Document
from fedloom.data.formats import Form, RowFormat
from fedloom.data.tokens import TokenBlocks, tokenize_documents
from fedloom.model.source import byte_tokenizer
from fedloom.recipe.data_section import Data


def blocks_of(rows: list[tuple[str, str]], max_length: int = 16, **changes: Any) -> TokenBlocks:
    data = Data(source="x", prompt="{q}", completion="{a}", max_length=max_length, **changes)
    shape = RowFormat(data)
    forms = [shape({"q": asked, "a": answer}) for asked, answer in rows]
    return tokenize_documents([Document(form.text, "row", form=form) for form in forms], byte_tokenizer(), data)


def learnt(blocks: TokenBlocks) -> list[str]:
    tokenizer = byte_tokenizer()
    rows = zip(blocks.tokens_NT, blocks.counted_NT, strict=True)
    return [tokenizer.decode(tokens_T[counted_T]) for tokens_T, counted_T in rows]


def test_answers_that_are_cut_and_that_are_gone_are_counted() -> None:
    blocks = blocks_of([("12345678", "1234567"), ("12345678", "123456789"), ("x" * 16, "answer"), ("x" * 15, "ab")])
    end = byte_tokenizer().eos_token
    assert learnt(blocks) == ["1234567" + end, "12345678", "a"]
    assert (blocks.cut, blocks.unanswered, blocks.dropped) == (2, 1, 0)
    assert blocks.num_tokens == 8 + 8 + 1
    assert blocks.lengths_N.tolist() == [16, 16, 16]


def test_a_text_far_longer_than_a_block_is_cut_and_counted() -> None:
    blocks = blocks_of([("q", "word " * 5000), ("long " * 5000, "a")])
    assert (len(blocks), blocks.cut, blocks.unanswered) == (1, 1, 1)


@pytest.mark.parametrize("window", ["truncate", "blocks"])
def test_an_end_of_a_plain_text_stands_where_it_ends_within_its_block(window: str) -> None:
    data = Data.model_validate({"source": "x", "end": True, "max_length": 8, "window": window})
    shape = RowFormat(data)
    documents = [Document(text, "row", form=shape({"text": text})) for text in ("abc", "abcdefgh", "abcdefghij")]
    end = byte_tokenizer().eos_token
    found = learnt(tokenize_documents(documents, byte_tokenizer(), data))
    assert found == (["abc" + end, "abcdefgh", "abcdefgh"] if window == "truncate" else
                     ["abc" + end, "abcdefgh", "abcdefgh", "ij" + end])  # fmt: skip


def test_a_slow_tokenizer_marks_the_same() -> None:
    class Slow:
        """Tells no places."""

        is_fast = False

        def __init__(self) -> None:
            self._fast = byte_tokenizer()
            self.eos_token_id = self._fast.eos_token_id

        def __call__(self, text: str, **named: Any) -> Any:
            assert "return_offsets_mapping" not in named
            return self._fast(text, **named)

    form = Form("ask: good answer; ask: more", ((5, 17), (23, 27)), ends=True)
    data = Data(source="x", max_length=64)
    fast, slow = (tokenize_documents([Document(form.text, "row", form=form)], tokenizer, data)
                  for tokenizer in (byte_tokenizer(), Slow()))  # fmt: skip
    assert fast.tokens_NT.tolist() == slow.tokens_NT.tolist()
    assert fast.counted_NT.tolist() == slow.counted_NT.tolist()
    assert learnt(fast) == ["good answer;more" + byte_tokenizer().eos_token]


def test_blanks_of_an_answer_count_where_a_tokenizer_tells_words_alone() -> None:
    # As the tokenizers of Pythia, Phi-2 and others do: the place of a token of blanks is empty there.
    trimming = byte_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    code = "  def f():\n    return  1 \n"
    form = Form(f"a  b {code}  c  {code}", ((5, 5 + len(code)), (10 + len(code), 10 + 2 * len(code))), ends=True)
    data = Data(source="x", max_length=128)
    plain, trimmed = (tokenize_documents([Document(form.text, "row", form=form)], tokenizer, data)
                      for tokenizer in (byte_tokenizer(), trimming))  # fmt: skip
    assert learnt(trimmed) == [code + code + trimming.eos_token]
    assert trimmed.counted_NT.tolist() == plain.counted_NT.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30), st.text(min_size=1, max_size=30).filter(str.strip)), max_size=8))
def test_rows_and_dropped_are_the_rows(rows: list[tuple[str, str]]) -> None:
    rows = [row for row in rows if not any(0xD800 <= ord(letter) < 0xE000 for text in row for letter in text)]
    blocks = blocks_of(rows)
    assert len(blocks) + blocks.unanswered + blocks.dropped == len(rows)
    assert bool(blocks.counted_NT[:, 1:].any(1).all())
    assert not (blocks.counted_NT & ~blocks.is_real).any()


@pytest.mark.parametrize("length", [15, 16, 17, 31, 33, 500, 5000])
def test_a_plain_text_that_is_cut_is_counted_with_what_it_loses(length: int) -> None:
    document, tokenizer = Document("x" * length, "row"), byte_tokenizer()
    blocks = tokenize_documents([document], tokenizer, Data(source="x", max_length=16))
    assert (blocks.cut, blocks.cut_tokens) == (int(length > 16), max(0, length - 16))
    whole = tokenize_documents([document], tokenizer, Data(source="x", max_length=16, window="blocks"))
    assert (whole.cut, whole.cut_tokens) == (0, 0)
