"""Branch of a tree: real workers below it, a server's run above it, and no Flower between them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("cryptography", reason="comes with Flower: pip install 'fedloom[deploy]'")

from safetensors.torch import load_file
from support.federation_here import split
from support.liars import LyingServer, facts_of
from support.tiny import make_recipe
from support.workers_here import LinkHere, Owner, asked_to, serve_here, told_of

from fedloom.deployment.client.policy import Policy
from fedloom.deployment.messages import unpack_facts
from fedloom.deployment.server import exchange
from fedloom.deployment.server.answering import Answerer, check_branchable, open_branch
from fedloom.deployment.server.facts import check_facts
from fedloom.deployment.server.superlink import SuperLink
from fedloom.deployment.signing import Signer, Verifier, make_signing_key
from fedloom.errors import DeploymentError, MessageError, RecipeError
from fedloom.host.frames import Frame
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(exchange, "ATTEND_SECONDS", 0.0)


def recipe(clients: int, **sections: Any) -> Recipe:
    """A recipe without caps on shares: of two branches neither could weigh more than the other."""
    data = {"clients": clients, "documents_per_client": 12, **sections.pop("data", {})}
    federation = {
        "rounds": 2,
        "max_share": 1.0,
        "round_deadline": 300.0,
        "keep_every": 1,
        **sections.pop("federation", {}),
    }
    return make_recipe(
        **{"training": {"engine": "reference"}, "data": data, "federation": federation, **sections},
    )


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Documents of six clients, of which no two have as many."""
    made = split(recipe(6), tmp_path_factory.mktemp("documents") / "split")
    return {f"client-{number}": path for number, path in enumerate(made)}


class Lines(Observer):
    """Writes down what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def show_step(self, what: str, detail: str) -> None:
        self.said.append(f"{what} {detail}")


@dataclass
class Grown:
    """A branch with its clients."""

    answerer: Answerer
    link: LinkHere
    lines: Lines

    @property
    def server(self) -> LyingServer:
        """A server above it that asks whatever it likes."""
        told = self.answerer._fleet.exchange.recipe
        lying = LyingServer(self.answerer.answer, self.answerer._recipe)
        lying.told = dict(told)
        return lying


def grow(
    name: str, documents: Mapping[str, Path], folder: Path, first_client: int = 0, *,
    policies: Mapping[str, Policy] = {}, open_question: Callable[[Frame], Frame] | None = None, **sections: Any,
) -> Grown:  # fmt: skip
    """Open a branch whose clients are there already."""
    plan, lines = recipe(len(documents), **sections), Lines()
    owners = {client: Owner(path, policies.get(client, Policy())) for client, path in documents.items()}
    link = LinkHere(owners, folder / name)
    check_branchable(plan, first_client)
    answerer = open_branch(
        name, plan, cast(SuperLink, link), lines, bool, folder=folder / name, wait_seconds=120.0,
        first_client=first_client, open_question=open_question,
    )  # fmt: skip
    return Grown(answerer, link, lines)


def grow_two(documents: Mapping[str, Path], folder: Path, **how: Any) -> dict[str, Grown]:
    """Open two branches of three clients, which have the numbers that they have in a run of six."""
    held = [*documents.items()]
    return {
        "a": grow("a", dict(held[:3]), folder, **how),
        "b": grow("b", dict(held[3:]), folder, 3),
    }


def link_to(branches: Mapping[str, Grown], folder: Path) -> LinkHere:
    """Return a server's link to branches in the place of workers."""
    link = LinkHere({}, folder)
    link.workers.update({name: cast(Any, one.answerer) for name, one in branches.items()})
    return link


def serve_flat(documents: Mapping[str, Path], folder: Path, **sections: Any) -> Run:
    owners = {client: Owner(path) for client, path in documents.items()}
    return serve_here(recipe(len(documents), **sections), LinkHere(owners, folder / "clients"), folder / "flat")


def weights_of(run: Run, which: str = "last") -> torch.Tensor:
    found = load_file(run.folder / "adapters" / which / "adapter_model.safetensors")
    return torch.cat([found[name].reshape(-1) for name in sorted(found)])


