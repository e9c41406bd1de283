"""Controls of a run: budgets, kept adapters, rounds that nobody evaluates, and going on under each of them."""

import json
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.bars import Bar
from support.marks import first
from support.quick_runs import attempt, make_recipe, result_of

from fedloom.experiment.run import plan, run
from fedloom.federation.shares import cap_weights, to_shares
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.check import check_run
from fedloom.records.run import read_run
from fedloom.report.run_report import write_report

CONTROLS: list[dict[str, Any]] = [
    {"federation": {"rounds": 6, "keep_every": 2, "max_bytes": 50_000}, "evaluation": {"every": 2},
     "training": {"max_steps": 1, "optimizer": "adafactor", "warmup": 2,
                  "schedule": "cosine", "schedule_scope": "run"}},
    {"training": {"max_steps": 1}},
    {"training": {"gradient_accumulation": 2, "batch_size": 2, "engine": "batched"}},
    {"training": {"warmup": 0.5, "schedule": "linear", "schedule_scope": "run", "learning_rate_end": 1e-3}},
    {"training": {"schedule": "cosine", "schedule_scope": "rounds", "learning_rate_end": 1e-3}},
    {"training": {"optimizer": {"kind": "sgd", "momentum": 0.9}}},
    {"training": {"optimizer": "adafactor", "engine": "batched"}},
    {"federation": {"keep_every": 1}},
    {"evaluation": {"every": 2}, "federation": {"rounds": 4}},
    {"evaluation": {"every": 3}, "training": {"proximal_schedule": "adaptive"}},
]  # fmt: skip
"""Settings of runs; the first has most at once."""


