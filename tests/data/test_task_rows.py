"""Rows become questions, and what is no question is counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.asked import CHOICE, ask_rows
from support.tiny import make_recipe

from fedloom.data.asking import Asking, warn_of_template
from fedloom.data.known_rows import KNOWN, read_known
from fedloom.data.rows import UnreadableError
from fedloom.data.task_rows import TaskRows, load_task
from fedloom.errors import DataError
from fedloom.model.source import open_model
from fedloom.recipe.task_section import Task

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
Write = Callable[..., Path]


def load(path: Path, **keys: Any) -> TaskRows:
    told = {"name": "task", "source": str(path), **(CHOICE if "kind" not in keys else {}), **keys}
    return load_task(Task.model_validate(told))


def asking(**data: Any) -> Asking:
    source = open_model("random:tiny-llama")
    return Asking(make_recipe(data=data).data, source.tokenizer, source.max_length, source.vocabulary_size)


@pytest.mark.parametrize(
    ("keys", "answer"),
    [({}, "blue"), ({"answer_as": "letter"}, "B"), ({"answer_as": "index"}, 1)],
)
def test_the_right_choice_is_told_by_text_letter_or_number(keys: Any, answer: Any, write_jsonl: Write) -> None:
    found = load(write_jsonl([{"q": "sky", "c": ["red", "blue"], "a": answer}]), **keys)
    (question,) = found.questions
    assert (question.prompt, question.choices, question.right) == ("sky", ("red", "blue"), 1)


def test_choices_are_templates_too_and_letters_stand_for_them(write_jsonl: Write) -> None:
    path = write_jsonl([{"q": "sky", "one": "red", "two": "blue", "a": "blue"}])
    (question,) = load(path, choices=["{one}", "{two}", "neither"]).questions
    assert question.choices == ("red", "blue", "neither")
    keys = {"choices": ["{one}", "{two}"], "letters": True, "prompt": "{q}?\n{lettered}"}
    (question,) = load(path, **keys).questions
    assert question.prompt == "sky?\nA. red\nB. blue"
    assert (question.choices, question.answers, question.right) == (("A", "B"), ("B",), 1)


def test_rows_that_are_no_questions_are_counted(write_jsonl: Write) -> None:
    rows = [
        {"q": "ok", "c": ["x", "y"], "a": "y"},
        {"q": "no answer", "c": ["x", "y"], "a": "z"},
        {"q": "one choice", "c": ["x"], "a": "x"},
        {"c": ["x", "y"], "a": "y"},
    ]
    found = load(write_jsonl(rows))
    assert len(found.questions) == 1
    assert found.skipped == {
        "without an answer among the choices": 1,
        "without two choices or more in column c": 1,
        "without text in column q": 1,
    }
    with pytest.raises(DataError, match=r"task task: no row is a question \(1 without an answer among the choices\)"):
        load(write_jsonl(rows[1:2]))
    with pytest.raises(DataError, match=r"task task: .*no such file or folder"):
        load(Path("none.jsonl"))


@pytest.mark.parametrize(
    ("choices", "answer", "keys", "reason"),
    [
        (["x", "y"], ["x", "y"], {}, "with several answers, of which a choice has one"),
        (["x", "x", "y"], "x", {}, "with its answer twice among the choices"),
        (["x", "x", "y"], 1, {"answer_as": "index"}, "with its answer twice among the choices"),
        (["x", "x"], "x", {"letters": True, "prompt": "{q}{lettered}"}, "with its answer twice among the choices"),
        (
            [str(n) for n in range(27)],
            "3",
            {"letters": True, "prompt": "{q}{lettered}"},
            "with more choices than letters",
        ),
    ],
)
def test_a_choice_that_could_be_right_and_count_as_wrong_is_no_question(
    choices: list[str], answer: Any, keys: Any, reason: str, write_jsonl: Write
) -> None:
    fair = {"q": "sky", "c": ["x", "y", "y"], "a": 0 if keys.get("answer_as") else "x"}
    found = load(write_jsonl([{"q": "sky", "c": choices, "a": answer}, fair]), **keys)
    assert (len(found.questions), found.skipped) == (1, {reason: 1})


def test_letters_tell_choices_of_the_same_text_apart(write_jsonl: Write) -> None:
    keys = {"letters": True, "prompt": "{q}{lettered}", "answer_as": "letter"}
    (question,) = load(write_jsonl([{"q": "sky", "c": ["x", "x"], "a": "B"}]), **keys).questions
    assert question.right == 1


def test_a_limit_draws_the_same_questions_each_time(write_jsonl: Write) -> None:
    path = write_jsonl([{"q": f"{number}", "c": ["x", "y"], "a": "x"} for number in range(50)])
    first, again = (load(path, limit=10).questions for _ in range(2))
    assert first == again
    assert [question.prompt for question in first] != [f"{number}" for number in range(10)]
    assert len({question.prompt for question in first}) == 10


def test_only_some_rows_and_a_part_of_them(write_jsonl: Write) -> None:
    path = write_jsonl([{"q": f"{number}", "c": ["x", "y"], "a": "x", "of": "ab"[number % 2]} for number in range(50)])
    assert {int(question.prompt) % 2 for question in load(path, only={"of": ["b"]}).questions} == {1}
    datasets = pytest.importorskip("datasets")
    theirs = datasets.Dataset.from_list([{"q": str(number)} for number in range(50)])
    test = theirs.train_test_split(0.25, seed=42)["test"]["q"]
    assert [question.prompt for question in load(path, test_share=0.25).questions] == list(test)


def test_a_list_of_answers_are_all_right(write_jsonl: Write) -> None:
    path = write_jsonl([{"q": "sky", "a": ["blue", "azure"]}])
    (question,) = load(path, kind="exact", prompt="{q}", answer="{a}").questions
    assert question.answers == ("blue", "azure")


def test_the_same_questions_have_the_same_digest_wherever_they_lie(write_jsonl: Write) -> None:
    rows = [{"q": "sky", "c": ["red", "blue"], "a": "red"}]
    one, other = load(write_jsonl(rows)), load(write_jsonl(rows, "other.jsonl"))
    assert one.digest == other.digest
    assert load(write_jsonl([{**rows[0], "a": "blue"}])).digest != one.digest
    assert load(write_jsonl(rows), prompt="{q}?").digest != one.digest


def test_a_choice_stands_behind_its_question_as_a_person_writes(tmp_path: Path) -> None:
    how = asking()
    rows = [{"q": "sky", "c": ["red", "blue"], "a": "red"}]
    asked = ask_rows(tmp_path, rows, how)
    for row, choice in enumerate(("red", "blue")):
        length = int(asked.options.lengths_N[row])
        tokens_T, counts_T = asked.options.tokens_NT[row, :length], asked.options.counted_NT[row, :length]
        assert how.tokenizer.decode(tokens_T[counts_T]) == f" {choice}"
        assert how.tokenizer.decode(tokens_T[~counts_T], skip_special_tokens=True) == "sky"
    asked = ask_rows(tmp_path, rows, how, prompt="{q}:\n")
    assert how.tokenizer.decode(asked.options.tokens_NT[0], skip_special_tokens=True).startswith("sky:\nred")


def test_a_run_on_conversations_is_asked_in_its_chat_template(tmp_path: Path) -> None:
    how = asking(messages="messages", chat_template=TEMPLATE, system="Be brief.")
    rows = [{"q": "sky", "c": ["red", "blue"], "a": "red"}]
    asked = ask_rows(tmp_path, rows, how)
    assert how.tokenizer.decode(asked.prompts[0]) == "s:Be brief.<|end|>u:sky<|end|>a:"
    assert how.tokenizer.decode(asked.options.tokens_NT[0]).startswith("s:Be brief.<|end|>u:sky<|end|>a:red")
    assert not warn_of_template(asked.task, how.data)
    plain = ask_rows(tmp_path, rows, how, chat=False)
    assert how.tokenizer.decode(plain.prompts[0], skip_special_tokens=True) == "sky"
    assert "asked without a chat template, and the run was trained in one" in warn_of_template(plain.task, how.data)


def test_a_template_that_is_not_that_of_training_is_told() -> None:
    data = make_recipe(data={"prompt": "Q {q}\nA ", "completion": "{a}"}).data
    keys = {"name": "t", "source": "x", **CHOICE}
    assert warn_of_template(Task.model_validate({**keys, "prompt": "Q {other}\nA "}), data) == ""
    assert "another template than data.prompt" in warn_of_template(Task.model_validate(keys), data)
    assert "in a chat template, and the run was trained without" in warn_of_template(
        Task.model_validate({**keys, "chat": True}), data
    )
    assert warn_of_template(Task.model_validate(keys), make_recipe().data) == ""


def test_a_question_longer_than_the_model_is_left_out_and_counted(tmp_path: Path) -> None:
    how = asking()
    assert how.longest is not None
    rows = [{"q": "sky", "c": ["red", "blue"], "a": "red"}, {"q": "long " * how.longest, "c": ["x", "y"], "a": "x"}]
    asked = ask_rows(tmp_path, rows, how)
    assert len(asked.questions) == 1
    assert asked.skipped == {"longer than the model takes": 1}
    with pytest.raises(DataError, match="no question can be asked"):
        ask_rows(tmp_path, rows[1:], how)


def test_an_answer_that_nobody_can_write_is_no_question(write_jsonl: Write) -> None:
    rows = [{"q": "ok", "a": "y"}, {"q": "half a character", "a": "\ud800"}, {"q": "in a list", "a": ["y", "\ud800"]}]
    found = load(write_jsonl(rows), kind="exact", prompt="{q}", answer="{a}")
    assert found.skipped == {"not valid Unicode": 2}


def test_a_row_of_megabytes_is_left_out_before_it_is_tokenised(tmp_path: Path) -> None:
    how = asking()
    small = {"q": "sky", "c": ["red", "blue"], "a": "red"}
    huge = "word " * 1_000_000
    rows = [small, {**small, "q": huge}, {**small, "c": ["red", huge]}]
    seen: list[int] = []
    whole = how.tokenizer

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def __call__(self, text: str, **more: Any) -> Any:
            seen.append(len(text))
            return whole(text, **more)

    asked = ask_rows(tmp_path, rows, replace(how, tokenizer=Watched()))
    assert asked.skipped == {"longer than the model takes": 2}
    assert max(seen) < 10_000
    written = {"kind": "rouge", "prompt": "{q}", "answer": "{a}"}
    asked = ask_rows(tmp_path, [small, {**small, "a": huge}], how, **written)
    assert asked.skipped == {"longer than the model takes": 1}, "it would be compared, word by word"


def test_a_question_that_the_chat_template_refuses_is_left_out_and_the_others_are_asked(tmp_path: Path) -> None:
    refuses = "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    how = asking(messages="messages", chat_template=refuses)
    rows = [{"q": text, "c": ["red", "blue"], "a": "red"} for text in ("sky", "a bad one")]
    asked = ask_rows(tmp_path, rows, how)
    assert asked.skipped == {"refused by the chat template (roles, or their order)": 1}
    with pytest.raises(DataError, match=r"no question can be asked \(1 refused by the chat template"):
        ask_rows(tmp_path, rows[1:], how)


ROWS: dict[str, tuple[dict[str, Any], str, list[str], str]] = {
    "mmlu": (
        {"question": "Why", "subject": "logic", "choices": ["p", "q", "r", "s"], "answer": 2},
        "Why?",
        ["p", "q", "r", "s"],
        "C",
    ),
    "pubmedqa": (
        {"CONTEXTS": ["One.", "Two."], "QUESTION": "So?", "final_decision": "maybe"},
        "One.\nTwo.\nSo?",
        ["yes", "no", "maybe"],
        "maybe",
    ),
    "medqa": (
        {"question": "Say.", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}], "answer": "y"},
        "Say.",
        ["x", "y"],
        "B",
    ),
    "medmcqa": (
        {"question": "Is it?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 0},
        "Is it?",
        ["1", "2", "3", "4"],
        "A",
    ),
    "careqa": (
        {"question": "Is it?", "op1": "1", "op2": "2", "op3": "3", "op4": "4", "cop": 4},
        "Is it?",
        ["1", "2", "3", "4"],
        "D",
    ),
    "fpb": (
        {"sentence": "Sales rose.", "label": 2},
        "Instruction: What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.\n"
        "Input: Sales rose.\n",
        ["negative", "neutral", "positive"],
        "positive",
    ),
    "fiqa": (
        {"sentence": "Down", "sentiment_score": -0.3, "format": "post"},
        "Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}.\n"
        "Input: Down\n",
        ["negative", "neutral", "positive"],
        "negative",
    ),
    "tfns": (
        {"text": "Up", "label": 1},
        "Instruction: What is the sentiment of this tweet? Please choose an answer from {negative/neutral/positive}.\n"
        "Input: Up\n",
        ["negative", "neutral", "positive"],
        "positive",
    ),
}
"""A row of each known form: what is asked, the choices, and the answer as the data set's board has it."""


