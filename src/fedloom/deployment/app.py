"""The app that Flower ships to clients: two lines that import ours. A client runs no other. No torch here.

Flower's SuperNode runs whatever app its server sends. Ours compares it with what stands here before it is kept.
"""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

from fedloom import __version__
from fedloom.errors import DeploymentError

RELAY = """\
from fedloom.federation import flower

server_app = flower.server_app
client_app = flower.client_app
"""
COMPONENTS = {"serverapp": "relay:server_app", "clientapp": "relay:client_app"}
PROJECT = f"""\
[project]
name = "fedloom"
version = "{__version__}"
description = "passes frames on"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedloom"

[tool.flwr.app.components]
serverapp = "{COMPONENTS["serverapp"]}"
clientapp = "{COMPONENTS["clientapp"]}"
"""
FILES = {"relay.py", "pyproject.toml", ".info/CONTENT"}
MOST_BYTES = 10_000


def write_app(folder: Path) -> None:
    """The app as Flower builds it from a folder."""
    folder.mkdir()
    (folder / "relay.py").write_text(RELAY, encoding="utf-8")
    (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")


def check_app(bundle: bytes) -> None:
    """Refuse an app that is not ours, whatever version of fedloom sent it.

    Raises:
        DeploymentError
    """
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as files:
            entries = files.infolist()
            names = [entry.filename for entry in entries]
            assert set(names) == FILES, "other files"
            assert len(names) == len(FILES), "a file twice"
            assert all(entry.file_size <= MOST_BYTES for entry in entries), "a file that is too long"
            assert files.read("relay.py").decode() == RELAY, "other code"
            project = tomllib.loads(files.read("pyproject.toml").decode())
            assert project["tool"]["flwr"]["app"]["components"] == COMPONENTS, "other components"
            assert project["project"]["dependencies"] == [], "dependencies"
    except Exception as error:  # of any kind, from bytes that may be anything
        why = str(error) if isinstance(error, AssertionError) else type(error).__name__
        raise DeploymentError(f"the server sent an app that is not fedloom's ({why}): it is not run") from error
