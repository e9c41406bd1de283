"""Cost of a server by the number of its clients: reckoned as it was measured, and small at rest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.import_file import import_file

BENCH = Path(__file__).parents[2] / "bench"
cost = import_file(BENCH / "cost.py")


@pytest.mark.parametrize("clients", [10, 30, 100])
def test_the_model_is_within_a_fifth_of_what_was_measured(clients: int) -> None:
    """Of requests and bytes, which no load changes, within a tenth."""
    found = cost.errors(clients)
    assert found
    for name, error in found.items():
        assert abs(error) < (0.1 if name in ("requests", "up_bytes", "down_bytes") else 0.2), (name, error)


def test_the_page_says_what_the_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (BENCH.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    cost.main(["--clients", "10", "100", "1000", "1000000", "--adapter-bytes", str(6 * 2**20)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    assert len(rows) == 4
    for row in rows:
        assert row in page


def test_a_message_is_as_many_parts_as_flower_makes_of_it() -> None:
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    from fedloom.deployment.flower.apps import to_record
    from fedloom.host.frames import Frame

    for payload_bytes in (0, 4, cost.CHUNK_BYTES):
        record = to_record(Frame({"do": "train"}, bytes(payload_bytes)))
        assert 1 + len(get_all_nested_objects(record)) == cost.parts(payload_bytes), "the message itself is one"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_clients_at_rest_ask_seldom_and_come_through() -> None:
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")
    from fedloom.deployment.server.nginx import find_nginx

    if find_nginx() is None or not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("nginx is not installed, or processes can't be looked at through /proc")
    words = ["--clients", "4", "--rounds", "2", "--runs", "1", "--rest", "15"]
    done = subprocess.run([sys.executable, str(BENCH / "scale.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (run,), rest = found["runs"], found["rest"]
    assert run["lost"] == 0
    # Twice a second, before a look waited at the server: 90 of three clients in 15 s.
    assert rest["requests"]["pull-messages"] <= 12
    # Thirty-two and more, when an adapter was three parts and what is empty four.
    assert sum(run["all_rounds"]["requests"].values()) / (2 * 4) < 29
