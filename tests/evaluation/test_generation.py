"""Answers to many prompts at once, against one prompt after another and a whole pass for each token."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, save_tiny_model
from support.marks import CI, first
from support.shapes import ARCHITECTURES
from support.tiny import PEFT_NEEDS, make_adapted, make_recipe
from transformers import GenerationConfig

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.lora import Residual, lora_pairs
from fedloom.adapters.peft_config import build_config
from fedloom.adapters.stacked_lora import StackedLora
from fedloom.errors import ModelError
from fedloom.evaluation import decoding, generation
from fedloom.evaluation.decoding import Way, stacks, way_of
from fedloom.evaluation.generation import Answer, Prompt, Sampling, Writing, write_all, write_on, write_with_each
from fedloom.experiment.building import load_adapted_model
from fedloom.model.attention import MASKLESS
from fedloom.model.loading import load_model
from fedloom.model.source import byte_tokenizer, open_model

TOKENIZER = byte_tokenizer()
TEXTS = (
    "red kites over the hill",
    "a",
    "the mill",
    "seven boats",
    "to be or not to b",
    "two",
    "rain on a roof",
    "two oaks",
)
ROOM = 6
PROMPTS = [Prompt(list(text.encode()), ROOM) for text in TEXTS]
FEW = PROMPTS[:4]
"""A batch of three lengths and one of a prompt alone: what a family can do otherwise than another shows in these."""
WRITING = Writing(batch_size=3)
AT_LEAST = ["bloom", "gpt2", "mamba", "roberta", "bart", "recurrent_gemma", "rwkv", "qwen3_next"]
"""Families of a kind of their own in what they keep, or in how they count positions; `make test` tries the first."""

WAYS = {
    "gpt2": Way(keeps=True, pads=True),
    "bloom": Way(keeps=True, pads=False),
    "roberta": Way(keeps=False, pads=False),
    "rwkv": Way(keeps=False, pads=False),
}
"""Short cuts of some; of the others transformers makes NaN of padding, counts positions from 0, or mixes rows."""


def one_by_one(adapted: AdaptedModel, prompt: Prompt, stops: Sequence[int] = ()) -> list[int]:
    """The likeliest tokens, each from a whole pass over the text of one prompt alone."""
    tokens = list(prompt.tokens)
    adapted.model.eval()
    while len(tokens) < len(prompt.tokens) + prompt.room:
        with torch.inference_mode():
            tokens.append(int(adapted.logits(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt.tokens) :]


def draw_adapters(adapted: AdaptedModel, count: int, scale: float = 0.3) -> list[Adapter]:
    """Adapters that are far from one another and from the base."""
    generator = torch.Generator().manual_seed(5)
    size = (count, adapted.layout.size)
    drawn_KP = torch.randn(size, generator=generator, dtype=adapted.weights_P.dtype) * scale
    return [Adapter(adapted.layout, drawn_P) for drawn_P in drawn_KP]


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    return [list(answer.tokens) for answer in answers]


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about the models
@pytest.mark.parametrize(
    "name", [*first(AT_LEAST, keep=4), *first([name for name in FAMILIES if name not in AT_LEAST], keep=0, every=9)]
)
def test_every_family_writes_what_it_would_alone(name: str, tmp_path: Path) -> None:
    save_tiny_model(name, tmp_path)
    family = FAMILIES[name]
    base = load_model(open_model(str(tmp_path)), dtype=family.dtype, device=torch.device("cpu"))
    section = make_recipe(adapter={"rank": 2, "targets": family.targets_of(name)}).adapter
    adapted = AdaptedModel(base, build_config(section, base), seed=7)
    adapters = draw_adapters(adapted, 2, scale=0.05)
    adapted.load(adapters[0])
    expected = [one_by_one(adapted, prompt) for prompt in FEW]
    assert tokens_of(write_all(adapted, TOKENIZER, FEW, WRITING)) == expected
    together = write_with_each(adapted, TOKENIZER, [adapters[1], adapters[0]], FEW, WRITING)
    assert tokens_of(together[1]) == expected
    assert way_of(adapted) == WAYS.get(name, way_of(adapted))
    # XLNet's layers see tokens before texts; it is not trained either, as it looks ahead.
    assert stacks(adapted) == (name != "xlnet")


@pytest.mark.parametrize("shape", first(ARCHITECTURES))
def test_adapters_at_once_write_what_each_writes_alone(shape: str) -> None:
    adapted = make_adapted(shape)
    assert adapted.base.config._attn_implementation == MASKLESS
    assert way_of(adapted) == Way(keeps=True, pads=True)
    assert stacks(adapted)
    adapters = [None, *draw_adapters(adapted, 3)]
    alone = []
    for adapter in adapters:
        with generation._with(adapted, adapter):
            alone.append([one_by_one(adapted, prompt) for prompt in PROMPTS])
    assert len({str(answers) for answers in alone}) == 4
    for size in (1, 3, 64):  # adapters that do not all fit, that do, and all prompts at once
        found = write_with_each(adapted, TOKENIZER, adapters, PROMPTS, Writing(batch_size=size))
        assert [tokens_of(answers) for answers in found] == alone
    assert adapted.base.config._attn_implementation == MASKLESS


def test_the_base_model_among_adapters_is_the_base_model_to_the_bit() -> None:
    """As one of a pass's adapters, made of zeros."""
    adapted = make_adapted()
    tokens_BT = torch.tensor([PROMPTS[0].tokens] * 2)
    stack = generation.Stack(adapted)
    stack.bind(torch.stack([torch.zeros(adapted.layout.size), draw_adapters(adapted, 1)[0].weights_P]))
    with torch.inference_mode():
        with generation._with(adapted, None):
            expected_BTV = adapted.logits(tokens_BT)
        with stack.installed():
            found_BTV = adapted.logits(tokens_BT)
    assert torch.equal(found_BTV[0], expected_BTV[0])
    assert not torch.equal(found_BTV[1], expected_BTV[1])


