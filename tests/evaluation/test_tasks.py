"""What models can do is counted right: models of which it is known beforehand."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asked import ask_rows
from support.shapes import ARCHITECTURES
from support.tiny import make_adapted, make_recipe

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.data.asking import AskedTask, Asking
from fedloom.errors import ModelError
from fedloom.evaluation.choices import log_likelihoods
from fedloom.evaluation.generation import Prompt, Writing, complete_all
from fedloom.evaluation.tasks import Answerer, TaskResult, check_applied, is_idle
from fedloom.model.devices import open_device
from fedloom.model.loading import load_model
from fedloom.model.source import open_model

LETTERS = {
    "prompt": "{q}\n{lettered}\nAnswer: ",
    "kind": "choice",
    "choices": "c",
    "letters": True,
    "answer": "{a}",
    "rule": "flowertune-letter",
}


@pytest.fixture(scope="module")
def how() -> Asking:
    source = open_model("random:tiny-llama")
    return Asking(make_recipe().data, source.tokenizer, source.max_length, source.vocabulary_size)


def answer(adapted: AdaptedModel, how: Asking, asked: AskedTask) -> TaskResult:
    complete = complete_all(adapted, how.tokenizer)
    return Answerer(adapted, how.tokenizer, complete, batch_size=16).answer(asked)


def quiz(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with four choices of several lengths, and the right one anywhere."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(number):
        choices = ["".join(drawn.choices("abcdefgh", k=drawn.randint(2, 5))) + str(place) for place in range(4)]
        rows.append({"q": "".join(drawn.choices("stuvwxyz", k=6)), "c": choices, "a": drawn.choice(choices)})
    return rows


def perturbed(adapted: AdaptedModel, scale: float = 0.5) -> Adapter:
    """An adapter whose B is not zero."""
    weights_P = adapted.read().weights_P
    return Adapter(adapted.layout, weights_P + scale * torch.randn(len(weights_P), generator=torch.manual_seed(0)))


def test_a_random_model_is_at_chance(how: Asking, tmp_path: Path) -> None:
    found = answer(make_adapted(device="cpu"), how, ask_rows(tmp_path, quiz(300), how))
    for name in ("accuracy", "accuracy_by_length"):
        measure = found.measures[name]
        assert measure.of == 300
        assert abs(measure.value - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 300)


def test_a_model_rigged_to_a_letter_has_that_letters_share(how: Asking, tmp_path: Path) -> None:
    base = load_model(open_model("random:tiny-llama"), dtype="float32", device=open_device("cpu"))
    head = torch.nn.Linear(base.config.hidden_size, base.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(base.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[how.tokenizer("B", add_special_tokens=False)["input_ids"][0]] = 1000
    base.set_output_embeddings(head)
    section = make_recipe(adapter={"rank": 2, "targets": ARCHITECTURES["tiny-llama"]}).adapter
    adapted = AdaptedModel(base, build_config(section, base), 7)
    rows = quiz(60)
    found = answer(adapted, how, ask_rows(tmp_path, rows, how, **LETTERS))
    of_b = sum(row["c"].index(row["a"]) == 1 for row in rows)
    for name in ("accuracy", "accuracy_by_length", "board"):
        assert found.measures[name].right == of_b
    assert found.measures["unreadable"].right == 0


def test_likelihoods_are_those_of_the_logits_whatever_the_batch(how: Asking, shape: str, tmp_path: Path) -> None:
    adapted = make_adapted(shape, device="cpu")
    adapted.load(perturbed(adapted))
    asked = ask_rows(tmp_path, quiz(5), how)
    found = log_likelihoods(adapted, asked.options, batch_size=8)
    torch.testing.assert_close(log_likelihoods(adapted, asked.options, batch_size=1), found, rtol=1e-5, atol=1e-4)
    for number, question in enumerate(asked.questions):
        for place, choice in enumerate(question.choices):
            # This model's tokens are bytes.
            prompt = asked.prompts[number]
            tokens = prompt + how.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = adapted.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            by_hand = sum(float(log_p[at - 1, tokens[at]]) for at in range(len(prompt), len(tokens)))
            assert float(found[4 * number + place]) == pytest.approx(by_hand, abs=1e-3)


def test_an_answer_in_words_ends_where_a_word_is(how: Asking, tmp_path: Path) -> None:
    """A model of plain text goes on to the last token that it may write, and would be right in nothing."""
    adapted = make_adapted(device="cpu")
    adapted.load(perturbed(adapted))
    told = {"kind": "exact", "prompt": "{q}", "answer": "{a}", "max_new_tokens": 12}
    asked = ask_rows(tmp_path, [{"q": "sky", "a": "-"}], how, **told)
    (said,) = complete_all(adapted, how.tokenizer)([Prompt(asked.prompts[0], 12)], Writing())
    word = next(letter for letter in said[1:] if said.index(letter) > 0 and said.partition(letter)[0].strip())
    rows = [{"q": "sky", "a": said.partition(word)[0]}]
    for words, right in (({}, 0), ({"words": [word]}, 1)):
        found = answer(adapted, how, ask_rows(tmp_path, rows, how, **told, **words))
        assert found.measures["exact_match"].right == right


def test_letters_behind_a_question_are_computed_once_and_are_those_of_each(how: Asking, tmp_path: Path) -> None:
    adapted = make_adapted(device="cpu")
    asked = ask_rows(tmp_path, quiz(6), how, **LETTERS)
    computed: list[int] = []
    together = log_likelihoods(
        adapted, asked.options, batch_size=4, watch=lambda progress: computed.append(progress.samples)
    )
    assert sum(computed) == 6
    each = [log_likelihoods(adapted, asked.options.take(torch.tensor([number])), batch_size=1) for number in range(24)]
    torch.testing.assert_close(together, torch.cat(each), rtol=1e-5, atol=1e-5)
    assert len(set(together.tolist())) == 24


def test_an_adapter_whose_b_is_zero_is_the_base_to_the_bit(how: Asking, tmp_path: Path) -> None:
    adapted = make_adapted(device="cpu")
    start = adapted.read()
    noise = torch.randn(len(start.weights_P), generator=torch.manual_seed(1))
    named = adapted.layout.split(noise)
    for name, value in named.items():
        if ".lora_B." in name:
            value.zero_()
    idle = Adapter(adapted.layout, noise)
    assert is_idle(start, idle)
    asked = ask_rows(tmp_path, quiz(20), how, **LETTERS)
    with adapted.as_base(start, idle):
        base = log_likelihoods(adapted, asked.options, batch_size=8)
        said = answer(adapted, how, asked).values
    assert torch.equal(log_likelihoods(adapted, asked.options, batch_size=8), base)
    assert answer(adapted, how, asked).values == said
    check_applied(adapted, start, idle, asked.prompts, batch_size=8)


def test_an_adapter_that_is_not_applied_is_an_error(
    how: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make_adapted(device="cpu")
    start, trained = adapted.read(), perturbed(adapted)
    asked = ask_rows(tmp_path, quiz(4), how)
    assert not is_idle(start, trained)
    check_applied(adapted, start, trained, asked.prompts, batch_size=8)
    assert torch.equal(adapted.read().weights_P, trained.weights_P)
    adapted.load(start)
    monkeypatch.setattr(AdaptedModel, "load", lambda *_: None)
    with pytest.raises(ModelError, match="not applied"):
        check_applied(adapted, start, trained, asked.prompts, batch_size=8)


def test_the_base_leaves_what_is_frozen_frozen(tmp_path: Path) -> None:
    """PEFT switches gradients on again for all of an adapter, and FFA-LoRA's A learns nothing."""
    adapted = make_adapted(device="cpu", freeze_a=True)
    before = [(name, value.requires_grad) for name, value in adapted.model.named_parameters()]
    with adapted.as_base(adapted.read(), adapted.read()):
        pass
    assert [(name, value.requires_grad) for name, value in adapted.model.named_parameters()] == before


