"""What two people compare on the phone: an exchanged request or kit, or a part of one, sounds otherwise."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from typer.testing import CliRunner

from fedloom.cli import app
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.fingerprints import fingerprint, read_fingerprint
from fedloom.errors import DeploymentError

SHOWN = re.compile(r"^(?:[0-9a-f]{4} ){7}[0-9a-f]{4}$", re.MULTILINE)


def provision(*words: str) -> list[str]:
    """Run `fedloom provision`, and return the fingerprints that it shows."""
    done = CliRunner().invoke(app, ["provision", *words], catch_exceptions=False)
    assert done.exit_code == 0
    return SHOWN.findall(done.output)


def test_both_sides_show_the_same_fingerprints(tmp_path: Path) -> None:
    server, here = str(tmp_path / "server"), str(tmp_path)
    provision("init", "--host", "localhost", "--server", server)
    (own,) = provision("request", "alice", "--folder", here)
    approved, authority = provision("approve", f"{here}/alice.request", "--server", server, "--to", here)
    assert own == approved
    assert authority == read_kit(tmp_path / "alice.kit").fingerprint


def test_an_exchanged_request_is_heard(tmp_path: Path) -> None:
    """Mallory's key under alice's name: approved in good faith, and two people who compare notice it."""
    server, alice, mallory = (str(tmp_path / name) for name in ("server", "alice", "mallory"))
    provision("init", "--host", "localhost", "--server", server)
    (own,) = provision("request", "alice", "--folder", alice)
    (others,) = provision("request", "alice", "--folder", mallory)
    approved, _ = provision("approve", f"{mallory}/alice.request", "--server", server, "--to", mallory)
    assert approved == others != own


def test_an_exchanged_name_is_heard(tmp_path: Path) -> None:
    server, here = str(tmp_path / "server"), str(tmp_path)
    provision("init", "--host", "localhost", "--server", server)
    (own,) = provision("request", "alice", "--folder", here)
    file = tmp_path / "alice.request"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name": "bob"}))
    assert provision("approve", str(file), "--server", server, "--to", here)[0] != own


def test_every_part_and_its_name_count() -> None:
    made = {
        fingerprint(),
        fingerprint(a=b"one"),
        fingerprint(b=b"one"),
        fingerprint(a=b"two"),
        fingerprint(a=b"on", e=b""),
        fingerprint(a=b"one", b=b"two"),
        fingerprint(a=b"onetwo", b=b""),
        fingerprint(a=b"one" + b"b" + b"two"),
    }
    assert len(made) == 8
    assert all(SHOWN.fullmatch(one) for one in made)


def test_a_fingerprint_is_read_as_people_type_it() -> None:
    made = fingerprint(a=b"one")
    for typed in (made, made.upper(), made.replace(" ", ""), made.replace(" ", ":"), f" {made.replace(' ', '-')}\n"):
        assert read_fingerprint(typed) == made


@pytest.mark.parametrize("change", [lambda made: made[:-1], lambda made: made + "0", lambda made: made[:-1] + "g"])
def test_a_part_of_a_fingerprint_is_none(change: Callable[[str], str]) -> None:
    for typed in (change(fingerprint(a=b"one")), "", "yes"):
        with pytest.raises(DeploymentError, match=r"not a whole fingerprint: .* 8 groups of 4"):
            read_fingerprint(typed)
