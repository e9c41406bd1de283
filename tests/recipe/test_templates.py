"""Templates of rows: columns, what may be left out, and what is no template."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.recipe.templates import parse_template

ALPACA = "### Instruction:\n{instruction}\n\n[[### Input:\n{input}\n\n]]### Response:\n"


def fill(template: str, row: dict[str, str]) -> str:
    return parse_template(template).fill(lambda name, optional: row.get(name, "") if optional else row[name])


def test_what_is_empty_is_left_out_with_the_text_around_it() -> None:
    with_input = fill(ALPACA, {"instruction": "Add.", "input": "1 2"})
    assert with_input == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    for empty in ({"input": ""}, {"input": " \n"}, {}):
        assert fill(ALPACA, {"instruction": "Add.", **empty}) == "### Instruction:\nAdd.\n\n### Response:\n"


def test_columns_and_braces() -> None:
    template = parse_template("{{{a}}} {b.c} {a}")
    assert template.columns == ("a", "b.c")
    assert template.fill(lambda name, _: name.upper()) == "{A} B.C A"
    assert parse_template("{a}").only_column == "a"
    assert parse_template("{a} ").only_column is None


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{a", "stands alone"),
        ("a}", "stands alone"),
        ("{}", "without the name"),
        ("[[{a}", "never closed"),
        ("{a}]]", "too many"),
        ("[[{a}[[{b}]]]]", "too many"),
        ("{a}[[b]]", "without a column"),
    ],
)
def test_what_is_no_template_is_refused(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_template(template)


@given(st.text())
def test_plain_text_stands_as_it_is(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    if "[[" not in text and "]]" not in text:
        assert fill(escaped, {}) == text
