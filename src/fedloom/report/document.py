"""Parts of a report, written as Markdown or as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import markupsafe

from fedloom.report.plots import Plot
from fedloom.text import show_controls, to_markdown_code, to_markdown_text


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    note: bool = False
    """True for a paragraph that warns."""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A block of code."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of cells as they are shown."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """Number of first columns that are aligned to the left; all others hold numbers and are aligned to the right."""


@dataclass(frozen=True)
class Figure:
    """A plot with its caption; its file is `plots/NAME.svg`."""

    name: str
    caption: str
    plot: Plot


Block = Text | Bullets | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    """A part of a document under its own heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A report or a comparison."""

    title: str
    subtitle: str
    state: str
    """State of the run in a word or two: done, still running, failed."""
    sections: Sequence[Section]

    @property
    def figures(self) -> list[Figure]:
        """Return the plots of all sections, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]


def to_markdown(document: Document) -> str:
    """Write a document as GitHub's Markdown, with links to the files of its plots."""
    parts = [f"# {to_markdown_text(document.title)}", to_markdown_text(document.subtitle)]
    for number, section in enumerate(document.sections, start=1):
        parts.append(f"## {number}. {to_markdown_text(section.title)}")
        parts += [block_to_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def to_html(document: Document, drawn: Mapping[str, str]) -> str:
    """Write a document as one HTML page, with its styles inside, and its plots, which are `drawn` by name as SVG."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_finalize
    )
    template = (resources.files("fedloom.report") / "page.html.j2").read_text(encoding="utf-8")
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (Text, Bullets, Code, Table, Figure)}

    def is_a(block: Block, kind: str) -> bool:
        return isinstance(block, kinds[kind])

    environment.tests["a"] = is_a
    environment.filters["breakable"] = _break_names
    return environment.from_string(template).render(document=document, drawn=drawn)


def _break_names(heading: str) -> markupsafe.Markup:
    """Let a heading break within the name of a run (`rounds=2_learning_rate=1e-3`), and be copied as it is."""
    shown = str(markupsafe.escape(show_controls(heading)))
    return markupsafe.Markup(re.sub("([_=])", r"\1<wbr>", shown))


def _finalize(value: object) -> object:
    """Write out control characters in a value that the template shows; leave what is marked as safe, the plots."""
    return show_controls(value) if isinstance(value, str) and not isinstance(value, markupsafe.Markup) else value


def block_to_markdown(block: Block) -> str:
    """Write one block as GitHub's Markdown; a figure as a link to its file."""
    if isinstance(block, Text):
        text = to_markdown_text(block.text)
        return f"> **Note:** {text}" if block.note else text
    if isinstance(block, Bullets):
        return "\n".join(f"- {to_markdown_text(item)}" for item in block.items)
    if isinstance(block, Code):
        return to_markdown_code(block.text)
    if isinstance(block, Figure):
        return f"![{to_markdown_text(block.caption)}](plots/{block.name}.svg)"
    marks = ["---" if column < block.text_columns else "---:" for column in range(len(block.header))]
    rows = [block.header, marks, *block.rows]
    return "\n".join("| " + " | ".join(to_markdown_text(str(cell)) for cell in row) + " |" for row in rows)


def to_lines(table: Table) -> list[str]:
    """Write a table for a terminal, a line for each row, with columns as wide as their longest cell."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
    left = table.text_columns
    return [
        "  ".join(
            f"{cell:<{width}}" if column < left else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def without_columns(cells: Sequence[str], columns: set[int]) -> list[str]:
    """Return a row without the columns of these numbers, counted from 0."""
    return [cell for column, cell in enumerate(cells) if column not in columns]
