"""Site that demands client certificates: stunnel before the server's nginx and on the client, as the guide has it."""

import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import SECONDS, confirmed, end, federation, run_here, split, tiny

from fedloom.deployment import keys
from fedloom.deployment.processes import free_port
from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import recipe_to_toml

pytestmark = pytest.mark.timeout(600)
if find_nginx() is None:
    pytest.skip("nginx is not installed", allow_module_level=True)
if shutil.which("stunnel4") is None or shutil.which("openssl") is None:
    pytest.skip("stunnel4 or openssl is not installed", allow_module_level=True)

GUIDE = Path(__file__).parents[2] / "docs" / "deploy.md"
HOST = "127.0.0.2"


def guide(title: str) -> list[str]:
    """List the blocks of the guide's section, in order."""
    section = GUIDE.read_text().partition(f"## {title}")[2].partition("\n## ")[0]
    return re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)


class Site:
    """Gateway before a server's port, a client's tunnel to it, and one without a certificate; all end with `stack`."""

    def __init__(self, folder: Path, port: int, stack: ExitStack) -> None:
        certificates, gateway, tunnel, self._kit = guide("Where client certificates are demanded")
        self.gate, self.near, self.far = folder / "gate", folder / "near", folder / "far"
        for home in (self.gate, self.near, self.far):
            home.mkdir()
        self.ports = {"gateway": free_port(), "near": free_port(), "far": free_port()}
        self._server, self._stack = port, stack
        subprocess.run(["bash", "-euc", certificates.replace("fed.example.org", HOST)], cwd=self.gate, check=True)
        for name in ("site-ca.crt", "alice-tls.crt", "alice-tls.key"):
            shutil.copy(self.gate / name, self.near)
        shutil.copy(self.gate / "site-ca.crt", self.far)
        self._open(self.gate, self.fill(gateway, 0), self.ports["gateway"])
        self._open(self.near, self.fill(tunnel, self.ports["near"]), self.ports["near"])
        without = [line for line in self.fill(tunnel, self.ports["far"]).splitlines() if "alice-tls" not in line]
        self._open(self.far, "\n".join(without), self.ports["far"])

    def fill(self, text: str, own: int) -> str:
        """Put this machine's addresses in the place of the guide's; `own` is a tunnel's port."""
        numbers = {"9443": self.ports["gateway"], "8443": self._server}
        text = text.replace("localhost:9000", f"localhost:{own}").replace("fed.example.org", HOST)
        return re.sub(r"\b(9443|8443)\b", lambda found: str(numbers[found[0]]), text)

    def lead(self, name: str, home: Path) -> None:
        """Have the kit of a client lead to the tunnel of its folder, as the guide does."""
        change = self.fill(self._kit, self.ports[home.name]).replace("alice", name)
        subprocess.run(["bash", "-euc", change], cwd=home, check=True)

    def said(self, home: Path) -> str:
        return (home / "stunnel.log").read_text()

    def _open(self, home: Path, text: str, port: int) -> None:
        """stunnel with a configuration, until it listens."""
        (home / "stunnel.conf").write_text(f"foreground = yes\npid =\n{text}")
        with (home / "stunnel.log").open("wb") as log:
            process = subprocess.Popen(["stunnel4", "stunnel.conf"], stdout=log, stderr=log, cwd=home)
        self._stack.callback(end, process)
        until = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, self.said(home)
            assert time.monotonic() < until
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)


def ask(port: int) -> bytes:
    """Say a word to whoever is behind a port, and hear the answer; nothing where the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection, suppress(ConnectionError):
        connection.sendall(b"word")
        return connection.recv(100)
    return b""


@pytest.mark.long
def test_a_client_with_a_certificate_comes_through_and_one_without_does_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as here, ExitStack() as stack:
        site = Site(tmp_path, here.getsockname()[1], stack)

        def answer() -> None:
            while True:
                try:
                    connection, _ = here.accept()
                except OSError:
                    return
                with connection, suppress(ConnectionError):
                    if connection.recv(100):
                        connection.sendall(b"answer")

        threading.Thread(target=answer, daemon=True).start()
        assert ask(site.ports["near"]) == b"answer"
        assert ask(site.ports["far"]) == b""
        # The gateway logs before it closes. The tunnel may find the connection reset before it has read the reason.
        assert "peer did not return a certificate" in site.said(site.gate)


@pytest.mark.slow
def test_a_client_with_a_certificate_takes_part_and_one_without_does_not(tmp_path: Path) -> None:
    recipe = tiny("data.clients=1", "federation.rounds=1")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    with federation(tmp_path, secure=True, host=HOST) as there, ExitStack() as stack:
        assert there.server is not None
        site = Site(tmp_path, there.port, stack)
        server = there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out))
        (data,) = split(recipe, tmp_path / "split")
        for name, home in (("alice", site.near), ("mallory", site.far)):
            keys.approve(there.server, keys.request(name, home), home)
            site.lead(name, home)
        kits = site.near / "alice.kit", site.far / "mallory.kit"
        there.start("mallory", "join", str(kits[1]), *confirmed(kits[1]), "--data", str(data))
        there.wait_for("mallory", "waiting")
        there.start("alice", "join", str(kits[0]), *confirmed(kits[0]), "--data", str(data))
        served = there.finish(server)
        assert "joining" not in there.said("mallory"), "without a certificate nobody answers"
        assert "peer did not return a certificate" in site.said(site.gate)
    local = run_here(recipe, tmp_path / "local")
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
