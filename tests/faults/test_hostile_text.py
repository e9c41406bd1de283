"""Names, paths and sentences of others stay text: in reports, comparisons, cards, errors and on the terminal."""

import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from support.marks import first
from support.tiny import make_recipe

from fedloom import run
from fedloom.cli import main
from fedloom.errors import RecipeError
from fedloom.evaluation import generation
from fedloom.experiment.run import plan
from fedloom.handover import generate
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import load_recipe
from fedloom.records.run import Run
from fedloom.report import document
from fedloom.report.comparison import write_comparison
from fedloom.report.run_report import write_report

TAG = "<script>alert(1)</script>"
ESCAPES = "\x1b[31mred\x1b]0;title\x07"
HOSTILE = f'{TAG}<img src=x onerror=alert(1)>{ESCAPES}[/bold]\\[red][a](javascript:b)```$x^${{{{7*7}}}}"&|'
"""HTML, a terminal's escape sequences, rich's markup, Markdown, a formula, a template."""
FILE_NAME = HOSTILE.replace("/", "\u2215")[:200]
"""The same as a file may be called."""


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str) -> None:
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "<script>alert(1)<" in page.text, "it is there, as text"


def check_markdown(text: str) -> None:
    outside = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    assert not re.search(r"<\s*(script|img)", outside)
    assert not re.search(r"(?<!\\)\[a\]\(javascript:", outside)
    assert "\x1b" not in text
    assert "&lt;script" in outside


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents, itself and each of them with such a name, and labelled by it."""
    made = tmp_path_factory.mktemp("hostile") / FILE_NAME
    for number in range(30):
        (made / f"{number}{FILE_NAME[:100]}").mkdir(parents=True)
        (made / f"{number}{FILE_NAME[:100]}" / FILE_NAME).write_text(f"document {number} says {number * 7919} and more")
    (made / "bad\x1b[31m").write_bytes(b"\xff")
    return made


def recipe_of(folder: Path) -> Any:
    data = {"source": str(folder), "partition": {"kind": "natural", "by": "package"}, "max_bad_fraction": 1}
    return make_recipe(data=data, federation={"rounds": 1}, description=HOSTILE)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(recipe_of(folder), tmp_path_factory.mktemp("runs") / FILE_NAME, Observer())


def test_a_report_is_text(finished: Run) -> None:
    check_page((finished.folder / "report.html").read_text())
    check_markdown((finished.folder / "report.md").read_text())


def test_a_failed_runs_report_is_text(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    status = '{"state": "failed", "error": "client <script>alert(1)</script> \\u001b[31m[a](javascript:b)"}'
    (tmp_path / "run" / "status.json").write_text(status)
    page = write_report(tmp_path / "run")
    check_page(page.read_text())
    check_markdown(page.with_suffix(".md").read_text())


def test_a_comparison_and_its_plots_are_text(finished: Run, tmp_path: Path) -> None:
    other = tmp_path / f"_{FILE_NAME[1:]}"
    shutil.copytree(finished.folder, other)
    page = write_comparison([finished.folder, other], tmp_path / "out")
    check_page(page.read_text())
    check_markdown(page.with_suffix(".md").read_text())
    for plot in (tmp_path / "out" / "plots").iterdir():
        tags = {element.tag.split("}")[-1] for element in ElementTree.fromstring(plot.read_text()).iter()}
        assert not {"script", "img", "a", "foreignObject"} & tags
        assert "\x1b" not in plot.read_text()


@pytest.mark.parametrize("which", ["initial", "best", "last"])
def test_a_model_card_is_text_and_its_front_matter_is_yaml(which: str, finished: Run) -> None:
    import yaml

    text = (finished.folder / "adapters" / which / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    check_markdown(body)
    assert yaml.safe_load(front)["library_name"] == "peft"
    outside = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.M | re.S)  # of code, which has comments
    assert outside.count("\n# ") == 1, "the description makes no heading of its own"


@pytest.mark.parametrize("terminal", first([True, False]))
def test_a_terminal_is_not_told_what_to_do(terminal: bool, folder: Path) -> None:
    screen = io.StringIO()
    display = Terminal(Console(file=screen, force_terminal=terminal, width=400, highlight=False))
    display.show_plan(plan(recipe_of(folder), display))
    display.show_folder(Path(FILE_NAME))
    display.close()
    shown = screen.getvalue()
    for sequence in ("\x1b[31m", "\x1b]0;", "\x07"):
        assert sequence not in shown
    assert r"<script>alert(1)<" in shown
    assert r"\x1b[31mred" in shown
    assert "[\u2215bold]\\[red]" in shown, "rich's markup is text, too"


def test_what_a_model_writes_does_not_tell_a_terminal_what_to_do(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation._Streamer, "put", lambda self, tokens: self.on_finalized_text(f"\n\t{ESCAPES}"))
    monkeypatch.setattr(generation._Streamer, "end", lambda self: None)
    generate.generate(finished.folder, "def", max_new_tokens=1)
    written = capsys.readouterr().out
    assert written.startswith("def\n\t\\x1b[31mred\\x1b]0;title\\x07")
    assert "\x1b" not in written


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "tiny", f"data.source=/nowhere/{ESCAPES}"],
        ["plan", ESCAPES],
        ["report", f"/nowhere/{ESCAPES}"],
        ["compare", "/nowhere/a", f"/nowhere/{ESCAPES}"],
        [ESCAPES],
        ["plan", "tiny", f"--{ESCAPES}"],
    ],
)
def test_an_error_does_not_tell_a_terminal_what_to_do(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fedloom", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert not {"\x1b", "\x07"} & set(said)


@pytest.mark.parametrize(
    "name", ["../escape", "a/b", "/absolute", "..", ".hidden", "", TAG, ESCAPES, "a\n", "a\x00", "-rf", "a b"]
)
def test_a_recipes_name_is_no_path_and_no_markup(name: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, ValueError)):
        make_recipe(name=name)
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nsource = "random:tiny-opt"\n[data]\nsource = "python:stdlib"\n')
    with pytest.raises(RecipeError):
        load_recipe(path, [f"name={name}"])


def test_pages_without_escaping_would_be_caught(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins that these tests must not let through: a template, and Markdown, that take text as it comes."""
    shutil.copytree(finished.folder, tmp_path / "run")
    escaping = document.jinja2.Environment

    def bare(**options: Any) -> Any:
        return escaping(**{**options, "autoescape": False, "finalize": None})

    monkeypatch.setattr(document.jinja2, "Environment", bare)
    monkeypatch.setattr(document, "to_markdown_text", str)
    page = write_report(tmp_path / "run")
    with pytest.raises(AssertionError):
        check_page(page.read_text())
    with pytest.raises(AssertionError):
        check_markdown(page.with_suffix(".md").read_text())