def test_adapters_that_share_an_a_write_at_once_as_well() -> None:
    """With `ffa`, an adapter is its B alone, and A is the model's."""
    adapted = make_adapted(freeze_a=True)
    adapters = [None, *draw_adapters(adapted, 2)]
    found = write_with_each(adapted, TOKENIZER, adapters, PROMPTS, WRITING)
    assert stacks(adapted)
    for adapter, answers in zip(adapters, found, strict=True):
        with generation._with(adapted, adapter):
            assert tokens_of(answers) == [one_by_one(adapted, prompt) for prompt in PROMPTS]
    assert len({str(answers) for answers in found}) == 3


def test_a_residual_is_its_adapters_alone() -> None:
    adapted = make_adapted(residuals=True)
    first_one, plain, other = draw_adapters(adapted, 3)
    pairs = lora_pairs(adapted.layout.names)

    def with_residual(adapter: Adapter, seed: int) -> Adapter:
        generator, tensors = torch.Generator().manual_seed(seed), adapted.layout.split(adapter.weights_P)
        factors = {
            layer: tuple(torch.randn(tensors[name].shape, generator=generator) for name in (b, a))
            for layer, (a, b) in pairs.items()
        }
        return Adapter(adapter.layout, adapter.weights_P, Residual(factors))  # type: ignore[arg-type]

    adapters = [with_residual(first_one, 1), None, plain, with_residual(other, 2)]
    found = write_with_each(adapted, TOKENIZER, adapters, PROMPTS, WRITING)
    for adapter, answers in zip(adapters, found, strict=True):
        with generation._with(adapted, adapter):
            assert tokens_of(answers) == [one_by_one(adapted, prompt) for prompt in PROMPTS]
    assert len({str(answers) for answers in found}) == 4


METHODS = [
    "prompt_tuning",
    "prefix_tuning",
    "ia3",
    "full",
    "adaption_prompt",
    "boft",
    "oft",
    "vera",
    "trainable_tokens",
]