def test_two_branches_of_three_clients_make_the_adapter_of_six_up_to_rounding(
    documents: Mapping[str, Path], tmp_path: Path
) -> None:
    branches = grow_two(documents, tmp_path)
    above = link_to(branches, tmp_path)
    tree = serve_here(recipe(2), above, tmp_path / "tree")
    flat = serve_flat(documents, tmp_path)
    assert weights_of(tree, "initial").equal(weights_of(flat, "initial"))
    # A branch's mean and the server's are each the nearest float32 of what they are.
    first = weights_of(flat, "round-1")
    assert (weights_of(tree, "round-1") - first).abs().max() <= 3 * 2.0**-24 * first.abs().max()
    # From there clients train: an optimizer's step is as long where a gradient is next to nothing.
    moved = (weights_of(flat) - weights_of(flat, "initial")).abs().max()
    assert (weights_of(tree) - weights_of(flat)).abs().max() < 1e-3 * moved
    # What every client was asked, whoever asked it: its number is part of every random draw.
    numbers = [
        (name, frame.manifest["client"]) for one in branches.values() for name, frame in asked_to(one.link, "train")
    ]
    assert sorted(set(numbers)) == [(f"client-{number}", number) for number in range(6)]
    for ours, theirs in zip(tree.rounds, flat.rounds, strict=True):
        assert ours["client_loss"] == pytest.approx(theirs["client_loss"], rel=1e-6)
        assert ours["central_loss"] == pytest.approx(theirs["central_loss"], rel=1e-6)
    for round in (1, 2):
        ours, theirs = ([one for one in run.clients if one["round"] == round] for run in (tree, flat))
        for key in ("examples", "tokens"):
            assert [one[key] for one in ours] == [sum(one[key] for one in theirs[at : at + 3]) for at in (0, 3)]
    # Of its clients the server above is told in sums alone.
    told = json.dumps([answer.manifest for _, answer in above.answered])
    assert "client-" not in told
    assert {name for name, _ in above.answered} == {"a", "b"}
    assert [line for line in branches["a"].lines.said if line.startswith(("lost", "refused"))] == []


@pytest.mark.long
def test_with_the_cap_of_a_server_two_branches_count_alike_which_its_plan_says(
    documents: Mapping[str, Path], tmp_path: Path
) -> None:
    """And so the tree is another than the flat run, by far more than by rounding."""
    one = {"federation": {"rounds": 1}}
    held = [*documents.items()]
    branches = {
        "a": grow("a", dict(held[:2]), tmp_path, **one),
        "b": grow("b", dict(held[2:]), tmp_path, 2, **one),
    }
    capped = recipe(2, federation={"rounds": 1, "max_share": None})
    tree = serve_here(capped, link_to(branches, tmp_path), tmp_path / "tree")
    flat = serve_flat(documents, tmp_path, **one)
    assert [*tree.plan["shares"].values()] == [0.5, 0.5]
    assert list(tree.plan["capped"]) == ["b"]
    moved = (weights_of(flat) - weights_of(flat, "initial")).abs().max()
    off = (weights_of(tree) - weights_of(flat)).abs().max() / moved
    assert off > 0.05


def limited(rounds: int) -> dict[str, Policy]:
    return {"client-1": Policy(max_rounds_a_day=rounds)}


@pytest.mark.long
@pytest.mark.parametrize("quorum", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_client_that_is_lost_costs_its_branch_what_it_costs_a_server(
    quorum: bool, documents: Mapping[str, Path], tmp_path: Path
) -> None:
    """The round goes on without it, or, where that are too few, without its branch, which says so in a word."""
    lost = {"federation": {"max_lost_clients": 1}} if quorum else {}
    branches = grow_two(documents, tmp_path, policies=limited(1), **lost)
    above = link_to(branches, tmp_path)
    tree = serve_here(recipe(2, federation={"max_lost_clients": 1}), above, tmp_path / "tree")
    first, second = tree.rounds[1], tree.rounds[2]
    assert first["lost"] == []
    of_a = [one["examples"] for one in tree.clients if one["client"] == 0]
    if quorum:
        assert second["lost"] == []
        assert of_a[1] < of_a[0]
    else:
        assert second["lost"] == [0]
        assert [answer.manifest.get("refused") for name, answer in told_of(above, "train") if name == "a"] == [
            None,
            "clients",
        ]
        assert "refused round 2, client 1, client-1" in "\n".join(branches["a"].lines.said)


# --- What a branch refuses: before anything is started, or in a word.


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"federation": {"strategy": {"kind": "fedmedian"}}}, "federation.strategy.kind"),
        ({"federation": {"strategy": {"kind": "krum"}}}, "federation.strategy.kind"),
        ({"federation": {"strategy": {"kind": "norm_clipped"}}}, "federation.strategy.kind"),
        ({"federation": {"strategy": {"kind": "mine:rule"}}}, "federation.strategy.kind"),
        ({"federation": {"strategy": {"weight_by": "equal"}}}, "federation.strategy.weight_by"),
        ({"federation": {"lora_rule": "svd"}}, "federation.lora_rule"),
        ({"federation": {"lora_rule": "fedex"}}, "federation.lora_rule"),
        ({"federation": {"lora_rule": "fedsa"}, "data": {"central_holdout": 0}}, "federation.lora_rule"),
        ({"privacy": {"epsilon": 8.0, "delta": 1e-3}, "data": {"client_holdout": 0.0}}, "privacy"),
        ({"personalise": {"epochs": 1}}, "personalise"),
        ({"federation": {"fraction": 0.5}}, "federation.fraction"),
    ],
)
def test_what_means_something_else_in_a_tree_is_refused_before_anything_starts(
    sections: dict[str, Any], key: str
) -> None:
    """And what a server above would be told of it, it refuses itself, whatever the branch is started with."""
    with pytest.raises(RecipeError) as refused:
        check_branchable(recipe(3, **sections), 0)
    assert refused.value.where == key
    assert refused.value.mend
    if key not in ("federation.fraction", "privacy"):
        above = recipe(2, **sections)
        plain = unpack_facts(facts_of("a"))
        check_facts(above, plain)
        with pytest.raises(MessageError, match="not with a branch"):
            check_facts(above, replace(plain, weighs="examples"))


