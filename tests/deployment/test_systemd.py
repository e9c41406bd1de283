"""Units of systemd as data, and as systemd itself reads them. None is started here: nothing runs systemd."""

import pwd
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from typer.testing import CliRunner

from fedloom.cli import app
from fedloom.deployment.systemd import FILES, describe_closed, write_units
from fedloom.errors import DeploymentError

UNITS = ("fedloom-serve.service", "fedloom-join@.service")
Unit = dict[str, dict[str, list[str]]]


def read_unit(file: Path) -> Unit:
    """Read a unit: each section's keys, with all of a key's values."""
    found: Unit = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in file.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[section][key].append(value)
    return found


@pytest.mark.parametrize("name", UNITS)
def test_a_service_can_do_no_more_than_it_must(name: str, tmp_path: Path) -> None:
    write_units(tmp_path)
    service = read_unit(tmp_path / name)["Service"]
    wanted = {
        "User": "fedloom",
        "Group": "fedloom",
        "StateDirectory": "fedloom",
        "WorkingDirectory": "/var/lib/fedloom",
        "UMask": "0077",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "PrivateTmp": "yes",
        "RestrictSUIDSGID": "yes",
        "Restart": "on-failure",
    }
    assert {key: service[key] for key in wanted} == {key: [value] for key, value in wanted.items()}
    assert not {"AmbientCapabilities", "ReadWritePaths", "BindPaths", "ExecStartPre", "PermissionsStartOnly"} & {
        *service
    }
    assert 'u fedloom - "fedloom" /var/lib/fedloom' in (tmp_path / "fedloom.conf").read_text().splitlines()


def test_the_server_stays_and_is_told_by_its_signal_to_end(tmp_path: Path) -> None:
    """Runs are submitted to it; none stands in its unit."""
    write_units(tmp_path)
    service = read_unit(tmp_path / "fedloom-serve.service")["Service"]
    (line,) = service["ExecStart"]
    assert line.split()[3:] == ["serve", "--server", "fedloom-server", "$FEDLOOM_OPTIONS"]
    assert "Environment" not in [key for key in service if "FEDLOOM_RECIPE" in "".join(service[key])]
    assert service["SuccessExitStatus"] == ["143"]


def test_the_server_does_not_see_the_authoritys_key_and_no_unit_holds_a_secret(tmp_path: Path) -> None:
    write_units(tmp_path)
    hidden = read_unit(tmp_path / "fedloom-serve.service")["Service"]["InaccessiblePaths"]
    assert hidden == ["-/var/lib/fedloom/fedloom-server/ca.key"]
    assert not [name for name in FILES if re.search("PRIVATE|PASSWORD|TOKEN", (tmp_path / name).read_text())]


@pytest.mark.parametrize("name", UNITS)
def test_the_command_of_a_unit_is_one(name: str, tmp_path: Path) -> None:
    write_units(tmp_path)
    (line,) = read_unit(tmp_path / name)["Service"]["ExecStart"]
    python, module, package, command, *words = line.split()
    assert (python, module, package) == (sys.executable, "-m", "fedloom")
    known = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = [word for word in words if word.startswith("--")]
    assert options
    assert all(option in known for option in options)


def test_what_a_persons_terminal_shows_is_what_was_written(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["provision", "systemd", "--to", str(tmp_path / "units")])
    assert done.exit_code == 0
    assert done.stdout.split() == [str(tmp_path / "units" / name) for name in FILES]
    why = describe_closed()
    assert done.stderr == (f"note: {why}\n" if why else "")


def test_a_python_in_a_closed_home_is_told_of_with_the_way_to_mend_it(tmp_path: Path) -> None:
    """Units that could not start were written without a word."""
    with TemporaryDirectory() as name:
        home = Path(name) / "home"
        python, link = home / ".venv" / "bin" / "python", Path(name) / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\n")
        link.symlink_to(python)
        for folder in (Path(name), home):
            folder.chmod(0o755)
        nobody = "nobody of that name"
        assert describe_closed(python, nobody) == describe_closed(link, nobody) == ""
        home.chmod(0o700)
        for one in (python, link):
            assert describe_closed(one, nobody).startswith(
                f"the services can't start here: the user {nobody} may not enter {home}, in which {python} lies;"
            )
        owner = pwd.getpwuid(home.stat().st_uid).pw_name
        assert describe_closed(python, owner) == "", "its owner's own it may be"
        home.chmod(0o751)
        assert describe_closed(python, nobody) == "", "who may go through need not look around"


@pytest.mark.parametrize("name", FILES)
def test_a_unit_that_is_there_stays_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(DeploymentError, match="the file exists; name another folder with --to"):
        write_units(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("python", ["/opt/my venv/bin/python", "/opt/50%/bin/python", "/opt/$HOME/python", "python"])
def test_a_path_that_systemd_would_read_otherwise_is_refused(python: str, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"can't name this path as it is; install fedloom in a folder"):
        write_units(tmp_path, Path(python))
    assert not [*tmp_path.iterdir()]


def verify(folder: Path) -> str:
    """Return what systemd has to say of the units in a folder, each by its own name."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    shutil.copy(folder / "fedloom-join@.service", folder / "fedloom-join@alice.service")
    units = [str(folder / name) for name in ("fedloom-serve.service", "fedloom-join@alice.service")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    # Units of the system's own may be found wanting, too.
    said = "\n".join(line for line in done.stderr.splitlines() if "fedloom" in line)
    return said or (f"exit code {done.returncode}: {done.stderr}" if done.returncode else "")


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    write_units(tmp_path)
    assert not verify(tmp_path)


@pytest.mark.parametrize(
    ("whole", "broken"),
    [
        ("NoNewPrivileges=", "NoNewPrivilege="),
        ("ProtectSystem=strict", "ProtectSystem=strictly"),
        (sys.executable, "/no"),
    ],
)
def test_systemd_finds_what_is_wrong(whole: str, broken: str, tmp_path: Path) -> None:
    """Where nothing is said, that is because nothing is wrong."""
    write_units(tmp_path)
    unit = tmp_path / "fedloom-serve.service"
    unit.write_text(unit.read_text().replace(whole, broken))
    assert "fedloom-serve.service" in verify(tmp_path)
