"""Tasks: what a model can do, by the likelihood of choices or by what it writes, as the model is now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.asking import AskedTask
from fedloom.data.tokens import stack_blocks
from fedloom.errors import ModelError
from fedloom.evaluation.choices import log_likelihoods
from fedloom.evaluation.code_runs import Limits, pass_at_k, run_programs
from fedloom.evaluation.flowertune import BOARD_RULES, count_board
from fedloom.evaluation.generation import LIKELIEST, Complete, Prompt, Sampling, Writing
from fedloom.evaluation.measures import Measure, find_answers, is_same, mean, rouge_l, share, token_f1
from fedloom.progress import Watch, as_questions, ignore

Values = dict[str, list[float]]
"""Value of each question, by the name of a measure."""
SHARES = {"accuracy", "accuracy_by_length", "board", "unreadable", "exact_match"}
"""Measures whose values are 0 or 1."""
COMPARED: Mapping[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {
    "exact": ("exact_match", is_same),
    "f1": ("f1", token_f1),
    "rouge": ("rouge_l", rouge_l),
}
"""Kind of task -> the name of its measure, and how what was written is compared with the answers that are right."""
TRIES = (1, 10, 100)
"""Numbers k of pass@k that are counted, where there are as many tries."""
SEED = 0
"""Seed of what is drawn."""
PROBED = 8
"""Questions by which an adapter is seen to be there."""


@dataclass(frozen=True)
class TaskResult:
    """Answers of a model to a task, counted."""

    values: Values
    measures: Mapping[str, Measure]
    seconds: float


@dataclass(frozen=True)
class Answerer:
    """A model as it is now, and how it answers: by likelihoods in batches, and in words by `complete`."""

    adapted: AdaptedModel
    tokenizer: Any
    complete: Complete
    batch_size: int
    watch: Watch = ignore
    lower: Callable[[int], object] = int

    def answer(self, asked: AskedTask) -> TaskResult:
        """Return the model's answers to a task, counted.

        Raises:
            ModelError: memory runs out with a single question.
            DataError: the task's pattern comes to no end.
        """
        began = time.perf_counter()
        ways = {"choice": self._choose, "code": self._run}
        values = ways.get(asked.task.kind, self._write)(asked)
        shares = SHARES if asked.task.tries > 1 else {*SHARES, "pass@1"}
        measures = {name: (share if name in shares else mean)(found) for name, found in values.items()}
        return TaskResult(values, measures, time.perf_counter() - began)

    def _choose(self, asked: AskedTask) -> Values:
        """Return which questions are right by the likeliest choice; likeliest by its sum, and by its characters."""
        found_N = log_likelihoods(
            self.adapted, asked.options, batch_size=self.batch_size, watch=as_questions(self.watch), lower=self.lower
        )
        values: Values = {"accuracy": [], "accuracy_by_length": []}
        sizes = [len(question.choices) for question in asked.questions]
        for question, scores in zip(asked.questions, found_N.split(sizes), strict=True):
            lengths = torch.tensor([max(1, len(choice)) for choice in question.choices])
            # The largest of numbers of which one is none is that one, and so it would be right by chance.
            told = not bool(scores.isnan().any())
            values["accuracy"].append(float(told and int(scores.argmax()) == question.right))
            values["accuracy_by_length"].append(float(told and int((scores / lengths).argmax()) == question.right))
        if asked.task.rule:
            values["board"], values["unreadable"] = self._ask_as_the_board(asked, asked.task.rule)
        return values

    def _ask_as_the_board(self, asked: AskedTask, rule: str) -> tuple[list[float], list[float]]:
        right = [question.choices[question.right] for question in asked.questions]
        gold = len(self.tokenizer(right[0], add_special_tokens=False)["input_ids"])
        rooms = [max(1, BOARD_RULES[rule].room(len(prompt), gold)) for prompt in asked.prompts]
        return count_board(self._complete(asked, rooms), right, rule)

    def _write(self, asked: AskedTask) -> Values:
        task = asked.task
        said = self._complete(asked, [task.max_new_tokens] * len(asked.prompts))
        right_ones = [question.answers for question in asked.questions]
        if task.kind == "regex":
            assert task.pattern is not None, "a recipe refuses it"
            found = [*zip(find_answers(task.pattern, said, where=f"task {task.name}"), right_ones, strict=True)]
            # Without an answer to compare with, what the pattern finds is right.
            right = [one is not None and (not answers or bool(is_same(one, answers))) for one, answers in found]
            return {"accuracy": [*map(float, right)], "unreadable": [float(one is None) for one, _ in found]}
        name, measure = COMPARED[task.kind]
        return {name: [measure(one, answers) for one, answers in zip(said, right_ones, strict=True)]}

    def _run(self, asked: AskedTask) -> Values:
        """Run what is written in its program, and return the share of tries, of one or of k, that pass (pass@k)."""
        task = asked.task
        sampling = Sampling(task.temperature, seed=SEED) if task.temperature else LIKELIEST
        said = self._complete(asked, [task.max_new_tokens] * len(asked.prompts), sampling)
        programs = [
            f"{before}{said[number * task.tries + one]}{behind}"
            for number, question in enumerate(asked.questions)
            for before, behind in [question.program or ("", "")]
            for one in range(task.tries)
        ]
        verdicts = iter(run_programs(programs, Limits(seconds=task.seconds)))
        passed = [sum(next(verdicts) == "passed" for _ in range(task.tries)) for _ in asked.questions]
        return {f"pass@{k}": [pass_at_k(task.tries, one, k) for one in passed] for k in TRIES if k <= task.tries}

    def _complete(self, asked: AskedTask, rooms: Sequence[int], sampling: Sampling = LIKELIEST) -> list[str]:
        """Return what is written behind each prompt, `tries` times."""
        if asked.room is not None:
            rooms = [min(room, asked.room - len(prompt)) for room, prompt in zip(rooms, asked.prompts, strict=True)]
        prompts = [Prompt(tokens, room) for tokens, room in zip(asked.prompts, rooms, strict=True)]
        writing = Writing(asked.stops, asked.task.words or (), sampling, self.batch_size)
        return self.complete([prompt for prompt in prompts for _ in range(asked.task.tries)], writing)


def average(results: Sequence[TaskResult]) -> TaskResult:
    """Return the mean over tasks of each measure that all of them have; each task counts alike."""
    shared = [name for name in results[0].measures if all(name in result.measures for result in results)]
    measures = {name: mean(*(result.values[name] for result in results)) for name in shared}
    return TaskResult({}, measures, sum(result.seconds for result in results))


def check_applied(
    adapted: AdaptedModel, start: Adapter, trained: Adapter, asked: Sequence[Sequence[int]], *, batch_size: int
) -> None:
    """Load an adapter, and refuse to judge it where it changes no log-likelihood though its weights say it does.

    `start` is what training began with, and `asked` the tokens of questions, of which a few are tried.

    Raises:
        ModelError
    """
    prompts = [torch.tensor(prompt) for prompt in asked if len(prompt) > 1][:PROBED]
    if not prompts:  # a single token predicts nothing that a likelihood could be of
        adapted.load(trained)
        return
    counted = [torch.ones(len(prompt), dtype=torch.bool) for prompt in prompts]
    blocks = stack_blocks(prompts, counted, max(map(len, prompts)))
    with adapted.as_base(start, trained):
        before = log_likelihoods(adapted, blocks, batch_size=batch_size)
    after = log_likelihoods(adapted, blocks, batch_size=batch_size)
    if torch.equal(before, after) and not is_idle(start, trained):
        raise ModelError(
            "the adapter changes no log-likelihood, though its weights are not what they were before training: it is"
            " not applied, or its changes are lost in the model's dtype",
            where="adapter",
            mend="check that it belongs to this model",
        )


def is_idle(start: Adapter, trained: Adapter) -> bool:
    """Return whether an adapter's weights say that it changes nothing: those it began with, or a LoRA whose B is 0."""
    if trained.residual is not None:
        return False
    named = trained.layout.split(trained.weights_P)
    of_lora = [value for name, value in named.items() if ".lora_B." in name]
    plain = bool(of_lora) and all(".lora_A." in name or ".lora_B." in name for name in named)
    return torch.equal(start.weights_P, trained.weights_P) or (plain and not any(bool(b.any()) for b in of_lora))
