"""The page in a real browser, headless: nothing complains, every plot is drawn, nothing sticks out."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.browsers import BROWSER, QUIET
from support.made_runs import make_run
from support.marks import first

from fedloom.report.comparison import write_comparison
from fedloom.report.run_report import write_report

PROBE = """<script>
const wide = [...document.querySelectorAll('main > *, section > *')].filter(
  e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
const plots = [...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = [...svg.querySelectorAll('path, use, rect')].some(shape => {
    const inside = shape.getBoundingClientRect();
    return inside.width > box.width / 4 && inside.height > 5;
  });
  return {width: box.width, height: box.height, drawn, text: svg.querySelectorAll('text').length};
});
const scrolls = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length;
const ink = getComputedStyle(document.body).color, paper = getComputedStyle(document.body).backgroundColor;
document.title = 'PROBE' + JSON.stringify({plots, ink, paper, scrolls, wide: wide.map(e => e.className || e.tagName)});
</script></body>"""

pytestmark = [pytest.mark.draws, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    losses = [3.0, 2.5, 2.2, 2.0, 2.1, 2.2]
    clients = [[loss + client / 9 for loss in losses] for client in range(3)]
    words = {"description": "a long value: " + "x" * 300}
    one = make_run(tmp_path / "one", losses, clients=clients, name="one", **words)
    two = make_run(tmp_path / "two", losses[:4], name="two", training={"proximal_mu": 0.0}, **words)
    comparison = write_comparison([one.folder, two.folder], tmp_path / "both")
    return [write_report(one.folder, reference="experiment"), comparison]


def look(page: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    """What a browser makes of a page: its plots, colours, and what it complained of."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(BROWSER), *QUIET, profile, *options, "--dump-dom", probed.as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    complaints = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    title = re.search(r"<title>PROBE(.*?)</title>", shown.stdout)
    assert title, shown.stderr[-500:]
    return {**json.loads(title[1]), "complaints": complaints}


@pytest.mark.long
@pytest.mark.parametrize("size", first(["400,800", "1280,900"]))
def test_every_plot_is_drawn_and_nothing_sticks_out(pages: list[Path], tmp_path: Path, size: str) -> None:
    for page, plots in zip(pages, (4, 2), strict=True):
        seen = look(page, tmp_path, f"--window-size={size}")
        assert seen["complaints"] == []
        assert seen["wide"] == []
        assert len(seen["plots"]) == plots
        for plot in seen["plots"]:
            assert plot["drawn"]
            assert plot["width"] > 250
            assert plot["height"] > 100
            assert plot["text"] >= 6, "axes with numbers and names"


@pytest.mark.long
def test_four_runs_with_the_names_of_a_sweep_fit_beside_one_another(tmp_path: Path) -> None:
    names = [f"rounds={rounds}_learning_rate={rate}_proximal_mu=0.01" for rounds in (10, 20) for rate in (0.001, 0.01)]
    runs = [make_run(tmp_path / name, [5.5884, 5.5, 5.4], baselines={"round0": {"losses": [5.5]}}) for name in names]
    page = write_comparison([run.folder for run in runs], tmp_path)
    assert look(page, tmp_path, "--window-size=1280,900")["scrolls"] == 0


@pytest.mark.long
def test_it_prints(pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        printed = tmp_path / f"{page.stem}.pdf"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [str(BROWSER), *QUIET, profile, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        held = printed.read_bytes()
        assert held.startswith(b"%PDF")
        assert 2 <= len(re.findall(rb"/Type\s*/Page\b", held)) <= 12


@pytest.mark.long
def test_dark_is_dark(pages: list[Path], tmp_path: Path) -> None:
    def brightness(color: str) -> float:
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    light = look(pages[0], tmp_path)
    dark = look(pages[0], tmp_path, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["paper"]) > 200 > 100 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 60 < 180 < brightness(dark["ink"])
