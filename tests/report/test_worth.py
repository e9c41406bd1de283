"""Was it worth it: a row and a sentence a client, from what is on record and from nothing else."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run

from fedloom.errors import RunError
from fedloom.records.run import Run, read_run
from fedloom.report.comparison import write_comparison
from fedloom.report.run_report import write_report
from fedloom.report.worth_section import Worth, likelier, worth_of


def made(folder: Path, **files: Any) -> Run:
    run = make_run(folder, [3.0, 2.0, 1.5], clients=[[3.0, 2.0, 1.6], [3.1, 2.2, 1.4], [2.9, 1.9, 1.5]])
    for name, content in files.items():
        (run.folder / f"{name}.json").write_text(json.dumps(content))
    return read_run(run.folder)


ALONE = {"local": {str(client): {"losses": [3.0, 2.2, 2.0], "tokens": 9, "own_loss": loss}
                   for client, loss in enumerate([1.8, 1.3, 1.5])}}  # fmt: skip
OWN = {"round": 2, "clients": {"0": {"global_loss": 1.6, "loss": 1.2}, "1": {"error": "the loss is nan"}}}


def test_a_run_that_was_asked_for_nothing_has_no_such_section(tmp_path: Path) -> None:
    run = made(tmp_path / "run", baselines={"round0": {"losses": [3.0], "tokens": 0}})
    assert worth_of(run) == {}
    assert "Was it worth it?" not in write_report(run.folder).read_text()


def test_losses_are_those_of_the_rounds_that_they_are_said_to_be(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", baselines=ALONE).folder
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_text(lines[0] + lines[2])
    assert worth_of(read_run(folder))[0].together == 1.6
    (folder / "rounds.jsonl").write_text(lines[1] + lines[2])
    with pytest.raises(RunError, match=r"rounds.jsonl lacks round 0; see what else is: fedloom fsck"):
        write_report(folder)


def test_a_row_has_what_is_on_record_of_its_client(tmp_path: Path) -> None:
    run = made(tmp_path / "run", baselines=ALONE, personalised=OWN)
    worth = worth_of(run)
    assert (worth[0].before, worth[0].alone, worth[0].together, worth[0].personalised) == (3.0, 1.8, 1.6, 1.2)
    assert (worth[0].gain, worth[0].went_on) == (pytest.approx(0.2), pytest.approx(0.4))
    assert (worth[1].together, worth[1].personalised) == (1.4, None)
    assert worth[1].gain == pytest.approx(-0.1)
    write_report(run.folder)
    text = (run.folder / "report.md").read_text()
    assert "| client 0 | 3.0000 | 1.8000 | 1.6000 | 1.2000 | +0.2000 |" in text
    assert "| client 1 | 3.1000 | 1.3000 | 1.4000 |  | -0.1000 |" in text
    assert (
        "Judged by each client's own hold-out (2 documents), of 3 clients 1 has a lower loss by taking part than alone,"
        " 1 a higher one, with 1 the two are alike. When they had gone on by themselves, of 1 client 1 has a lower loss"
        " than before. Fewer than 20 documents, as each of them has, are too few to tell that from chance." in text
    )
    assert "beats the one that it trained alone. What going on by itself brought is not in it" in text
    assert "Alone, a client trained as long as it did in the federation. By itself afterwards, it trained" in text
    assert "own texts is 22.1 % more likely than with the one that it trained alone; when it has gone on by" in text
    assert "when it has gone on by itself, it is 49.2 % more likely than before." in text
    assert "own texts is 9.5 % less likely than with the one that it trained alone." in text
    assert "Client 2: with the shared adapter, the right next word of its own texts is as likely as with" in text


def test_only_what_the_table_and_the_sentences_tell_apart_is_better_or_worse(tmp_path: Path) -> None:
    alone = {str(client): {"own_loss": loss} for client, loss in enumerate([1.600035, 1.3997, 1.51])}
    run = made(tmp_path / "run", baselines={"local": alone})
    text = write_report(run.folder).with_suffix(".md").read_text()
    assert "| client 0 | 3.0000 | 1.6000 | 1.6000 | +0.0000 |" in text
    assert text.count("is as likely as with the one that it trained alone") == 2
    assert "of 3 clients 1 has a lower loss by taking part than alone, with 2 the two are alike." in text
    assert "a higher one" not in text


def test_each_verdict_names_the_hold_out_that_it_is_by(tmp_path: Path) -> None:
    alone = {str(client): {"losses": [3.0, 1.4], "tokens": 9, "own_loss": 2.0} for client in range(3)}
    run = made(tmp_path / "run", baselines={"local": alone})
    text = write_report(run.folder).with_suffix(".md").read_text()
    assert "own hold-out (2 documents), of 3 clients 3 have a lower loss by taking part than alone." in text
    assert (
        "Judged by the central hold-out (24 documents), federation did not help: client 0 alone is 0.1000 nats a token"
        in text
    )
    assert "are judged alike, by the central hold-out. A baseline trains without the proximal term, for 1 round" in text


@pytest.mark.parametrize(
    ("held", "each", "few"),
    [
        ((20, 24, 90), "20 to 90 documents", ""),
        ((2, 24, 90), "2 to 90 documents", " Fewer than 20 documents, as 1 of them has, are too few to tell"),
        ((2, 3, 90), "2 to 90 documents", " Fewer than 20 documents, as 2 of them have, are too few to tell"),
    ],
)
def test_few_documents_are_too_few_to_tell(held: Sequence[int], each: str, few: str, tmp_path: Path) -> None:
    clients = [{"train_documents": 10, "holdout_documents": number} for number in held]
    run = make_run(tmp_path / "run", [3.0, 2.0], clients=[[3.0, 2.0]] * 3, plan={"clients": clients}, baselines=ALONE)
    text = write_report(run.folder).with_suffix(".md").read_text()
    assert (
        f"own hold-out ({each}), of 3 clients 0 have a lower loss by taking part than alone, 3 a higher one.{few}"
        in text
    )
    assert bool(few) == ("too few" in text)


def test_without_baselines_there_is_no_verdict(tmp_path: Path) -> None:
    run = made(tmp_path / "run", personalised=OWN)
    write_report(run.folder)
    text = (run.folder / "report.md").read_text()
    assert "| client 0 | 3.0000 | 1.6000 | 1.2000 |" in text
    assert "a lower loss by" not in text
    assert "By itself afterwards, it trained" in text
    assert "Alone, a client" not in text, "explained, and not in the table"
    assert "Client 0: when it has gone on by itself, the right next word of its own texts is 49.2 % more likely" in text


BROUGHT = {
    "coalitions": [{"clients": [0, 1], "error": "round 1: the loss is nan"}],
    "leave_one_out": {"0": 0.5, "1": -0.25},
    "shapley": {"0": {"value": 0.4, "standard_error": 0.1}, "1": {"value": -0.1, "standard_error": 0.2}},
    "orders": 8,
}


def test_what_a_client_brings_is_told_beside_what_it_has(tmp_path: Path) -> None:
    run = made(tmp_path / "run", baselines=ALONE, contributions=BROUGHT)
    write_report(run.folder)
    text = (run.folder / "report.md").read_text()
    assert "| client 0 | 3.0000 | 1.8000 | 1.6000 | +0.2000 | +0.5000 | +0.4000 ± 0.1000 |" in text
    assert "| client 2 | 2.9000 | 1.5000 | 1.5000 | +0.0000 |  |  |" in text
    assert "without it, the right next word of the texts held out for all is 39.3 % less likely than with it" in text
    assert "without it, the right next word of the texts held out for all is 28.4 % more likely than with it" in text
    assert "by how much the loss falls on the 24 documents that were held out for all" in text
    assert "8 orders were drawn" in text
    assert "The federation of 0, 1 failed: round 1: the loss is nan" in text


def test_a_client_that_could_not_go_on_is_told_of(tmp_path: Path) -> None:
    run = made(tmp_path / "run", personalised=OWN)
    write_report(run.folder)
    assert "Client 1 could not go on by itself: the loss is nan" in (run.folder / "report.md").read_text()


def test_over_seeds_there_is_a_mean_and_a_spread(tmp_path: Path) -> None:
    folders = []
    for seed, loss in ((1, 1.0), (2, 1.4)):
        run = make_run(tmp_path / str(seed), [3.0, 2.0], clients=[[3.0, 2.0]] * 3, seed=seed)
        own = {"round": 1, "clients": {"0": {"global_loss": 2.0, "loss": loss}}}
        (run.folder / "personalised.json").write_text(json.dumps(own))
        folders.append(run.folder)
    (folders[0] / "contributions.json").write_text(json.dumps(BROUGHT))
    write_comparison(folders, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "| client 0 |  | 2.0000 ± 0.0000 | 1.2000 ± 0.2828 |  | +0.5000 | +0.4000 |" in text


@pytest.mark.parametrize(
    ("nats", "said"),
    [
        (0.0, "as likely as"),
        (-1e-5, "as likely as"),
        (math.log(1.1), "10.0 % more likely than"),
        (-math.log(1.25), "20.0 % less likely than"),
        (math.log(3), "3.0 times as likely as"),
        (-math.log(4), "75.0 % less likely than"),
    ],
)
def test_losses_in_words(nats: float, said: str) -> None:
    assert likelier(nats) == said


def test_a_gain_is_that_of_taking_part_and_not_of_more_passes() -> None:
    assert Worth(alone=1.7, together=1.6, personalised=1.8).gain == pytest.approx(0.1)
    assert Worth(alone=1.7, together=1.8, personalised=1.5).gain == pytest.approx(-0.1)
    assert Worth(alone=1.7, together=1.8, personalised=1.5).went_on == pytest.approx(0.3)
    assert Worth(alone=1.7, personalised=1.5).gain is Worth(alone=1.7, personalised=1.5).went_on is None
    assert Worth(alone=1.7).gain is Worth(together=1.7).gain is None