@pytest.mark.filterwarnings("ignore")  # of PEFT, about the models
@pytest.mark.parametrize("method", first(METHODS, keep=4))
@pytest.mark.parametrize("shape", first(["tiny-llama", "tiny-gpt2"], rest=CI))
def test_other_methods_write_what_they_would_alone(method: str, shape: str) -> None:
    if (method, shape) in {("adaption_prompt", "tiny-gpt2"), ("oft", "tiny-gpt2"), ("boft", "tiny-gpt2")}:
        pytest.skip("PEFT has it for other models")
    section = {"rank": None, "alpha": None, "options": PEFT_NEEDS.get(method, {}), "method": method}
    recipe = make_recipe(model={"source": f"random:{shape}"}, adapter=section)
    adapted = load_adapted_model(recipe, open_model(recipe.model.source))
    start = adapted.read()
    generator = torch.Generator().manual_seed(5)
    moved_P = start.weights_P + 0.5 * torch.randn(adapted.layout.size, generator=generator)
    adapters = [start if adapted.is_whole else None, Adapter(adapted.layout, moved_P)]
    found = write_with_each(adapted, TOKENIZER, adapters, PROMPTS, WRITING)
    for adapter, answers in zip(adapters, found, strict=True):
        with generation._with(adapted, adapter):
            assert tokens_of(answers) == [one_by_one(adapted, prompt) for prompt in PROMPTS]
    assert tokens_of(found[0]) != tokens_of(found[1])


