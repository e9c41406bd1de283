"""Tasks that a client holds itself: asked of the adapters that a server sends, and counted. Only counts leave here."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.asking import AskedTask, Asking, ask, warn_of_template
from fedloom.data.task_rows import load_task
from fedloom.deployment.client.display import say
from fedloom.evaluation.generation import complete_all
from fedloom.evaluation.task_counts import TaskCount
from fedloom.evaluation.tasks import Answerer, check_applied
from fedloom.model.source import ModelSource
from fedloom.progress import Watch
from fedloom.recipe.data_section import Data
from fedloom.recipe.task_section import Task
from fedloom.text import count

BASE = ""
"""Name of the base model among those that answered, which have their hashes."""


class OwnTasks:
    """A client's own tasks, and who answered them: nothing is asked twice."""

    def __init__(
        self,
        tasks: Sequence[Task],
        start: Adapter,
        data: Data,
        source: ModelSource,
        adapted: AdaptedModel,
        batch_size: int,
        watch: Watch,
    ) -> None:
        """Read the rows of the tasks, which are asked as a recipe's `data` says; `start` is what training begins with.

        Raises:
            DataError: rows can't be had, or none of them is a question.
        """
        self._adapted, self._start, self._size = adapted, start, batch_size
        room = None if source.max_length is None else source.max_length - adapted.prompt_length
        how = Asking(data, source.tokenizer, room, source.vocabulary_size)
        self._asked: list[AskedTask] = [ask(load_task(task), how) for task in tasks]
        complete = complete_all(adapted, source.tokenizer, watch)
        self._answerer = Answerer(adapted, source.tokenizer, complete, self._size, watch)
        self._counts: dict[str, tuple[TaskCount, ...]] = {}
        for asked in self._asked:
            warning = warn_of_template(asked.task, data)
            skipped = f", {count(sum(asked.skipped.values()), 'row')} skipped" if asked.skipped else ""
            words = f"{asked.task.name}: {count(len(asked.questions), 'question')}{skipped}"
            say("task", f"{words}; {warning}" if warning else words)

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, adapter: Adapter) -> tuple[TaskCount, ...]:
        """Return what an adapter has right.

        Raises:
            ModelError: it is not applied.
        """
        digest = adapter.sha256()
        if digest not in self._counts:
            check_applied(self._adapted, self._start, adapter, self._asked[0].prompts, batch_size=self._size)
            self._counts[digest] = self._answer("the adapter")
        return self._counts[digest]

    def ask_base(self) -> tuple[TaskCount, ...]:
        """Return what the base model has right, without an adapter."""
        if BASE not in self._counts:
            with self._adapted.as_base(self._start, self._start):
                self._counts[BASE] = self._answer("the base model")
        return self._counts[BASE]

    def _answer(self, whose: str) -> tuple[TaskCount, ...]:
        found = []
        for asked in self._asked:
            one = TaskCount.of(asked.task.name, self._answerer.answer(asked))
            say("task", f"{one.task}, {whose}: {one.right} of {one.questions} right")
            found.append(one)
        return tuple(found)
