"""The example that writes the federation out ends where the package ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.import_file import import_file

from fedloom import load_recipe, run
from fedloom.adapters.adapter import Adapter
from fedloom.experiment.building import load_adapted_model
from fedloom.model.source import open_model
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "fedprox_by_hand.py"
ENGINE = "training.engine=reference"


def last_adapter(recipe: Recipe, finished: Run) -> Adapter:
    adapted = load_adapted_model(recipe, open_model(recipe.model.source, recipe.model.revision))
    return adapted.open(finished.folder / "adapters" / "last")


def losses_in(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^round \d+: loss ([\d.]+)", printed, re.MULTILINE)]


@pytest.mark.long
def test_the_example_as_a_reader_runs_it_gives_the_packages_adapter_to_the_bit(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, check=True, capture_output=True, text=True)
    recipe = load_recipe("tiny", [ENGINE])
    finished = run(recipe, tmp_path / "run")
    assert f"sha256 {last_adapter(recipe, finished).sha256()}\n" in done.stdout
    assert losses_in(done.stdout) == pytest.approx([record["central_loss"] for record in finished.rounds], abs=1e-4)
    assert done.stderr == ""


@pytest.mark.long
def test_it_samples_draws_dropout_and_holds_harder_as_the_package_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [ENGINE, "federation.fraction=0.7", "training.epochs=2", "training.weight_decay=0.1"]
    changes += ["training.proximal_mu=1.0", "adapter.dropout=0.2", "data.documents_per_client=8", "seed=5"]
    recipe = load_recipe("tiny", changes)
    by_hand = import_file(EXAMPLE).federate(recipe)
    cohorts = re.findall(r"trained by clients \[(.*)\]", capsys.readouterr().out)
    assert all(len(cohort.split(",")) == 2 for cohort in cohorts)
    assert by_hand.sha256() == last_adapter(recipe, run(recipe, tmp_path / "run")).sha256()


def test_the_example_stays_a_page() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip() and not line.strip().startswith("#")]) <= 80
