"""A long text has the tokens that its tokenizer gives it whole, in memory that does not grow with it."""

import random
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.tiny import make_recipe
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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


def trained(kind: str) -> Any:
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
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
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


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece", "bytes"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_tokenizer() if request.param == "bytes" else trained(request.param)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 3_000)
    monkeypatch.setattr(long_texts, "OVERLAP", 1_000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", TEXTS)
def test_the_pieces_give_the_tokens_of_the_whole(kind: str, tokenizer: Any) -> None:
    text = TEXTS[kind][:60_000]
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert long_texts.tokenize_all(text, tokenizer).tolist() == whole
    for length in random.Random(1).sample(range(2_900, len(text)), 5):
        assert long_texts.tokenize_all(text[:length], tokenizer).tolist() == tokenizer(text[:length])["input_ids"]


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_what_is_used(tokenizer: Any) -> None:
    parts = long_texts._tokenize_in_pieces(PROSE[:60_000], tokenizer)
    assert parts is not None
    assert len(parts) > 20


@pytest.mark.usefixtures("small_pieces")
def test_pieces_that_never_agree_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = byte_tokenizer(), PROSE[:9_000]
    monkeypatch.setattr(long_texts, "AGREEING", 2_000)  # more than overlap
    assert long_texts._tokenize_in_pieces(text, tokenizer) is None
    assert long_texts.tokenize_all(text, tokenizer).tolist() == tokenizer(text)["input_ids"]


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


@pytest.mark.long
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
