"""Intruders in a federation: each is refused, is told why, and gets no byte of the model; the run goes on."""

import http.client
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import Federation, confirmed, end, federation, run_here, split, tiny

from fedloom.deployment import keys
from fedloom.deployment.flower.bundle import write_app
from fedloom.deployment.processes import (
    AND,
    SOCKETS,
    flower_command,
    hand_over,
    programs_environment,
    tasks_words,
    write_secret,
)
from fedloom.deployment.server.nginx import find_nginx
from fedloom.deployment.signing import make_signing_key
from fedloom.recipe.loading import recipe_to_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
if find_nginx() is None:
    pytest.skip("nginx is not installed", allow_module_level=True)
if shutil.which("faketime") is None:
    pytest.skip("faketime is not installed", allow_module_level=True)

HOST = "127.0.0.2"
SECONDS = 400.0
"""Time within which the refused give up: they ask for two minutes."""


class Relay:
    """Way to the server that counts what comes back over each connection."""

    def __init__(self, port: int) -> None:
        self._server, self.most_bytes = (HOST, port), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._server)
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                self.most_bytes = max(self.most_bytes, passed) if counts else self.most_bytes
                target.sendall(data)
        for end_of in (source, target):
            with suppress(OSError):
                end_of.shutdown(socket.SHUT_RDWR)
        if counts:
            source.close()
            target.close()


@contextmanager
def relay(port: int) -> Iterator[Relay]:
    made = Relay(port)
    try:
        yield made
    finally:
        made.close()


def write_kit(folder: Path, name: str, server: str, ca: Path) -> Path:
    """Write a kit as `approve` would, but by whoever makes one for himself."""
    folder.mkdir(exist_ok=True)
    kit = folder / f"{name}.kit"
    signer = make_signing_key(ca.with_name("signing.key"))
    kit.write_text(f'name = "{name}"\nserver = "{server}"\nsigner = "{signer}"\nca = """\n{ca.read_text()}"""\n')
    return kit


def status_of(host: str, port: int, path: str) -> int:
    """Return the status that a server on this machine answers a question without content with."""
    context = ssl._create_unverified_context()
    with closing(http.client.HTTPSConnection(host, port, timeout=30, context=context)) as connection:
        connection.request("POST", path)
        return connection.getresponse().status


