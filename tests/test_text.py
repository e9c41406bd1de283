"""Text that others chose is shown as text: controls, markup and passwords have no power."""

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import DataError, FedloomError
from fedloom.report.plots import Line, Plot, draw
from fedloom.text import (
    format_share,
    hide_secrets,
    list_numbers,
    list_some,
    quote_path,
    round_down,
    sentence,
    show_controls,
    to_markdown_code,
    to_markdown_text,
)

TEXTS = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x07\r\n\u202e\u2028`|<&[*$_\\")), max_size=60)
some_hundred = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("erased\x08\rover", r"erased\x08\rover"),
        ("file\u202eexe.txt", r"file\u202eexe.txt"),
        ("lone \udcff", r"lone \udcff"),
        ("kept\tand\nkept", "kept\tand\nkept"),
        ("👩‍🚀 שלום e\u0301", "👩‍🚀 שלום e\u0301"),
    ],
)
def test_controls_are_written_out_and_other_text_is_kept(text: str, shown: str) -> None:
    assert show_controls(text) == shown


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://someone:s3cret@mirror.example/x", "s3cret"),
        ("https://mirror.example/x?a=b&access_token=s3cret&c=d", "s3cret"),
        ("hf_" + "Ab1" * 12, "Ab1Ab1"),
    ],
)
def test_secrets_are_left_out_of_errors_and_the_rest_is_told(text: str, secret: str) -> None:
    error = DataError("can't be had", where=text, mend="write section.key=value")
    assert secret in text
    assert secret not in str(error)
    assert "can't be had; write section.key=value" in str(error)
    assert "hf_datasets_cache/x" in hide_secrets("hf_datasets_cache/x")


@some_hundred
@given(TEXTS)
def test_an_error_is_one_line_that_a_terminal_can_show(text: str) -> None:
    shown = str(FedloomError(text, where=text, mend=text))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e]", shown)
    shown.encode("utf-8")


@some_hundred
@given(TEXTS)
def test_markdown_has_no_tag_link_or_cell_that_was_not_meant(text: str) -> None:
    shown = to_markdown_text(text)
    assert "<" not in shown
    assert "\n" not in shown
    unescaped = re.sub(r"\\.", "", shown)
    assert not set(unescaped) & set("[|`*")


@some_hundred
@given(TEXTS)
def test_nothing_ends_a_block_of_code_early(text: str) -> None:
    opening, *lines = to_markdown_code(text).split("\n")
    assert [line for line in lines if line.strip() == opening] == [opening]
    assert lines[-1] == opening


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x^$", "_hidden", "\x1b[31m", "a & b", "cost $5"])
def test_a_name_stays_a_name_in_a_plot(name: str) -> None:
    svg = draw(Plot([Line(name, [0, 1], [1, 2]), Line("other", [0, 1], [2, 1])], x_label="x", y_label="y"))
    texts = [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert any(text.lstrip("\u200b") == show_controls(name) for text in texts)
    assert "<script>" not in svg


def test_a_symbol_stays_what_it_is_at_the_head_of_a_sentence() -> None:
    """Ε is another letter than ε, and nobody's privacy loss."""
    assert sentence("ε = 4 of each document") == "ε = 4 of each document."
    assert sentence("it reads a layer") == "It reads a layer."


@pytest.mark.parametrize(("share", "shown"), [(1.0, "100 %"), (0.9999, "100 %"), (0.342, "34 %"), (0.00123, "0.12 %")])
def test_a_share_is_never_a_power_of_ten(share: float, shown: str) -> None:
    assert format_share(share) == shown


@pytest.mark.parametrize("units", [*range(1, 200), 1000, 12345])
def test_a_limit_that_is_told_can_be_typed(units: int) -> None:
    assert 0.5 / units < float(round_down(1 / units)) <= 1 / units


def test_the_first_few_words_are_listed_and_the_others_counted() -> None:
    assert list_some(["a", "b"], 2) == "a, b"
    assert list_some(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert list_some([], 2) == ""


def test_numbers_that_follow_one_upon_another_are_listed_as_spans() -> None:
    assert list_numbers([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
    assert list_numbers([3]) == "3"
    assert list_numbers([]) == ""


def test_a_path_in_a_command_is_no_option() -> None:
    assert shlex.split(quote_path(Path("-r"))) == ["./-r"]
    for text in ("runs/-r", "/a b", "it's", "é\n", "-"):
        (found,) = shlex.split(quote_path(text))
        assert Path(found) == Path(text)


def test_an_error_keeps_the_spaces_of_a_path() -> None:
    assert str(FedloomError("no\n  room", where="a  b", mend="type 'a  b'")) == "a  b: no room; type 'a  b'"
