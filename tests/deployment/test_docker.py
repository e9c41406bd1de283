"""Files for Docker as data, and as docker compose reads them. No container is run here: there is no engine."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.marks import first
from typer.testing import CliRunner

from fedloom import __version__
from fedloom.cli import app
from fedloom.deployment.docker import FILES, write_compose
from fedloom.errors import DeploymentError

SIDES = ("server", "client")
NAMED = {"FEDLOOM_BASE": f"python@sha256:{'0' * 64}", "FEDLOOM_SUMS": "1" * 64, "FEDLOOM_FINGERPRINT": "3f2a 91bc"}
"""What has to be named, since nothing can be made up for it."""
WRITABLE = {
    "server": {"/fedloom/runs", "/fedloom/fedloom-server/seen", "/fedloom/fedloom-server/queue", "/models"},
    "client": {"/fedloom/journal", "/models"},
}


def service(folder: Path, side: str) -> dict[str, Any]:
    write_compose(folder)
    told: dict[str, Any] = yaml.safe_load((folder / f"compose.{side}.yaml").read_text())["services"]
    assert list(told) == [side]
    found: dict[str, Any] = told[side]
    return found


@pytest.mark.parametrize("side", SIDES)
def test_a_container_can_do_no_more_than_it_must(side: str, tmp_path: Path) -> None:
    told = service(tmp_path, side)
    assert told["user"] == "${FEDLOOM_USER:-1000:1000}"
    assert told["read_only"] is True
    assert told["cap_drop"] == ["ALL"]
    assert told["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "network_mode", "ipc", "environment", "env_file"} & set(told)
    assert told["tmpfs"][0] == "/tmp"
    written = {volume.split(":")[-1] for volume in told["volumes"] if not volume.endswith(":ro")}
    assert written == WRITABLE[side]
    assert ("ports" in told) == (side == "server")


@pytest.mark.parametrize("side", SIDES)
def test_a_container_is_watched_and_ends_in_peace(side: str, tmp_path: Path) -> None:
    told = service(tmp_path, side)
    assert told["healthcheck"]["test"][:5] == ["CMD", "python", "-m", "fedloom.deployment.health", side]
    assert (told["stop_signal"], told["stop_grace_period"]) == ("SIGTERM", "60s")
    # Nobody else takes leave of what a killed process of Flower's leaves behind.
    dockerfile = (tmp_path / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["tini", "--", "fedloom"]' in dockerfile
    assert "--no-install-recommends tini" in dockerfile
    assert told["restart"] != "no"


def test_secrets_stay_out_of_the_image_and_the_authoritys_key_out_of_the_container(tmp_path: Path) -> None:
    assert not any(
        "ca.key" in volume or volume.startswith((".:", "./:")) for volume in service(tmp_path, "server")["volumes"]
    )
    dockerfile = (tmp_path / "Dockerfile").read_text()
    assert not any(line.startswith(("COPY", "ADD")) for line in dockerfile.splitlines())
    assert f"pip install --no-index ./fedloom-{__version__}-py3-none-any.whl" in dockerfile
    users = [line for line in dockerfile.splitlines() if line.startswith("USER")]
    assert (users[-1], users[0]) == ("USER 1000:1000", "USER 1000:1000")
    assert (tmp_path / ".dockerignore").read_text().split() == ["*", "!*.whl", "!requirements-*.txt", "!SHA256SUMS"]


def test_nothing_is_installed_but_by_its_hash(tmp_path: Path) -> None:
    """A name on a registry is whose it is: fedloom's own comes from a file, and everything by a hash."""
    write_compose(tmp_path)
    dockerfile = (tmp_path / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install ([^;&\n]+)", dockerfile)
    assert len(installs) == 4
    assert all(words.startswith(("--require-hashes ", "--no-index ./")) for words in installs)
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${BASE}", "client"]
    assert "PIP_NO_DEPS=1" in dockerfile


@pytest.mark.parametrize(
    ("base", "passes"),
    [("python:3.11-slim-bookworm", False), ("", False), (f"python:3.11@sha256:{'a' * 64}", True)],
)
def test_the_image_to_begin_with_is_named_by_its_digest(base: str, passes: bool, tmp_path: Path) -> None:
    write_compose(tmp_path)
    (check,) = re.findall(r"^RUN (case .+)$", (tmp_path / "Dockerfile").read_text(), re.MULTILINE)
    done = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, text=True)
    assert (done.returncode == 0) == passes
    assert passes or "has to be named by its digest" in done.stderr


