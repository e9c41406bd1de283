"""The pages: what they say of the code is what the code says, every link leads somewhere, every command is one."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer
from support.import_file import import_file
from support.marks import first

from fedloom.cli import app
from fedloom.model.source import SHAPES
from fedloom.recipe.loading import shipped_recipes

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    if path.name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") or path.parent.name == "docs"
)
FILE = re.compile(r"`((?:src|tests|docs|bench|scripts|examples)/[\w./-]+)`")
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")


def script(name: str) -> ModuleType:
    """Return a script of the repository as a module."""
    return import_file(ROOT / "scripts" / f"{name}.py")


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(page: str) -> list[str]:
    """Return the lines of a page's fenced blocks."""
    return [line for block in re.findall(r"^```\w*\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
            for line in block.splitlines()]  # fmt: skip


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    prose = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


write_pages = script("write_pages")


@pytest.mark.parametrize("page", sorted(write_pages.PARTS))
def test_what_a_page_says_of_the_code_is_what_the_code_says(page: str) -> None:
    assert write_pages.renew(page) == read(page), f"{page} is out of date: make pages"


def test_a_part_that_is_out_of_date_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/strategies.md"
    monkeypatch.setitem(write_pages.PARTS, page, {**write_pages.PARTS[page], "strategies": lambda: "| another |"})
    assert write_pages.renew(page) != read(page)
    monkeypatch.setitem(write_pages.PARTS, page, {"nothing": lambda: ""})
    with pytest.raises(LookupError, match="no place for nothing"):
        write_pages.renew(page)


def test_every_shape_of_random_weights_is_named() -> None:
    assert [shape for shape in SHAPES if f"`{shape}`" not in read("README.md")] == []


def test_every_command_and_option_has_its_place() -> None:
    commands = read("docs/commands.md")
    for name, command in write_pages.list_commands(typer.main.get_command(app), "fedloom"):
        assert f"\n## {name}\n" in commands
        for option in command.params:
            assert write_pages.label(option) in commands


def test_the_drawing_has_every_room() -> None:
    rooms = {path.name for path in write_pages.SOURCE.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.stem for path in write_pages.SOURCE.glob("*.py") if not path.name.startswith("__")}
    drawn = set(re.findall(r"^\| `(\w+)` \| \d+ \|", read("docs/architecture.md"), re.MULTILINE))
    assert rooms <= drawn


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for link in LINK.findall(read(page)):
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    for path in FILE.findall(read(page)):
        assert (ROOT / path).exists(), f"{page}: {path}"


def commands_shown() -> Iterator[tuple[str, str]]:
    """Yield every command line that a page shows in a block of code, with its page; not the usage lines of commands."""
    for page in PAGES:
        for line in code_blocks(page) if page != "docs/commands.md" else ():
            if match := re.match(r"(?:\.venv/bin/)?fedloom ([a-z].*?)(?: {3,}.*| +#.*)?$", line):
                yield page, match[1]


def test_every_claim_of_security_has_its_test() -> None:
    page = (ROOT / "docs/security.md").read_text()
    claims = [line for line in page.splitlines() if line.startswith("| ") and line != "| claim | test |"]
    assert len(claims) > 30
    for claim in claims:
        files = [ROOT / name for name in re.findall(r"`(tests/[\w/]+\.py)`", claim)]
        assert files, f"no test stands beside: {claim}"
        attacks = "".join(file.read_text() for file in files)
        named = [word for words in re.findall(r"\.py` \(([^)]*)\)", claim) for word in re.findall(r"`(\w+)`", words)]
        assert not [word for word in named if word not in attacks], claim


@pytest.mark.parametrize(("page", "line"), sorted(set(commands_shown())))
def test_every_command_that_a_page_shows_is_one(page: str, line: str) -> None:
    known = dict(write_pages.list_commands(typer.main.get_command(app), "fedloom"))
    words = line.split()
    name = max((name for name in known if f"fedloom {line} ".startswith(f"{name} ")), key=len, default=None)
    if name is None:
        assert re.match(r"serve ──|join$", line), f"{page}: fedloom {line}"
        return
    options = {option for parameter in known[name].params for option in parameter.opts}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{page}: fedloom {line}"
    if words[0] in ("run", "plan", "sweep", "split") and re.fullmatch(r"[a-z][\w-]*", words[1]):
        assert words[1] in shipped_recipes(), f"{page}: fedloom {line}"


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_shows_is_there(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {match[1] for line in code_blocks(page) if (match := re.match(r"make ([\w-]+)", line))}
    assert shown | set(re.findall(r"`make ([\w-]+)`", read(page))) <= targets


@pytest.mark.parametrize("number", first(range(3)))
def test_the_code_of_the_guide_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", read("docs/guide.md"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4, "the last is a part of a package"
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[number], "docs/guide.md", "exec"), {})
    assert len(list(tmp_path.glob("runs/tiny-*/adapters/best"))) == 1


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len(read("README.md").splitlines()) < 200, "what is not for everybody has a page in docs/"


def test_an_index_shows_a_readme_whose_links_lead_to_the_repository() -> None:
    text = script("readme_of_the_package").with_links_to_the_repository(read("README.md"))
    assert "](https://github.com/fedloom/fedloom/blob/main/docs/guide.md)" in text
    assert "](https://github.com/fedloom/fedloom/raw/main/docs/images/report.png)" in text
    assert not LINK.findall(text)


def test_a_page_laid_out_for_the_site_has_the_sites_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_site = script("build_site")
    assert "](guide.md#when-it-does-not-fit)" in build_site.lay_out("README.md")
    assert "](https://github.com/fedloom/fedloom/blob/main/LICENSE)" in build_site.lay_out("README.md")
    assert "](contributing.md)" in build_site.lay_out("README.md")
    (tmp_path / "README.md").write_text("[gone](docs/gone.md)", encoding="utf-8")
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    with pytest.raises(LookupError, match=r"docs/gone\.md leads nowhere"):
        build_site.lay_out("README.md")


def test_the_site_has_every_page() -> None:
    shown = set(re.findall(r'= "([\w-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")))
    assert shown == {script("build_site").place_of(page) for page in PAGES}


@pytest.mark.slow  # as make docs does
def test_pages_can_be_checked_from_the_command_line() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "write_pages.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
