"""Tasks of lm-evaluation-harness on the live model, against the harness's own numbers for the same model exported."""

import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.families import FAMILIES, save_tiny_model
from support.tiny import make_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.errors import DataError
from fedloom.evaluation import harness
from fedloom.evaluation.generation import Prompt, Writing, write_all
from fedloom.evaluation.harness import HarnessScore, run_harness
from fedloom.model.attention import MASKLESS
from fedloom.model.loading import load_model
from fedloom.model.source import open_model

QUESTIONS = ["red kites", "a", "the mill by the river", "seven boats", "to be or not to", "two", "rain on a roof"] * 3
ROOM = 8

needs_harness = pytest.mark.skipif(
    not harness.find_spec(harness.PACKAGE),
    reason="lm-evaluation-harness is not installed: pip install --no-deps -r requirements/evaluate.txt",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness, of transformers and PEFT, about each other


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model("llama", folder).generation_config.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(base: Path) -> AdaptedModel:
    model = load_model(open_model(str(base)), dtype="float64", device=torch.device("cpu"))
    section = make_recipe(adapter={"rank": 2, "targets": FAMILIES["llama"].targets_of("llama")}).adapter
    adapted = AdaptedModel(model, build_config(section, model), seed=7)
    generator = torch.Generator().manual_seed(5)
    adapted.load(Adapter(adapted.layout, 0.05 * torch.randn(adapted.layout.size, generator=generator)))
    return adapted


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **task: Any) -> str:
    """Write a task's documents and its file, which is JSON and therefore YAML."""
    documents = folder / f"{name}.jsonl"
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test", "doc_to_text": "{{q}}", "metadata": {"version": 3.0}, **task,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(told))
    return str(file)


@pytest.fixture
def choices(tmp_path: Path) -> str:
    draw = random.Random(3)
    rows = [
        {"q": text, "choices": [" yes", " no", " kites and boats"], "answer": draw.randrange(3)} for text in QUESTIONS
    ]
    return write_task(
        tmp_path, "our_choices", rows, output_type="multiple_choice", doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    )  # fmt: skip


@pytest.fixture
def likelihood(tmp_path: Path) -> str:
    rows = [{"q": text, "answer": " and more"} for text in QUESTIONS]
    return write_task(
        tmp_path, "our_words", rows, output_type="loglikelihood", doc_to_target="{{answer}}", target_delimiter="",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )  # fmt: skip


@pytest.fixture
def answers(tmp_path: Path, adapted: AdaptedModel, tokenizer: Any) -> str:
    """A task whose answers are those that the adapter writes."""
    prompts = [Prompt(tokenizer(text)["input_ids"], ROOM) for text in QUESTIONS]
    found = write_all(adapted, tokenizer, prompts, Writing([tokenizer.eos_token_id], ["\n"], batch_size=1))
    rows = [{"q": text, "answer": answer.text} for text, answer in zip(QUESTIONS, found, strict=True)]
    return write_task(
        tmp_path, "our_answers", rows, output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": ROOM, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


def by_itself(base: Path, adapter: Path, tasks: list[str]) -> dict[str, Any]:
    """The harness's own results for the merged model, which it loads itself.

    With an adapter beside the base, it would cut the vocabulary down to the tokenizer's.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    PeftModel.from_pretrained(own, adapter).merge_and_unload().save_pretrained(adapter / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter / "merged")
    model = HFLM(str(adapter / "merged"), dtype="float64", device="cpu", batch_size=4)
    found: dict[str, Any] = simple_evaluate(model, tasks=tasks, task_manager=TaskManager(include_defaults=False))
    return found["results"]  # type: ignore[no-any-return]


@needs_harness
def test_its_numbers_are_the_harness_own_for_the_model_exported(
    base: Path, adapted: AdaptedModel, tokenizer: Any, choices: str, likelihood: str, answers: str, tmp_path: Path
) -> None:
    adapter = adapted.read()
    adapted.save(adapter, tmp_path / "adapter")
    tasks = [choices, likelihood, answers]
    answered = run_harness(adapted, tokenizer, tasks, batch_size=4)
    found = answered.scores
    expected = by_itself(base, tmp_path / "adapter", tasks)
    asked = [("our_answers", "exact_match"), ("our_choices", "acc"), ("our_choices", "acc_norm")]
    assert sorted((score.task, score.metric) for score in found) == [*asked, ("our_words", "perplexity")]
    for score in found:
        assert score.value == pytest.approx(expected[score.task][f"{score.metric},{score.filter}"], rel=1e-5)
        assert (score.documents, score.version) == (len(QUESTIONS), "3.0")
        assert score.higher_is_better is (score.metric != "perplexity")
    assert len(answered.prompts) == harness.PROBES
    assert set(answered.prompts) <= set(QUESTIONS)
    digests = {score.task: score.digest for score in found}
    assert len(set(digests.values())) == 3
    values = {score.metric: score.value for score in found}
    assert values["exact_match"] == 1.0
    assert 0 < values["acc"] < 1

    with adapted.as_base(adapter, adapter):
        base_alone = run_harness(adapted, tokenizer, tasks).scores
    assert {score.task: score.digest for score in base_alone} == digests
    alone = {score.metric: score.value for score in base_alone}
    assert abs(alone["perplexity"] / values["perplexity"] - 1) > 1e-3
    assert alone["exact_match"] < 1


@needs_harness
def test_what_fills_prompts_up_is_masked(
    adapted: AdaptedModel, tokenizer: Any, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without masks, answers in a batch are others than alone."""
    monkeypatch.setattr(harness, "with_masks", lambda model: nullcontext())
    (score,) = run_harness(adapted, tokenizer, [answers], batch_size=4).scores
    assert score.value < 1


@needs_harness
def test_everything_is_afterwards_as_it_was(adapted: AdaptedModel, tokenizer: Any, likelihood: str) -> None:
    tokenizer.pad_token = None
    tokenizer.chat_template = None
    before = adapted.weights_P.detach().clone()
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    first = run_harness(adapted, tokenizer, [likelihood], limit=4).scores
    assert (random.random(), torch.rand(1)) == expected
    assert (tokenizer.pad_token, tokenizer.chat_template) == (None, None)
    assert adapted.base.config._attn_implementation == MASKLESS
    assert torch.equal(adapted.weights_P, before)
    # The layers still see the flat weights, and can be trained.
    adapted.load(Adapter(adapted.layout, before * 0))
    assert run_harness(adapted, tokenizer, [likelihood], limit=4).scores != first
    adapted.load(Adapter(adapted.layout, before))
    adapted.logits(torch.tensor([[1, 2, 3]])).square().mean().backward()
    assert adapted.gradient_P.any()
    assert run_harness(adapted, tokenizer, [likelihood], limit=4).scores == first
    assert first[0].documents == 4


@needs_harness
def test_questions_are_written_by_a_chat_template(adapted: AdaptedModel, tokenizer: Any, likelihood: str) -> None:
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}"
    plain, own, other = (
        run_harness(adapted, tokenizer, [likelihood], chat_template=text, as_chat=text is not None)
        for text in (None, template, template + "{% if add_generation_prompt %}a:{% endif %}")
    )
    assert len({one.scores[0].value for one in (plain, own, other)}) == 3
    assert len({one.scores[0].digest for one in (plain, own, other)}) == 3
    led = run_harness(adapted, tokenizer, [likelihood], chat_template=template, as_chat=True, system="be brief")
    assert set(led.prompts) <= {f"s:be briefu:{text}" for text in QUESTIONS}


