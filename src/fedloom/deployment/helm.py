"""Helm chart for both sides of a deployment. It holds no secrets: a Secret of the cluster's is named.

Its files lie in `chart`, as Helm reads them. Each side is a release of its own, one pod that runs as no root, on a
read-only root, without capabilities and without a token for the cluster. The server's sees nothing of the authority's
key.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from fedloom import __version__
from fedloom.deployment.docker import write_files


def write_chart(folder: Path) -> list[Path]:
    """Write the chart, of this version.

    Raises:
        DeploymentError: one of the files is there already, or the folder can't be written.
    """
    return write_files(folder, read_chart())


def read_chart() -> dict[str, str]:
    """Return the text of each file of the chart, by its path in it."""
    texts = _read_folder(resources.files("fedloom.deployment") / "chart", "")
    return {name: text.replace("VERSION", __version__) for name, text in texts.items()}


def _read_folder(folder: Traversable, inside: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        path = f"{inside}{item.name}"
        found |= _read_folder(item, f"{path}/") if item.is_dir() else {path: item.read_text(encoding="utf-8")}
    return found
