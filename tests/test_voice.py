"""The voice: a docstring begins with a verb or a noun, ends as a sentence, and needs no line above it to be read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent

LEANING = re.compile("of|that|what|whether|where|whose|how|why|as|by|for|in|none|from|to|with")
"""First words of half a sentence: its other half would be the name above."""

NO_VERBS = re.compile("a|an|the|each|every|all|both|it|its|this|these|those|one|no|not|nothing|they|there")
"""First words that only a noun or a whole sentence begins with: a function's first word is a verb."""

PROPERTIES = {"property", "cached_property"}
LONGEST_LINE = 120

PATHS = sorted(SOURCE.rglob("*.py"))


class Words(NamedTuple):
    """A docstring, or the string under an assignment, with the kind of thing that it describes."""

    kind: str
    line: int
    columns: int
    text: str


def columns_of(node: ast.expr) -> int:
    """Return the length of a string's longest line in the source, its indentation and quotes included."""
    assert isinstance(node, ast.Constant)
    lines = node.value.split("\n")
    return max(node.col_offset + len(lines[0]) + 3, *(len(line) for line in lines))


def strings_of(body: list[ast.stmt]) -> list[ast.Constant | None]:
    """Return, for each statement, its string if it is nothing but one."""
    values = [statement.value if isinstance(statement, ast.Expr) else None for statement in body]
    return [value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None for value in values]


def words_of(tree: ast.Module) -> Iterator[Words]:
    """Yield every docstring of a module, and every string under a constant or a field."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        kind = "noun"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {getattr(mark, "id", getattr(mark, "attr", "")) for mark in node.decorator_list}
            kind = "noun" if names & PROPERTIES else "verb"
        strings = strings_of(node.body)
        for position, string in enumerate(strings):
            if string is None:
                continue
            if position == 0:
                yield Words(kind, string.lineno, columns_of(string), string.value)
            elif isinstance(node.body[position - 1], ast.Assign | ast.AnnAssign):
                yield Words("field", string.lineno, columns_of(string), string.value)


def ends_in_code(text: str) -> bool:
    """Return whether the last paragraph of a docstring is a block that the one before it announces with a colon."""
    before, blank, _ = text.rpartition("\n\n")
    return bool(blank) and before.endswith(":")


def ends_in_errors(text: str) -> bool:
    """Return whether a docstring ends with the names of the errors that are raised, and nothing to say of them."""
    return re.search(r"Raises:\n\s*[A-Z]\w+(, [A-Z]\w+)*$", text) is not None


def fault_of(words: Words) -> str:
    """Return what is wrong with a docstring; an empty text if nothing is."""
    text = words.text.strip()
    first = re.sub(r"\W+$|^\W+", "", (text.split() or [""])[0]).split("'")[0].lower()
    if not first:
        return "says nothing"
    if LEANING.fullmatch(first):
        return f"begins with {first!r}"
    if words.kind == "verb" and NO_VERBS.fullmatch(first):
        return f"describes a function and begins with {first!r}, which is no verb"
    if words.kind != "field" and not text[0].isupper() and text[0] != "`":
        return "begins without a capital letter"
    if not text.endswith((".", ":", "```")) and not ends_in_code(text) and not ends_in_errors(text):
        return "ends in the middle of a sentence"
    if words.columns > LONGEST_LINE:
        return f"is wider than {LONGEST_LINE} columns"
    return ""


def faults_of(source: str) -> list[str]:
    """Return the faults in a module's words, with their lines."""
    return [f"line {words.line} {fault}" for words in words_of(ast.parse(source)) if (fault := fault_of(words))]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_words_can_be_read_alone(path: Path) -> None:
    assert not faults_of(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('"""Whether it rains."""', "line 1 begins with 'whether'"),
        ('RAIN = 3\n"""Of a day, in millimetres."""', "line 2 begins with 'of'"),
        ('class Day:\n    rain: int\n    """None where it is dry."""', "line 3 begins with 'none'"),
        ('class Day:\n    """What a day has."""', "line 2 begins with 'what'"),
        ('def rain():\n    """The rain of a day."""', "line 2 describes a function and begins with 'the'"),
        ('async def rain():\n    """It rains."""', "line 2 describes a function and begins with 'it'"),
        ('def rain():\n    """return the rain."""', "line 2 begins without a capital letter"),
        ('def rain():\n    """Return the rain"""', "line 2 ends in the middle of a sentence"),
        ('def rain():\n    """Return the rain.\n\n    It is dry"""', "line 2 ends in the middle of a sentence"),
        ('def rain():\n    """ """', "line 2 says nothing"),
        (f'def rain():\n    """Return {"rain " * 24}."""', "line 2 is wider than 120 columns"),
    ],
)
def test_a_fault_is_found(source: str, fault: str) -> None:
    (found,) = faults_of(source)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "source",
    [
        '"""Rain of a day, in millimetres."""',
        'def rain():\n    """Return the rain.\n\n    Raises:\n        ValueError: it is dry."""',
        'class Day:\n    @property\n    def rain(self):\n        """The rain of the day."""',
        'RAIN = 3\n"""Millimetres in a day."""',
        'def rain():\n    """Draw the rain as:\n\n        |||"""',
        'print("Of what is printed nothing is said")',
    ],
)
def test_a_good_word_is_left_alone(source: str) -> None:
    assert not faults_of(source)
