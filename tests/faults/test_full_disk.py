"""A disk that is full, or may not be written to: one line, what was complete is kept, and the run goes on after it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.marks import first
from support.quick_runs import attempt, make_recipe, result_of

from fedloom.errors import RunError
from fedloom.experiment import recorder, watchers
from fedloom.experiment.run import run
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.trackers import TRACKERS, Tracker
from fedloom.records import writer
from fedloom.records.run import read_run
from fedloom.records.state import committed, read_state
from fedloom.report import run_report

EVERY = int(os.environ.get("FEDLOOM_EVERY_NTH_WRITE", "8"))
"""Writes that fail in a test run: each of so many, and the last ones; 1 is all of them."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    """A recipe, what it comes to, and its run directory."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = make_recipe(folder, federation={"rounds": 2}, baselines=["pooled"])
    assert not attempt(recipe, folder / "run")
    return recipe, result_of(folder / "run"), folder / "run"


def assert_kept(folder: Path) -> None:
    """What was committed can be read, and nothing unfinished takes room."""
    states = [read_state(path) for path in committed(folder)]
    if states:
        assert (folder / "adapters" / "best" / "adapter_model.safetensors").stat().st_size > 0
    assert not [*folder.glob("state/.*")]
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.long
def test_whatever_can_not_be_written_it_goes_on_to_the_same_result(whole: Any, tmp_path: Path) -> None:
    recipe, result, _ = whole
    number, failed, said = 1, 0, set()
    while True:
        folder = tmp_path / str(number)
        error = attempt(recipe, folder, f"file.write=enospc@{number}")
        if not error:
            break
        failed += 1
        assert "can't be written (No space left on device); make room for it, and " in error
        assert len(error.splitlines()) == 1
        said.add(Path(error.split(": ")[0]).name)
        if folder.exists():
            assert_kept(folder)
        assert not attempt(recipe, folder)
        assert result_of(folder) == result, f"write {number}"
        assert (folder / "report.html").exists()
        number += EVERY if number < 60 else 1
    print(f"{failed} writes failed, {len(said)} kinds of file, all went on to the same result")
    assert failed >= 40 // EVERY


@pytest.mark.parametrize(
    "name",
    first(["adapter.between", "state.manifest", "adapter.written", "adapter.renamed", "state.file", "state.flushed"]),
)
def test_a_disk_that_fills_inside_a_commit_leaves_the_one_before(name: str, whole: Any, tmp_path: Path) -> None:
    recipe, result, _ = whole
    folder = tmp_path / "run"
    assert "can't be written (No space left on device)" in attempt(
        recipe, folder, f"{name}=enospc@{4 if name.startswith('adapter') else 3}"
    )
    assert (folder / "adapters" / "best" / "adapter_model.safetensors").exists()
    assert (folder / "adapters" / "last" / "adapter_model.safetensors").exists()
    assert_kept(folder)
    assert not attempt(recipe, folder)
    assert result_of(folder) == result


def mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    folder = tmp_path / "run"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.long
def test_a_real_disk_that_is_full(whole: Any, disk: Path) -> None:
    recipe, result, finished = whole
    used = sum(4096 * (1 + path.stat().st_size // 4096) for path in finished.rglob("*") if path.is_file())
    said = []
    for share in (0.05, 0.3, 0.6, 0.9):
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        mount("-o", f"remount,size={int(used * share) // 4096 * 4}k", str(disk))
        said.append(attempt(recipe, disk))
        assert "can't be written (No space left on device)" in said[-1]
        assert_kept(disk)
        mount("-o", "remount,size=64m", str(disk))
        assert not attempt(recipe, disk)
        assert result_of(disk) == result, f"a disk of {share} of the room"
    files = sorted({Path(error.split(": ")[0]).name for error in said})
    print(f"full at {len(said)} sizes, in {', '.join(files)}")
    assert len(files) > 2


def test_a_run_directory_that_may_not_be_written_to(whole: Any, disk: Path) -> None:
    recipe, result, _ = whole
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, disk, "round.begins=raise@2")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    mount("-o", "remount,ro", str(disk))
    assert "can't be written (Read-only file system); see that it may be written" in attempt(recipe, disk)
    with pytest.raises(RunError, match=r"can't make the run directory: .* is no folder that can be written to"):
        run(recipe, disk / "new" / "run", Observer())
    mount("-o", "remount,rw", str(disk))
    assert before == {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert not attempt(recipe, disk)
    assert result_of(disk) == result


@pytest.mark.parametrize("error", first([OSError(28, "No space left on device"), RuntimeError("a bug in the report")]))
def test_a_report_that_fails_does_not_lose_the_run(
    error: Exception, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, result, _ = whole

    def fail(*_: object) -> str:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(run_report, "to_html" if isinstance(error, RuntimeError) else "to_markdown", fail)
        with pytest.raises(type(error)):
            run(recipe, tmp_path / "run", Observer())
    assert read_run(tmp_path / "run").status["state"] == "done"
    assert result_of(tmp_path / "run") == result
    run(recipe, tmp_path / "run", Observer(), resume=True)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_report_between_rounds_that_can_not_be_written_is_said_and_the_run_goes_on(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, result, _ = whole
    said: list[str] = []

    class Said(Observer):
        def show_step(self, what: str, detail: str) -> None:
            said.append(f"{what}: {detail}")

    def fail(folder: Path) -> None:
        raise RunError("can't be written (No space left on device)", where=str(folder))

    monkeypatch.setattr(watchers, "write_report", fail)
    run(recipe, tmp_path / "run", Said(), watch=True)
    assert result_of(tmp_path / "run") == result
    assert sum(line.startswith("report: ") for line in said) == 3


def test_documents_and_trackers_that_can_not_be_written_say_so(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, finished = whole
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "plots")
    (tmp_path / "run" / "plots").write_text("in the way")
    with pytest.raises(RunError, match=r"plots: can't be written \(File exists\); .*the run itself is not affected"):
        run_report.write_report(tmp_path / "run")

    def refuse(folder: Path, recipe: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setitem(TRACKERS, "tensorboard", refuse)
    says = r"--log: tensorboard can't be told anything \(Read-only file system\)"
    with pytest.raises(RunError, match=says):
        Tracker("tensorboard", {}).show_folder(tmp_path)


def test_a_writer_that_lets_the_error_through_would_be_caught(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: it writes where the file is to be, and knows of no full disk."""
    recipe, _, _ = whole

    def write_text(path: Path, text: str, mend: str = "") -> None:
        if path.name == "report.md":
            path.write_text(text[: len(text) // 2])
            raise OSError(28, "No space left on device")
        path.write_text(text)

    for module in (writer, run_report):
        monkeypatch.setattr(module, "write_text", write_text)
    with pytest.raises(OSError, match="No space") as raised:
        run(recipe, tmp_path / "run", Observer())
    assert not isinstance(raised.value, RunError), "which a terminal would show as a bug"
    assert recorder.write_report
