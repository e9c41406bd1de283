"""The same recipe on one machine and over Flower: the same adapter and the same records, but for times."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.federation_here import federation, run_here, split, timeless, tiny

from fedloom.recipe.loading import recipe_to_toml


@pytest.mark.timeout(900)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_batched_engine_makes_the_same_over_flower_within_rounding(tmp_path: Path) -> None:
    """Held to both engines of a local run: one client at a time is another order of sums than all at once."""
    overrides = ("data.clients=2", "federation.rounds=2", "training.optimizer=sgd", "training.learning_rate=0.1")
    batched = tiny(*overrides, "training.engine=batched")
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(batched, tmp_path / "split")):
            there.join(f"client-{client}", data)
        (tmp_path / "tiny.toml").write_text(recipe_to_toml(batched))
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
    last = read_weights(there.out)
    start = load_file(there.out / "adapters" / "initial" / "adapter_model.safetensors")
    for engine in ("batched", "reference"):
        local = run_here(tiny(*overrides, f"training.engine={engine}"), tmp_path / engine)
        for name, expected in read_weights(tmp_path / engine).items():
            assert torch.allclose(last[name], expected, rtol=1e-3, atol=1e-5), (engine, name)
        assert [record["client_loss"] for record in served.rounds] == pytest.approx(
            [record["client_loss"] for record in local.rounds], rel=1e-4
        )
    assert any(not torch.allclose(last[name], start[name], atol=1e-3) for name in start), "it learned"


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapters" / "last" / "adapter_model.safetensors")
