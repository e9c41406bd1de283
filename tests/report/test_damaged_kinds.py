"""Records that are valid JSON and hold another kind of value: a comparison says which file's key, and never crashes."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run, paths_of
from support.marks import first

from fedloom.errors import RunError
from fedloom.records import run as reading
from fedloom.report import comparison

OWN = {"losses": [2.0, 1.9], "tokens": 5, "own_loss": 1.9, "adapter_sha256": "a"}
ASKED = {"task": "quiz", "digest": "d", "measures": {"accuracy": {"value": 0.5, "low": 0.2, "high": 0.8, "of": 4}}}
MORE = {
    "personalised.json": {"round": 1, "clients": {"0": {"loss": 1.8, "global_loss": 1.9}, "1": {"error": "why"}}},
    "contributions.json": {
        "coalitions": [{"clients": [0, 1], "losses": {"central": 1.9}, "tokens": 5}],
        "leave_one_out": {"0": 0.1},
        "shapley": {"0": {"value": 0.1, "standard_error": 0.2}},
    },
}
FILES = ("resolved.json", "plan.json", "status.json", "environment.json", "baselines.json", *MORE, "rounds.jsonl",
         "clients.jsonl", "evaluation.jsonl")  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three runs of two arms, with all that a run may have on record; nothing is drawn of them."""
    monkeypatch.setattr(comparison, "write_document", lambda document, out, name: out)
    for name, more in (("run", {}), ("again", {"seed": 9}), ("other", {"training": {"proximal_mu": 0.3}})):
        baselines = {"round0": {"losses": [2.0], "tokens": 0}, "pooled": OWN, "local": {"0": OWN, "1": OWN}}
        asked = [ASKED, {**ASKED, "round": 1}]
        clients = [[2.0, 1.9], [2.1, 1.9], [2.0, 1.8]]
        make_run(tmp_path / name, [2.0, 1.9], clients=clients, baselines=baselines, evaluations=asked, **more)
        for file, told in MORE.items():
            (tmp_path / name / file).write_text(json.dumps(told), encoding="utf-8")
    return [tmp_path / name for name in ("run", "again", "other")]


def put(value: Any, path: tuple[Any, ...], odd: object) -> Any:
    changed = json.loads(json.dumps(value))
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = odd
    return changed


def compare(folders: list[Path]) -> None:
    said: list[str] = []
    comparison.write_comparison(folders, folders[0].parent, say=said.append)
    comparison.write_comparison(folders, folders[0].parent, by=["training.proximal_mu"], say=said.append)
    assert said


def damage(path: Path, odd: object) -> int:
    """Put `odd` in the place of every value, one by one; return how many were refused, all of them by name."""
    written, said = path.read_text(encoding="utf-8"), []
    lines = written.splitlines() if path.suffix == ".jsonl" else [written]
    folders = [path.parent, *(path.parent.parent / name for name in ("again", "other"))]
    for number, line in enumerate(lines[:2]):
        for where in paths_of(json.loads(line)):
            changed = [*lines[:number], json.dumps(put(json.loads(line), where, odd)), *lines[number + 1 :]]
            path.write_text("\n".join(changed) + "\n", encoding="utf-8")
            try:
                compare(folders)
            except RunError as error:
                said.append(str(error))
    assert all(str(path) in error for error in said)
    return len(said)


@pytest.mark.parametrize("odd", first([{"a": 1}, None, "x", [], [["x"]], True, -1, float("nan"), 10**400]))
@pytest.mark.parametrize("file", FILES)
def test_a_value_of_another_kind_is_named_or_not_needed(file: str, odd: object, folders: list[Path]) -> None:
    assert damage(folders[0] / file, odd) or odd in ("x", -1)


def test_a_reader_that_takes_any_kind_would_be_caught(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "find_odd", lambda record, kind: None)
    with pytest.raises((TypeError, AttributeError)):
        damage(folders[0] / "plan.json", {"a": 1})