def test_numbers_beyond_what_a_client_takes_are_refused_before_anything_starts() -> None:
    check_branchable(recipe(3), 99_997)
    with pytest.raises(DeploymentError, match="--first-client"):
        check_branchable(recipe(3), 99_998)


def test_a_server_refuses_a_branch_that_weighs_by_another_measure() -> None:
    told = unpack_facts(facts_of("a", weighs="tokens"))
    check_facts(recipe(2, federation={"strategy": {"weight_by": "tokens"}}), told)
    with pytest.raises(MessageError, match=r"weighs its clients by tokens, and .* is examples"):
        check_facts(recipe(2), told)


@pytest.fixture(scope="module")
def one(documents: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """A branch of two clients, for many questions."""
    held = dict([*documents.items()][:2])
    return grow("a", held, tmp_path_factory.mktemp("one"))


def test_it_tells_sums_of_its_clients_and_that_it_is_a_branch(one: Grown) -> None:
    told = one.server.meet()
    answers = [unpack_facts(answer) for _, answer in told_of(one.link, "meet")]
    for key in ("blocks", "tokens", "train_documents", "holdout_tokens"):
        assert told[key] == sum(getattr(answer, key) for answer in answers) > 0
    assert (told["name"], told["weighs"], told["tasks"]) == ("a", "examples", 0)
    assert told["base"] == answers[0].base
    assert told["documents"] not in [answer.documents for answer in answers]


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (lambda server: server.meet({"seed": 8}), "recipe"),
        (lambda server: server.meet({"training": {"learning_rate": 1.0}}), "recipe"),
        (lambda server: server.meet({"data": {"clients": 2, "text": "secret"}}), "recipe"),
        (lambda server: server.train(documents="f" * 64), "documents"),
        (lambda server: server.train(seconds=1e-9), "late"),
        (lambda server: server.train(layout="f" * 64), "question"),
        (lambda server: server.evaluate(own="f" * 3), "question"),
        (lambda server: server.ask(server.question("tasks")).manifest, "question"),
        (lambda server: server.ask(server.question("keep")).manifest, "question"),
    ],
)
def test_it_asks_its_clients_nothing_that_is_not_its_own_recipes(
    ask: Callable[[LyingServer], Mapping[str, Any]], word: str, one: Grown
) -> None:
    before = len(one.link.asked)
    assert ask(one.server) == {"name": "a", "refused": word}
    assert len(one.link.asked) == before


def test_only_the_number_of_clients_may_differ(one: Grown) -> None:
    assert "refused" not in one.server.meet({"data": {"clients": 77}})


def test_its_clients_have_less_time_than_it_has(one: Grown, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    one.link.on_question = lambda name, frame: seen.append(frame.manifest["seconds"])
    monkeypatch.setattr(one.answerer, "_last", None)
    one.server.evaluate(seconds=100.0)
    assert len(seen) == 2
    assert all(80.0 < seconds <= 90.0 for seconds in seen)
    seen.clear()
    one.server.evaluate(seconds=1e6)
    assert all(seconds <= 300.0 for seconds in seen), "its own recipe's deadline"


def test_a_question_asked_again_is_not_asked_of_the_clients_again(one: Grown) -> None:
    question = one.server.question("train", round=1)
    first = one.answerer.answer(question)
    before = len(one.link.asked)
    again = one.answerer.answer(replace(question, manifest={**question.manifest, "seconds": 5.0}))
    assert again == first
    assert "report" in first.manifest
    assert len(one.link.asked) == before


def test_a_question_that_the_kits_server_did_not_sign_is_not_answered(
    documents: Mapping[str, Path], tmp_path: Path
) -> None:
    key = make_signing_key(tmp_path / "key.pem")
    stranger = make_signing_key(tmp_path / "stranger.pem")
    assert key != stranger
    held = dict([*documents.items()][:2])
    branch = grow("a", held, tmp_path, open_question=Verifier(key, "a").open)
    question = branch.server.question("meet")
    asked = len(branch.link.asked)
    for frame in (question, Signer(tmp_path / "stranger.pem").sign(question, "a", 60.0),
                  Signer(tmp_path / "key.pem").sign(question, "b", 60.0)):  # fmt: skip
        assert branch.answerer.answer(frame).manifest == {"name": "a", "refused": "question"}
    assert "refused" not in branch.answerer.answer(Signer(tmp_path / "key.pem").sign(question, "a", 60.0)).manifest
    assert len(branch.link.asked) == asked
