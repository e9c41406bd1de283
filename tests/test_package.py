"""What a user installs, and what the documents say."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.marks import is_installed

import fedloom
from fedloom.federation.aggregation import describe_strategies
from fedloom.recipe.loading import describe_keys, load_recipe, shipped_recipes
from fedloom.recipe.methods import describe_methods

ROOT = Path(__file__).parent.parent


def test_the_strategies_in_the_documents_are_those_of_the_code() -> None:
    assert describe_strategies() in (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8"), "make pages"


def test_the_methods_in_the_documents_are_those_of_the_code() -> None:
    assert describe_methods() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), "make pages"


@pytest.mark.long
def test_the_wheel_runs_from_elsewhere(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", ROOT], check=True
    )
    (wheel,) = (tmp_path / "dist").glob("fedloom-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"fedloom/recipe/shipped/{name}.toml" for name in shipped_recipes()} <= set(held)
    assert {"fedloom/recipe/shipped/recipe.schema.json", "fedloom/py.typed"} <= set(held)
    assert any(name.endswith("licenses/LICENSE") for name in held)
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def fedloom(*arguments: str) -> str:
        return subprocess.run(
            [tmp_path / "site" / "bin" / "fedloom", *arguments],
            cwd=elsewhere, env=environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    found = subprocess.run(
        [sys.executable, "-c", "import fedloom; print(fedloom.__file__)"],
        cwd=elsewhere, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert found.startswith(str(tmp_path / "site"))
    assert "quickstart" in fedloom("recipes")
    assert "best adapter" in fedloom("run", "tiny", "--out", "run")
    assert (elsewhere / "run" / "adapters" / "best" / "adapter_model.safetensors").is_file()


def test_every_dependency_is_pinned_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line).groups() for line in lines)
    assert len(pins) == len(lines)
    pinned = {name.lower().replace("_", "-") for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["oracles"]]
    assert {re.match(r"[A-Za-z0-9-]+", line).group() for line in wanted} <= pinned


def hashed_pins() -> dict[str, dict[str, str]]:
    """Read `requirements/`: by file, the version of each package, all of whose lines are a version or a hash."""
    files = {}
    for file in (ROOT / "requirements").glob("*.txt"):
        blocks = re.split(r"\n(?=\S)", file.read_text().rstrip("\n"))[1:]  # the first is its head
        pins = [re.fullmatch(r"(\S+)==(\S+)( ;.+?)?( \\\n    --hash=sha256:[0-9a-f]{64})+", block) for block in blocks]
        assert all(pins), file.name
        files[file.stem] = {pin[1].replace(".", "-"): pin[2] for pin in pins}
        assert len(files[file.stem]) == len(blocks)
    return files


def test_every_pin_has_hashes_in_one_file() -> None:
    """Another version, or one whose files may be anything, would be installed beside what was tested."""
    files = hashed_pins()
    files.pop("cuda")  # torch's own choice
    hashed = [pin for pins in files.values() for pin in pins.items()]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [(re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(), line.partition("==")[2]) for line in lines]
    assert sorted(hashed) == sorted(pins), "scripts/write_hashes.py"


def test_nothing_is_installed_without_a_hash() -> None:
    """By whoever builds or checks: a registry is asked for nothing but files that were seen before."""
    for name in ("Makefile", "scripts/install"):
        text = (ROOT / name).read_text()
        for line in text.splitlines():
            if re.search(r"pip install|\$pip |\$hashed ", line) and "hashed=" not in line:
                allowed = ("--require-hashes", "$hashed ", "--no-build-isolation --editable .", 'pip="')
                assert any(words in line for words in allowed), f"{name}: {line}"
    for file in (ROOT / ".github").rglob("*.yml"):
        for action in re.findall(r"uses: (\S+)", file.read_text()):
            assert re.fullmatch(r"[\w/.-]+@[0-9a-f]{40}", action), f"{file.name}: {action}"
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"pip install\S* '?fedloom", page.read_text()), f"{page.name}: a name anybody may have"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_commit_is_built_to_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx_py", reason="cyclonedx-bom is not installed: make install")
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a checkout")
    sums = []
    for number, (umask, zone) in enumerate((("022", "UTC"), ("077", "Asia/Tokyo"))):
        folder = tmp_path / str(number) / "dist"
        command = f'umask {umask} && exec "{ROOT}/scripts/dist" "{sys.executable}" "{folder}"'
        subprocess.run(["sh", "-c", command], env={**os.environ, "TZ": zone}, check=True)
        sums.append((folder / "SHA256SUMS").read_text())
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
        time.sleep(1.1)  # what is written with the time of its making would differ
    assert sums[0] == sums[1]
    names = [line.split()[1] for line in sums[0].splitlines()]
    assert sorted(names) == sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    assert [name for name in names if name.endswith((".whl", ".tar.gz"))]
    told = json.loads((folder / "sbom.cdx.json").read_text())
    assert told["bomFormat"] == "CycloneDX"
    assert told["metadata"]["component"]["version"] == fedloom.__version__
    listed = {
        (part["name"].lower().replace("_", "-").replace(".", "-"), part["version"]) for part in told["components"]
    }
    files = hashed_pins()
    assert listed == {*files["torch"].items(), *files["deploy"].items()}
    assert all(any(reference.get("hashes") for reference in part["externalReferences"]) for part in told["components"])


def test_the_keys_in_the_documents_are_those_of_the_code() -> None:
    assert describe_keys() in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"), (
        "docs/recipe.md is out of date: make pages"
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_under_its_name_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_experiments_recipes_are_the_experiment() -> None:
    whole, half = load_recipe("opt350m-lora-fedprox-6k"), load_recipe("opt350m-lora-fedprox-3k")
    as_run = load_recipe("opt350m-lora-fedprox-6k-as-run")
    assert (whole.adapter.rank, whole.adapter.alpha, whole.adapter.dropout) == (16, 32, 0.5)
    assert (whole.data.clients, whole.data.documents_per_client, whole.data.central_holdout) == (3, 2000, 3000)
    assert (whole.training.epochs, whole.training.learning_rate, whole.training.proximal_mu) == (3, 1e-5, 0.1)
    assert (whole.federation.rounds, half.federation.rounds, half.data.documents_per_client) == (20, 10, 1000)
    full, dora = load_recipe("opt350m-fedprox-full-6k"), load_recipe("opt350m-dora-fedprox-6k")
    for other in (full, dora):
        assert (other.data, other.training, other.model.source) == (whole.data, whole.training, whole.model.source)
    assert (full.adapter.method, full.model.dtype, full.federation.rounds) == ("full", "float32", 10)
    assert dora.adapter == whole.adapter.model_copy(update={"dora": True})
    assert as_run.data.pad_in_loss
    assert (as_run.training.proximal_mu, as_run.adapter.dropout) == (0.0, 0.05)
    assert (as_run.training.schedule, as_run.training.schedule_scope) == ("linear", "round")
    assert as_run.training.optimizer_state == "keep"


def test_what_the_readme_shows_is_there(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme) + re.findall(r"`((?:src|docs|tests)/[\w./]+)`", readme):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"fedloom (?:run|plan) ([a-z][\w-]*)(?!\S)", readme):
        assert name in shipped_recipes(), name
    (recipe,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "mine.toml").write_text(recipe, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.toml", ["training.proximal_mu=0.01"]).training.proximal_mu == 0.01
    catalogue = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for name, text in shipped_recipes().items():
        assert f"| `{name}` |" in catalogue
        assert load_recipe(name).name in text
    targets = set(re.findall(r"^make (\w+)", readme, re.MULTILINE))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("arrives", [True, False])
def test_oracles_that_arrive_in_part_are_none(arrives: bool, tmp_path: Path) -> None:
    oracles, pip = tmp_path / "oracles", tmp_path / "venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.write_text(f"#!/bin/sh\nmkdir -p {oracles}/bitsandbytes\nexit {int(not arrives)}\n", encoding="utf-8")
    pip.chmod(0o755)
    (tmp_path / "venv" / "installed").touch()
    # As if by hand: a make within another one, that of the tests, has more to say.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        ["make", f"VENV={tmp_path / 'venv'}", f"ORACLES={oracles}", oracles / "installed"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=alone,
    )  # fmt: skip
    assert oracles.exists() == ("skipped" not in made.stdout.splitlines()[-1]) == arrives


def test_a_folder_without_a_package_is_no_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_made").mkdir()
    assert not is_installed("half_made")
    assert not is_installed("never_made")
    assert is_installed("pytest")
