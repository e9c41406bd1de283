"""Tasks of lm-evaluation-harness, run on the model that is loaded, with the adapter that is in it.

Nothing is loaded again, and nothing is merged. Prompts, answers and metrics are the harness's own, and so are its
settings of generation: its numbers are to be those that it gives for the same model exported. A task that runs the code
that a model wrote is refused: the harness would run it unconfined.
"""

from __future__ import annotations

import copy
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import DataError
from fedloom.host.files import hash_json
from fedloom.model.attention import with_masks

PACKAGE = "lm_eval"
WHERE = "tasks"
HASHED = ("doc", "prompt", "target")
"""Parts of a question that the harness hashes."""
PROBES = 8
"""Questions that are told as they were asked."""
RESAMPLED = 1000
"""Times that questions are drawn anew for the standard error of a metric that has no formula for it."""


@dataclass(frozen=True)
class HarnessScore:
    """Metric of a task, or of a group of tasks, as the harness tells it."""

    task: str
    metric: str
    filter: str
    """Way in which answers were read, `none` for most tasks."""
    value: float
    error: float | None
    """Standard error; None where the harness gives none."""
    documents: int
    """Questions that were asked."""
    version: str
    """Version of the task: numbers of two versions can't be compared."""
    higher_is_better: bool | None = None
    """Direction in which a model is better; None where the harness does not say."""
    digest: str = ""
    """Hash of the documents that were asked, as prompts, with what is right."""


@dataclass(frozen=True)
class HarnessAnswers:
    """Scores of a model, and a few of the questions as the model met them."""

    scores: list[HarnessScore]
    prompts: list[str]


def open_manager(tasks: Sequence[str]) -> Any:
    """Return the harness's list of tasks, which has all of these; each was read once, so that it can be.

    Raises:
        DataError: the harness is not installed, has no such task, or can't read its file or its documents.
    """
    if find_spec(PACKAGE) is None:
        raise DataError(
            "lm-evaluation-harness is not installed", where=WHERE, mend="pip install 'lm-eval==0.4.13', or leave it out"
        )
    with _quiet():
        from lm_eval.tasks import TaskManager

        files = [name for name in tasks if name.endswith((".yaml", ".yml"))]
        # To know all of its own takes seconds.
        manager = TaskManager(include_defaults=len(files) < len(tasks))
    for name in tasks:
        if not (Path(name).is_file() if name in files else name in manager.all_tasks):
            what = "there is no such file" if name in files else "lm-evaluation-harness has no such task"
            raise DataError(f"{name}: {what}", where=WHERE, mend="lm-eval ls tasks lists those that it has")
    with _quiet(), _as_it_was(), _explained(tasks):
        try:
            manager.load(list(tasks))
        except OSError:
            raise
        # Of any kind: a file of somebody's own may say anything, and its words may quote what a task asks.
        except Exception as error:
            raise DataError(
                f"{' or '.join(tasks)} is no task that lm-evaluation-harness can read ({type(error).__name__})",
                where=WHERE,
                mend="try it with lm-eval itself",
            ) from error
    return manager


def name_harness() -> str:
    """Return the harness's name with its version, on which numbers depend."""
    return f"lm-evaluation-harness {version(PACKAGE)}"


def run_harness(
    adapted: AdaptedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    manager: Any = None,
    batch_size: int = 8,
    limit: int | None = None,
    examples: int | None = None,
    chat_template: str | None = None,
    as_chat: bool = False,
    system: str | None = None,
    max_length: int | None = None,
    seed: int = 1234,
) -> HarnessAnswers:
    """Run tasks of lm-evaluation-harness, by name or by their .yaml files, on the model as it is now.

    `limit` asks the first few questions of each task alone, `examples` is how many answered ones stand before each
    (the task's own number where left out). With `as_chat`, questions are written by the tokenizer's chat template, or
    by `chat_template`, behind a `system` message. `manager` is what `open_manager` gave, where that was asked before.
    The model, the tokenizer and everybody's random numbers are afterwards as they were.

    Raises:
        DataError: the harness is not installed, has no such task or can't read its documents, or the task runs code.
    """
    manager = manager or open_manager(tasks)
    with _quiet():
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        # The harness sets its template, and a token for padding where there is none.
        tokenizer = copy.deepcopy(tokenizer)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        # It would ask git about whatever folder this is.
        without_git = patch.object(evaluator, "get_git_commit_hash", lambda: None)
        with _as_it_was(), with_masks(adapted.base), torch.inference_mode(), _explained(tasks), without_git:
            adapted.model.eval()
            # Whoever tries how much fits, it is not us.
            adapted.give_back()
            model = HFLM(adapted.outer, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
            found = evaluator.simple_evaluate(
                model, tasks=list(tasks), task_manager=manager, num_fewshot=examples, limit=limit,
                apply_chat_template=as_chat, system_instruction=system, bootstrap_iters=RESAMPLED,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
    # No samples where nothing was asked.
    samples = [one for of_task in found.get("samples", {}).values() for one in of_task[:PROBES]]
    prompts = [str(one["arguments"][0][0]) for one in samples[:PROBES]]
    return HarnessAnswers(_scores(found), prompts)


def _scores(found: Mapping[str, Any]) -> list[HarnessScore]:
    """Return the metrics of each task, and of each group."""
    scores = []
    for task, own in found["results"].items():
        for key, value in own.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = own.get(f"{metric}_stderr,{filter_name}")
            error = error if isinstance(error, float) else None
            version = str(found["versions"].get(task, ""))
            better = found.get("higher_is_better", {}).get(task, {}).get(metric)
            asked = _documents(found, task), version, better, _digest(found, task)
            scores.append(HarnessScore(task, metric, filter_name, float(value), error, *asked))
    return scores


def _digest(found: Mapping[str, Any], task: str) -> str:
    """Return a hash of what a task asked, or all tasks of a group together."""
    if inside := found["group_subtasks"].get(task):
        return hash_json([_digest(found, other) for other in sorted(inside)])
    asked = {tuple(one[f"{part}_hash"] for part in HASHED) for one in found.get("samples", {}).get(task, ())}
    return hash_json(sorted(asked))


def _documents(found: Mapping[str, Any], task: str) -> int:
    """Return how many questions a task asked, or all tasks of a group together."""
    counts = found["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_documents(found, other) for other in found["group_subtasks"][task])


@contextmanager
def _explained(tasks: Sequence[str]) -> Iterator[None]:
    """Turn what a person can mend into one error."""
    try:
        yield
    except OSError as error:  # of a hub that is not there, a data set that nobody has
        raise DataError(
            f"the documents of {' or '.join(tasks)} can't be read ({type(error).__name__})",
            where=WHERE,
            mend="have them in the cache of datasets, or name a file of your own",
        ) from error
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        raise DataError(
            f"{' or '.join(tasks)} runs the code that a model wrote, and the harness does not confine it",
            where=WHERE,
            mend="leave it out, or use fedloom's own humaneval",
        ) from error


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Leave everybody's random numbers as they were: the harness sets all of them."""
    ours, arrays = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(ours)
        numpy.random.set_state(arrays)


@contextmanager
def _quiet() -> Iterator[None]:
    """Have the harness say nothing but errors: it quotes what a task asks, and warns about what it imports.

    Its progress stays on a terminal.
    """
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with redirect_stdout(io.StringIO()), bars, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
