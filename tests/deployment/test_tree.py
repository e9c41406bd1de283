"""Tree of servers over Flower: two branches of three clients each make the adapter of six, up to rounding."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from safetensors.torch import load_file
from support.federation_here import Federation, confirmed, split, tiny

from fedloom.deployment import keys
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.run import Run


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapters" / "last" / "adapter_model.safetensors")


def join_all(there: Federation, names: list[str], data: list[Path]) -> None:
    """Have several clients join in one process."""
    assert there.server
    kits = [keys.approve(there.server, keys.request(name, there.folder), there.folder).kit for name in names]
    held = [word for folder in data for word in ("--data", str(folder))]
    there.start("join", "join", *map(str, kits), *held, *confirmed(kits[0]))


def open_there(folder: Path, stack: ExitStack) -> Federation:
    folder.mkdir()
    return Federation(folder, stack, secure=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_branches_of_three_clients_over_flower_make_the_adapter_of_six(tmp_path: Path) -> None:
    """Over TLS, with keys of every server's own; the clients of a server are in one process."""
    shared = ("federation.max_share=1.0", "federation.rounds=2")
    recipe = tiny("data.clients=6", *shared)
    file = tmp_path / "tiny.toml"
    file.write_text(recipe_to_toml(recipe))
    data = split(recipe, tmp_path / "split")
    names = [f"client-{number}" for number in range(6)]
    with ExitStack() as stack:
        flat = open_there(tmp_path / "flat", stack)
        server = flat.serve(str(file), "--out", str(flat.out))
        join_all(flat, names, data)
        expected = flat.finish(server)
    with ExitStack() as stack:
        above = open_there(tmp_path / "above", stack)
        assert above.server
        for number, name in enumerate(("a", "b")):
            branch = open_there(tmp_path / name, stack)
            assert branch.server
            kit = keys.approve(above.server, keys.request(name, branch.folder), branch.folder).kit
            branch.start(
                "branch", "branch", str(kit), str(file), "data.clients=3", "--server", str(branch.server),
                "--port", str(branch.inner), "--first-client", str(3 * number), *confirmed(kit),
            )  # fmt: skip
            part = slice(3 * number, 3 * number + 3)
            join_all(branch, names[part], data[part])
        server = above.serve(str(file), "data.clients=2", "--out", str(above.out))
        tree = above.finish(server)
    assert tree.plan["elsewhere"] == ["a", "b"]
    assert [one["lost"] for one in tree.rounds] == [[]] * 3
    ours, theirs = weights_of(tree), weights_of(expected)
    start = load_file(tree.folder / "adapters" / "initial" / "adapter_model.safetensors")
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in start)
    off = max(float((ours[name] - theirs[name]).abs().max()) for name in start)
    assert moved > 1e-3
    assert off < 1e-3 * moved
    assert [one["client_loss"] for one in tree.rounds] == pytest.approx(
        [one["client_loss"] for one in expected.rounds], rel=1e-5
    )