@pytest.mark.parametrize("form", KNOWN)
def test_known_forms_of_rows_are_read(form: str, tmp_path: Path) -> None:
    row, asked, choices, answer = ROWS[form]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row), json.dumps({"other": 1})]), encoding="utf-8")
    by_letter = answer in "ABCD"
    found = load(
        path, kind="choice", rows_of=form, prompt="{question}", choices="choices", answer="{answer}",
        answer_as="letter" if by_letter else "text",
    )  # fmt: skip
    (question,) = found.questions
    assert (question.prompt, list(question.choices)) == (asked, choices)
    assert question.right == ("ABCD".index(answer) if by_letter else choices.index(answer))
    assert found.skipped == {f"not in the form of {form}": 1}


WRONG: list[tuple[str, dict[str, Any]]] = [
    *(("mmlu", {"answer": value}) for value in (float("inf"), float("nan"), 0.7, -1, 4, None, [1])),
    *(("fpb", {"label": value}) for value in (-1, 3, float("inf"), 1.5, "positive")),
    *(("tfns", {"label": value}) for value in (-1, -3, float("-inf"))),
    *(("fiqa", {"sentiment_score": value}) for value in (float("nan"), float("inf"), "good")),
    *((form, {column: value}) for form, column in (("fpb", "sentence"), ("tfns", "text")) for value in (None, ["x"])),
    ("medmcqa", {"cop": -1}),
    ("careqa", {"cop": 0}),
    ("medqa", {"options": [{"key": "A", "value": "y"}, {"key": "B", "value": "y"}]}),
]


@pytest.mark.parametrize(("form", "wrong"), WRONG)
def test_a_row_without_a_right_answer_is_no_question_and_no_guess(form: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(UnreadableError):
        read_known({**ROWS[form][0], **wrong}, form)


def test_the_options_of_a_question_may_come_in_any_order() -> None:
    options = [{"key": "B", "value": "y"}, {"key": "A", "value": "x"}]
    found = read_known({"question": "Say.", "options": options, "answer": "y"}, "medqa")
    assert (found["choices"], found["answer"]) == (["y", "x"], "A")


def test_known_forms_are_those_that_a_task_can_name() -> None:
    described = Task.model_json_schema()["properties"]["rows_of"]
    assert set(described["anyOf"][0]["enum"]) == set(KNOWN)