def submit_run(there: Federation, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Send an app of a client's own to where clients connect."""
    assert there.server is not None
    (home / "flower").mkdir(parents=True)
    ca = there.server / "ca.crt"
    settings = f'[superlink.there]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    (home / "flower" / "config.toml").write_text(settings)
    write_app(home / "app")
    command = [str(Path(sys.executable).parent / "flwr"), "run", str(home / "app"), "there", "--format", "json"]
    return subprocess.run(
        command, env=programs_environment(home / "flower"), capture_output=True, text=True, timeout=120
    )


def start_without_key(there: Federation, address: str) -> "subprocess.Popen[bytes]":
    """Flower's SuperNode with the certificate alone, which makes itself a key."""
    words = ["--superlink", address, "--root-certificates", str(there.server / "ca.crt")]
    words += [AND, *tasks_words("127.0.0.1:1", write_secret(there.folder), None)]
    environment = programs_environment(there.folder / "f") | hand_over(words) | {SOCKETS: str(there.folder)}
    with (there.folder / "keyless.log").open("wb") as log:
        return subprocess.Popen(
            flower_command("supernode"), stdout=log, stderr=log, env=environment, start_new_session=True
        )


def test_the_refused_get_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    from flwr.supercore.routers.runtime.router import router as runtime
    from flwr.superlink.routers.control.router import router as control

    recipe = tiny("data.clients=2", "federation.rounds=1")
    local = run_here(recipe, tmp_path / "local")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    data = split(recipe, tmp_path / "split")
    with federation(tmp_path, secure=True, host=HOST) as there, relay(there.port) as way, relay(there.port) as honest:
        assert there.server is not None
        ca = there.server / "ca.crt"
        other = keys.init(tmp_path / "other", HOST, there.port)

        def approve(name: str, through: str = "") -> Path:
            """Make a client's kit; its name is its folder's."""
            asked = keys.request(name, tmp_path / name)
            keys.approve(there.server, asked, tmp_path / name)
            return write_kit(tmp_path / name, name, through or way.address, ca)

        def join(name: str, kit: Path, *before: str, data: Path = data[0]) -> "subprocess.Popen[bytes]":
            return there.start(name, "join", str(kit), *confirmed(kit), "--data", str(data), before=before)

        erin = approve("erin")
        keys.revoke(there.server, "erin")
        server = there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out), "--wait", "900")
        there.wait_for("serve", "waiting")
        keys.request("mallory", tmp_path / "mallory")
        keys.request("oscar", tmp_path / "oscar")
        patient = {
            "erin": join("erin", erin),
            "mallory": join("mallory", write_kit(tmp_path / "mallory", "mallory", way.address, ca)),
            # She is a client at first, who is told the recipe; the bytes of that are not counted.
            "carol": join("carol", approve("carol", f"{HOST}:{there.port}")),
        }
        there.wait_for("serve", "client    carol: ")
        keys.revoke(there.server, "carol")

        quick = {
            "oscar": join("oscar", write_kit(tmp_path / "oscar", "oscar", way.address, other.ca)),
            "nobody": join("nobody", write_kit(tmp_path / "nobody", "nobody", way.address, ca)),
            "ahead": join("ahead", approve("frank"), "faketime", "-f", "+60s"),
            "behind": join("behind", approve("grace"), "faketime", "-f", "-400s"),
        }
        keyless = start_without_key(there, way.address)
        try:
            assert {name: process.wait(SECONDS) for name, process in quick.items()} == dict.fromkeys(quick, 2)
            keyless.wait(SECONDS)
        finally:
            end(keyless)
        submitted = submit_run(there, way.address, tmp_path / "submit")
        paths = [route.path for router in (control, runtime) for route in router.routes]
        through_proxy = {path: status_of(HOST, there.port, path) for path in paths}
        behind_it = {path: status_of("localhost", there.inner, path) for path in paths}
        there.join("alice", data[0])
        assert {name: process.wait(SECONDS) for name, process in patient.items()} == dict.fromkeys(patient, 2)

        knocking = join("mallory-again", tmp_path / "mallory" / "mallory.kit")
        there.wait_for("mallory-again", "not yet")
        bob = join("bob", approve("bob", honest.address), data=data[1])
        served = there.finish(server)
        assert bob.poll() is None
        assert knocking.poll() is None

    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ], "the honest clients' run is that of a run without the others"
    said = {name: there.said(name).strip().splitlines()[-1] for name in (*quick, *patient)}
    assert "the server's certificate is not signed by the kit's authority" in said["oscar"]
    assert "nobody's key is not there" in said["nobody"]
    assert "s ahead of the server's: Flower refuses more than 5 s; set it" in said["ahead"]
    assert "s behind the server's: Flower refuses more than 305 s; set it" in said["behind"]
    for name in patient:
        assert said[name].startswith(
            f"error: the server refuses {name}'s key: it was not approved there, it is revoked"
        )
        assert "restart" not in there.said(name), "being refused is no fault of the SuperNode's"
    assert submitted.returncode != 0 or '"success": true' not in submitted.stdout
    assert "403" in submitted.stdout + submitted.stderr
    assert len(paths) > 40
    assert set(behind_it.values()) == {403}, "and on the server's own machine, too"
    assert set(through_proxy.values()) == {403}
    assert served.plan["data"] == "alice, bob: each its own", "who came and was revoked is none of the run's clients"
    assert all(f"client    {name}: " not in there.said("serve") for name in ("erin", "mallory", "frank", "grace"))

    # Of the model, which is one array in one answer, nothing can have come over connections shorter than it.
    payload = int(local.plan["payload_bytes"])
    assert 0 < way.most_bytes < payload < honest.most_bytes
