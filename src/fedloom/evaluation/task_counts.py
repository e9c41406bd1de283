"""Counts of a model's answers to tasks that a client holds itself: nothing else is told of them."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.evaluation.tasks import TaskResult

RIGHT = ("accuracy", "exact_match")
"""Measures that count the answers which are right; a task has one of them at most."""


@dataclass(frozen=True)
class TaskCount:
    """Count of a model's answers to one task."""

    task: str
    questions: int
    right: int
    unreadable: int | None = None
    """Answers that were none at all; None where that is not looked at."""

    @classmethod
    def of(cls, task: str, result: TaskResult) -> TaskCount:
        """Return what counts of a result whose answers are right or wrong."""
        measures = result.measures
        right, unreadable = next(measures[name] for name in RIGHT if name in measures), measures.get("unreadable")
        assert right.right is not None, "a share is counted"
        return cls(task, right.of, right.right, unreadable.right if unreadable else None)


@dataclass(frozen=True)
class OwnAnswers:
    """Counts of the answers to a client's own tasks, by a global adapter, and by the base model where it was asked."""

    adapter: tuple[TaskCount, ...]
    base: tuple[TaskCount, ...] | None = None