@pytest.fixture(scope="module")
def uncut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Recipe with some of `CONTROLS`, and its run without an interruption, for all the instants of one."""
    folder = tmp_path_factory.mktemp("uncut")
    recipe = make_recipe(folder, **request.param)
    assert not attempt(recipe, folder / "run")
    return recipe, folder / "run"


@pytest.mark.parametrize("uncut", first(CONTROLS, every=2), ids=str, indirect=True)
@pytest.mark.parametrize(
    "point", first(["round.begins=raise@3", "state.renamed=raise@3", "record.round=raise@2"], every=2)
)
def test_a_run_that_goes_on_comes_to_what_it_would_have(uncut: tuple[Recipe, Path], point: str, tmp_path: Path) -> None:
    recipe, whole = uncut
    with pytest.raises(RuntimeError):
        attempt(recipe, tmp_path / "run", point)
    assert not attempt(recipe, tmp_path / "run")
    assert result_of(tmp_path / "run") == result_of(whole)
    assert [finding.what for finding in check_run(tmp_path / "run") if not finding.well] == []
    assert read_run(tmp_path / "run").status.get("stopped_early") == read_run(whole).status.get("stopped_early")


def sent(folder: Path) -> list[int]:
    return [record["bytes_up"] + record["bytes_down"] for record in read_run(folder).rounds]


@pytest.mark.parametrize("spare", first([0, -1, 1]))
def test_a_run_ends_before_its_budget_of_bytes_is_exceeded(spare: int, tmp_path: Path) -> None:
    whole = make_recipe(tmp_path, training={"optimizer_state": "reset"})
    assert not attempt(whole, tmp_path / "whole")
    spent = list(accumulate(sent(tmp_path / "whole")))
    assert spent[2] > spent[1] > 0
    budget = {"rounds": 3, "max_bytes": spent[2] + spare}
    changes = {"training": {"optimizer_state": "reset"}, "evaluation": {"every": 5}, "federation": budget}
    assert not attempt(make_recipe(tmp_path, **changes), tmp_path / "run")
    found = read_run(tmp_path / "run")
    completed = 1 if spare < 0 else 2
    assert len(found.rounds) - 1 == completed
    assert sum(sent(tmp_path / "run")) == spent[completed] <= spent[2] + spare
    assert found.status["state"] == "done"
    why = f"{spent[completed]:,} of federation.max_bytes ({spent[2] + spare:,}) are used"
    assert why in found.status["stopped_early"]
    assert why in (tmp_path / "run" / "report.md").read_text()
    assert "central_loss" in found.rounds[-1], "the last round is evaluated, whatever made it the last"


def test_a_budget_for_no_round_ends_the_run_after_round_0(tmp_path: Path) -> None:
    assert not attempt(make_recipe(tmp_path, federation={"max_bytes": 1}), tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert len(found.rounds) == 1
    assert "3 scheduled, 0 completed: 0 of federation.max_bytes (1)" in found.status["stopped_early"]


@pytest.mark.long
def test_the_plan_says_what_a_budget_allows(tmp_path: Path) -> None:
    per_round = plan(make_recipe(tmp_path)).bytes_per_round
    two = plan(make_recipe(tmp_path, federation={"max_bytes": 2 * per_round + 1}))
    assert any(line.startswith("federation.max_bytes ends the run after 2 of 3 rounds") for line in two.unused)


def test_kept_adapters_open_with_peft_and_are_those_of_their_rounds(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, federation={"rounds": 4, "keep_every": 2}, adapter={"dropout": 0.0})
    assert not attempt(recipe, tmp_path / "run")
    folders = {path.name: path for path in (tmp_path / "run" / "adapters").iterdir()}
    assert set(folders) == {"initial", "best", "last", "round-2", "round-4"}
    last, kept = (load_file(folders[name] / "adapter_model.safetensors") for name in ("last", "round-4"))
    assert all(torch.equal(last[name], kept[name]) for name in last)
    assert "round 2 of 4" in (folders["round-2"] / "README.md").read_text()
    logits = []
    for name in ("round-2", "round-4"):
        base = load_model(open_model("random:tiny-llama"), dtype="float32", device=torch.device("cpu"))
        model = PeftModel.from_pretrained(base, folders[name]).eval()
        logits.append(model(input_ids=torch.arange(5)[None]).logits)
    assert not torch.equal(*logits)
    assert "adapters/round-2" in [finding.what for finding in check_run(tmp_path / "run")]
    # Another round's adapter in its place is found, and one that was removed is missed by nobody.
    for file in folders["round-4"].iterdir():
        (folders["round-2"] / file.name).write_bytes(file.read_bytes())
    assert [finding.what for finding in check_run(tmp_path / "run") if not finding.well] == ["adapters/round-2"]
    for file in folders["round-2"].iterdir():
        file.unlink()
    folders["round-2"].rmdir()
    assert all(finding.well for finding in check_run(tmp_path / "run"))


@pytest.mark.long
def test_rounds_are_evaluated_every_so_many_and_after_the_last(tmp_path: Path) -> None:
    every, some = ({"evaluation": {"every": number}, "federation": {"rounds": 5}} for number in (1, 2))
    assert not attempt(make_recipe(tmp_path, **every), tmp_path / "every")
    assert not attempt(make_recipe(tmp_path, **some), tmp_path / "some")
    all_rounds, found = read_run(tmp_path / "every"), read_run(tmp_path / "some")
    assert [record["round"] for record in found.rounds if "central_loss" in record] == [0, 2, 4, 5]
    for record, other in zip(found.rounds, all_rounds.rounds, strict=True):
        assert record["adapter_sha256"] == other["adapter_sha256"], "what is trained does not depend on it"
        assert record.get("central_loss", other["central_loss"]) == other["central_loss"]
        assert bool(record["client_losses"]) == ("central_loss" in record)
    judged = {report["round"]: "holdout_loss_after" in report for report in found.clients}
    assert judged == {1: True, 2: False, 3: True, 4: False, 5: True}, "both before and after training, or neither"
    losses = {record["round"]: record["central_loss"] for record in found.rounds if "central_loss" in record}
    assert losses[found.best_round or 0] == min(losses.values())
    best, kept = ((tmp_path / "some" / "adapters" / name / "adapter_model.safetensors").read_bytes()
                  for name in ("best", "last" if found.best_round == 5 else "best"))  # fmt: skip
    assert best == kept
    planned = plan(make_recipe(tmp_path, **some))
    assert planned.evaluate_tokens == sum(record.get("evaluate_tokens", 0) for record in found.rounds)
    write_report(tmp_path / "some")
    assert (tmp_path / "some" / "report.html").is_file()


def test_only_an_evaluated_round_stops_a_run_early(tmp_path: Path) -> None:
    stop = {"rounds": 9, "early_stop": {"patience": 1, "min_delta": 9.0}}
    assert not attempt(make_recipe(tmp_path, federation=stop, evaluation={"every": 4}), tmp_path / "run")
    found = read_run(tmp_path / "run")
    assert len(found.rounds) - 1 == 4
    assert "in 4 rounds" in found.status["stopped_early"]


@pytest.mark.parametrize("training", [{"max_steps": 1}, {"max_steps": 3, "epochs": 2}, {"epochs": 2}], ids=str)
def test_no_share_by_tokens_is_above_the_cap_whatever_part_of_them_a_round_has(
    training: dict[str, Any], tmp_path: Path
) -> None:
    """By tokens that a client holds, others would be capped than those whose steps had most."""
    rows = tmp_path / "of_three.jsonl"
    # One has few short texts and many long ones, and steps that may have either.
    texts = {"a": [3, 40, 3, 40, 3, 40], "b": [9] * 30, "c": [20] * 12}
    words = {
        who: [" ".join(f"{who}{n}{m}" for m in range(size)) for n, size in enumerate(sizes)]
        for who, sizes in texts.items()
    }
    rows.write_text("".join(json.dumps({"text": text, "who": who}) + "\n" for who in words for text in words[who]))
    federation = {"max_share": 0.4, "strategy": {"kind": "fedavg", "weight_by": "tokens"}, "rounds": 3}
    data = {"source": str(rows), "documents_per_client": None, "max_length": 64, "central_holdout": 3,
            "partition": {"kind": "natural", "by": "who"}}  # fmt: skip
    recipe = make_recipe(tmp_path, training={"batch_size": 2, **training}, federation=federation, data=data)
    run(recipe, tmp_path / "run", Observer())
    reports = [json.loads(line) for line in (tmp_path / "run" / "clients.jsonl").read_text().splitlines()]
    for record in read_run(tmp_path / "run").rounds[1:]:
        told = {str(one["client"]): one["tokens"] for one in reports if one["round"] == record["round"]}
        weights = cap_weights(told, 0.4)
        assert record["shares"] == pytest.approx(to_shares(weights))
        assert max(record["shares"].values()) <= 0.4 + 1e-9
        assert record.get("capped", []) == [int(client) for client in told if weights[client] < told[client]]


def test_a_run_that_ends_early_takes_its_work_out_of_the_bar(tmp_path: Path) -> None:
    stop = {"rounds": 9, "early_stop": {"patience": 1, "min_delta": 9.0}}
    bar = Bar()
    run(
        make_recipe(tmp_path, federation=stop, baselines=["pooled", "local"], contributions=True), tmp_path / "run", bar
    )
    assert bar.totals["rounds"] == bar.steps * 9, "as it was planned"
    assert bar.totals["baselines"] == bar.totals["contributions"] == bar.steps
    assert bar.clock.seconds_left() == 0
    # A client alone scores its own hold-out where its adapter is better than before.
    assert bar.planned["baselines"] - 200 < bar.scored["baselines"] <= bar.planned["baselines"]
    assert bar.scored["contributions"] == bar.planned["contributions"]


@pytest.mark.parametrize("engine", ["reference", "batched"])
@pytest.mark.parametrize("window", first([None, "truncate", "pack"]))
def test_one_client_over_rounds_is_one_central_run_to_the_bit(engine: str, window: str | None, tmp_path: Path) -> None:
    """Of a plain text, and of answers alone, each in a block of its own or in shared ones."""
    data: dict[str, Any] = {"clients": 1, "documents_per_client": 13}
    if window:
        rows = tmp_path / "answers.jsonl"
        words = [sha256(str(n).encode()).hexdigest() for n in range(60)]
        told = ({"q": word[: 4 + n % 5], "a": word[-2 - n % 7 :]} for n, word in enumerate(words))
        rows.write_text("".join(json.dumps(row) + "\n" for row in told))
        data |= {"source": str(rows), "documents_per_client": 40, "max_length": 32, "window": window}
        data |= {"prompt": "Q{q}:", "completion": "{a}"}
    training = {"engine": engine, "batch_size": 2, "epochs": 9, "proximal_mu": 0.0, "optimizer_state": "keep"}
    plain = {"data": data, "adapter": {"dropout": 0.0}}
    parts = make_recipe(
        tmp_path, **plain, training={**training, "max_steps": 3},
        federation={"rounds": 6, "strategy": {"kind": "fedavg", "learning_rate": None}},
    )  # fmt: skip
    whole = make_recipe(
        tmp_path, **plain, training={**training, "max_steps": 18},
        federation={"rounds": 1, "strategy": {"kind": "fedavg", "learning_rate": None}},
    )  # fmt: skip
    rounds = [run(recipe, tmp_path / name, Observer()).rounds for recipe, name in ((parts, "parts"), (whole, "whole"))]
    assert rounds[0][-1]["adapter_sha256"] == rounds[1][-1]["adapter_sha256"]
    assert rounds[0][0]["adapter_sha256"] != rounds[0][-1]["adapter_sha256"]
    tokens = [sum(record["train_tokens"] for record in records) for records in rounds]
    assert tokens[0] == tokens[1]
    shas = [record["adapter_sha256"] for record in rounds[0]]
    assert all(one != other for one, other in pairwise(shas))


@pytest.mark.long
def test_a_plan_counts_the_tokens_of_the_steps_that_are_taken(tmp_path: Path) -> None:
    whole = plan(make_recipe(tmp_path))
    few = plan(make_recipe(tmp_path, training={"max_steps": 1, "batch_size": 2}))
    assert few.steps_per_round == 3
    assert 0 < few.train_tokens_per_round < whole.train_tokens_per_round
    assert "whole_steps" in few.to_json()
    assert "whole_steps" not in whole.to_json()


def test_the_pooled_baseline_takes_as_many_steps_as_all_clients(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path, baselines=["pooled", "local"],
        training={"max_steps": 2, "batch_size": 2, "optimizer_state": "reset"}, federation={"rounds": 2},
        evaluation={"every": 2},
    )  # fmt: skip
    assert not attempt(recipe, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "baselines.json").read_text())
    trained = sum(record["train_tokens"] for record in read_run(tmp_path / "run").rounds)
    assert told["pooled"]["tokens"] == pytest.approx(trained, rel=0.2)
    assert len(told["pooled"]["losses"]) == 3