@needs_harness
def test_what_it_can_not_run_is_refused(adapted: AdaptedModel, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.yaml: there is no such file"):
        run_harness(adapted, tokenizer, [str(tmp_path / "absent.yaml")])
    gone = write_task(tmp_path, "gone", [], output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target=0)
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(DataError, match=r"the documents of .*gone.yaml can't be read \(FileNotFoundError\)"):
        run_harness(adapted, tokenizer, [gone])
    spoiled = tmp_path / "spoiled.yaml"
    spoiled.write_text("task: [x")
    with pytest.raises(DataError, match=r"spoiled\.yaml is no task that .* can read \(ParserError\)"):
        run_harness(adapted, tokenizer, [str(spoiled)])
    runs = write_task(
        tmp_path, "runs_code", [{"q": "x", "answer": "y"}], output_type="generate_until", doc_to_target="{{answer}}",
        unsafe_code=True, generation_kwargs={"until": ["\n"], "max_gen_toks": 2},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    with pytest.raises(DataError, match="runs the code that a model wrote"):
        run_harness(adapted, tokenizer, [runs])


@needs_harness
@pytest.mark.long
def test_a_task_that_it_does_not_have_is_named(adapted: AdaptedModel, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no-such-task: lm-evaluation-harness has no such task"):
        run_harness(adapted, tokenizer, ["no-such-task"])


def test_without_the_harness_an_error_says_what_to_install(
    adapted: AdaptedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package_is_installed")
    with pytest.raises(DataError, match=r"lm-evaluation-harness is not installed; pip install 'lm-eval==0\.4\.13'"):
        run_harness(adapted, tokenizer, ["mmlu"])


def test_a_groups_documents_are_those_of_its_tasks() -> None:
    """As the harness tells of a group: a mean over tasks, and no number of documents of its own."""

    def asked(word: str) -> dict[str, str]:
        return {f"{part}_hash": f"{word} as {part}" for part in harness.HASHED}

    found = {
        "results": {
            "group": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "group"},
            "one": {"acc,none": 0.25, "acc_stderr,none": "N/A", "alias": "one"},
            "two": {"acc,none": 0.75, "acc_stderr,none": 0.2, "alias": "two"},
        },
        "n-samples": {"one": {"effective": 3}, "two": {"effective": 5}},
        "group_subtasks": {"group": ["one", "two"]},
        "versions": {"group": 1, "one": 2, "two": 2},
        "higher_is_better": {"group": {"acc": True}},
        "samples": {"one": [asked("a"), asked("b")], "two": [asked("c")]},
    }

    def digest_of(task: str) -> str:
        return harness._digest(found, task)

    assert len(set(map(digest_of, ("group", "one", "two")))) == 3
    assert harness._scores(found) == [
        HarnessScore("group", "acc", "none", 0.5, 0.1, 8, "1", True, digest_of("group")),
        HarnessScore("one", "acc", "none", 0.25, None, 3, "2", None, digest_of("one")),
        HarnessScore("two", "acc", "none", 0.75, 0.2, 5, "2", None, digest_of("two")),
    ]
