"""Adapters that clients elsewhere go on to by themselves (`personalise`): they stay there, losses alone are told."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.federation_here import run_here, tiny
from support.liars import LyingClient, LyingServer
from support.marks import first
from support.tiny import make_adapted, make_recipe
from support.workers_here import Owner, asked_to, link_of, serve_here, told_of

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.reading import read_aloud
from fedloom.deployment.own_messages import KeptAdapter
from fedloom.errors import MessageError
from fedloom.experiment.building import load_base
from fedloom.host import failpoints
from fedloom.host.frames import Frame
from fedloom.model.source import open_model
from fedloom.records.check import check_run

pytestmark = pytest.mark.usefixtures("hurry")

PERSONAL = ("data.clients=2", "federation.rounds=2", "personalise.epochs=2")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def kept_of(folder: Path, name: str) -> Path:
    (home,) = (folder / "clients" / name / f"{name}.journal.adapters").iterdir()
    return home


def told_by(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "personalised.json").read_text()))


def kinds(folder: Path, name: str) -> list[str]:
    lines = (folder / "clients" / name / f"{name}.journal.jsonl").read_text().splitlines()
    return [json.loads(line)["kind"] for line in lines]


@pytest.mark.parametrize("rule", ["factors", pytest.param("svd", marks=pytest.mark.long)])
def test_each_client_makes_the_adapter_that_it_makes_on_one_machine_to_the_bit(rule: str, tmp_path: Path) -> None:
    ranks = ("federation.client_ranks=[2,4]", "adapter.rank=4") if rule == "svd" else ()
    recipe = tiny(*PERSONAL, f"federation.lora_rule={rule}", *ranks)
    local = run_here(recipe, tmp_path / "local")
    served = serve_here(recipe, link_of(recipe, tmp_path), tmp_path / "served")
    ours, theirs = told_by(served.folder), told_by(local.folder)
    assert ours["round"] == theirs["round"]
    losses = ("global_loss", "loss")
    assert ours["clients"] == {n: {key: told[key] for key in losses} for n, told in theirs["clients"].items()}
    assert not [one for one in check_run(served.folder) if not one.well]
    for number in range(2):
        mine = load_file(kept_of(tmp_path, f"client-{number}") / "adapter_model.safetensors")
        expected = load_file(local.folder / "clients" / str(number) / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
        card = (kept_of(tmp_path, f"client-{number}") / "README.md").read_text()
        assert f"holds out (nats per token) | {ours['clients'][str(number)]['loss']:.4f} |" in card


def test_the_adapter_goes_nowhere_and_losses_alone_are_told(tmp_path: Path) -> None:
    recipe = tiny(*PERSONAL)
    link = link_of(recipe, tmp_path)
    served = serve_here(recipe, link, tmp_path / "served")
    (first, told) = told_of(link, "keep")[0]
    assert told.payload == b""
    assert set(told.manifest) == {"before", "after"}
    kept = load_file(kept_of(tmp_path, first) / "adapter_model.safetensors")
    raw = [value.numpy().tobytes() for value in kept.values()]
    wholes = [file.read_bytes() for file in served.folder.rglob("*") if file.is_file()]
    assert not any(part in whole for part in raw for whole in [*wholes, *(f.payload for _, f in link.answered)])
    assert not (served.folder / "clients").exists()
    worth = (served.folder / "report.md").read_text().partition("Was it worth it?")[2]
    assert "Together, then by itself" in worth
    assert "| client 1 |" in worth


@pytest.mark.long
def test_an_owner_finds_it_where_they_say_and_peft_opens_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny(*PERSONAL)
    serve_here(recipe, link_of(recipe, tmp_path, keep=tmp_path / "mine"), tmp_path / "served")
    homes = sorted((tmp_path / "mine").iterdir())
    assert [home.name.rsplit("-", 1)[0] for home in homes] == ["client-0-tiny", "client-1-tiny"]
    assert f"own       {homes[0]}: an adapter of this client's own, which stays here" in capsys.readouterr().out
    opened = PeftModel.from_pretrained(load_base(recipe, open_model(recipe.model.source)), homes[0])
    assert opened.peft_config["default"].r == recipe.adapter.rank
    card = (homes[0] / "README.md").read_text()
    assert "it went on by itself, 2 epochs over this client's documents" in card
    assert "was sent to nobody" in card


@pytest.mark.long
def test_without_leave_no_loss_is_told_and_the_adapter_is_made_all_the_same(tmp_path: Path) -> None:
    recipe = tiny(*PERSONAL)
    link = link_of(recipe, tmp_path, {1: Policy(tell_holdout_loss=False)})
    served = serve_here(recipe, link, tmp_path / "served")
    assert set(told_by(served.folder)["clients"]["0"]) == {"global_loss", "loss"}
    assert told_by(served.folder)["clients"]["1"] == {}
    assert dict(told_of(link, "keep"))["client-1"].manifest == {"before": None, "after": None}
    assert (kept_of(tmp_path, "client-1") / "adapter_model.safetensors").is_file()
    assert kinds(tmp_path, "client-1").count("own") == 1
    journal = tmp_path / "clients" / "client-1" / "client-1.journal.jsonl"
    assert "adapter of its own" in "\n".join(read_aloud(journal, Policy()))
    assert "score" not in kinds(tmp_path, "client-1")


def test_it_counts_in_the_journal_and_has_the_limit_of_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that asks again and again, each time from another adapter, has no more of it than of rounds."""
    recipe = make_recipe(personalise={"epochs": 1})
    link = link_of(recipe, tmp_path, {0: Policy(max_rounds_a_day=2)})
    server = LyingServer(link.workers["client-0"].answer, recipe)
    assert [("after" in server.ask(server.question("keep", round=n)).manifest) for n in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    assert "max_rounds_a_day: its policy allows 2 adapters of its own a day" in capsys.readouterr().out
    assert kinds(tmp_path, "client-0").count("own") == 2
    assert server.train()["report"], "rounds are counted apart"


@pytest.mark.parametrize(
    ("recipe", "policy", "asked", "word"),
    first(
        [
            ({}, {}, {}, "question"),
            ({"personalise": {"epochs": 1}}, {}, {"round": 4}, "question"),
            ({"personalise": {"epochs": 1}}, {}, {"client": 3}, "question"),
            ({"personalise": {"epochs": 9}}, {"max_epochs": 3}, {}, "policy"),
            ({"personalise": {"epochs": 1}}, {}, {"documents": "0" * 64}, "documents"),
            ({"personalise": {"epochs": 1}}, {}, {"layout": "0" * 64}, "question"),
            ({"personalise": {"epochs": 1}}, {}, {"training": {"epochs": 99}}, "question"),
        ],
        keep=2,
    ),
)
def test_a_server_that_asks_for_more_gets_a_word(
    recipe: dict[str, Any], policy: dict[str, Any], asked: dict[str, Any], word: str, tmp_path: Path
) -> None:
    asked_for = make_recipe(**recipe)
    link = link_of(asked_for, tmp_path, {0: Policy(**policy)})
    server = LyingServer(link.workers["client-0"].answer, asked_for)
    assert server.ask(server.question("keep", **asked)).manifest == {"name": "client-0", "refused": word}
    assert not (tmp_path / "clients" / "client-0" / "client-0.journal.adapters").exists()


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"before": -1.0, "after": 1.0}, "before"),
        ({"before": 1.0, "after": float("nan")}, "after"),
        ({"before": 1.0, "after": 1.0, "text": "private"}, "unknown"),
        ({"name": "1", "refused": "memory"}, "too little memory"),
        ({"score": None}, "unknown"),
    ],
)
def test_what_a_lying_client_tells_of_its_adapter_costs_it_its_row_alone(
    told: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, _ = LyingClient(lambda do, asked, answer: Frame(told) if do == "keep" else answer).fleet()
    found = fleet.keep(make_adapted().read(), 3)
    assert found[0] == KeptAdapter(2.0, 1.0)
    assert isinstance(found[1], MessageError)
    assert why in str(found[1])


def test_numbers_beside_such_an_answer_are_refused() -> None:
    """An adapter that came back would be the server's."""
    fleet, _ = LyingClient(
        lambda do, asked, answer: Frame(answer.manifest, b"1234") if do == "keep" else answer
    ).fleet()
    assert "numbers came" in str(fleet.keep(make_adapted().read(), 3)[1])


@pytest.mark.long
def test_a_client_that_fails_is_named_and_the_others_have_theirs(tmp_path: Path) -> None:
    recipe = tiny(*PERSONAL)
    link = link_of(recipe, tmp_path)

    def change_its_mind(name: str, frame: Frame) -> None:
        if frame.manifest["do"] == "keep" and name == "client-1":
            link.owners[name] = Owner(link.owners[name].data, Policy(max_epochs=1))
            link.restart(name)

    link.on_question = change_its_mind
    served = serve_here(recipe, link, tmp_path / "served")
    told = told_by(served.folder)["clients"]
    assert set(told["0"]) == {"global_loss", "loss"}
    assert "its owner's policy does not allow it" in told["1"]["error"]
    assert "could not go on by itself" in (served.folder / "report.md").read_text()


@pytest.mark.long
def test_a_run_is_not_over_for_a_client_before_its_own_adapter_is_there(tmp_path: Path) -> None:
    """A minute after the last round it took the run for over, while the server waited for slower clients."""
    recipe = tiny(*PERSONAL)
    link = link_of(recipe, tmp_path)
    account = link.workers["client-0"].account
    seen = {}

    def look(name: str, frame: Frame) -> None:
        if name == "client-0" and account.until is not None:
            seen[frame.manifest["do"]] = account.until - time.monotonic() > 61

    link.on_question = look
    serve_here(recipe, link, tmp_path / "served")
    assert seen["keep"]
    assert account.until is not None
    assert account.until - time.monotonic() <= 61


@pytest.mark.long
def test_a_server_that_was_killed_asks_again_and_has_the_same(tmp_path: Path) -> None:
    recipe = tiny(*PERSONAL)
    whole = serve_here(recipe, link_of(recipe, tmp_path / "a"), tmp_path / "a" / "served")
    link = link_of(recipe, tmp_path / "b")
    failpoints.arm("personalised.written=raise")
    with pytest.raises(RuntimeError, match="a failpoint"):
        serve_here(recipe, link, tmp_path / "b" / "served")
    failpoints.arm("")
    link.restart("client-0")
    again = serve_here(recipe, link, tmp_path / "b" / "served", resume=True)
    assert told_by(again.folder) == told_by(whole.folder)
    assert len(asked_to(link, "keep")) == 4
