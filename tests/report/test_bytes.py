"""Bytes of a run: what a plan knows of them before, and what a report says of those on record."""

from pathlib import Path
from typing import Any

import pytest
from support.made_runs import make_run
from support.tiny import make_recipe

from fedloom.experiment.run import plan, run
from fedloom.monitoring.display import describe_plan
from fedloom.monitoring.observer import Observer
from fedloom.report.communication_section import show_communication
from fedloom.report.comparison import conclude, summarize
from fedloom.report.figures import bytes_moved, full_model_bytes, update_bytes
from fedloom.report.observations import the_payload
from fedloom.report.run_report import build_report

FULL = {"method": "full", "rank": None, "alpha": None}
RULES: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"lora_rule": "rolora"}, "at most"),
    ({"lora_rule": "svd"}, ""),
    ({"lora_rule": "svd", "client_ranks": [1, 2, 2]}, "at most"),
    ({"lora_rule": "fedex"}, "at first"),
]


@pytest.mark.parametrize(("section", "told"), RULES, ids=str)
def test_a_plan_says_how_its_bytes_of_a_round_are_meant(section: dict[str, Any], told: str, tmp_path: Path) -> None:
    recipe = make_recipe(federation={"rounds": 3, **section})
    planned = plan(recipe)
    assert describe_plan(planned)["bytes"].split(", ")[1].split(" ")[:-4] == told.split()
    assert planned.to_json().get("bytes_are", "") == told
    each = [one["bytes_up"] + one["bytes_down"] for one in run(recipe, tmp_path / "run", Observer()).rounds[1:]]
    assert each[0] <= planned.bytes_per_round
    if told == "":
        assert set(each) == {planned.bytes_per_round}
    elif told == "at most":
        assert max(each) < planned.bytes_per_round
    else:
        assert planned.bytes_per_round == each[0] < each[1] < each[2]


def test_a_budget_of_a_rule_that_sends_ever_more_is_not_called_ample() -> None:
    enough = 3 * plan(make_recipe(federation={"rounds": 3})).bytes_per_round
    notes = {
        rule: plan(make_recipe(federation={"rounds": 3, "lora_rule": rule, "max_bytes": enough})).unused
        for rule in ("factors", "rolora", "fedex")
    }
    assert f"all rounds take {enough:,} bytes" in notes["factors"][0]
    assert f"all rounds take at most {enough:,} bytes" in notes["rolora"][0]
    assert not any("max_bytes" in line for line in notes["fedex"])
    less = {
        rule: plan(make_recipe(federation={"rounds": 3, "lora_rule": rule, "max_bytes": enough // 2})).unused
        for rule in ("rolora", "fedex")
    }
    assert not any("max_bytes" in line for line in less["rolora"])
    assert "federation.max_bytes ends the run after at most 1 of 3 rounds" in less["fedex"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": FULL},
        {"federation": {"lora_rule": "ffa"}},
        {"adapter": {**FULL, "method": "ia3"}},
    ],
    ids=str,
)
def test_the_base_model_has_the_same_size_whatever_is_trained(changes: dict[str, Any]) -> None:
    usual = plan(make_recipe())
    assert usual.base_parameters == usual.parameters - usual.trainable_parameters
    assert plan(make_recipe(**changes)).base_parameters == usual.base_parameters


def test_a_whole_model_is_exchanged_once_and_not_compared_with_itself(tmp_path: Path) -> None:
    sizes = {"parameters": 500, "trainable_parameters": 500, "payload_bytes": 2000}
    for known in ({}, {"base_parameters": 500}):  # earlier plans lack the key
        folder = tmp_path / f"run{len(known)}"
        finished = make_run(folder, [3.0, 2.5], adapter=FULL, plan={**sizes, **known})
        assert full_model_bytes(finished) == 2000
        assert the_payload(finished) is None
        blocks = next(s for s in build_report(finished).sections if s.title == "Communication").blocks
        assert blocks[0].text.startswith("The whole model in float32 has 2.0 kB. Both ways, 6.0 kB")  # type: ignore[union-attr]
        assert blocks[1].rows[0][-1] == "12.0 kB"  # type: ignore[union-attr]


def test_what_travels_is_counted_by_what_is_on_record(tmp_path: Path) -> None:
    """A residual grows what goes down, half an adapter is less than one, and a lost client got its adapter."""
    grows = {2: {"bytes_down": 9000}}
    grown = make_run(tmp_path / "grown", [3.0, 2.5, 2.4], name="grown", more=grows)
    usual = make_run(tmp_path / "usual", [3.0, 2.5, 2.4], name="usual")
    assert update_bytes(usual) == 1000
    assert update_bytes(grown) == bytes_moved(grown) / 12 == 1500
    assert f"{full_model_bytes(grown) / 1500:,.0f} times as much" in str(the_payload(grown))
    assert [line.split()[-3:-2] + line.split()[-4:-3] for line in summarize([grown, usual], None)[1:3]] == [
        ["kB", "1.5"],
        ["kB", "1.0"],
    ]
    assert "grown sends 1.5 times the bytes of usual in an update." in conclude([grown, usual], ["grown", "usual"])
    lossy = make_run(tmp_path / "lossy", [3.0, 2.5], lost={1: [0]})
    assert update_bytes(lossy) == 1000
    away = {1: {"unasked": [0], "bytes_down": 2000}}
    assert update_bytes(make_run(tmp_path / "away", [3.0, 2.5], lost={1: [0]}, more=away)) == 1000
    skipped = {1: {"clients": [], "lost": [2], "bytes_up": 0}}
    assert update_bytes(make_run(tmp_path / "skipped", [3.0, 2.5], more=skipped)) == 1000
    blocks = next(s for s in build_report(lossy).sections if s.title == "Communication").blocks
    assert blocks[1].rows[0][-1] == f"{5 * full_model_bytes(lossy) / 1e6:.1f} MB"  # type: ignore[union-attr]


def test_adapters_that_are_sent_to_be_scored_are_named_beside_those_of_training(tmp_path: Path) -> None:
    """Of three rounds of three clients they are twelve, beside the eighteen that train: they were nowhere."""
    scored = {round: {"client_losses": {"0": 2.0, "1": 2.0}} for round in range(3)}
    for name, planned, told in (
        ("here", {}, "adapters would have been sent 6 times more, 6.0 kB."),
        ("served", {"elsewhere": ["a", "b", "c"]}, "adapters were sent 6 times more, 6.0 kB."),
        ("grows", {"elsewhere": ["a", "b", "c"], "bytes_are": "at first"}, "sent 6 times more, at least 6.0 kB."),
    ):
        made = make_run(tmp_path / name, [3.0, 2.5, 2.4], more=scored, plan=planned)
        text = show_communication(made)[0].text  # type: ignore[union-attr]
        assert text.endswith(told)
    none = make_run(tmp_path / "none", [3.0, 2.5], more={round: {"client_losses": {}} for round in range(2)})
    assert "scored" not in show_communication(none)[0].text  # type: ignore[union-attr]
