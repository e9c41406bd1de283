"""FlowerTune's evaluation: its frames, its rules and its averages, on rows made up in the forms of its data sets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_adapted, make_recipe

from fedloom.data.asking import Asking, ask, warn_of_template
from fedloom.data.task_rows import load_task
from fedloom.evaluation.flowertune import count_board
from fedloom.evaluation.generation import Prompt
from fedloom.evaluation.measures import wilson
from fedloom.evaluation.tasks import Answerer, average
from fedloom.model.source import open_model
from fedloom.recipe.task_files import load_tasks

ROWS: dict[str, dict[str, Any]] = {
    "mmlu-stem": {"question": "Which one", "choices": ["w", "x", "y", "z"], "answer": 1, "subject": "anatomy"},
    "mmlu-social-sciences": {"question": "Who", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "sociology"},
    "mmlu-humanities": {"question": "Why", "choices": ["w", "x", "y", "z"], "answer": 0, "subject": "philosophy"},
    "pubmedqa": {"CONTEXTS": ["It is."], "QUESTION": "Is it?", "final_decision": "yes"},
    "medqa": {"question": "What?", "options": [{"key": "A", "value": "w"}, {"key": "B", "value": "x"}], "answer": "x"},
    "medmcqa": {"question": "What?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 3},
    "careqa": {"question": "What?", "op1": "w", "op2": "x", "op3": "y", "op4": "z", "cop": 1},
    "fpb": {"sentence": "Sales rose.", "label": 2},
    "fiqa": {"sentence": "Sales rose.", "sentiment_score": 0.05, "format": "headline"},
    "tfns": {"text": "Sales fell.", "label": 0},
}
LETTERED = "A. w\nB. x\nC. y\nD. z"
PROMPTS = {
    "mmlu-stem": "<|im_start|>question\nAnswer the following multiple choice question.\nQuestion: Which one?\n\n"
    f"Options:\n{LETTERED}\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n",
    "pubmedqa": "<|im_start|>question\nAs an expert doctor in clinical science and medical knowledge, can you tell me"
    " if the following statement is correct? Answer yes, no, or maybe.\nIt is.\nIs it?\nThe answer is:\n<|im_end|>\n"
    "<|im_start|>answer\n",
    "fpb": "Instruction: What is the sentiment of this news? Please choose an answer from"
    " {negative/neutral/positive}.\nInput: Sales rose.\nAnswer: ",
    "tfns": "Instruction: What is the sentiment of this tweet? Please choose an answer from"
    " {negative/neutral/positive}.\nInput: Sales fell.\nAnswer: ",
}
SUITES = ("flowertune-mmlu", "flowertune-medical", "flowertune-finance")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Where the rows of each task are, four of each: half of the sentiments are asked, or more."""
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    return {name: f"{name}={tmp_path / name}.jsonl" for name in ROWS}


@pytest.fixture(scope="module")
def how() -> Asking:
    source = open_model("random:tiny-llama")
    return Asking(make_recipe().data, source.tokenizer, None, source.vocabulary_size)


@pytest.mark.parametrize("suite", SUITES)
def test_questions_stand_in_the_boards_frame(suite: str, places: dict[str, str], how: Asking) -> None:
    names = [task.name for task in load_tasks([suite]).tasks]
    for task in load_tasks([suite], [places[name] for name in names]).tasks:
        rows = load_task(task)
        assert len(rows.questions) == (1 if task.test_share else 4)
        if task.name in PROMPTS:
            assert rows.questions[0].prompt == PROMPTS[task.name]
        if task.letters:
            assert rows.questions[0].choices == tuple("ABCD"[: 2 if task.name == "medqa" else 4])
            assert rows.questions[0].prompt.endswith("\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n")
        chats = make_recipe(data={"messages": "messages"}).data
        assert "asked without a chat template" in warn_of_template(task, chats)


def test_a_suite_is_the_mean_of_its_tasks_with_what_is_no_answer_apart(places: dict[str, str], how: Asking) -> None:
    names = ("mmlu-stem", "mmlu-social-sciences", "mmlu-humanities")
    loaded = load_tasks(["flowertune-mmlu"], [places[name] for name in names])
    assert loaded.averages == {"flowertune-mmlu": names}
    rooms: list[int] = []

    def complete(prompts: Sequence[Prompt], writing: Any) -> list[str]:
        rooms.extend(prompt.room for prompt in prompts)
        return ["B", " b)", "?", "C"]

    answerer = Answerer(make_adapted(device="cpu"), how.tokenizer, complete, 4)
    results = [answerer.answer(ask(load_task(task), how)) for task in loaded.tasks]
    assert rooms == [1] * 12, "as many tokens as the answer has"
    # B is right in the first, C in the second, A in the third.
    assert [result.measures["board"].right for result in results] == [2, 1, 0]
    assert [result.measures["unreadable"].right for result in results] == [1, 1, 1]
    assert (results[0].measures["board"].low, results[0].measures["board"].high) == wilson(2, 4)
    whole = average(results).measures
    assert whole["board"].value == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert whole["unreadable"].value == 0.25
    assert set(whole) == {"accuracy", "accuracy_by_length", "board", "unreadable"}
    assert whole["board"].interval.startswith("bootstrap")


def test_a_sentiment_has_the_room_that_the_board_gives(places: dict[str, str], how: Asking) -> None:
    tasks = {task.name: task for task in load_tasks(["flowertune-finance"], [places["tfns"]]).tasks}
    rooms: list[int] = []

    def complete(prompts: Sequence[Prompt], writing: Any) -> list[str]:
        rooms.extend(prompt.room + len(prompt.tokens) for prompt in prompts)
        return ["negative"] * len(prompts)

    answerer = Answerer(make_adapted(device="cpu"), how.tokenizer, complete, 4)
    found = answerer.answer(ask(load_task(tasks["tfns"]), how))
    assert rooms == [512] * 4
    assert found.measures["board"].value == 1


@pytest.mark.parametrize(
    ("rule", "said", "answer", "right", "readable"),
    [
        ("flowertune-letter", "B", "B", True, True),
        ("flowertune-letter", " b. x", "B", True, True),
        ("flowertune-letter", "The", "A", False, False),
        ("flowertune-letter", "", "A", False, False),
        ("flowertune-letter", "x\n## c\nmore", "C", True, True),
        ("flowertune-letter", "E", "A", False, True),
        ("flowertune-boolean", "yes", "yes", True, True),
        ("flowertune-boolean", "Yes.", "yes", True, True),
        ("flowertune-boolean", "nono", "no", True, True),
        ("flowertune-boolean", "maybe", "maybe", True, True),
        ("flowertune-boolean", "Maybe.", "maybe", False, True),
        ("flowertune-boolean", "yes it is", "yes", False, False),
        ("flowertune-sentiment", "positive", "positive", True, True),
        ("flowertune-sentiment", "not positive but Negative", "negative", False, True),
        ("flowertune-sentiment", "Negative", "negative", True, True),
        ("flowertune-sentiment", "neutral", "neutral", True, True),
        ("flowertune-sentiment", "no idea", "neutral", True, False),
        ("flowertune-sentiment", "bad Answer: positive", "neutral", True, False),
    ],
)
def test_answers_are_read_as_the_board_reads_them(
    rule: str, said: str, answer: str, right: bool, readable: bool
) -> None:
    assert count_board([said], [answer], rule) == ([float(right)], [float(not readable)])
