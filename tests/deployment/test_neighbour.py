"""Neighbour: another user of a client's or the server's machine, who looks, connects, and takes places."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import Served, descendants, end, wait_until

from fedloom.cli import main
from fedloom.deployment import keys
from fedloom.deployment.client import worker_process
from fedloom.deployment.client.joining import read_kit
from fedloom.deployment.processes import (
    AND,
    RUNTIME_SOCKET,
    SOCKETS,
    flower_command,
    hand_over,
    private_folder,
    programs_environment,
    tasks_words,
    write_secret,
)
from fedloom.errors import DeploymentError
from fedloom.host.frames import Frame, accept, ask, listen

NOBODY = 65534
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it looks at /proc")
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
REFUSED = {"BrokenPipeError", "ConnectionError", "ConnectionResetError"}
"""Errors of whoever's connection is closed, by how far he had come."""
PRIVATE = ("split", "documents", ".key", ".secret", ".sock", "fedloom-", "journal", "policy", ".crt", "recipe", "tiny")
"""Parts of paths that nobody else is to read: documents, keys, secrets, sockets and private folders."""


def as_a_neighbour(attempt: Callable[[], object]) -> str:
    """Carry out an attempt as another user of this machine; return its result, or the name of its error."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on: that other threads are not there in the child
        child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            told = str(attempt())
        except BaseException as error:
            told = type(error).__name__
        os.write(writing, told.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as result:
        told = result.read()
    os.waitpid(child, 0)
    return told


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        end(process)


def is_private(path: Path) -> bool:
    return not stat.S_IMODE(path.stat().st_mode) & 0o077


# What everyone can see


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("served")
@LINUX
def test_no_command_line_tells_of_documents_keys_secrets_or_sockets(served: Served) -> None:
    for name, what in {"serve": ("superlink", "server-tasks"), "client-0": ("supernode", "client-tasks")}.items():
        lines = served.seen[name].lines + served.seen[name].names
        assert all(any(word in line for line in lines) for word in what), f"they were looked at: {lines}"
    found = {line for seen in served.seen.values() for line in seen.lines for word in PRIVATE if word in line}
    assert not found


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("served")
@LINUX
def test_a_client_listens_on_no_port_that_another_could_take(served: Served) -> None:
    assert served.seen["serve"].ports, "the server's are seen"
    assert not served.seen["client-0"].ports | served.seen["client-1"].ports


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("served")
def test_what_serve_writes_is_its_owners_alone(served: Served) -> None:
    written = [served.run.folder, *served.run.folder.rglob("*")]
    assert len(written) > 20
    assert [path for path in written if not is_private(path)] == []


@LINUX
def test_join_hides_its_arguments_while_it_waits(tmp_path: Path) -> None:
    kit, data = tmp_path / "a.kit", tmp_path / "documents of a patient.jsonl"
    kit.write_text('name = "a"\nserver = "127.0.0.1:1"\n')
    data.write_text("")
    command = [sys.executable, "-m", "fedloom", "join", str(kit), "--data", str(data)]
    with started(command, {**os.environ}, tmp_path / "log") as process:
        wait_until(lambda: b"waiting" in (tmp_path / "log").read_bytes(), "its wait")
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert shown == [word.encode() for word in command[:4]]


@LINUX
@AS_ROOT
def test_what_a_process_is_told_can_not_be_read_by_another_user(tmp_path: Path) -> None:
    """Its environment, from which it takes its arguments, is its owner's."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with started(command, {**os.environ, **hand_over(["--data", "secret"])}, tmp_path / "log") as process:
        environment = Path(f"/proc/{process.pid}/environ")
        wait_until(lambda: b"secret" in environment.read_bytes(), "its start")
        assert as_a_neighbour(environment.read_bytes) == "PermissionError"


# Sockets