def test_a_model_for_which_a_short_cut_is_wrong_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention without masks would take in what fills prompts up: the trial sees it."""
    adapted = make_adapted("tiny-opt")
    expected = [one_by_one(adapted, prompt) for prompt in PROMPTS]
    monkeypatch.setattr(decoding, "with_masks", lambda model: nullcontext())
    monkeypatch.setitem(decoding._TRIED, adapted, {False: Way(keeps=True, pads=True)})
    assert tokens_of(write_all(adapted, TOKENIZER, PROMPTS, WRITING)) != expected
    decoding._TRIED.pop(adapted)
    assert tokens_of(write_all(adapted, TOKENIZER, PROMPTS, WRITING)) == expected
    assert way_of(adapted) == Way(keeps=True, pads=False)
    monkeypatch.setattr(StackedLora, "forward", lambda layer, x: layer.base(x))
    assert not stacks(adapted)


def test_a_models_own_settings_of_writing_change_nothing() -> None:
    adapted = make_adapted()
    adapted.load(draw_adapters(adapted, 1)[0])
    plain = tokens_of(write_all(adapted, TOKENIZER, PROMPTS, WRITING))
    own = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, eos_token_id=plain[0][0])
    adapted.base.generation_config = own
    assert tokens_of(write_all(adapted, TOKENIZER, PROMPTS, WRITING)) == plain
    assert adapted.base.generation_config is own


def test_what_is_drawn_for_a_prompt_is_its_own() -> None:
    """Whoever is beside it, in whatever batch, under whatever other adapter."""
    adapted = make_adapted()
    adapters = draw_adapters(adapted, 2)

    def drawn(prompts: Sequence[Prompt], seed: int, size: int = 3, top_p: float = 1.0) -> list[list[Answer]]:
        writing = Writing(sampling=Sampling(1.0, top_p, seed), batch_size=size)
        return write_with_each(adapted, TOKENIZER, adapters, prompts, writing)

    expected = drawn(PROMPTS, seed=1)
    assert drawn(PROMPTS, seed=1, size=1) == drawn(PROMPTS, seed=1, size=16) == expected
    assert [answers[:3] for answers in expected] == drawn(PROMPTS[:3], seed=1)
    assert expected != drawn(PROMPTS, seed=2)
    same = drawn([PROMPTS[0]] * 8, seed=1)[0]
    assert len({answer.tokens for answer in same}) == 8, "samples of one prompt differ"
    adapted.load(adapters[0])
    assert tokens_of(drawn(PROMPTS, 1, top_p=1e-9)[0]) == tokens_of(write_all(adapted, TOKENIZER, PROMPTS, WRITING))


@pytest.mark.parametrize("top_p", [1.0, 0.65])
def test_tokens_are_drawn_by_their_probability(top_p: float) -> None:
    scores_V = torch.tensor([0.4, 0.1, 0.3, 0.2]).log() * 2
    count, kept_V = 4000, torch.tensor([1.0, 0.0, 1.0, float(top_p == 1.0)])
    choose = generation._drawn(range(count), 1, Sampling(2.0, top_p, 3))
    found_V = choose(0, scores_V.expand(count, -1)).bincount(minlength=4) / count
    expected_V = torch.tensor([0.4, 0.1, 0.3, 0.2]) * (kept_V if top_p < 1 else 1)
    expected_V /= expected_V.sum()
    deviation_V = (expected_V * (1 - expected_V) / count).sqrt()
    assert ((found_V - expected_V).abs() <= 4 * deviation_V).all()
    assert not found_V[expected_V == 0].any()


def test_an_answer_ends_where_it_should() -> None:
    adapted = make_adapted()
    adapted.load(draw_adapters(adapted, 1)[0])
    plain = write_all(adapted, TOKENIZER, PROMPTS, Writing(batch_size=8))
    whole = plain[0].tokens
    stop = next(token for token in whole if token != whole[0])
    place = whole.index(stop)
    stopped = write_all(adapted, TOKENIZER, PROMPTS, Writing([stop], batch_size=8))
    assert tokens_of(stopped) == [one_by_one(adapted, prompt, [stop]) for prompt in PROMPTS]
    assert stopped[0] == Answer(TOKENIZER.decode(whole[:place]), whole[: place + 1], True)
    assert [answer.ended for answer in stopped] == [stop in answer.tokens for answer in plain]

    prompts = [Prompt(prompt.tokens, 1 + number % 4) for number, prompt in enumerate(PROMPTS)]
    short = write_all(adapted, TOKENIZER, prompts, WRITING)
    assert [len(answer.tokens) for answer in short] == [prompt.room for prompt in prompts]
    assert all(answer.tokens == whole.tokens[: len(answer.tokens)] for answer, whole in zip(short, plain, strict=True))
    assert not any(answer.ended for answer in short)


def test_a_word_ends_an_answer_and_is_cut_off() -> None:
    """A tokenizer of bytes: a word is several tokens, which a fixed choice writes here."""
    adapted = make_adapted()
    wanted = TOKENIZER("ab class XY", add_special_tokens=False)["input_ids"]

    def choose(step: int, scores_BV: torch.Tensor) -> torch.Tensor:
        return torch.full((len(scores_BV),), wanted[step])

    batch = decoding.Batch([PROMPTS[0].tokens], [9], choose, decoding.Ending(words=["\nclass", " class"]), TOKENIZER)
    (tokens,) = decoding.decode(adapted, batch, way_of(adapted))
    assert tokens == wanted[:8]
    writing = Writing(words=["\nclass", " class"])
    assert generation._answer(tokens, batch, writing, TOKENIZER) == Answer("ab", tuple(tokens), True)


def test_no_prompt_is_taken_beyond_the_longest() -> None:
    """A batch goes on until its last answer is done, and GPT-2 has no position behind its last."""
    adapted = make_adapted("tiny-gpt2")
    longest = adapted.base.config.max_position_embeddings
    long, short = list(range(1, 200)) * 9, [5, 6, 7]
    prompts = [Prompt(long[: longest - 2], 2), Prompt(short, 9), Prompt(long[: longest - 4], 4)]
    found = write_all(adapted, TOKENIZER, prompts, Writing(batch_size=8))
    assert tokens_of(found) == [one_by_one(adapted, prompt) for prompt in prompts]


def test_where_memory_runs_out_batches_become_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make_adapted()
    adapters = draw_adapters(adapted, 2)
    expected = write_with_each(adapted, TOKENIZER, adapters, PROMPTS, WRITING)
    enough, sizes = 4, []

    def short_of_memory(adapted: AdaptedModel, batch: decoding.Batch, *others: Any) -> list[list[int]]:
        sizes.append(len(batch.prompts))
        if len(batch.prompts) > enough:
            raise torch.OutOfMemoryError
        return decoding.decode(adapted, batch, *others)

    monkeypatch.setattr(generation, "decode", short_of_memory)
    assert write_with_each(adapted, TOKENIZER, adapters, PROMPTS, Writing(batch_size=16)) == expected
    assert sizes == [16, 8, 4, 4, 4, 4]
    enough = 1
    with pytest.raises(ModelError, match="not enough memory to answer a single prompt"):
        write_with_each(adapted, TOKENIZER, adapters, PROMPTS, WRITING)


def test_one_prompt_is_written_as_among_others() -> None:
    adapted = make_adapted()
    pieces: list[str] = []
    said = write_on(adapted, TOKENIZER, PROMPTS[0].tokens, room=ROOM, say=pieces.append)
    assert "".join(pieces) == said + "\n"
    assert said == write_all(adapted, TOKENIZER, PROMPTS, WRITING)[0].text
