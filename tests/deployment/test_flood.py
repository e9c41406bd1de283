"""Hosts that a server does not know, in numbers: they keep no client away, and fill neither its memory nor its disk."""

import time
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.import_file import import_file

from fedloom.deployment import keys
from fedloom.deployment.processes import free_port, private_folder
from fedloom.deployment.server.nginx import find_nginx
from fedloom.deployment.server.superlink import SuperLink

BENCH = Path(__file__).parents[2] / "bench"
FLOODS = {
    "half-sent requests of one address": (5000, 1, 1000, 1),
    "half-sent requests of fifty addresses": (5000, 50, 1000, 1),
    "bodies that are too large": (60, 1, 31_000_000, 30_999_999),
    "bodies that are not": (60, 1, 2_000_000, 1_999_999),
}
"""Requests, addresses that they come from, bytes of each body, and bytes of it that are sent."""


# One after another: each takes both cores.
pytestmark = pytest.mark.xdist_group("flood")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return import_file(BENCH / "flood.py")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(find_nginx() is None, reason="nginx is not installed")
@pytest.mark.parametrize("what", FLOODS)
def test_strangers_in_numbers_keep_no_client_away_and_fill_nothing(what: str, bench: ModuleType) -> None:
    with bench.serve() as server:
        seen = bench.attack(server, bench.Honest(server), FLOODS[what], 5.0)
    assert seen.probes >= 10
    assert seen.answered == seen.probes
    assert seen.worst_seconds < 8
    assert seen.superlink_bytes < 60e6
    assert seen.disk_bytes < 5e6


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_hundred_keys_are_in_within_seconds(tmp_path: Path) -> None:
    said: list[str] = []
    security = keys.init(tmp_path / "server", "localhost", free_port())
    with private_folder() as folder:
        link = SuperLink(folder, security.port, security, lambda what, detail: said.append(f"{what} {detail}"))
        with closing(link):
            link.open()
            for number in range(100):
                keys.approve(security.folder, keys.request(f"c{number}", tmp_path / "keys"), tmp_path / "keys")
            (security.folder / "clients" / "mallory.pub").write_text(f"ecdsa-sha2-nistp384 {'A' * 182}==\n")
            started = time.monotonic()
            assert link.nodes() == []
            seconds = time.monotonic() - started
            assert len(link._taken) == 100
    assert len(said) == 1, said
    assert said[0].startswith("refused mallory's key, which Flower does not take: ")
    assert seconds < 30  # a hundred handshakes, where each takes seconds, would be minutes
