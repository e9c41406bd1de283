"""Benchmarks that can't be run as they were typed end in a line of usage, before anything is timed."""

import argparse
import json
from pathlib import Path

import pytest
from support.import_file import import_file

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize(
    ("program", "typed", "told"),
    [
        ("engines", "--shape tiny-opt --cases long", "--cases: long: 512 tokens are more than tiny-opt's 256"),
        ("engines", "--shape tiny-opt --cases full --length 512", "--length: full: 512 tokens"),
        ("engines", "--shape nosuch", "no shape 'nosuch' (known: opt-350m"),
        ("gpu", "tiny-opt nosuch", "no part 'nosuch' (known: machine, works"),
        ("memory", "--case nosuch 64 1", "--case: no shape 'nosuch' (known: opt-350m"),
        ("memory", "--case tiny-opt x 1", "--case: invalid literal"),
        ("privacy", "nosuch", "no part 'nosuch' (known: steps, memory, utility)"),
        ("processor", "nosuch", "no part 'nosuch' (known: masks, step, pages, prepacked)"),
        ("rows", "nosuch rows", "no shape 'nosuch' (known: opt-350m"),
        ("rows", "tiny-opt --sizes 3", "'3' is none, as 3x2 is"),
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


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.stem)
def test_a_program_has_help_in_lines_and_what_is_none_says_whose_part_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "\nif __name__ ==" in text:
        assert "open_parser(__doc__)" in text or "RawDescriptionHelpFormatter" in text
    else:
        assert ": a part of " in text.splitlines()[0]


def test_parts_are_those_that_are_named_and_none_is_no_error() -> None:
    parser = argparse.ArgumentParser()
    import_file(BENCH / "options.py").add_parts(parser, {"masks": 1, "step": 2})
    assert parser.parse_args([]).parts == []
    assert parser.parse_args(["step", "masks"]).parts == ["step", "masks"]
