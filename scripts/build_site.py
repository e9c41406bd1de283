"""Lay README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ out as one site, and build it into build/site.

GitHub shows the same Markdown, so links are written for the repository: a link to a page becomes a link to its place in
the site, a link to any other file of the repository one to GitHub. A link that leads nowhere ends the build; so does an
anchor that is not there (`zensical build --strict`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"
"""Where zensical.toml looks for the pages."""
SOURCE = "https://github.com/fedloom/fedloom/blob/main"
AT_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside docs/ -> their names in the site."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def place_of(path: str) -> str | None:
    """Return where a file of the repository stands in the site; None where it is no part of it."""
    if path in AT_THE_ROOT:
        return AT_THE_ROOT[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def lay_out(path: str) -> str:
    """Return a page with its links as the site needs them.

    Raises:
        LookupError: a link leads nowhere.
    """

    def relink(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith("mailto:"):
            return target
        found = (ROOT / path).parent.joinpath(target).resolve()
        if not found.exists() or not found.is_relative_to(ROOT):
            raise LookupError(f"{path}: a link to {target} leads nowhere")
        inside = found.relative_to(ROOT).as_posix()
        return place_of(inside) or f"{SOURCE}/{inside}"

    return LINK.sub(relink, (ROOT / path).read_text(encoding="utf-8"))


def main() -> int:
    """Build the site anew; exit with what zensical exits with."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for path in [*AT_THE_ROOT, *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]:
        place = PAGES / str(place_of(path))
        place.write_text(lay_out(path), encoding="utf-8")
    # As a module of this very Python: the site is built by what is installed beside the package.
    return subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LookupError as error:
        sys.exit(f"error: {error}")
