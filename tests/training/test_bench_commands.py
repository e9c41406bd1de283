"""Benchmarks that can't be run as they were typed end in a line of usage, before anything is timed."""

import json
from pathlib import Path

import pytest
from support.import_file import import_file

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    ("program", "typed", "told"),
    [
        ("engines", "--shape tiny-opt", "--cases: long: 512 tokens are more than tiny-opt's 256; leave long out"),
        ("engines", "--shape tiny-opt --cases full --length 512", "--length: full: 512 tokens"),
        ("engines", "--shape nosuch", 'no shape "nosuch"; known: opt-350m'),
        ("experiment", "judge nosuch", "nosuch: no such run directory"),
        ("experiment", "documents made-up", "made-up: name a file that ends in .jsonl"),
        ("experiment", "documents nosuch/made-up.jsonl", "in a folder that is there"),
    ],
)
def test_what_a_benchmark_can_not_do_is_told_at_once(
    program: str,
    typed: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [program, *typed.split()])
    with pytest.raises(SystemExit) as ended:
        import_file(BENCH / f"{program}.py").main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_documents_and_a_run_that_still_prepares_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = import_file(BENCH / "experiment.py")
    monkeypatch.setattr("sys.argv", ["experiment", "documents", str(tmp_path / "made-up.jsonl"), "3"])
    experiment.main()
    assert len([json.loads(line) for line in (tmp_path / "made-up.jsonl").read_text().splitlines()]) == 3
    monkeypatch.setattr("sys.argv", ["experiment", "judge", str(tmp_path)])
    experiment.main()
    assert json.loads(capsys.readouterr().out)["state"] == "still prepares"