def test_a_model_that_gives_no_numbers_has_nothing_right(how: Asking, tmp_path: Path) -> None:
    adapted = make_adapted(device="cpu")
    for weights in adapted.base.parameters():
        weights.data.fill_(float("nan"))
    asked = ask_rows(tmp_path, [{"q": f"question {number}", "c": ["x", "y"], "a": "x"} for number in range(4)], how)
    found = Answerer(adapted, how.tokenizer, complete_all(adapted, how.tokenizer), 4).answer(asked)
    assert [found.measures[name].value for name in ("accuracy", "accuracy_by_length")] == [0.0, 0.0]


WRITTEN = {
    "exact": ({"answer": "{a}"}, "exact_match"),
    "regex": ({"answer": "{a}", "pattern": r"[a-d]+"}, "accuracy"),
    "f1": ({"answer": "{a}"}, "f1"),
    "rouge": ({"answer": "{a}"}, "rouge_l"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_answers_in_words_are_counted(kind: str, how: Asking, tmp_path: Path) -> None:
    """A model that says what is right in every second question."""
    keys, measure = WRITTEN[kind]
    rows = [{"q": f"question {number}", "a": "abc"} for number in range(10)]
    asked = ask_rows(tmp_path, rows, how, kind=kind, prompt="{q}", max_new_tokens=5, **keys)
    rooms: list[int] = []

    def complete(prompts: Sequence[Prompt], writing: Any) -> list[str]:
        rooms.extend(prompt.room for prompt in prompts)
        return ["abc" if number % 2 else "x y" for number in range(len(prompts))]

    found = Answerer(make_adapted(device="cpu"), how.tokenizer, complete, 4).answer(asked)
    assert found.measures[measure].value == 0.5
    assert rooms == [5] * 10
    if kind == "regex":
        assert found.measures["unreadable"].value == 0.5


def test_a_pattern_without_an_answer_is_right_where_it_finds_something(how: Asking, tmp_path: Path) -> None:
    asked = ask_rows(tmp_path, [{"q": "a"}, {"q": "b"}], how, kind="regex", prompt="{q}", pattern="yes")
    answerer = Answerer(make_adapted(device="cpu"), how.tokenizer, lambda *_: ["yes", "no"], 4)
    assert answerer.answer(asked).values == {"accuracy": [1.0, 0.0], "unreadable": [0.0, 1.0]}


def test_an_answer_has_the_room_that_the_model_has_left(how: Asking, tmp_path: Path) -> None:
    assert how.longest is not None
    rows = [{"q": "x" * (how.longest - 20), "a": "y"}, {"q": "x", "a": "y"}]
    asked = ask_rows(tmp_path, rows, how, kind="exact", prompt="{q}", answer="{a}", max_new_tokens=50)
    adapted = make_adapted(device="cpu")
    answerer = Answerer(adapted, how.tokenizer, complete_all(adapted, how.tokenizer), 4)
    assert answerer.answer(asked).measures["exact_match"].of == 2
    rooms: list[int] = []

    def complete(prompts: Sequence[Prompt], writing: Any) -> list[str]:
        rooms.extend(prompt.room for prompt in prompts)
        return [""] * len(prompts)

    Answerer(adapted, how.tokenizer, complete, 4).answer(asked)
    assert rooms == [how.longest - len(asked.prompts[0]), 50]
