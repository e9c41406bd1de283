"""App that Flower ships to clients: two lines that import ours. A client runs no other. No torch here.

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
from fedloom.deployment.flower import apps

server_app = apps.server_app
client_app = apps.client_app
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
    """Write the app as Flower builds it from a folder."""
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
            _demand(set(names) == FILES, "other files")
            _demand(len(names) == len(FILES), "a file twice")
            _demand(all(entry.file_size <= MOST_BYTES for entry in entries), "a file that is too long")
            _demand(files.read("relay.py").decode() == RELAY, "other code")
            project = tomllib.loads(files.read("pyproject.toml").decode())
            _demand(project["tool"]["flwr"]["app"]["components"] == COMPONENTS, "other components")
            _demand(project["project"]["dependencies"] == [], "dependencies")
    except _OtherAppError as error:
        why = str(error)
    except Exception as error:  # of any kind, from bytes that may be anything
        why = type(error).__name__
    else:
        return
    raise DeploymentError(f"the server sent an app that is not fedloom's ({why}): it is not run")


class _OtherAppError(Exception):
    """Reason why an app is not ours."""


def _demand(holds: bool, else_it_has: str) -> None:
    if not holds:
        raise _OtherAppError(else_it_has)