@AS_ROOT
def test_a_private_folder_is_closed_to_another_user_and_its_sockets_too() -> None:
    with private_folder() as folder, listen(str(folder / RUNTIME_SOCKET)):
        path = str(folder / RUNTIME_SOCKET)
        with closing(socket.socket(socket.AF_UNIX)) as ours:
            ours.connect(path)
        attempts: dict[str, Callable[[], object]] = {
            "list": lambda: os.listdir(folder),
            "connect": lambda: socket.socket(socket.AF_UNIX).connect(path),
            "remove": lambda: os.unlink(path),
            "take its place": lambda: socket.socket(socket.AF_UNIX).bind(path),
            "take a free place": lambda: socket.socket(socket.AF_UNIX).bind(f"{path}.2"),
            "rename": lambda: folder.rename(folder.with_name("taken")),
        }
        assert {what: as_a_neighbour(attempt) for what, attempt in attempts.items()} == dict.fromkeys(
            attempts, "PermissionError"
        )
        (folder / "written").write_text("")
        assert is_private(folder / "written")
        assert is_private(folder / RUNTIME_SOCKET)


class Telling:
    """Worker that tells something private to whoever asks."""

    is_spent = may_train = holds_former = False
    account = SimpleNamespace(goes_on=False)
    opening_seconds, whose = 0.0, ""

    def look(self) -> None:
        pass

    def begin(self, asked: Frame, came: float) -> Iterator[Any]:
        yield from ()
        return Frame({"told": "private"})


def _accept_anybody(listener: socket.socket) -> socket.socket:
    """The twin: it takes who comes."""
    return listener.accept()[0]


