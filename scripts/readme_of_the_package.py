"""The README as a package index shows it: its links lead to the repository, since an index has no other file of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "https://github.com/fedloom/fedloom"


def with_links_to_the_repository(text: str) -> str:
    """Return Markdown whose relative links are links to the repository, and whose images are files of it."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:|#)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!\w+:|#)", rf"\1{REPOSITORY}/blob/main/", text)


class ReadmeHook(MetadataHookInterface):
    """Gives the package its README; hatchling calls it."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": with_links_to_the_repository(text)}
