"""The same recipe on one machine and over Flower: the same adapter and the same records, but for times."""

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from federation_here import federation, run_here, split, timeless, tiny

from fedloom.recipe import recipe_to_toml


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("clients", "rounds"), [(2, 1), pytest.param(3, 3, marks=pytest.mark.slow, id="the whole of tiny")]
)
def test_clients_over_flower_and_tls_make_the_adapter_of_a_local_run(clients: int, rounds: int, tmp_path: Path) -> None:
    recipe = tiny(f"data.clients={clients}", f"federation.rounds={rounds}")
    local = run_here(recipe, tmp_path / "local")
    file = tmp_path / "tiny.toml"
    file.write_text(recipe_to_toml(recipe))
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(recipe, tmp_path / "split")):
            there.join(f"client-{client}", data)
        server = there.serve(str(file), "--out", str(there.out))
        served = there.finish(server)
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
    assert timeless(served.rounds) == timeless(local.rounds)
    key = lambda record: (record["round"], record["client"])  # noqa: E731
    assert sorted(timeless(served.clients), key=key) == sorted(timeless(local.clients), key=key)
    assert (there.out / "report.html").is_file()
