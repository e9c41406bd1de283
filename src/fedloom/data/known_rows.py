"""Rows of well-known data sets, each in its own form, as columns `question`, `choices` and `answer`.

They are read as FlowerTune's evaluation reads them (Flower, benchmarks/flowertune-llm/evaluation, as of March 2026).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedloom.data.rows import Row, UnreadableError

SENTIMENTS = ("negative", "neutral", "positive")


class Known(NamedTuple):
    """A known form of rows: the columns that are read, and the function that makes ours of them."""

    columns: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]


def _pick(row: Row, column: str, choices: Sequence[Any], first: int = 0) -> int:
    """Return the place among choices that a column names by a whole number, or by its digits.

    Raises:
        UnreadableError: it names none: 0.7 is not 0, and -1 is not the last.
    """
    number = int(row[column]) - first
    if not (0 <= number < len(choices) and float(row[column]) == number + first):
        raise UnreadableError("without an answer among the choices")
    return number


def _numbered(row: Row, column: str, choices: list[Any], first: int = 0) -> dict[str, Any]:
    """Return a question whose answer is a number, which becomes a letter."""
    number = _pick(row, column, choices, first)
    return {"question": _as_question(row["question"]), "choices": choices, "answer": chr(ord("A") + number)}


def _as_question(text: str) -> str:
    return text if text.endswith(("?", ".")) else f"{text}?"


def _mmlu(row: Row) -> dict[str, Any]:
    return _numbered(row, "answer", row["choices"])


def _pubmedqa(row: Row) -> dict[str, Any]:
    question = "\n".join([*row["CONTEXTS"], row["QUESTION"]])
    return {"question": question, "choices": ["yes", "no", "maybe"], "answer": row["final_decision"]}


def _medqa(row: Row) -> dict[str, Any]:
    texts = [option["value"] for option in row["options"]]
    if texts.count(row["answer"]) != 1:
        raise UnreadableError("without an answer among the choices")
    # By its place, in which it is shown, and not by its key: options may come in any order.
    letter = chr(ord("A") + texts.index(row["answer"]))
    return {"question": _as_question(row["question"]), "choices": texts, "answer": letter}


def _medmcqa(row: Row) -> dict[str, Any]:
    return _numbered(row, "cop", [row[column] for column in ("opa", "opb", "opc", "opd")])


def _careqa(row: Row) -> dict[str, Any]:
    return _numbered(row, "cop", [row[column] for column in ("op1", "op2", "op3", "op4")], first=1)


def _sentiment(text: str, answer: str, of_what: str = "news") -> dict[str, Any]:
    if not isinstance(text, str):
        raise TypeError("a text is asked about")
    asked = f"What is the sentiment of this {of_what}? Please choose an answer from {{negative/neutral/positive}}."
    return {"question": f"Instruction: {asked}\nInput: {text}\n", "choices": list(SENTIMENTS), "answer": answer}


def _fpb(row: Row) -> dict[str, Any]:
    return _sentiment(row["sentence"], SENTIMENTS[_pick(row, "label", SENTIMENTS)])


def _fiqa(row: Row) -> dict[str, Any]:
    score = float(row["sentiment_score"])
    if not math.isfinite(score):
        raise UnreadableError("without an answer among the choices")
    answer = "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"
    return _sentiment(row["sentence"], answer, "tweet" if row["format"] == "post" else "news")


def _tfns(row: Row) -> dict[str, Any]:
    answers = ("negative", "positive", "neutral")
    return _sentiment(row["text"], answers[_pick(row, "label", answers)], "tweet")


KNOWN: Mapping[str, Known] = {
    "mmlu": Known(("question", "choices", "answer"), _mmlu),
    "pubmedqa": Known(("CONTEXTS", "QUESTION", "final_decision"), _pubmedqa),
    "medqa": Known(("question", "options", "answer"), _medqa),
    "medmcqa": Known(("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa),
    "careqa": Known(("question", "op1", "op2", "op3", "op4", "cop"), _careqa),
    "fpb": Known(("sentence", "label"), _fpb),
    "fiqa": Known(("sentence", "sentiment_score", "format"), _fiqa),
    "tfns": Known(("text", "label"), _tfns),
}
"""Forms by the name that a task has for them in `rows_of`."""


def read_known(row: Row, form: str) -> Row:
    """Return a row's own columns with ours beside them.

    Raises:
        UnreadableError: it is not of that form.
    """
    try:
        return {**row, **KNOWN[form].read(row)}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise UnreadableError(f"not in the form of {form}") from None
