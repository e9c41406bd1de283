"""Command `fedloom branch`: what it refuses before it waits, and how it is found and ended from another terminal."""

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import Federation, confirmed, wait_until

from fedloom.cli import app
from fedloom.deployment import keys
from fedloom.deployment.branching import branch
from fedloom.deployment.client.joining import Kit, read_kit
from fedloom.deployment.processes import free_port
from fedloom.deployment.queue import QUEUE
from fedloom.errors import DeploymentError, RunError
from fedloom.monitoring.status import find_work, status_file
from fedloom.recipe.loading import load_recipe


def approved(server: Path, name: str, folder: Path) -> Path:
    """Have a name's key approved by a server, and return its kit, beside its key."""
    return keys.approve(server, keys.request(name, folder), folder).kit


def start(kit: Kit, port: int, security: keys.Security | None) -> None:
    """Start a branch whose clients never come."""
    branch(kit, load_recipe("tiny", ["data.clients=1"]), port=port, security=security, wait_seconds=1.0, first_client=0)


@pytest.mark.parametrize("secure", [True, False])
def test_the_kit_of_its_own_server_is_refused_before_it_waits_for_anybody(secure: bool, tmp_path: Path) -> None:
    """It waited for its clients, joined itself, and then for ever: it has no place beside its own clients."""
    port = free_port()
    if secure:
        security = keys.init(tmp_path / "server", "localhost", port)
        kit = read_kit(approved(security.folder, "north", tmp_path))
    else:
        security, kit = None, Kit("north", f"127.0.0.1:{port}")
    with pytest.raises(DeploymentError, match="leads to this branch's own server") as refused:
        start(kit, port, security)
    assert refused.value.mend
    assert not [*tmp_path.glob(".*.lock")]


@pytest.mark.long
def test_the_kit_of_another_server_is_not_taken_for_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    security = keys.init(tmp_path / "server", "localhost", free_port())
    above = keys.init(tmp_path / "above", "localhost", security.port)
    with pytest.raises(DeploymentError, match="0 of 1 clients came"):
        start(read_kit(approved(above.folder, "north", tmp_path)), 0, security)
    assert "waiting   for 1 client\n" in capsys.readouterr().out


def test_a_run_is_not_submitted_to_a_branch(tmp_path: Path) -> None:
    """It was queued, and nobody ever took it."""
    server = keys.init(tmp_path / "server", "localhost", free_port()).folder
    with status_file(server, "fedloom branch"):
        result = CliRunner().invoke(app, ["submit", "tiny", "--server", str(server)])
    assert isinstance(result.exception, RunError)
    assert "a branch works with it" in str(result.exception)
    assert not (server / QUEUE).exists()


@pytest.mark.long
def test_a_branch_is_seen_and_ended_by_its_servers_folder(tmp_path: Path) -> None:
    """A second branch there is told to end the first so, and could not."""
    above = keys.init(tmp_path / "above", "localhost", free_port())
    with ExitStack() as stack:
        there = Federation(tmp_path, stack, secure=True)
        assert there.server
        kit = approved(above.folder, "north", tmp_path)
        words = ["branch", str(kit), "tiny", "--server", str(there.server), "--port", str(there.inner)]
        first = there.start("first", *words, *confirmed(kit))
        there.wait_for("first", "waiting")
        with pytest.raises(DeploymentError) as second:
            start(read_kit(kit), there.inner, keys.open_server(there.server))
        assert f"end that one: fedloom stop {there.server}" in second.value.mend
        shown = CliRunner().invoke(app, ["status", str(there.server)])
        assert shown.exit_code == 0
        assert f"at work   fedloom branch, process {first.pid}," in shown.output
        stopped = CliRunner().invoke(app, ["stop", str(there.server)])
        assert (stopped.exit_code, "start it again as before" in stopped.output) == (0, True), stopped.output
        assert first.wait(60) == 128 + signal.SIGTERM
        wait_until(lambda: find_work(there.server) is None, "its end")  # type: ignore[arg-type]
