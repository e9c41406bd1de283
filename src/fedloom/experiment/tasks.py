"""Tasks of a run: read before anything is trained, asked of the base model and of adapters, and put on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.asking import AskedTask, Asking, ask, asks_in_chat, warn_of_template
from fedloom.data.seen_questions import count_seen
from fedloom.data.task_rows import TaskRows, load_task
from fedloom.errors import RecipeError
from fedloom.evaluation.code_runs import run_program
from fedloom.evaluation.generation import complete_all
from fedloom.evaluation.measures import count_share
from fedloom.evaluation.task_counts import OwnAnswers
from fedloom.evaluation.tasks import Answerer, TaskResult, average, check_applied
from fedloom.host.files import hash_json
from fedloom.model.source import ModelSource
from fedloom.progress import Say, Watch
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.task_files import load_tasks
from fedloom.records.answers import explain_seen, name_model
from fedloom.records.evaluations import add_evaluations, find_evaluation
from fedloom.records.run import Record
from fedloom.records.writer import now
from fedloom.text import count, list_reasons


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their questions."""

    tasks: tuple[TaskRows, ...]
    averages: Mapping[str, Sequence[str]]
    """Name of a mean -> the names of its tasks."""
    in_training: Mapping[str, int] = field(default_factory=dict)
    """Questions of each task that are among the documents trained on; empty where nobody could look."""

    def __bool__(self) -> bool:
        return bool(self.tasks)

    @property
    def digest(self) -> str:
        """Return a hash of all that is asked."""
        return hash_json([{rows.task.name: rows.digest for rows in self.tasks}, dict(self.averages)])


def gather_tasks(
    sources: Sequence[str | Path], places: Sequence[str] = (), say: Say | None = None, *, run_code: bool = False
) -> LoadedTasks:
    """Read files of tasks, and the rows of each; `places` are as in `load_tasks`.

    Raises:
        RecipeError, DataError: a file or a source can't be had, or is not what it should be; or a task runs code, and
            nobody asked for that with `run_code`.
        RunError: this machine does not give what confines a program.
    """
    found = load_tasks(sources, places)
    if of_code := [task.name for task in found.tasks if task.kind == "code"]:
        if not run_code:
            raise RecipeError(
                "it runs programs that the model writes, and nobody has read",
                where=f"task {of_code[0]}",
                mend="read docs/tasks-code.md, then: fedloom evaluate RUN --tasks ... --run-code",
            )
        run_program("")  # before a model is asked for an hour
    loaded = []
    for task in found.tasks:
        if say:
            say("task", f"{task.name}: {task.source}")
        loaded.append(load_task(task))
    return LoadedTasks(tuple(loaded), found.averages)


def find_seen(loaded: LoadedTasks, trained: frozenset[bytes]) -> LoadedTasks:
    """Return tasks with how many of their questions are among what is trained on, by its hashes."""
    return replace(loaded, in_training={rows.task.name: count_seen(rows, trained) for rows in loaded.tasks})


NO_TASKS = LoadedTasks((), {})


def describe_tasks(loaded: LoadedTasks, recipe: Recipe) -> tuple[str, ...]:
    """Return a line for each task: its questions, what was skipped, and a warning where training asked otherwise."""
    lines = []
    for rows in loaded.tasks:
        skipped = sum(rows.skipped.values())
        reasons = list_reasons(rows.skipped)
        warning = warn_of_template(rows.task, recipe.data)
        seen = loaded.in_training.get(rows.task.name)
        lines.append(
            f"{rows.task.name}, {rows.task.kind}: {count(len(rows.questions), 'question')}"
            + (f", {explain_seen(seen)}" if seen is not None else "")
            + (f", {count(skipped, 'row')} skipped: {reasons}" if skipped else "")
            + (f"; {warning}" if warning else "")
        )
    return tuple(lines)


