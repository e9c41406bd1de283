"""The embedded default: a real pretrained model and real documents, for one short round."""

from pathlib import Path

import pytest

from fedloom import load_recipe, run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "quickstart-noniid"])
def test_the_loss_of_a_real_model_falls(name: str, tmp_path: Path) -> None:
    short = ["federation.rounds=1", "data.documents_per_client=5", "data.central_holdout=6", "data.max_length=64"]
    finished = run(load_recipe(name, short), tmp_path / "run")
    before, after = (record["central_loss"] for record in finished.rounds)
    assert 2 < after < before < 5, "a pretrained model, not a random one"
    assert finished.rounds[1]["proximal_loss"] > 0
    assert finished.plan["trainable_parameters"] == 921_600
