"""The experiment's recipes, from a hub that has their model as a pickle, as the real one does, and their data set.

The hub is one of this machine (`support.hub_here`), the model tiny, the program a process of its own.
"""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from support.hub_here import Hub, Repository, ask_here, environment_of, files_of, make_opt, open_hub
from support.quick_runs import Said, attempt, make_recipe
from transformers import OPTForCausalLM

from fedloom import read_run
from fedloom.handover.finished_run import recipe_of
from fedloom.recipe.loading import load_recipe, shipped_recipes

MODEL, DATA = "facebook/opt-350m", "codeparrot/codeparrot-clean-valid"
RECIPES = [name for name in shipped_recipes() if load_recipe(name).model.source == MODEL]
SMALL = ("data.documents_per_client=12", "data.central_holdout=10")
QUICK = (*SMALL, "federation.rounds=1", "training.epochs=1", "model.dtype=float32")
PROGRAM = """
import json, sys
from fedloom.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["fedloom", *words]
    try:
        main()
    except SystemExit as end:
        print(f"--- {end.code or 0}", flush=True)
"""


@pytest.fixture(scope="module")
def original() -> OPTForCausalLM:
    return make_opt(256)


@pytest.fixture(scope="module")
def files(original: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made, pickle = files_of(original, tmp_path_factory.mktemp("model")), io.BytesIO()
    torch.save(original.state_dict(), pickle)
    whole = {name: content for name, content in made.items() if name.endswith(".json")}
    return {**whole, "pytorch_model.bin": pickle.getvalue()}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with open_hub() as here:
        here.add_model(MODEL, files)
        rows = [{"content": f"def f{row}(x):\n    return x + {row * row % 97}\n" * 3} for row in range(60)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        here.add_dataset(DATA, {"file-000000000001.json.gz": gzip.compress(lines.encode())})
        yield here


def converted(original: OPTForCausalLM) -> bytes:
    """What the hub's bot makes of the model: the tied head is not in it."""
    return save({name: value for name, value in original.state_dict().items() if name != "lm_head.weight"})


def carry_out(hub: Hub, home: Path, *commands: tuple[str, ...]) -> list[tuple[int, str]]:
    """Carry commands out in one process that asks this hub; the exit code of each, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env=environment_of(hub, home),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    *printed, rest = done.stdout.split("--- ")
    texts = [printed[0], *(text.partition("\n")[2] for text in printed[1:])]
    codes = [int(text.split()[0]) for text in (*printed[1:], rest)]
    return list(zip(codes, texts, strict=True))


@pytest.mark.slow
def test_it_runs_on_the_hubs_conversion_and_on_one_made_here_to_the_same_adapter(
    hub: Hub, original: OPTForCausalLM, tmp_path: Path
) -> None:
    recipe, model = "opt350m-lora-fedprox-6k", hub.models[MODEL]
    # Of nobody that is believed unasked.
    commit = model.request({"model.safetensors": converted(original)}, author="someone")
    refused, made, named = carry_out(
        hub,
        tmp_path,
        ("plan", recipe, *SMALL),
        ("run", recipe, *QUICK, f"model.weights_revision={commit}", "--out", "there"),
        ("run", recipe, *QUICK, "model.convert=true", "--out", "here"),
    )
    assert refused[0] == 2
    assert f"fedloom convert {MODEL}, or model.convert = true, reads it once" in " ".join(refused[1].split())
    assert (made[0], named[0]) == (0, 0), (made, named)
    here, there = (read_run(tmp_path / name) for name in ("here", "there"))
    assert here.plan["model_revision"] == there.plan["model_revision"] == model.references["main"][0].id
    assert here.plan["data_revision"] == hub.datasets[DATA].references["main"][0].id
    assert "unused" not in here.plan
    assert set(here.plan["model_weights"]) == {"pytorch_model.bin", "model.safetensors"}
    assert there.plan["model_weights"] == {"commit": commit}
    assert here.rounds[1]["central_loss"] == there.rounds[1]["central_loss"]
    adapters = [load_file(run.folder / "adapters/last/adapter_model.safetensors") for run in (here, there)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    for run, words in ((here, "converted here: pytorch_model.bin"), (there, f"those at commit {commit}")):
        assert words in (run.folder / "adapters/best/README.md").read_text()
        assert words in (run.folder / "report.md").read_text()


@pytest.mark.slow
def test_every_recipe_of_the_experiment_is_planned(hub: Hub, original: OPTForCausalLM, tmp_path: Path) -> None:
    assert len(RECIPES) == 6
    commit = hub.models[MODEL].request({"model.safetensors": converted(original)})
    for code, text in carry_out(hub, tmp_path, *(("plan", recipe, *SMALL) for recipe in RECIPES)):
        assert code == 0, text
        assert f"those at commit {commit}" in " ".join(text.split())


@pytest.mark.slow
def test_the_command_converts_once_for_all_runs_after_it(hub: Hub, tmp_path: Path) -> None:
    converted, again, planned, nothing = carry_out(
        hub,
        tmp_path,
        ("convert", MODEL),
        ("convert", MODEL),
        ("plan", RECIPES[0], *SMALL),
        ("convert", "nobody/nothing"),
    )
    assert (converted[0], again[0], planned[0], nothing[0]) == (0, 0, 0, 2), (converted, again, planned, nothing)
    assert "reading pytorch_model.bin, once" in converted[1]
    assert "reading" not in again[1]
    assert again[1].strip() in converted[1]
    assert "converted here: pytorch_model.bin (sha256" in " ".join(planned[1].split())
    assert "check the name and the network" in nothing[1]


@pytest.mark.long
def test_a_run_goes_on_and_is_handed_on_at_the_commits_that_it_began_with(
    hub: Hub, original: OPTForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main branch and the pull request move on while a run is stopped, and what this machine remembers is lost."""
    ask_here(hub, tmp_path, monkeypatch)
    model = hub.models[MODEL]
    commit = model.request({"model.safetensors": converted(original)})
    recipe = make_recipe(tmp_path, model={"source": MODEL}, adapter={"rank": 2, "alpha": 4, "targets": ["q_proj"]})
    assert attempt(recipe, tmp_path / "whole") == ""
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "run", "round.begins=raise@2")
    move_on(model, original)
    for path in (tmp_path / "cache").glob("converted/*"):
        path.unlink()
    said = Said()
    assert attempt(recipe, tmp_path / "run", display=said) == ""
    assert "resumed: after round 1" in said.steps
    whole, run = (read_run(tmp_path / name) for name in ("whole", "run"))
    assert run.plan["model_weights"] == whole.plan["model_weights"] == {"commit": commit}
    assert [record["central_loss"] for record in run.rounds] == [record["central_loss"] for record in whole.rounds]
    handed_on = recipe_of(tmp_path / "run").model
    assert (handed_on.revision, handed_on.weights_revision) == (run.plan["model_revision"], commit)


def move_on(model: Repository, original: OPTForCausalLM) -> None:
    """Let both branches have other weights: a pickle of nothing, and safetensors of other numbers."""
    model.commit({"pytorch_model.bin": b"another"})
    other: dict[str, Any] = {name: value + 1 for name, value in original.model.state_dict().items()}
    model.commit({"model.safetensors": save(other)}, author="SFconvertbot", reference="refs/pr/1")
