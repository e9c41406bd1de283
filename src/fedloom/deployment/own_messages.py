"""Messages on what a client does for itself: counts of its own tasks, and the adapter that it keeps.

Whatever comes in is checked as it is unpacked, as in `messages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedloom.deployment.messages import read_answer
from fedloom.errors import MessageError
from fedloom.evaluation.task_counts import OwnAnswers, TaskCount
from fedloom.host.frames import Frame


@dataclass(frozen=True)
class KeptAdapter:
    """Account of an adapter that a client keeps: losses on its own hold-out, both or neither."""

    before: float | None = None
    """Loss of the adapter that it was made from."""
    after: float | None = None


def ask_tasks(adapter: Frame, *, base: bool) -> Frame:
    """Write the question for a client's own tasks; `adapter` is the packed one that answers, with the base or without.

    The base model needs no array, as each client has it.
    """
    return replace(adapter, manifest={**adapter.manifest, "do": "tasks", "base": base})


def pack_answers(found: OwnAnswers | None) -> Frame:
    """Write how many of a client's own tasks were right, or that it is not told."""
    rows = _to_rows(found.adapter) if found else None
    return Frame({"tasks": rows, "base": _to_rows(found.base) if found and found.base is not None else None})


def unpack_answers(answer: Frame, most: int, *, base: bool) -> OwnAnswers | None:
    """Read what `pack_answers` wrote, from a client that said it has so many tasks; None where it does not tell.

    Raises:
        MessageError: it refuses, or what it says can't be.
    """
    told = read_answer(answer, "tasks")
    if told["tasks"] is None and told["base"] is None:
        return None
    adapter = _from_rows(told["tasks"] or ())
    asked = _from_rows(told["base"] or ())
    if len(adapter) > most or (told["base"] is not None) != base:
        raise MessageError("it answers for other models or tasks than were asked")
    if base and [(one.task, one.questions) for one in adapter] != [(one.task, one.questions) for one in asked]:
        raise MessageError("the base model was asked other questions than the adapter")
    return OwnAnswers(adapter, asked if base else None)


def pack_kept(kept: KeptAdapter) -> Frame:
    """Write that an adapter is kept, and its losses where they are told."""
    return Frame(asdict(kept))


def unpack_kept(answer: Frame, *, private: bool = False) -> KeptAdapter:
    """Read what `pack_kept` wrote.

    Raises:
        MessageError: it refuses, or is not such an answer.
    """
    return KeptAdapter(**read_answer(answer, "keep", private=private))


def _to_rows(counts: Sequence[TaskCount]) -> list[list[Any]]:
    return [[one.task, one.questions, one.right, one.unreadable] for one in counts]


def _from_rows(rows: Sequence[Sequence[Any]]) -> tuple[TaskCount, ...]:
    found = tuple(TaskCount(*row) for row in rows)
    if len({one.task for one in found}) < len(found):
        raise MessageError("a task is told of twice")
    for one in found:
        if one.right > one.questions or (one.unreadable or 0) > one.questions:
            raise MessageError("an impossible count: more answers than questions")
    return found