@pytest.mark.parametrize("damaged", ["SHA256SUMS", "fedloom-0.whl", "requirements-deploy.txt", None])
def test_what_was_exchanged_is_not_installed(damaged: str | None, tmp_path: Path) -> None:
    """The image's own check, of files as make dist leaves them."""
    write_compose(tmp_path / "files")
    (command,) = re.findall(
        r"^RUN --mount=type=bind,target=/dist cd /dist && (echo .+?[^\\])$",
        (tmp_path / "files" / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    dist = tmp_path / "dist"
    dist.mkdir()
    for name in ("fedloom-0.whl", "requirements-deploy.txt"):
        (dist / name).write_text(name)
    subprocess.run("sha256sum -- * > ../sums && mv ../sums SHA256SUMS", shell=True, cwd=dist, check=True)
    told = hashlib.sha256((dist / "SHA256SUMS").read_bytes()).hexdigest()
    if damaged:
        (dist / damaged).write_text("mallory's")
    done = subprocess.run(["sh", "-c", command], cwd=dist, env={**os.environ, "SUMS": told}, capture_output=True)
    assert (done.returncode == 0) == (damaged is None)


@pytest.mark.parametrize("missing", first(NAMED))
def test_what_has_to_be_named_is_asked_for(missing: str, tmp_path: Path) -> None:
    program = compose_program()
    write_compose(tmp_path)
    named = {"FEDLOOM_NAME": "alice", "FEDLOOM_DATA": "./documents", **NAMED}
    command = [*program, "-f", "compose.client.yaml", "config"]
    environment = {**os.environ, **{name: value for name, value in named.items() if name != missing}}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert missing in done.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_stays_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(DeploymentError, match="the file exists"):
        write_compose(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeploymentError, match=r"can't be written .*; name another folder with --to"):
        write_compose(tmp_path / "file" / "folder")


def test_the_server_stays_and_comes_back_with_the_machine(tmp_path: Path) -> None:
    """No run stands in its file; what is submitted lies in a folder that stays when the container goes."""
    told = service(tmp_path, "server")
    assert words_of(told) == ["serve", "--page", "0.0.0.0:8080"]
    assert told["restart"] == "unless-stopped", "on-failure does not come back when the machine starts"
    assert "./fedloom-server/queue:/fedloom/fedloom-server/queue" in told["volumes"]
    assert "./recipes:/fedloom/recipes:ro" in told["volumes"]


def test_the_page_is_for_browsers_of_the_servers_machine_alone(tmp_path: Path) -> None:
    told = service(tmp_path, "server")
    assert [port for port in told["ports"] if port.endswith(":8080")] == ["127.0.0.1:${FEDLOOM_PAGE:-8080}:8080"]


def words_of(told: dict[str, Any]) -> list[str]:
    """Return a side's command as words, where nothing more was asked for."""
    command = told["command"]
    return command.replace("${FEDLOOM_OPTIONS:-}", "").split() if isinstance(command, str) else command


def test_the_commands_in_the_files_are_commands(tmp_path: Path) -> None:
    for side in SIDES:
        folder = tmp_path / side
        command, *words = words_of(service(folder, side))
        known = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert all(word in known for word in words if word.startswith("--")), known


def compose_program() -> list[str]:
    """`docker compose`, or the program that it was; neither needs an engine to read a file."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither docker compose nor docker-compose is installed")


def words_in(command: str | list[str]) -> list[str]:
    """Return a command's words as Compose hands them to Docker; the program that it was splits them only then."""
    return shlex.split(command) if isinstance(command, str) else command


@pytest.mark.parametrize("side", first(SIDES))
def test_docker_compose_reads_the_files(side: str, tmp_path: Path) -> None:
    program = compose_program()
    write_compose(tmp_path)
    command = [*program, "-f", f"compose.{side}.yaml", "config"]
    environment = {
        **os.environ,
        "FEDLOOM_NAME": "alice",
        "FEDLOOM_DATA": "./documents",
        "FEDLOOM_USER": "1234:1234",
        **NAMED,
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = yaml.safe_load(done.stdout)["services"][side]
    assert told["user"] == "1234:1234"
    assert f"fedloom-{side}:{__version__}" == told["image"]
    assert told["build"]["args"] == {"BASE": NAMED["FEDLOOM_BASE"], "SUMS": NAMED["FEDLOOM_SUMS"], "GPU": ""}
    if side == "server":
        assert words_in(told["command"]) == ["serve", "--page", "0.0.0.0:8080"]
        environment["FEDLOOM_OPTIONS"] = "--wait 3600 --notify 'recipes/tell me'"
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        more = yaml.safe_load(done.stdout)["services"]["server"]["command"]
        assert words_in(more)[3:] == ["--wait", "3600", "--notify", "recipes/tell me"]
    if side == "client":
        assert told["command"][:2] == ["join", "alice.kit"]
        assert told["command"][-2:] == ["--fingerprint", "3f2a 91bc"]
        del environment["FEDLOOM_NAME"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        assert "the name in the kit" in done.stderr
