"""Tasks of a run: read before anything is trained, asked of the base model and of adapters, and put on record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.asking import AskedTask, Asking, ask, asks_in_chat, warn_of_template
from fedloom.data.task_rows import TaskRows, load_task
from fedloom.evaluation.generation import complete_each
from fedloom.evaluation.tasks import Answerer, TaskResult, average, check_applied
from fedloom.host.files import hash_json
from fedloom.model.source import ModelSource
from fedloom.progress import Say, Watch
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.task_files import load_tasks
from fedloom.records.evaluations import add_evaluations, find_evaluation
from fedloom.records.run import Record
from fedloom.records.writer import now
from fedloom.text import count


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their questions."""

    tasks: tuple[TaskRows, ...]
    averages: Mapping[str, Sequence[str]]
    """Name of a mean -> the names of its tasks."""

    def __bool__(self) -> bool:
        return bool(self.tasks)

    @property
    def digest(self) -> str:
        """Return a hash of all that is asked."""
        return hash_json([{rows.task.name: rows.digest for rows in self.tasks}, dict(self.averages)])


def gather_tasks(sources: Sequence[str | Path], places: Sequence[str] = (), say: Say | None = None) -> LoadedTasks:
    """Read files of tasks, and the rows of each; `places` are as in `load_tasks`.

    Raises:
        RecipeError, DataError: a file or a source can't be had, or is not what it should be.
    """
    found = load_tasks(sources, places)
    loaded = []
    for task in found.tasks:
        if say:
            say("task", f"{task.name}: {task.source}")
        loaded.append(load_task(task))
    return LoadedTasks(tuple(loaded), found.averages)


NO_TASKS = LoadedTasks((), {})


def describe_tasks(loaded: LoadedTasks, recipe: Recipe) -> tuple[str, ...]:
    """Return a line for each task: its questions, what was skipped, and a warning where training asked otherwise."""
    lines = []
    for rows in loaded.tasks:
        skipped = sum(rows.skipped.values())
        warning = warn_of_template(rows.task, recipe.data)
        lines.append(
            f"{rows.task.name}, {rows.task.kind}: {count(len(rows.questions), 'question')}"
            + (f", {count(skipped, 'row')} skipped" if skipped else "")
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
        complete = complete_each(adapted, source.tokenizer, watch)
        self._answerer = Answerer(adapted, source.tokenizer, complete, recipe.evaluation.batch_size, watch)

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
        if known := self._known(None, None):
            return known
        with self.adapted.as_base(self._start, self._start):
            return self._examine(None, None)

    def examine(self, adapter: Adapter, round: int) -> list[Record]:
        """Ask the model with the adapter of a round, and return its records.

        Raises:
            ModelError: the adapter is not applied.
        """
        digest = adapter.sha256()
        if known := self._known(round, digest):
            return known
        first, size = self._asked[0], self._recipe.evaluation.batch_size
        check_applied(self.adapted, self._start, adapter, first, batch_size=size)
        return self._examine(round, digest)

    def _known(self, round: int | None, adapter_sha256: str | None) -> list[Record]:
        """Return the records of a model that was asked all of this before; none where something is missing."""
        digests = {rows.task.name: rows.digest for rows in self._loaded.tasks}
        digests |= {name: self._digest_of(names) for name, names in self._loaded.averages.items()}
        found = [
            find_evaluation(self._folder, name, digest=digest, round=round, adapter_sha256=adapter_sha256)
            for name, digest in digests.items()
        ]
        whole = [record for record in found if record is not None]
        return whole if len(whole) == len(found) else []

    def _examine(self, round: int | None, adapter_sha256: str | None) -> list[Record]:
        """Ask the model as it is now."""
        model = {} if round is None else {"round": round, "adapter_sha256": adapter_sha256}
        results: dict[str, TaskResult] = {}
        records: list[Record] = []
        for asked in self._asked:
            name = asked.task.name
            whose = "the base model" if round is None else f"round {round}"
            self._say("task", f"{name}, {count(len(asked.questions), 'question')}: {whose}")
            results[name] = self._answerer.answer(asked)
            records.append({**model, **self._describe(asked), **_counted(results[name])})
        for name, names in self._loaded.averages.items():
            told = {"task": name, "kind": "average", "of_tasks": list(names), "digest": self._digest_of(names)}
            records.append({**model, **told, **_counted(average([results[one] for one in names]))})
        add_evaluations(self._folder, records)
        return records

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
        if task.kind == "choice":
            told["chance"] = sum(1 / size for size in sizes) / len(sizes)
        warning = warn_of_template(task, self._recipe.data)
        return {**told, "warning": warning} if warning else told


def _counted(result: TaskResult) -> dict[str, Any]:
    measures = {name: measure.to_json() for name, measure in result.measures.items()}
    return {"measures": measures, "seconds": result.seconds, "finished": now()}
