"""Tasks of lm-evaluation-harness, asked of a run's models, and put on record beside the run's own tasks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.evaluation.harness import HarnessAnswers, HarnessScore, name_harness, open_manager, run_harness
from fedloom.evaluation.measures import Z_95
from fedloom.evaluation.tasks import check_applied
from fedloom.host.files import hash_json
from fedloom.model.source import ModelSource
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe
from fedloom.records.answers import HARNESS, name_model
from fedloom.records.evaluations import add_evaluations
from fedloom.records.run import Record
from fedloom.records.writer import now

PREFIX = "lm-eval/"
"""Beginning of the names of the harness's tasks in records: one of fedloom's own may have the same name."""
INTERVAL = "value ± 1.96 of the harness's standard errors, 95 %"
OTHER_PROMPTS = "asked by the harness's own prompts, and the run was trained by data.prompt"


class HarnessTasks:
    """Tasks that the harness has, by name or from files, and how they are asked.

    `limit` asks the first few questions of each alone, `examples` is how many answered ones stand before each.
    """

    def __init__(self, names: Sequence[str], *, limit: int | None = None, examples: int | None = None) -> None:
        """Read the tasks, so that what is wrong with them is told before a model is loaded.

        Raises:
            DataError: the harness is not installed, or has no such task.
        """
        self.names, self.limit, self.examples = tuple(names), limit, examples
        self.manager = open_manager(self.names)


class HarnessExaminer:
    """Has the harness ask a run's models, and puts its figures on record.

    What it asks is known only when it has: so it is asked anew each time.
    """

    def __init__(
        self, tasks: HarnessTasks, recipe: Recipe, source: ModelSource, adapted: AdaptedModel, folder: Path, *, say: Say
    ) -> None:
        """Take the run directory, whose initial adapter is there, and its model."""
        self._tasks, self._data, self._source, self._adapted = tasks, recipe.data, source, adapted
        self._batch_size, self._folder, self._say = recipe.evaluation.batch_size, folder, say

    def examine_base(self) -> list[Record]:
        """Ask the base model, without an adapter, and return its records."""
        start = self._adapted.open(self._folder / "adapters" / "initial")
        with self._adapted.as_base(start, start):
            return self._record({}, *self._ask({}))

    def examine(self, adapter: Adapter, model: Record) -> list[Record]:
        """Ask the model with an adapter, and return its records; `model` says whose it is, as a record does.

        Raises:
            ModelError: the adapter is not applied.
        """
        self._adapted.load(adapter)
        answers, seconds = self._ask(model)
        start = self._adapted.open(self._folder / "adapters" / "initial")
        asked = [self._source.tokenizer(prompt)["input_ids"][: self._longest] for prompt in answers.prompts]
        check_applied(self._adapted, start, adapter, asked, batch_size=self._batch_size)
        return self._record({**model, "adapter_sha256": adapter.sha256()}, answers, seconds)

    @property
    def _longest(self) -> int | None:
        longest = self._source.max_length
        return None if longest is None else longest - self._adapted.prompt_length

    def _ask(self, model: Record) -> tuple[HarnessAnswers, float]:
        self._say("harness", f"{', '.join(self._tasks.names)}: {name_model(model)}")
        began, in_chat = time.perf_counter(), self._data.is_chat
        answers = run_harness(
            self._adapted,
            self._source.tokenizer,
            self._tasks.names,
            manager=self._tasks.manager,
            batch_size=self._batch_size,
            limit=self._tasks.limit,
            examples=self._tasks.examples,
            chat_template=self._data.own_template,
            as_chat=in_chat,
            system=self._data.system if in_chat else None,
            max_length=self._longest,
        )
        return answers, time.perf_counter() - began

    def _record(self, model: Record, answers: HarnessAnswers, seconds: float) -> list[Record]:
        """Put the scores on record, a line for each task; `seconds` are those of all of them together."""
        how = [name_harness(), self._tasks.limit, self._tasks.examples, self._data.is_chat, self._data.own_template]
        records: dict[str, Record] = {}
        for score in answers.scores:
            told: Record = {
                **model,
                "task": PREFIX + score.task,
                "kind": HARNESS,
                "source": how[0],
                "revision": score.version,
                "digest": hash_json([*how, score.version, score.digest]),
                "questions": score.documents,
                "chat": self._data.is_chat,
                "measures": {},
                "seconds": seconds,
                "finished": now(),
            }
            if not self._data.is_chat and self._data.prompt is not None:
                told["warning"] = OTHER_PROMPTS
            record = records.setdefault(score.task, told)
            if math.isfinite(score.value):
                record["measures"][_name(score)] = measure(score)
        add_evaluations(self._folder, [*records.values()])
        return [*records.values()]


def _name(score: HarnessScore) -> str:
    return score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"


def measure(score: HarnessScore) -> dict[str, Any]:
    """Return a score as a record has it: with an interval by its standard error, where the harness gives one."""
    told: dict[str, Any] = {"value": score.value, "of": score.documents}
    if score.error is not None and math.isfinite(score.error):
        reach = Z_95 * score.error
        told |= {"low": score.value - reach, "high": score.value + reach, "interval": INTERVAL}
    return told if score.higher_is_better is None else {**told, "higher_is_better": score.higher_is_better}
