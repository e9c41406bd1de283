"""Questions that stand among training documents: by text, with their answer, by their columns, in conversations."""

from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks

from fedloom.data.documents import Document
from fedloom.data.formats import Form
from fedloom.data.seen_questions import count_seen, digest_trained
from fedloom.data.splits import ClientDocuments
from fedloom.data.task_rows import TaskRows, load_task
from fedloom.recipe.task_files import load_tasks

ROW = {"q": "What is  ripe\nin May?", "c": ["cafe\u0301s", "apples"], "a": "cafe\u0301s"}
FRAMED = {"prompt": "Question: {q}\nAnswer:"}


def rows_of(folder: Path, row: dict[str, Any], **task: Any) -> TaskRows:
    return load_task(load_tasks([write_tasks(folder, [row], {"name": "quiz", **task})]).tasks[0])


def learnt(text: str, *, asked: int = 0, row: Any = None) -> frozenset[bytes]:
    """What is known of one client that trains on one text, of which so many characters are what is asked."""
    form = Form(text, ((asked, len(text)),)) if asked else None
    held_out = Document("What is ripe in May? held out", "elsewhere")
    return digest_trained([ClientDocuments((Document(text, "here", form=form, row=row),), (held_out,))])


@pytest.mark.parametrize(
    ("task", "trained", "seen"),
    [
        ({}, {"text": "What is ripe in\tMay?"}, 1),
        ({}, {"text": "What is ripe in May? cafés"}, 1),  # composed, where the task has it decomposed
        ({}, {"text": "What is ripe in May? nothing", "asked": 20}, 1),
        ({}, {"text": "What is ripe in June?"}, 0),
        ({}, {"text": "One asked: What is ripe in May? cafés"}, 0),
        ({}, {"text": "What is ripe in May? apples"}, 0),
        (FRAMED, {"text": "Question: What is ripe in May? Answer: cafés"}, 1),
        (FRAMED, {"text": "What is ripe in May?"}, 1),
        (FRAMED, {"text": "as a chat", "row": {"messages": [{"role": "user", "content": "What is ripe in May?"}]}}, 1),
        ({"prompt": "{b} {q}"}, {"text": "as rows", "row": {"q": ROW["q"], "b": "A book."}}, 1),
        ({"prompt": "{b} {q}"}, {"text": "as rows", "row": {"q": ROW["q"], "b": "Another."}}, 0),
        ({"prompt": "Choose.\n{lettered}", "letters": True}, {"text": "Choose."}, 0),
    ],
)
def test_a_question_is_found_as_it_is_asked_or_by_its_columns(
    task: dict[str, Any], trained: dict[str, Any], seen: int, tmp_path: Path
) -> None:
    assert count_seen(rows_of(tmp_path, {**ROW, "b": "A book."}, **task), learnt(**trained)) == seen


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    row = {**ROW, "q": "What is ripe in May? held out"}
    assert count_seen(rows_of(tmp_path, row), learnt("something else")) == 0


def test_a_row_may_be_nested_more_deeply_than_functions(tmp_path: Path) -> None:
    nested: Any = "What is ripe in May?"
    for _ in range(5000):
        nested = [nested]
    assert count_seen(rows_of(tmp_path, ROW), learnt("other", row={"messages": nested})) == 1