class Examiner:
    """Asks a run's models its tasks, and puts the answers on record; what is there already is not asked again."""

    def __init__(
        self,
        loaded: LoadedTasks,
        recipe: Recipe,
        source: ModelSource,
        adapted: AdaptedModel,
        folder: Path,
        *,
        say: Say,
        watch: Watch,
    ) -> None:
        """Take the run directory, whose initial adapter is there, and its model."""
        self._loaded, self._recipe, self._source, self.adapted, self._folder = loaded, recipe, source, adapted, folder
        self._say = say
        size = recipe.evaluation.batch_size
        complete = complete_all(adapted, source.tokenizer, watch)
        self._answerer = Answerer(adapted, source.tokenizer, complete, size, watch)

    @cached_property
    def _asked(self) -> list[AskedTask]:
        longest = self._source.max_length
        room = None if longest is None else longest - self.adapted.prompt_length
        how = Asking(self._recipe.data, self._source.tokenizer, room, self._source.vocabulary_size)
        return [ask(rows, how) for rows in self._loaded.tasks]

    @cached_property
    def _start(self) -> Adapter:
        return self.adapted.open(self._folder / "adapters" / "initial")

    def examine_base(self) -> list[Record]:
        """Ask the base model, without an adapter, and return its records."""
        known = self._find_known({})
        if self._needed(known):
            with self.adapted.as_base(self._start, self._start):
                self._ask({}, known)
        return self._in_order(known)

    def examine(self, adapter: Adapter, model: Record) -> list[Record]:
        """Ask the model with an adapter, and return its records; `model` says whose it is, as a record does.

        Raises:
            ModelError: the adapter is not applied.
        """
        model = {**model, "adapter_sha256": adapter.sha256()}
        known = self._find_known(model)
        if self._needed(known):
            size = self._recipe.evaluation.batch_size
            check_applied(self.adapted, self._start, adapter, self._asked[0].prompts, batch_size=size)
            self._ask(model, known)
        return self._in_order(known)

    def _find_known(self, model: Record) -> dict[str, Record]:
        """Return the records of a model that are there already, by task, of the same questions."""
        digests = {rows.task.name: rows.digest for rows in self._loaded.tasks}
        digests |= {name: self._digest_of(names) for name, names in self._loaded.averages.items()}
        found = {name: find_evaluation(self._folder, name, digest=one, model=model) for name, one in digests.items()}
        return {name: record for name, record in found.items() if record is not None}

    def _needed(self, known: Mapping[str, Record]) -> set[str]:
        """Return the names of the tasks to ask: those without a record, and those of a mean without one."""
        lacking = {rows.task.name for rows in self._loaded.tasks if rows.task.name not in known}
        for name, names in self._loaded.averages.items():
            if name not in known or lacking & set(names):
                lacking |= set(names)
        return lacking

    def _ask(self, model: Record, known: dict[str, Record]) -> None:
        """Ask the model as it is now what is lacking, and add it to what is known, and to what is on record."""
        needed = self._needed(known)
        results: dict[str, TaskResult] = {}
        whose = name_model(model)
        for asked in self._asked:
            if (name := asked.task.name) in needed:
                self._say("task", f"{name}, {count(len(asked.questions), 'question')}: {whose}")
                results[name] = self._answerer.answer(asked)
                known[name] = {**model, **self._describe(asked), **_counted(results[name])}
                add_evaluations(self._folder, [known[name]])
        for name, names in self._loaded.averages.items():
            if needed.issuperset(names):
                told = {"task": name, "kind": "average", "of_tasks": list(names), "digest": self._digest_of(names)}
                known[name] = {**model, **told, **_counted(average([results[one] for one in names]))}
                add_evaluations(self._folder, [known[name]])

    def _in_order(self, known: Mapping[str, Record]) -> list[Record]:
        return [known[name] for name in (*(rows.task.name for rows in self._loaded.tasks), *self._loaded.averages)]

    def _digest_of(self, names: Sequence[str]) -> str:
        return hash_json([rows.digest for rows in self._loaded.tasks if rows.task.name in names])

    def _describe(self, asked: AskedTask) -> dict[str, Any]:
        task, sizes = asked.task, [len(question.choices) for question in asked.questions]
        told: dict[str, Any] = {
            "task": task.name,
            "kind": task.kind,
            "source": task.source,
            "revision": asked.rows.revision,
            "digest": asked.rows.digest,
            "questions": len(asked.questions),
            "skipped": dict(asked.skipped),
            "chat": asks_in_chat(task, self._recipe.data),
        }
        if task.name in self._loaded.in_training:
            told["in_training"] = self._loaded.in_training[task.name]
        if task.kind == "choice":
            told["chance"] = sum(1 / size for size in sizes) / len(sizes)
        warning = warn_of_template(task, self._recipe.data)
        return {**told, "warning": warning} if warning else told


def _counted(result: TaskResult) -> dict[str, Any]:
    measures = {name: measure.to_json() for name, measure in result.measures.items()}
    return {"measures": measures, "seconds": result.seconds, "finished": now()}


def describe_own_answers(found: Mapping[int, OwnAnswers], model: Record) -> list[Record]:
    """Return the records of counts that clients told of their own tasks: by the adapter of `model`, and by the base."""
    records: list[Record] = []
    for client, answers in found.items():
        for whose, counts in ((model, answers.adapter), ({}, answers.base or ())):
            for one in counts:
                counted = {"accuracy": one.right} | ({} if one.unreadable is None else {"unreadable": one.unreadable})
                measures = {name: count_share(number, one.questions).to_json() for name, number in counted.items()}
                told = {"holder": client, "task": one.task, "questions": one.questions, "measures": measures}
                records.append({**whose, **told, "finished": now()})
    return records
