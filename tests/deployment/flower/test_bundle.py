"""App of a client: it runs fedloom's own relay and no other app, whatever its server sends."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedloom.deployment import processes
from fedloom.deployment.client.joining import Kit, Member, join
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.flower.bundle import PROJECT, RELAY, check_app, write_app
from fedloom.errors import DeploymentError

OURS = {"relay.py": RELAY, "pyproject.toml": PROJECT, ".info/CONTENT": ""}


def bundle(files: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own, of a library of its
def test_the_app_as_flower_builds_it_is_taken(tmp_path: Path) -> None:
    build = pytest.importorskip("flwr.cli.build", reason="Flower is not installed")
    write_app(tmp_path / "app")
    check_app(build.build_fab_from_disk(tmp_path / "app"))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({**OURS, "relay.py": RELAY + "import os\n"}, "other code"),
        ({**OURS, "numpy.py": ""}, "other files"),
        ({**OURS, "fedloom/__init__.py": ""}, "other files"),
        ({**OURS, "pyproject.toml": PROJECT.replace("relay:client_app", "os:system")}, "other components"),
        ({**OURS, "pyproject.toml": PROJECT.replace("dependencies = []", 'dependencies = ["x"]')}, "dependencies"),
        ({**OURS, "pyproject.toml": "="}, "TOMLDecodeError"),
        ({**OURS, ".info/CONTENT": "x" * 20_000}, "too long"),
    ],
)
def test_any_other_app_is_refused(files: dict[str, str], why: str) -> None:
    check_app(bundle(OURS))
    with pytest.raises(DeploymentError, match=why):
        check_app(bundle(files))


def test_another_app_is_refused_by_a_python_without_asserts(tmp_path: Path) -> None:
    (tmp_path / "app").write_bytes(bundle({**OURS, "relay.py": "other"}))
    code = (
        "import sys; from fedloom.deployment.flower.bundle import check_app; check_app(open(sys.argv[1], 'rb').read())"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code, str(tmp_path / "app")], capture_output=True, text=True)
    assert "other code" in done.stderr


def test_bytes_that_are_no_app_are_refused() -> None:
    with pytest.raises(DeploymentError, match="not run"):
        check_app(b"noise")


def test_without_flower_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(DeploymentError, match=r"pip install 'flwr>="):
        join([Member(Kit("a", "127.0.0.1:1"), tmp_path, Policy(), tmp_path / "a.journal.jsonl")], print)