@LINUX
@AS_ROOT
@pytest.mark.parametrize(("take", "got"), [(accept, REFUSED), (_accept_anybody, {"private"})])
def test_a_worker_whose_socket_is_open_by_mistake_answers_its_owner_alone(
    take: Callable[[socket.socket], socket.socket], got: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lock, where the first is left open: the rights of the folder, and of the socket."""
    monkeypatch.setattr(worker_process, "accept", take)
    with private_folder() as folder:
        path = str(folder / "worker.sock")
        listener = listen(path)
        folder.chmod(0o777)
        os.chmod(path, 0o777)
        waiting = worker_process.take_in([listener])
        threading.Thread(target=worker_process.serve, args=(waiting, [Telling()]), daemon=True).start()

        def question() -> object:
            return ask(path, Frame({"do": "meet"}), patience_seconds=0, answer_seconds=30).manifest["told"]

        assert as_a_neighbour(question) in got
        assert question() == "private"


def test_a_folder_whose_sockets_would_have_too_long_paths_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with (
        pytest.raises(DeploymentError, match=r"too long for sockets; name a shorter one .*TMPDIR=/tmp"),
        private_folder(),
    ):
        pass
    assert not [*long.iterdir()]


def test_the_longest_folder_that_is_taken_has_room_for_every_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not in the test's own folder, whose path may be too long itself.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        fits = len(str(Path(short) / "fedloom-12345678" / "99" / RUNTIME_SOCKET)) + 1
        longest = Path(short) / ("x" * (103 - fits))
        longest.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(longest))
        with private_folder() as folder:
            (folder / "99").mkdir()
            for name in ("99/worker.sock", "99/runtime.sock", "serve.sock"):
                listen(str(folder / name)).close()


# Places of a SuperNode


TASKS = """\
import os, sys
from fedloom.deployment.flower.programs import run_client_tasks
from fedloom.deployment.processes import take_arguments
sys.argv[1:] = take_arguments()
run_client_tasks(os.pipe()[0])
"""
"""What a SuperNode forks, by itself."""


@pytest.mark.long
def test_what_runs_a_clients_messages_asks_nobody_who_took_the_port(tmp_path: Path) -> None:
    """A neighbour listens where the SuperNode is said to be; the question goes to the socket in the private folder."""
    with (
        private_folder() as folder,
        listen(str(folder / RUNTIME_SOCKET)) as ours,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        words = tasks_words(f"127.0.0.1:{taken.getsockname()[1]}", write_secret(folder), None)
        environment = programs_environment(folder / "flower") | {SOCKETS: str(folder)} | hand_over(words)
        with started([sys.executable, "-c", TASKS], environment, tmp_path / "log"):
            ours.settimeout(120)
            with accept(ours) as connection:
                assert connection.recv(100).startswith(b"POST /v1/runtime/acquire-task")
            taken.settimeout(1)
            with pytest.raises(TimeoutError):
                taken.accept()


@pytest.mark.long
@LINUX
def test_a_supernode_gives_messages_out_in_its_private_folder_and_on_no_port(tmp_path: Path) -> None:
    with private_folder() as folder:
        words = ["--superlink", "127.0.0.1:1", "--insecure", "--isolation", "process"]
        secret = write_secret(folder)
        words += ["--superexec-auth-secret-file", str(secret), AND, *tasks_words("127.0.0.1:1", secret, None)]
        environment = programs_environment(folder / "flower") | {SOCKETS: str(folder)} | hand_over(words)
        for _ in range(2):  # the second finds the socket of the first, which was killed
            with started(flower_command("supernode"), environment, tmp_path / "log") as process:
                wait_until(lambda: answers(folder / RUNTIME_SOCKET), "its answer on the socket")
                assert is_private(folder / RUNTIME_SOCKET)
                family = [process.pid, *descendants(process.pid)]
                ports = [found for member in family for found in psutil.Process(member).net_connections("tcp")]
                assert not [found for found in ports if found.status == psutil.CONN_LISTEN]
                for member in family:
                    with suppress(ProcessLookupError):
                        os.kill(member, 9)
                process.wait()


def answers(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        return connection.recv(100).startswith(b"HTTP/1.1 ")
    return False


# Files


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_no_file_of_a_deployment_can_be_changed_by_others_whatever_the_umask(tmp_path: Path) -> None:
    server, client = tmp_path / "server", tmp_path / "client"
    client.mkdir()
    security = keys.init(server, "localhost", 8443)
    asked = keys.request("alice", client)
    for _ in range(2):  # the second time, the kit is there
        kit = keys.approve(server, asked, client).kit
    keys.renew(server)
    assert is_private(server)
    files = [path for path in (*server.rglob("*"), *client.iterdir()) if path.is_file()]
    assert {path.name for path in files} >= {"alice.pub", "alice.kit", "alice.request", "server.crt", "signing.key"}
    assert [path for path in files if path.stat().st_mode & 0o022] == []
    assert {path.name for path in files if is_private(path)} == {"ca.key", "server.key", "signing.key", "alice.key"}
    assert security.signing_key.is_file()
    assert read_kit(kit).signer


@pytest.mark.parametrize("rights", [0o640, 0o604, 0o620, 0o644])
def test_a_private_key_that_others_can_read_is_refused_on_both_sides(rights: int, tmp_path: Path) -> None:
    security = keys.init(tmp_path / "server", "localhost", 8443)
    kit = keys.approve(security.folder, keys.request("alice", tmp_path), tmp_path).kit
    for key in (security.key, security.signing_key, security.folder / "ca.key"):
        key.chmod(rights)
        with pytest.raises(
            DeploymentError, match=rf"{key.name}: others .* can read the private key; chmod 600 '.*{key.name}'"
        ):
            keys.open_server(security.folder)
        key.chmod(0o600)
    (tmp_path / "alice.key").chmod(rights)
    with pytest.raises(
        DeploymentError, match=r"alice.key: others .* can read the private key; chmod 600 '.*alice.key'"
    ):
        read_kit(kit)
    (tmp_path / "alice.key").chmod(0o400)
    assert read_kit(kit).key


def test_a_kit_from_before_questions_were_signed_is_refused_with_the_way_to_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    security = keys.init(tmp_path / "server", "localhost", 8443)
    kit = keys.approve(security.folder, keys.request("alice", tmp_path), tmp_path).kit
    whole = kit.read_text()
    line = next(line for line in whole.splitlines() if line.startswith("signer"))
    for old in (
        whole.replace(f"{line}\n", ""),
        whole.replace(line, 'signer = "00"'),
        whole.replace(line, "signer = 5"),
    ):
        kit.write_text(old)
        monkeypatch.setattr(sys, "argv", ["fedloom", "join", str(kit), "--data", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "alice.kit: signer: the kit does not say which key signs the server's questions" in said
        assert "provision approve" in said
    # A server's folder from before gets its key when a client is approved again; it stays the same from then on.
    security.signing_key.unlink()
    signers = []
    for _ in range(2):
        keys.approve(security.folder, tmp_path / "alice.request", tmp_path)
        signers.append(read_kit(kit).signer)
    assert signers[0] == signers[1] != json.loads(line.partition("=")[2])


def test_without_certificates_nothing_is_signed_and_the_kit_may_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.kit").write_text('name = "a"\nserver = "127.0.0.1:8000"\n')
    assert read_kit(tmp_path / "a.kit").signer == ""
