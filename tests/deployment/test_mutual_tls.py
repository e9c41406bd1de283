"""Site that demands client certificates: stunnel before the server's nginx and on the client, as the guide has it."""

import re
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import SECONDS, Federation, confirmed, end, federation, run_here, split, tiny

from fedloom.deployment import keys
from fedloom.deployment.processes import free_port
from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import recipe_to_toml

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
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


def start_tunnel(there: Federation, stack: ExitStack, name: str, text: str, folder: Path, port: int) -> None:
    """stunnel with a configuration, until it listens."""
    file = folder / f"{name}.conf"
    file.write_text(f"foreground = yes\npid =\n{text}")
    with (there.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(["stunnel4", str(file)], stdout=log, stderr=log, cwd=folder)
    stack.callback(end, process)
    until = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, there.said(name)
        assert time.monotonic() < until
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def test_a_client_with_a_certificate_takes_part_and_one_without_does_not(tmp_path: Path) -> None:
    certificates, gateway, tunnel, kit = guide("Where client certificates are demanded")
    gate, near, far = tmp_path / "gate", tmp_path / "near", tmp_path / "far"
    for folder in (gate, near, far):
        folder.mkdir()
    recipe = tiny("data.clients=1", "federation.rounds=1")
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    ports = {"gateway": free_port(), "near": free_port(), "far": free_port()}

    subprocess.run(["bash", "-euc", certificates.replace("fed.example.org", HOST)], cwd=gate, check=True)
    for name in ("site-ca.crt", "alice-tls.crt", "alice-tls.key"):
        shutil.copy(gate / name, near)
    shutil.copy(gate / "site-ca.crt", far)

    with federation(tmp_path, secure=True, host=HOST) as there, ExitStack() as stack:
        assert there.server is not None

        def fill(text: str, own: int) -> str:
            numbers = {"9443": ports["gateway"], "8443": there.port}
            text = text.replace("localhost:9000", f"localhost:{own}").replace("fed.example.org", HOST)
            return re.sub(r"\b(9443|8443)\b", lambda found: str(numbers[found[0]]), text)

        start_tunnel(there, stack, "gateway", fill(gateway, 0), gate, ports["gateway"])
        start_tunnel(there, stack, "tunnel", fill(tunnel, ports["near"]), near, ports["near"])
        without = "\n".join(line for line in fill(tunnel, ports["far"]).splitlines() if "alice-tls" not in line)
        start_tunnel(there, stack, "without", without, far, ports["far"])

        server = there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out))
        (data,) = split(recipe, tmp_path / "split")
        for folder, own, name in ((near, "near", "alice"), (far, "far", "mallory")):
            keys.approve(there.server, keys.request(name, folder), folder)
            change = fill(kit, ports[own]).replace("alice", name)
            subprocess.run(["bash", "-euc", change], cwd=folder, check=True)
        kits = near / "alice.kit", far / "mallory.kit"
        there.start("mallory", "join", str(kits[1]), *confirmed(kits[1]), "--data", str(data))
        there.wait_for("mallory", "waiting")
        there.start("alice", "join", str(kits[0]), *confirmed(kits[0]), "--data", str(data))
        served = there.finish(server)
        assert "joining" not in there.said("mallory"), "without a certificate nobody answers"
        assert "certificate required" in there.said("without")
    local = run_here(recipe, tmp_path / "local")
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
