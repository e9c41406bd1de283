"""A long text has the tokens that its tokenizer gives it whole, in memory that does not grow with it."""

import random
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.marks import CI, first
from support.tiny import make_recipe
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from fedloom.data import long_texts
from fedloom.data.documents import Document
from fedloom.data.tokens import tokenize_documents
from fedloom.model.source import byte_tokenizer

FILES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
PROSE = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
TEXTS = {
    "code": PROSE,
    "umlauts and emojis": "".join(
        random.Random(0).choices(["grün ", "\U0001f600", "e\u0301", "日本語。", "\n", "x"], k=30_000)
    ),
    "no blanks": PROSE.replace(" ", "").replace("\n", ""),
    "one letter": "a" * 50_000,
    "special tokens in it": PROSE[:20_000] + "</s>" + PROSE[:20_000],
}


def trained(kind: str, *, split: bool = True) -> Any:
    """A tokenizer of a kind, trained on some code, that puts <s> before a text and </s> behind it."""
    special = ["<s>", "</s>", "[UNK]"]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=1000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
        trainer = trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="[UNK]")
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special)
    tokenizer.train_from_iterator([PROSE[:100_000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")


@pytest.fixture(scope="module", params=first(["bpe", "unigram", "wordpiece", "bytes"], rest=CI))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_tokenizer() if request.param == "bytes" else trained(request.param)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 3_000)
    monkeypatch.setattr(long_texts, "OVERLAP", 1_000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", first(TEXTS, keep=2, every=2))
def test_the_pieces_give_the_tokens_of_the_whole(kind: str, tokenizer: Any) -> None:
    text = TEXTS[kind][:60_000]
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert long_texts.tokenize_all(text, tokenizer).tolist() == whole
    for length in random.Random(1).sample(range(2_900, len(text)), 5):
        assert long_texts.tokenize_all(text[:length], tokenizer).tolist() == tokenizer(text[:length])["input_ids"]


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_what_is_used(tokenizer: Any) -> None:
    if tokenizer.vocab_size == 257:
        assert not long_texts.splits_words_first(tokenizer), "of bytes alone: it knows no words"
        return
    assert long_texts.splits_words_first(tokenizer)
    parts = long_texts._tokenize_in_pieces(PROSE[:60_000], tokenizer)
    assert parts is not None
    assert len(parts) > 20


@pytest.mark.usefixtures("small_pieces")
def test_pieces_that_never_agree_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = trained("bpe"), PROSE[:9_000]
    monkeypatch.setattr(long_texts, "AGREEING", 2_000)  # more than overlap
    assert long_texts._tokenize_in_pieces(text, tokenizer) is None
    assert long_texts.tokenize_all(text, tokenizer).tolist() == tokenizer(text)["input_ids"]


def plain(model: Any, pre_tokenizer: Any = None, normalizer: Any = None, **special: Any) -> Any:
    tokenizer = Tokenizer(model)
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def threes() -> Any:
    """Digits by threes, as GPT-4 splits them: a piece that begins inside a number counts from another digit."""
    pattern = Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, level])
    tokenizer.train_from_iterator(
        [" ".join(random.Random(2).choices("0123456789", k=3_000)), "123 123 456 456 " * 300],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def bos_for_the_unknown() -> Any:
    words = {"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4, "AC": 5}
    tokenizer = plain(models.BPE(vocab=words, merges=[("A", "C")], unk_token="<s>"), pre_tokenizers.Digits())
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


LETTERS = {"x": 0, "4": 1, "y": 2, "a": 3}
PERIODIC = [("[UNK]", -20.0), ("a", -5.0), ("b", -5.0), ("ab", -1.0), ("ba", -0.9999), ("x", -2.0), ("y", -2.0)]
ODD = {
    "characters that are left out": (
        lambda: plain(models.BPE(vocab=LETTERS, merges=[])), "é" * 1000 + "xy" * 95_000 + "4" * 15_000
    ),
    "the same in words": (
        lambda: plain(models.BPE(vocab=LETTERS, merges=[]), pre_tokenizers.Digits()),
        "é" * 1000 + "xy" * 95_000 + "4" * 15_000,
    ),
    "digits by threes": (
        threes, "ab " * 65_000 + "".join(random.Random(3).choices("0123456789", k=5_002)) + " ab" * 5_000
    ),
    "digits by threes in another place": (threes, "ab " * 64_000 + "7" * 9_004 + " ab" * 5_000),
    "costs that tie by phase": (
        lambda: plain(models.Unigram(PERIODIC, unk_id=0)), "xy" * 97_500 + "x" + "ab" * 2_500 + "y" * 3_000
    ),
    "a beginning that stands for the unknown": (
        bos_for_the_unknown, "".join(random.Random(0).choices("ACGT", k=210_000))
    ),
    "a beginning that stands for the unknown, and digits": (bos_for_the_unknown, "A1" + "ACG7" * 52_000),
    "blanks in one word": (lambda: trained("unigram", split=False), "word " * 39_000 + " " * 5_001 + "word " * 2_000),
}  # fmt: skip
"""Tokenizers and texts whose pieces agree on many tokens, and not with the whole."""


@pytest.mark.parametrize("kind", first(ODD, keep=3))
def test_what_pieces_agree_on_by_chance_is_not_believed(kind: str) -> None:
    make, text = ODD[kind]
    tokenizer = make()
    assert len(text) > long_texts.PIECE
    assert long_texts.tokenize_all(text, tokenizer).tolist() == tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.long
def test_digits_by_threes_are_still_read_in_pieces() -> None:
    tokenizer, text = threes(), "ab 12345 " * 30_000
    assert long_texts.splits_words_first(tokenizer)
    parts = long_texts._tokenize_in_pieces(text, tokenizer)
    assert parts is not None
    assert torch.cat(parts).tolist() == tokenizer(text, verbose=False)["input_ids"]


@pytest.mark.usefixtures("small_pieces")
def test_joining_at_the_cut_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: pieces laid side by side where one ends and the next begins."""
    tokenizer = trained("bpe")
    monkeypatch.setattr(
        long_texts,
        "_find_seam",
        lambda tokens, following, middle: (
            sum(token[0] < middle for token in tokens),
            sum(token[0] < middle for token in following) + 1,
        ),
    )
    assert long_texts.tokenize_all(PROSE[:60_000], tokenizer).tolist() != tokenizer(PROSE[:60_000])["input_ids"]


@pytest.mark.slow
def test_ten_million_characters_take_little_more_than_their_tokens() -> None:
    tokenizer, text = trained("bpe"), (PROSE * 60)[:10_000_000]
    tokenize_documents([Document(PROSE, "warm")], tokenizer, make_recipe(data={"window": "blocks"}).data)
    process, peak = psutil.Process(), 0
    before = process.memory_info().rss

    class Watched(type(tokenizer)):
        is_fast = True

        def __call__(self, *asked: Any, **options: Any) -> Any:
            nonlocal peak
            result = super().__call__(*asked, **options)
            peak = max(peak, process.memory_info().rss)
            return result

    tokenizer.__class__ = Watched
    blocks = tokenize_documents(
        [Document(text, "long")], tokenizer, make_recipe(data={"window": "blocks", "max_length": 512}).data
    )
    held = blocks.tokens_NT.numel() * blocks.tokens_NT.element_size()
    print(f"{(peak - before) / 1e6:.0f} MB at most, {held / 1e6:.0f} MB of tokens")
    assert torch.equal(blocks.tokens_NT.flatten()[:100], torch.tensor(tokenizer(text[:2_000])["input_ids"][:100]))
    assert peak - before < 3 * held + 100e6
