"""The page docs/study.md, written from the records alone: `page.md.j2` has its prose, this its numbers and verdicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import claims
import jinja2
from claims import Measure
from records import Tier, read_plans
from sweeps import SEEDS, count_runs, list_sweeps

from fedloom.host.files import write_text
from fedloom.records.run import Run
from fedloom.report import figures
from fedloom.report.arms_section import compare_arms, draw_arms, group_runs, note_arms, spread_by_round, tabulate_arms
from fedloom.report.comparison import unfairness
from fedloom.report.document import Bullets, Figure, Table, block_to_markdown
from fedloom.report.plots import Line, Plot, draw, drawn_before
from fedloom.report.run_report import LOSS_AXIS, load_reference
from fedloom.text import format_bytes, format_seconds

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "study.md"
PLOTS = ROOT / "docs" / "images" / "study"
TRAIN_LOSS = (
    2.6038, 2.5122, 2.4589, 2.4234, 2.3961, 2.3736, 2.3547, 2.3383, 2.3237, 2.3108, 2.2986, 2.2879, 2.2775, 2.2683,
    2.2593, 2.2510, 2.2435, 2.2364, 2.2295, 2.1748,
)  # fmt: skip
"""The document's section 2.1, from round 1 on."""


def write_page(*, check: bool = False) -> int:
    """Write the page and its plots; with `check`, write nothing, and return 1 where a file is out of date."""
    plots: dict[str, Figure] = {}
    files = {PAGE: render(plots)}
    for name, figure in plots.items():
        path = PLOTS / f"{name}.svg"
        files[path] = drawn_before(figure.plot, path) or ("" if check else draw(figure.plot))
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    left = [path for path in PLOTS.glob("*.svg") if path not in files]
    if check:
        for path in (*stale, *left):
            print(f"{path.relative_to(ROOT)} is out of date: make study-page", file=sys.stderr)
        return int(bool(stale or left))
    PLOTS.mkdir(parents=True, exist_ok=True)
    for path in stale:
        write_text(path, files[path], "make study-page")
    for path in left:
        path.unlink()
    return 0


def render(plots: dict[str, Figure]) -> str:
    """Return the page's text; `plots` is told each plot by the name of its file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": format_bytes, "duration": format_seconds}
    tiers = {name: Tier(name) for name in SEEDS}
    plans = read_plans()
    lora, half, full = (line["central_loss"] for line in load_reference("experiment")["trajectories"])
    return environment.get_template("page.md.j2").render(
        tiers=tiers,
        nano=tiers["nano"],
        small=tiers["small"],
        card=tiers["card"],
        shown={name: Shown(tier, plots) for name, tier in tiers.items()},
        plans=plans,
        planned_full=count_runs(list_sweeps("full", 2000, 1e-5)),
        judged=claims.judge_claims(tiers["nano"], plans),
        published={"train": TRAIN_LOSS, "central": lora, "half": half, "full": full},
        claims=claims,
        table=write_table,
        per_cent=lambda share: f"{100 * share:.0f} %",
        losses=tabulate_losses(lora, Shown(tiers["nano"], plots)),
    )


def tabulate_losses(published: Sequence[float], nano: Shown) -> str:
    """Write the document's losses by round beside those of the experiment here."""
    runs = nano.tier.mixed()
    header = ["Round", "Document, clients", "Nano, clients", "Document, central", "Nano, central"]
    rows = [
        [
            str(round),
            f"{TRAIN_LOSS[round - 1]:.4f}" if round else "–",
            nano.of_round(runs, "client_loss", round),
            f"{loss:.4f}",
            nano.of_round(runs, "central_loss", round),
        ]
        for round, loss in enumerate(published)
    ]
    return write_table(header, rows)


def write_table(header: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: int = 1) -> str:
    """Write a table in Markdown."""
    return block_to_markdown(Table(header, [[str(cell) for cell in row] for row in rows], text_columns))


class Shown:
    """A tier as the page shows it; `plots` is told each plot by the name of its file."""

    def __init__(self, tier: Tier, plots: dict[str, Figure]) -> None:
        self.tier, self._plots = tier, plots

    def mean(self, runs: Sequence[Run], measure: Measure, digits: int = 3) -> str:
        """Write the mean of a measure over runs, and its deviation where there are several."""
        found = figures.spread([measure(run) for run in runs])
        return f"{found.mean:.{digits}f}" + (f" ± {found.deviation:.{digits}f}" if len(runs) > 1 else "")

    def of_round(self, runs: Sequence[Run], key: str, round: int) -> str:
        """Write a number of a round: its mean over runs, and its deviation; a dash where it is not on record."""
        if any(round >= len(run.rounds) or key not in run.rounds[round] for run in runs):
            return "–"
        return self.mean(runs, lambda run: run.rounds[round][key], 4)

    def compare(
        self, name: str, runs: Sequence[Run], by: Sequence[str], against: str, plots: Sequence[str] = ()
    ) -> str:
        """Write a table of arms, what is between them in words, and of their plots those that are named."""
        arms = group_runs(runs, by, against)
        words = Bullets([*note_arms(arms), *compare_arms(arms, unfairness, limits=False)])
        drawn = [figure for figure in draw_arms(arms.arms) if figure.name.removeprefix("arms-") in plots]
        shown = [self.plot(replace(figure, name=f"{name}-{figure.name.removeprefix('arms-')}")) for figure in drawn]
        return "\n\n".join([block_to_markdown(tabulate_arms(arms)), block_to_markdown(words), *shown])

    def curves(self, name: str, caption: str, arms: dict[str, Sequence[Run]]) -> str:
        """Draw the central loss of arms by round, with one standard deviation, against its value before training."""
        lines = []
        for title, runs in arms.items():
            rounds, spreads = spread_by_round(runs)
            low, high = ([of.mean + sign * of.deviation for of in spreads] for sign in (-1, 1))
            lines.append(Line(title, rounds, [of.mean for of in spreads], low=low, high=high))
        return self.plot(Figure(name, caption, Plot(lines, x_label="round", y_label=LOSS_AXIS)))

    def plot(self, figure: Figure) -> str:
        """Keep a figure to be drawn; return the link to its file."""
        name = f"{self.tier.name}-{figure.name}"
        self._plots[name] = figure
        return f"![{figure.caption}](images/study/{name}.svg)"

    def learnt_text_in(self, round: int, share: float) -> float:
        """Return how far a central loss would be off if this share of its rows were rows that clients train on.

        By the mean of both losses over the seeds; the training loss is that of the round's steps, before they are over.
        """
        found = [run.rounds[round] for run in self.tier.mixed()]
        return share * figures.spread([record["train_loss"] - record["central_loss"] for record in found]).mean
