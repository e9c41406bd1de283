"""Records that are valid JSON and lack a key: whoever reads a run says which file lacks which, and nothing crashes."""

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run, paths_of
from support.marks import first

from fedloom.errors import RunError
from fedloom.monitoring.status import describe
from fedloom.records.check import check_run
from fedloom.records.run import read_run
from fedloom.report.comparison import write_comparison
from fedloom.report.run_report import write_report

FILES = ("plan.json", "status.json", "environment.json", "clients.jsonl", "evaluation.jsonl", "rounds.jsonl",
         "resolved.json")  # fmt: skip


def without(value: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(value)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return changed


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "report": lambda: write_report(folder),
        "compare": lambda: write_comparison([folder, folder.parent / "whole"], folder.parent / "comparison"),
        "status": lambda: describe(folder),
        "fsck": lambda: check_run(folder),
    }


@pytest.mark.parametrize("file", first(FILES, keep=5))
def test_a_missing_key_is_named_or_not_needed(file: str, tmp_path: Path) -> None:
    clients = [[2.0, 1.9, 1.8], [2.1, 1.9, 1.7], [2.0, 1.8, 1.9]]
    counted = {"value": 0.5, "low": 0.2, "high": 0.8, "interval": "Wilson, 95 %", "of": 4, "right": 2}
    quiz = {"task": "quiz", "kind": "choice", "digest": "d", "measures": {"accuracy": counted}, "chance": 0.5}
    asked = [quiz, {**quiz, "round": 2, "adapter_sha256": "a"}]
    make_run(tmp_path / "whole", [2.0, 1.9, 1.8], clients=clients, evaluations=asked)
    make_run(tmp_path / "run", [2.0, 1.9, 1.8], clients=clients, evaluations=asked)
    path = tmp_path / "run" / file
    written = path.read_text()
    lines = written.splitlines() if path.suffix == ".jsonl" else [written]
    said, expected = [], []
    for number, line in enumerate(lines[:2]):
        for lacking in paths_of(json.loads(line)):
            changed = [*lines[:number], json.dumps(without(json.loads(line), lacking)), *lines[number + 1 :]]
            path.write_text("\n".join(changed) + "\n")
            for reader in readers(tmp_path / "run").values():
                try:
                    reader()
                except RunError as error:
                    said.append(str(error).partition(" the record")[0])
                    place = f"{path}:{number + 1}" if len(lines) > 1 else f"{path}"
                    expected.append(f'{place}: lacks "{lacking[-1]}":')
    assert said == expected
    assert said or file not in ("rounds.jsonl", "resolved.json", "plan.json")


def test_the_line_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [2.0, 1.9])
    rounds = tmp_path / "run" / "rounds.jsonl"
    lines = [json.loads(line) for line in rounds.read_text().splitlines()]
    del lines[1]["bytes_up"]
    rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=r'rounds\.jsonl:2: lacks "bytes_up": the record is damaged; see .* fsck'):
        write_report(tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_seconds", "x"), ("round", None), ("central_loss", "x"), ("train_loss", float("nan")), ("lost", {}),
     ("clients", ["a"]), ("client_losses", {"0": "x"}), ("bytes_up", True), ("train_tokens", 1.5)],
)  # fmt: skip
def test_a_round_whose_number_is_none_is_named(key: str, value: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "run", [2.0, 1.9])
    rounds = tmp_path / "run" / "rounds.jsonl"
    lines = [json.loads(line) for line in rounds.read_text().splitlines()]
    lines[1][key] = value
    rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_run(tmp_path / "whole", [2.0, 1.9])
    reading = readers(tmp_path / "run")
    for name in ("report", "compare"):
        with pytest.raises(RunError, match=rf'rounds\.jsonl:2: "{key}(\.0)?" is not what it should be; see .* fsck'):
            reading[name]()
    reading["status"]()
    with suppress(RunError):
        reading["fsck"]()


def test_a_key_that_may_be_left_out_is_still_none(tmp_path: Path) -> None:
    assert make_run(tmp_path / "run", [2.0, None]).rounds[1].get("central_loss") is None
    assert read_run(tmp_path / "run").baselines == {}
