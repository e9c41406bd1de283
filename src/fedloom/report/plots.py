"""Plots as SVG: text and axes take the colour of the page, so that they can be read on a light and on a dark one.

Lines differ by colour and by dash, in the palette of Okabe and Ito, which colour-blind people can read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedloom import __version__
from fedloom.host.files import hash_text
from fedloom.host.imports import quick_imports
from fedloom.text import show_controls

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")
LONGEST_LABEL = 40
"""Characters of a line's name."""
INK = "#010203"
"""Placeholder for the page's own colour, replaced when the plot is written; nothing else may have this colour."""
LONGEST_NAME = 60
"""Characters of a name in the legend."""
WIDEST_TICKS = 80
"""Characters of all names below an axis that stand beside one another; where there are more, they slope."""
MOST_MARKED = 40
"""Points of a line that are marked: with more, the marks would hide its dashes."""
MOST_NAMES = 6
"""Names in a legend: more would leave no room for the plot."""


@dataclass(frozen=True)
class Line:
    """A curve through points (x, y), with a name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    """True for a curve in the background."""
    low: Sequence[float] = ()
    """Lower edge of a band around the curve, one value for each point; no band if empty."""
    high: Sequence[float] = ()
    """Upper edge of that band."""
    joined: bool = True
    """False for points without a line between them; their bands are bars."""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word beside it."""

    x: float
    name: str


@dataclass(frozen=True)
class Bars:
    """Stacked bars, one stack at every x."""

    x: Sequence[float]
    values: dict[str, Sequence[float]] = field(default_factory=dict)
    """Heights by name, from the bottom of the stack up, one for each x."""


@dataclass(frozen=True)
class Plot:
    """Curves or points, over rounds or anything else, or stacked bars over rounds."""

    lines: Sequence[Line] = ()
    _: KW_ONLY
    x_label: str
    y_label: str
    marks: Sequence[Mark] = ()
    bars: Bars | None = None
    ticks: Sequence[str] = ()
    """Names of x = 0, 1, 2, ..., where x is no number."""
    log_x: bool = False
    """True for an x over several powers of ten."""


def draw(plot: Plot) -> str:
    """Draw a plot as SVG, with a comment behind it by which `drawn_before` knows it."""
    # Imported here, since it takes a second; and not pyplot, which would keep every figure in memory.
    with quick_imports():
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained", dpi=FigureCanvasSVG.fixed_dpi)
    FigureCanvasSVG(figure)  # it measures letters as it will write them
    axes = figure.subplots()
    for patch in (figure.patch, axes.patch):
        patch.set(facecolor="none", edgecolor="none")
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    if plot.bars:
        _draw_bars(plot.bars, axes)
    else:
        _draw_lines(plot, axes)
    svg = _finish(figure, axes, legend=plot.bars is not None or len(plot.lines) > 1)
    return svg + _mark(plot, svg)


def drawn_before(plot: Plot, path: Path) -> str | None:
    """Return the SVG in a file if `draw` made it of the same plot and nobody changed it since, else None."""
    try:
        svg = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    drawing, _, _ = svg.rpartition("<!--")
    return svg if svg == drawing + _mark(plot, drawing) else None


def _mark(plot: Plot, svg: str) -> str:
    return f"<!-- {hash_text(json.dumps([__version__, asdict(plot), svg], default=list))} -->"


def _draw_lines(plot: Plot, axes: Any) -> None:
    strong = [line for line in plot.lines if not line.faint]
    if plot.log_x:
        axes.set_xscale("log")
    for line in plot.lines:
        number = strong.index(line) if not line.faint else plot.lines.index(line)
        color, dash = PALETTE[number % len(PALETTE)], DASHES[number % len(DASHES)]
        style: dict[str, Any] = {"color": color, "linestyle": dash, "label": _label(line.name)}
        style |= {"linewidth": 1.2, "alpha": 0.7} if line.faint else {"linewidth": 2.2}
        style |= {} if line.faint or len(line.x) > MOST_MARKED else {"marker": "o", "markersize": 4}
        style |= {} if line.joined else {"linestyle": "none", "marker": "o", "markersize": 4 if line.faint else 7}
        axes.plot(line.x, line.y, **style)
        if line.low and not line.joined:
            axes.vlines(line.x, line.low, line.high, color=color, linewidth=2.2)
        elif line.low:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
    for mark in plot.marks:
        axes.axvline(mark.x, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            mark.name, (mark.x, 1), xycoords=("data", "axes fraction"), xytext=(3, -11), textcoords="offset points",
            color=INK, fontsize=9,
        )  # fmt: skip
    if plot.ticks:
        axes.set_xticks(range(len(plot.ticks)), [_label(name) for name in plot.ticks])
        if sum(map(len, plot.ticks)) > WIDEST_TICKS:
            axes.tick_params(axis="x", labelrotation=20)
    elif not plot.log_x and all(float(x).is_integer() for line in plot.lines for x in line.x):
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_bars(bars: Bars, axes: Any) -> None:
    below = [0.0] * len(bars.x)
    for number, (name, values) in enumerate(bars.values.items()):
        axes.bar(bars.x, values, bottom=below, color=PALETTE[number % len(PALETTE)], label=_label(name), width=0.7)
        below = [low + value for low, value in zip(below, values, strict=True)]
    axes.xaxis.get_major_locator().set_params(integer=True)


def _label(name: str) -> str:
    """Return a name that matplotlib draws letter by letter, cut if it is long."""
    shown = show_controls(name)
    # Matplotlib reads text between dollars as a formula, and leaves a line out of the legend if its name begins with an
    # underscore; a character of no width before it prevents that.
    shown = (shown if len(shown) <= LONGEST_LABEL else f"{shown[:LONGEST_LABEL]}…").replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _finish(figure: Any, axes: Any, *, legend: bool) -> str:
    import matplotlib

    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    if legend:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0.0}
        handles, names = axes.get_legend_handles_labels()
        short = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
        columns = 3 if max(map(len, short)) < LONGEST_NAME // 2 else 1
        axes.legend(
            handles[:MOST_NAMES], short[:MOST_NAMES], frameon=False, labelcolor=INK, ncols=columns, fontsize=9, **above
        )
    file = io.StringIO()
    # The same numbers must give the same file: without a date, and with ids that are hashed from the drawing.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "fedloom", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        # Not savefig, which draws everything twice: once to place it, though the layout does that.
        figure.canvas.print_svg(file, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Without a width and height of its own, the plot takes the width of the page.
    return re.sub(
        r'(<svg\b[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
