"""The study of the published experiment: its runs are those that it names, its verdicts follow from its records."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from support.import_file import import_file
from support.marks import first
from support.tiny import make_recipe

from fedloom.errors import RunError
from fedloom.experiment.combinations import expand
from fedloom.experiment.sweep import sweep
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import recipe_to_toml
from fedloom.records.run import Run, read_run

STUDY = Path(__file__).parent.parent.parent / "studies" / "experiment"
sys.path.insert(0, str(STUDY))  # its files import one another
NAMES = ("base_model", "claims", "page", "records", "rescoring", "study", "sweeps")
base_model, claims, page, records, rescoring, study, sweeps = (import_file(STUDY / f"{name}.py") for name in NAMES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a sweep, which is its only one."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.toml").write_text(recipe_to_toml(make_recipe()), encoding="utf-8")
    return next(sweep(folder / "tiny.toml", ["seed=1"], folder / "alone", Observer()).glob("seed=*"))


def made_run(seed: int, losses: list[float]) -> Run:
    rounds = [{"round": number, "central_loss": loss} for number, loss in enumerate(losses)]
    return Run(Path("x"), {"seed": seed}, {}, {}, {}, rounds, [], {}, {}, {})


def test_the_page_is_what_the_records_say() -> None:
    assert page.write_page(check=True) == 0


def test_a_page_that_says_something_else_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "render", lambda plots: "another")
    assert page.write_page(check=True) == 1


@pytest.mark.parametrize("tier", first(["nano", "small", "card", "full"]))
def test_every_sweep_is_one_that_fedloom_can_run(tier: str, tmp_path: Path) -> None:
    for folder in ("untrained", "base", "read", "unread", "all"):
        (tmp_path / folder).mkdir()
    names: set[tuple[Any, ...]] = set()
    for name, text in study.recipes_of(tier).items():
        path = tmp_path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        for combination in expand(path, ()):
            assert combination.recipe.seed in sweeps.SEEDS[tier]
            settings = json.dumps(combination.recipe.model_dump(mode="json"), sort_keys=True)
            assert settings not in names, f"{name}: {combination.name} stands in two sweeps"
            names.add(settings)
    assert len(names) > 1


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([-0.1, -0.11, -0.09], "confirmed"),
        ([0.1, 0.11, 0.09], "refuted"),
        ([0.001, -0.001, 0.0005], "refuted"),
        ([0.1, -0.1, 0.05], "undecided"),
        ([-0.1], "undecided"),
    ],
)
def test_a_verdict_follows_from_the_differences(differences: list[float], verdict: str) -> None:
    ours = [made_run(seed, [3.0, 2.0 + difference]) for seed, difference in enumerate(differences)]
    theirs = [made_run(seed, [3.0, 2.0]) for seed in range(len(differences))]
    assert claims.judge(claims.pair(ours, theirs, claims.loss_after(-1))) == verdict


def test_runs_of_other_seeds_are_no_pairs() -> None:
    with pytest.raises(ValueError, match=r"seeds \[1\] and \[2\] make no pairs"):
        claims.pair([made_run(1, [1.0])], [made_run(2, [1.0])], claims.loss_after(-1))


def test_a_seed_that_is_on_record_twice_is_no_pair() -> None:
    with pytest.raises(ValueError, match=r"seeds \[1, 1\] and \[1\] make no pairs"):
        claims.pair([made_run(1, [1.0]), made_run(1, [2.0])], [made_run(1, [1.0])], claims.loss_after(-1))


def test_what_never_rose_could_not_be_made_steadier() -> None:
    falls, rises = ([made_run(seed, losses) for seed in (1, 2)] for losses in ([3.0, 2.0, 1.0], [3.0, 1.0, 2.0]))
    assert claims.judge_steadier(falls, falls) == "undecided"
    assert claims.judge_steadier(falls, rises) == "confirmed"
    assert claims.judge_steadier(rises, rises) == "refuted"


def test_the_readme_counts_runs_and_verdicts_as_they_are() -> None:
    verdicts = [one.verdict for one in claims.judge_claims(records.Tier("nano"), records.read_plans())]
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    counts = ", ".join(f"{words[verdicts.count(one)]} {one}" for one in ("refuted", "undecided"))
    runs = len(records.Tier("nano").runs)
    confirmed = f"{words[verdicts.count('confirmed')]} are confirmed"
    said = f"in {runs} runs: of {words[len(verdicts)]} claims {confirmed}, {counts}."
    assert said in " ".join((STUDY.parent.parent / "README.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: "", 0),
        (lambda text: text.splitlines()[0], 1),
        (lambda text: text[: text.rindex("}")], 2),
        (lambda text: text.replace('"central_loss": [', '"central_loss": [NaN, ', 1), 1),
        (lambda text: text.replace('"central_loss": [', '"central_loss": [1.0, ', 1), 2),
        (lambda text: text.replace('"central_loss": [', '"central_loss": ["x", ', 1), 2),
        (lambda text: text + "[]\n", 3),
        (lambda text: text + "{}\n{", 4),
    ],
)
def test_a_damaged_record_is_named_by_its_line(damage: Any, line: int, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "nano" / "proximal.jsonl"
    records.keep(finished.parent, path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        records.Tier("nano", tmp_path)
    assert str(caught.value).startswith(f"{path}{f':{line}' if line > 1 else ''}")


def test_a_damaged_record_ends_the_command_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def write_page(*, check: bool) -> int:
        raise RunError("the record is damaged", where="proximal.jsonl:2")

    monkeypatch.setattr(study, "write_page", write_page)
    monkeypatch.setattr(sys, "argv", ["study.py", "page"])
    assert study.main() == 2
    assert capsys.readouterr().err == "error: proximal.jsonl:2: the record is damaged\n"


def test_a_page_that_can_not_be_written_whole_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "study.md")
    monkeypatch.setattr(page, "PLOTS", tmp_path / "plots")
    (tmp_path / "study.md").write_text("before", encoding="utf-8")
    monkeypatch.setattr(page, "render", lambda plots: "half\ud800")  # which no file of UTF-8 can hold
    with pytest.raises(UnicodeEncodeError):
        page.write_page()
    assert (tmp_path / "study.md").read_text(encoding="utf-8") == "before"


def test_overfitting_is_undecided_where_seeds_disagree() -> None:
    falls, rises = made_run(1, [3.0, 2.0, 1.0]), made_run(2, [3.0, 1.0, 1.1, 1.2])
    assert claims.judge_onsets([falls, falls], overfits=False) == "confirmed"
    assert claims.judge_onsets([rises, rises], overfits=False) == "refuted"
    assert claims.judge_onsets([rises, rises], overfits=True) == "confirmed"
    assert claims.judge_onsets([falls, rises], overfits=True) == "undecided"


@pytest.mark.long
def test_a_run_that_counts_padding_is_scored_over_real_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    for number in range(60):
        lines = "".join(f"{name} = {number**3}\n" for name in "abcdefghi")
        (tmp_path / "long" / f"{number}.py").write_text(lines, encoding="utf-8")
    base_model.cut_documents(tmp_path / "long", tmp_path / "short")
    assert len((tmp_path / "short" / "7.py").read_text(encoding="utf-8").splitlines()) == base_model.FIRST_LINES
    data = {"source": str(tmp_path / "short"), "max_length": 96, "duplicates": "report"}
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(make_recipe(data=data)), encoding="utf-8")
    folder = sweep(tmp_path / "tiny.toml", ["data.pad_in_loss=false,true"], tmp_path / "padding", Observer())
    records.keep(folder, tmp_path / "nano" / "padding.jsonl")
    plain, counted = records.Tier("nano", tmp_path).runs
    assert claims.padding_share(counted) > 0.1
    assert claims.real_loss(plain) == claims.loss_after(-1)(plain)
    assert abs(claims.real_loss(counted) - claims.real_loss(plain)) < 0.1 * claims.real_loss(plain)
    assert claims.real_loss(counted) != claims.loss_after(-1)(counted)
    # What it takes for an honest run's loss is what that run reports.
    assert rescoring.score_real_tokens(folder / plain.folder.name) == pytest.approx(claims.real_loss(plain), rel=1e-5)


def test_what_is_kept_of_a_run_gives_the_same_figures(finished: Path, tmp_path: Path) -> None:
    records.keep(finished.parent, tmp_path / "nano" / "proximal.jsonl")
    (kept, *others) = records.Tier("nano", tmp_path).runs
    run = read_run(finished)
    assert not others
    assert claims.drift(kept) == pytest.approx(claims.drift(run), rel=1e-6)
    assert claims.best_loss(kept) == pytest.approx(claims.best_loss(run), rel=1e-6)
    assert kept.recipe["training"]["proximal_mu"] == run.recipe["training"]["proximal_mu"]
    assert kept.plan["payload_bytes"] == run.plan["payload_bytes"]
    text = (tmp_path / "nano" / "proximal.jsonl").read_text(encoding="utf-8")
    assert str(finished.parent.parent) not in text
    assert math.isfinite(claims.all_seconds([kept]))
