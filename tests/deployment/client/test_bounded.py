"""The owner's side of a private run: what may be told of any one document is theirs to say, and is counted for good."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.liars import LyingServer
from support.marks import first
from support.tiny import make_recipe
from support.workers_here import link_of, serve_here

from fedloom.deployment.client import client_model
from fedloom.deployment.client import documents as client_documents
from fedloom.deployment.client.account import find_run, hash_alike
from fedloom.deployment.client.documents import write_splits
from fedloom.deployment.client.journal import Journal, open_ledger, standing
from fedloom.deployment.client.ledger import Cost, Ledger, judge
from fedloom.deployment.client.policy import Policy, PrivacyPolicy, load_policy, policy_to_toml, with_options
from fedloom.deployment.client.reading import read_aloud
from fedloom.deployment.client.refusals import find_refusals
from fedloom.deployment.client.rehearsal import rehearse
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.messages import pack_recipe
from fedloom.errors import DeploymentError, RecipeError
from fedloom.experiment.run import run
from fedloom.host import failpoints
from fedloom.host.files import hash_json
from fedloom.host.frames import Frame
from fedloom.monitoring.observer import Observer
from fedloom.privacy.accounting import calibrate, epsilon, renyi, renyi_epsilon
from fedloom.privacy.noise import derive_key
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe

ROUNDS = 3
TEXTS = [f"{n} is a text of a patient: " + f"word{n} " * (n + 9) for n in range(20)]
OWNER = {"delta": 1e-3}
"""An owner who bounds, and whose δ is the recipe's."""


def private(*, rounds: int = ROUNDS, seed: int = 7, **privacy: Any) -> Recipe:
    bound = {"delta": 1e-3, **({} if "noise_multiplier" in privacy else {"epsilon": 4.0}), **privacy}
    return make_recipe(
        seed=seed,
        training={"engine": "reference", "batch_size": 3},
        data={"documents_per_client": None, "client_holdout": 0.0},
        federation={"rounds": rounds},
        privacy=bound,
    )


def client(folder: Path, policy: Policy | None = None, texts: list[str] = TEXTS) -> Worker:
    """Start a client, or start it again, with its secret and its journal in a folder."""
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    secret = folder / "alice.journal.secret"
    if not secret.exists():
        secret.write_bytes(b"s" * 32)
        secret.chmod(0o600)
    return Worker("alice", data, policy or Policy(), Journal(folder / "alice.journal.jsonl"))


def owner(**keys: Any) -> Policy:
    return Policy(privacy=PrivacyPolicy(**OWNER, **keys))


def server(worker: Worker, recipe: Recipe | None = None) -> LyingServer:
    return LyingServer(worker.answer, recipe or private())


def train(worker: Worker, round: int = 1, recipe: Recipe | None = None, moved: float = 0.0) -> Frame:
    """Have a client train for a round, from an adapter that was moved by so much."""
    asking = server(worker, recipe)
    asking._adapter = replace(asking.adapter, weights_P=asking.adapter.weights_P + moved)
    return asking.ask(asking.question("train", round=round))


def ledger(folder: Path) -> Ledger:
    return open_ledger(standing(Journal(folder / "alice.journal.jsonl").read()))


def costs_of(folder: Path) -> list[Cost]:
    """Costs of the rounds, in order."""
    entries = Journal(folder / "alice.journal.jsonl").read()
    return [entry.charge.cost for entry in entries if entry.charge and entry.kind == "train"]


def spent(folder: Path) -> float:
    return ledger(folder).epsilon(1e-3)


def kinds(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "alice.journal.jsonl").read_text().splitlines()]


# --- The ledger.


def test_rounds_of_one_noise_are_composed_and_those_of_several_add_up() -> None:
    one, other = Cost(0.1, 1.2, 30), Cost(0.25, 2.0, 10)
    assert Ledger([]).epsilon(1e-5) == 0
    assert Ledger([one, one]).epsilon(1e-5) == epsilon(0.1, 1.2, 60, 1e-5)
    both = [a + b for a, b in zip(renyi(*one), renyi(*other), strict=True)]
    assert Ledger([one, other]).epsilon(1e-5) == renyi_epsilon(both, 1e-5)
    assert Ledger([one]).plus(other).epsilon(1e-5) > max(Ledger([one]).epsilon(1e-5), Ledger([other]).epsilon(1e-5))


def test_what_was_told_without_noise_is_told_for_good(tmp_path: Path) -> None:
    plain = make_recipe(training={"engine": "reference"}, data={"documents_per_client": None})
    worker = client(tmp_path)
    asking = server(worker, plain)
    asking.meet()
    assert "report" in asking.train()
    assert asking.evaluate()["score"]
    assert spent(tmp_path) == float("inf")
    assert ledger(tmp_path).unbounded == 3
    for policy, word in ((owner(max_epsilon=8.0), "privacy"), (owner(), None)):
        assert server(client(tmp_path, policy)).meet().get("refused") == word


def line(kind: str, task: str, **told: Any) -> str:
    return json.dumps({"when": "2026-11-26T00:00:00+00:00", "kind": kind, "task": task, "run": "r", **told}) + "\n"


def round_of(task: str, unit: str = "document", delta: float = 1e-3) -> str:
    """A line of a journal for a round with a bound."""
    return line("train", task, privacy={"rate": 0.1, "noise": 2.0, "steps": 10, "unit": unit, "delta": delta})


def test_what_protects_another_unit_is_no_bound(tmp_path: Path) -> None:
    """Of an author with many documents, a bound for each of them says little; and how many rows there are is told."""
    path = tmp_path / "alice.journal.jsonl"
    path.write_text(line("meet", "m", hides=True, unit="author") + round_of("a", "author") + round_of("b", "author"))
    entries = standing(Journal(path).read())
    once = Cost(0.1, 2.0, 10)
    assert open_ledger(entries, "author").epsilon(1e-3) == Ledger([once, once]).epsilon(1e-3)
    assert open_ledger(entries).unbounded == 3
    by_author = Policy(privacy=PrivacyPolicy(unit="author", delta=1e-3, max_epsilon=9.0))
    assert "of all documents of any one author together is spent (δ = 0.001)" in "\n".join(read_aloud(path, by_author))
    assert "ε = ∞ of any one document: 3 answers of this journal had no noise for it" in "\n".join(
        read_aloud(path, owner(max_epsilon=9.0))
    )
    # A recipe's question alone tells how many units it has.
    path.write_text(line("meet", "m", hides=True))
    assert open_ledger(Journal(path).read(), "author").unbounded == 1
    assert open_ledger(Journal(path).read()).epsilon(1e-3) == 0


def test_without_a_policy_a_ledger_is_told_at_the_delta_of_the_recipes(tmp_path: Path) -> None:
    path = tmp_path / "alice.journal.jsonl"
    path.write_text(round_of("a"))
    one, both = Ledger([Cost(0.1, 2.0, 10)]), Ledger([Cost(0.1, 2.0, 20)])
    assert f"ε = {one.epsilon(1e-3):.3g} of any one document is spent (δ = 0.001), without a limit" in "\n".join(
        read_aloud(path, Policy())
    )
    path.write_text(round_of("a") + round_of("b", delta=1e-5))
    told = "\n".join(read_aloud(path, Policy()))
    assert f"ε = {both.epsilon(1e-5):.3g} of any one document is spent" in told
    assert "(δ = 1e-05, the smallest of 2 that recipes had)" in told
    strict = Policy(privacy=PrivacyPolicy(delta=1e-4))
    assert "(δ = 0.0001), without a limit" in "\n".join(read_aloud(path, strict)), "the owner's own is always theirs"


def test_a_damaged_cost_ends_it_with_the_lines_number(tmp_path: Path) -> None:
    good = {"when": "2026-11-26T00:00:00+00:00", "kind": "train", "task": "a"}
    for told in (
        {"rate": 0.1, "noise": 1.0, "steps": -3},
        {"rate": 2, "noise": 1.0, "steps": 3},
        {"rate": 0.1, "noise": float("nan"), "steps": 3},
        {"rate": 0.1, "steps": 3},
        {"rate": 0.1, "noise": "1", "steps": 3},
        {"rate": 0.1, "noise": 1.0, "steps": 1e400},
        {"rate": 0.1, "noise": 1.0, "steps": 3, "delta": 0},
        {"rate": 0.1, "noise": 1.0, "steps": 3, "delta": float("nan")},
        {"rate": 0.1, "noise": 1.0, "steps": 3, "delta": "1e-5"},
        [],
        None,
    ):
        path = tmp_path / "a.jsonl"
        path.write_text(f"{json.dumps(good)}\n{json.dumps({**good, 'privacy': told})}\n")
        with pytest.raises(DeploymentError, match="line 2 is not an entry of a journal"):
            Journal(path).read()


# --- The policy.


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ("max_epsilon = 0.0", r"policy\.toml:2: `privacy\.max_epsilon`"),
        ("max_epsilon = -1", r"policy\.toml:2: `privacy\.max_epsilon`"),
        ("delta = 1.0", r"policy\.toml:2: `privacy\.delta`"),
        ("delta = nan", r"policy\.toml:2: `privacy\.delta`"),
        ("max_epsilon = inf", r"policy\.toml:2: `privacy\.max_epsilon`"),
        ("min_noise_multiplier = 'much'", r"policy\.toml:2: `privacy\.min_noise_multiplier`"),
        ("max_epsilom = 1.0", "unknown key `privacy.max_epsilom`.*did you mean.*max_epsilon"),
    ],
)
def test_a_key_that_is_none_is_named(told: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(f"[privacy]\n{told}\n")
    with pytest.raises(RecipeError, match=why):
        load_policy(tmp_path / "policy.toml")


def test_a_policy_goes_to_the_worker_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("min_tokens = 5\n[privacy]\nmax_epsilon = 8\n")
    policy = load_policy(tmp_path / "policy.toml")
    assert policy.privacy
    assert (policy.privacy.max_epsilon, policy.privacy.delta, policy.privacy.unit) == (8.0, 1e-6, "document")
    (tmp_path / "handed.toml").write_text(policy_to_toml(with_options(policy, text="story")))
    assert load_policy(tmp_path / "handed.toml") == policy.model_copy(update={"text": "story"})
    (tmp_path / "empty.toml").write_text("[privacy]\n")
    assert load_policy(tmp_path / "empty.toml").privacy == PrivacyPolicy()


PLAIN = make_recipe(data={"documents_per_client": None})


@pytest.mark.parametrize(
    ("keys", "recipe", "why"),
    [
        ({}, PLAIN, "allows no recipe without [privacy]"),
        ({}, private(noise="seed"), "allows no noise of a recipe's seed"),
        (
            {"unit": "patient"},
            private(),
            'wants all rows of one "patient" together protected, and this recipe protects',
        ),
        (
            {},
            private(unit="author"),
            'wants each document protected, and this recipe protects all rows of one "author"',
        ),
        ({"unit": "patient"}, private(unit="author"), 'this recipe protects all rows of one "author" together'),
    ],
)
def test_what_bounds_too_little_is_refused_before_anything_is_read(
    keys: dict[str, Any], recipe: Recipe, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker("alice", tmp_path / "not there", owner(**keys), Journal(tmp_path / "alice.journal.jsonl"))
    assert server(worker, recipe).meet() == {"name": "alice", "refused": "privacy"}
    assert why in capsys.readouterr().out


def test_a_chat_template_of_the_servers_is_refused_in_a_private_run_alone(tmp_path: Path) -> None:
    """It can fail, or take its time, at a document that it chooses: the noise covers neither."""
    data = {"messages": "messages", "chat_template": "{{ messages }}", "documents_per_client": None}
    sent = private().model_copy(update={"data": make_recipe(data=data).data})
    own, servers = Policy(chat_template="{{ mine }}"), Policy(chat_template="server")
    assert [refusal.key for refusal in find_refusals(servers, sent)] == ["chat_template"]
    assert [*find_refusals(own, sent)] == [*find_refusals(servers, make_recipe(data=data))] == []


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"max_epsilon": 3.0}, "allows ε 3 in all (δ = 0.001): 0 is spent, and this would make it 4"),
        ({"max_epsilon_a_run": 2.5}, "allows ε 2.5 a recipe (δ = 0.001): 0 is spent, and this would make it 4"),
    ],
)
def test_a_run_that_asks_for_too_much_is_refused_before_the_model_is_opened(
    keys: dict[str, Any],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    open_source = client_documents.open_source

    def watched(*given: Any, **more: Any) -> Any:
        opened.append(given)
        return open_source(*given, **more)

    monkeypatch.setattr(client_documents, "open_source", watched)
    assert server(client(tmp_path, owner(**keys))).meet() == {"name": "alice", "refused": "privacy"}
    told = capsys.readouterr().out
    assert why in told
    assert f"change privacy.{next(iter(keys))} in" in told
    assert not opened
    assert "refused" not in server(client(tmp_path, owner(max_epsilon=4.1))).meet()
    assert opened


def test_the_larger_noise_is_taken_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    least = calibrate(3 / 20, ROUNDS * 7, 4.0, 1e-3)
    assert server(client(tmp_path / "a", owner(min_noise_multiplier=least / 2))).meet()["noise_multiplier"] == least
    assert "is taken" not in capsys.readouterr().out
    worker = client(tmp_path / "b", owner(min_noise_multiplier=9.0))
    assert server(worker).meet()["noise_multiplier"] == 9.0
    assert f"min_noise_multiplier = 9 is taken: the recipe's would be {least:.3g}" in capsys.readouterr().out
    train(worker)
    assert spent(tmp_path / "b") == epsilon(3 / 20, 9.0, 7, 1e-3)


def test_a_delta_that_gives_a_document_away_is_refused(tmp_path: Path) -> None:
    assert server(client(tmp_path), private(delta=0.1)).meet()["refused"] == "recipe"
    assert server(client(tmp_path, texts=TEXTS[:1])).meet()["refused"] == "policy", "fewer than min_documents"


def test_a_delta_of_the_owners_that_gives_a_document_away_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server(client(tmp_path, Policy(privacy=PrivacyPolicy(delta=0.06)))).meet()["refused"] == "privacy"
    assert "has δ = 0.06, more than one over the 20 documents here" in capsys.readouterr().out
    assert "refused" not in server(client(tmp_path, Policy(privacy=PrivacyPolicy(delta=0.05)))).meet()


# --- All that one author wrote as a unit.

AUTHORS = 10
BY_AUTHOR = {"delta": 1e-3, "unit": "author"}


def client_of_authors(folder: Path, policy: Policy) -> Worker:
    """Start a client whose 20 rows are those of ten authors."""
    worker = client(folder, policy)
    rows = [{"text": text, "author": f"a{n % AUTHORS}"} for n, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return worker


def test_an_owner_of_authors_sees_what_is_told_of_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, policy = private(unit="author"), Policy(privacy=PrivacyPolicy(**BY_AUTHOR, max_epsilon=4.5))
    worker = client_of_authors(tmp_path, policy)
    facts = server(worker, recipe).meet()
    assert facts["train_documents"] == facts["blocks"] == AUTHORS
    rate, steps = 3 / AUTHORS, -(-AUTHORS // 3)
    noise = calibrate(rate, ROUNDS * steps, 4.0, 1e-3)
    assert f'10 values of "author", whatever they say; a noise multiplier of {noise:.3g}' in capsys.readouterr().out
    told = train(worker, 1, recipe).manifest["report"]
    assert (told["examples"], told["steps"]) == (AUTHORS, steps)
    assert costs_of(tmp_path) == [Cost(rate, noise, steps)]
    so_far = f"ε = {epsilon(rate, noise, steps, 1e-3):.3g} of all documents of any one author together is spent"
    assert so_far in capsys.readouterr().out
    assert so_far in "\n".join(read_aloud(tmp_path / "alice.journal.jsonl", policy))
    (round,) = [json.loads(line) for line in (tmp_path / "alice.journal.jsonl").read_text().splitlines()][1:2]
    assert (round["privacy"]["unit"], round["privacy"]["units"]) == ("author", AUTHORS)


def test_what_was_told_of_documents_counts_against_a_bound_of_authors(tmp_path: Path) -> None:
    train(client_of_authors(tmp_path, owner(max_epsilon=9.0)), 1)
    for most, word in ((9.0, "privacy"), (None, None)):
        policy = Policy(privacy=PrivacyPolicy(**BY_AUTHOR, max_epsilon=most))
        assert server(client_of_authors(tmp_path, policy), private(unit="author")).meet().get("refused") == word


def test_a_delta_that_gives_an_author_away_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy(privacy=PrivacyPolicy(unit="author", delta=0.11))
    assert server(client_of_authors(tmp_path, policy), private(unit="author")).meet()["refused"] == "privacy"
    assert 'has δ = 0.11, more than one over the 10 values of "author" here' in capsys.readouterr().out


def test_a_server_can_not_ask_for_noise_that_is_its_own_to_add(tmp_path: Path) -> None:
    asking = server(client(tmp_path))
    told = {**asking.told["privacy"], "unit": "client"}
    assert asking.meet({"privacy": told})["refused"] == "question"


# --- What is spent.


def test_counts_that_were_told_without_a_bound_are_told_for_good(tmp_path: Path) -> None:
    """The tokens of all documents, told before and after one of them is added, are that one's own length."""
    worker = client(tmp_path)
    assert server(worker).meet()["tokens"] == 0
    assert spent(tmp_path) == 0
    assert server(worker, PLAIN).meet()["tokens"] > 0
    assert spent(tmp_path) == float("inf")
    assert server(client(tmp_path, owner(max_epsilon=9.0))).meet()["refused"] == "privacy"


def test_a_refused_recipe_without_a_bound_tells_nothing(tmp_path: Path) -> None:
    assert server(client(tmp_path, owner()), PLAIN).meet()["refused"] == "privacy"
    assert spent(tmp_path) == 0


def test_each_round_is_charged_before_it_is_trained_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = calibrate(3 / 20, ROUNDS * 7, 4.0, 1e-3)
    worker = client(tmp_path, owner(max_epsilon=4.5))
    server(worker).meet()
    shown = capsys.readouterr().out
    assert f"told      20 rows, whatever they say; a noise multiplier of {noise:.3g}" in shown
    assert "ε = 0 of any one document is spent (δ = 0.001), 4.5 is left; 3 rounds of this recipe may still be" in shown
    for round in range(1, ROUNDS + 1):
        assert "report" in train(worker, round, moved=round).manifest
        so_far = epsilon(3 / 20, noise, 7 * round, 1e-3)
        assert spent(tmp_path) == so_far
        left = f"{ROUNDS - round} round{'s' * (round != 2)} of this recipe may still be trained"
        assert f"ε = {so_far:.3g} of any one document is spent (δ = 0.001), {4.5 - so_far:.3g} is left; {left}" in (
            capsys.readouterr().out
        )
    line = json.loads((tmp_path / "alice.journal.jsonl").read_text().splitlines()[1])
    assert line["privacy"] == {
        "unit": "document", "units": 20, "batch": 3, "max_norm": 1.0, "delta": 1e-3,
        "rate": 0.15, "noise": noise, "steps": 7,
    }  # fmt: skip
    assert len(line["documents"]) == 64
    assert kinds(tmp_path) == ["meet", *["train", "answer"] * ROUNDS]
    aloud = "\n".join(read_aloud(tmp_path / "alice.journal.jsonl", owner(max_epsilon=4.5)))
    assert (
        f"ε = {spent(tmp_path):.3g} of any one document is spent (δ = 0.001), {4.5 - spent(tmp_path):.3g} is" in aloud
    )
    assert "answer written" in aloud


def test_runs_add_up_until_the_owner_allows_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = owner(max_epsilon=5.3)
    worker = client(tmp_path, policy)
    for round in range(1, ROUNDS + 1):
        train(worker, round)
    first_run = spent(tmp_path)
    assert server(client(tmp_path, policy), private(seed=8)).meet()["refused"] == "privacy"
    assert (
        f"allows ε 5.3 in all (δ = 0.001): {first_run:.3g} is spent, and this would make it" in capsys.readouterr().out
    )
    # A smaller run may still take part, by its own noise.
    small = private(seed=8, epsilon=1.0)
    assert "refused" not in server(client(tmp_path, policy), small).meet()
    train(client(tmp_path, policy), 1, small)
    assert first_run < spent(tmp_path) <= 5.3


def test_a_round_that_would_go_beyond_is_refused_though_its_run_was_begun(tmp_path: Path) -> None:
    """Between two rounds another run of the same journal took what was left."""
    policy = owner(max_epsilon=4.5)
    worker = client(tmp_path, policy)
    assert "report" in train(worker, 1).manifest
    (cost,) = costs_of(tmp_path)
    told = {"recipe": "another", "run": "x", "privacy": cost._replace(steps=28)._asdict()}
    Journal(tmp_path / "alice.journal.jsonl").note("another", told)
    assert train(worker, 2).manifest["refused"] == "privacy"
    assert kinds(tmp_path) == ["meet", "train", "answer", "train"]


def test_two_limits_that_refuse_are_both_named() -> None:
    refused = [
        *judge(PrivacyPolicy(**OWNER, max_epsilon=1, max_epsilon_a_run=1), Ledger([]), Ledger([]), Cost(1, 1, 9))
    ]
    assert [key for key, _ in refused] == ["privacy.max_epsilon", "privacy.max_epsilon_a_run"]


def test_a_rehearsal_says_what_a_recipe_would_spend(tmp_path: Path) -> None:
    client(tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(private()))
    (tmp_path / "policy.toml").write_text("[privacy]\nmax_epsilon = 3.0\ndelta = 1e-3\n")
    for policy, well in ((tmp_path / "policy.toml", False), (None, True)):
        found = rehearse(
            tmp_path / "no.kit",
            tmp_path / "rows.jsonl",
            policy,
            {},
            tmp_path / "a.jsonl",
            str(tmp_path / "recipe.toml"),
        )
        (finding,) = [one for one in found if one.what == "privacy"]
        assert finding.well == well, finding
        assert "asks for ε = " in finding.found
        assert ("may have 1 of 3 rounds" in finding.found) == (not well), finding.found


def privacy_of(folder: Path, recipe: Recipe, policy: str = "") -> Any:
    """Return what a rehearsal finds of a recipe's privacy, with a client's rows and journal."""
    (folder / "recipe.toml").write_text(recipe_to_toml(recipe))
    (folder / "policy.toml").write_text(policy)
    journal = folder / "alice.journal.jsonl"
    asked = folder / "policy.toml", {}, journal, str(folder / "recipe.toml")
    found = rehearse(folder / "no.kit", folder / "rows.jsonl", *asked)
    (finding,) = [one for one in found if one.what == "privacy"]
    return finding


def test_a_rehearsal_counts_authors_and_not_their_rows(tmp_path: Path) -> None:
    client_of_authors(tmp_path, Policy())
    by_author = '[privacy]\nunit = "author"\ndelta = 1e-3\n'
    finding = privacy_of(tmp_path, private(unit="author"), by_author)
    assert finding.well, finding
    noise = calibrate(3 / AUTHORS, ROUNDS * 4, 4.0, 1e-3)
    assert "of all documents of any one author together is spent (δ = 0.001), without a limit" in finding.found
    assert (
        f"this recipe has a noise of {noise:.3g}, asks for ε = 4 at this δ, and may have 3 of 3 rounds" in finding.found
    )
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('{"text": "of nobody"}\n')
    finding = privacy_of(tmp_path, private(unit="author"), by_author)
    assert finding.found.startswith("privacy.unit: rows.jsonl:21: without a value in column author")


def test_a_rehearsal_says_when_units_are_counted(tmp_path: Path) -> None:
    """Conversations are read by the model's tokenizer, which a rehearsal does not fetch."""
    client_of_authors(tmp_path, Policy())
    data = {"messages": "messages", "chat_template": "tokenizer", "documents_per_client": None}
    chats = private(unit="author").model_copy(update={"data": make_recipe(data=data).data})
    by_author = '[privacy]\nunit = "author"\ndelta = 1e-3\n'
    assert privacy_of(tmp_path, chats, by_author).found == (
        "what it would tell of all documents of any one author together follows from the number of values of"
        ' "author": they are counted when its run begins'
    )
    (tmp_path / "rows.jsonl").unlink()
    assert privacy_of(tmp_path, private(unit="author"), by_author).found.startswith("--data")


@pytest.mark.long
def test_a_rehearsal_counts_the_rounds_of_the_recipe_that_were_trained(tmp_path: Path) -> None:
    """Else its owner is told of a refusal that does not come, or of rounds that are over."""
    recipe, policy = private(), "[privacy]\nmax_epsilon = 4.1\ndelta = 1e-3\n"
    for round in range(1, ROUNDS + 1):
        train(client(tmp_path, owner(max_epsilon=4.1)), round)
        finding, left = privacy_of(tmp_path, recipe, policy), ROUNDS - round
        were = "was" if round == 1 else "were"
        assert f"and may have {left} of 3 rounds, of which {round} {were} trained before" in finding.found
        assert finding.well == (left > 0)
        asked = ledger(tmp_path).epsilon(1e-3)
        assert f"ε = {asked:.3g} of any one document is spent" in finding.found
    assert finding.mend.startswith("the server's owner begins a run of another seed or name")
    other = privacy_of(tmp_path, private(seed=8), policy)
    assert not other.well
    assert "asks for ε = 4 at this δ, and may have 0 of 3 rounds" in other.found


@pytest.mark.long
def test_a_run_by_a_column_is_served_and_a_rehearsal_knows_it_again(tmp_path: Path) -> None:
    recipe = make_recipe(
        data={"clients": 2, "documents_per_client": 24, "client_holdout": 0.0}, privacy={"epsilon": 8.0, "delta": 1e-3,
        "unit": "package"},
    )  # fmt: skip
    bound = PrivacyPolicy(unit="package", delta=1e-3)
    link = link_of(recipe, tmp_path, policy=Policy(min_documents=2, privacy=bound))
    told = serve_here(recipe, link, tmp_path / "run").plan["privacy"]
    assert told["unit"] == "package"
    data, name = link.owners["client-0"].data, "client-0"
    rows = [json.loads(row) for row in (data / "train.jsonl").read_text().splitlines()]
    assert told["clients"]["0"]["units"] == len({row["package"] for row in rows}) < len(rows)
    assert "Values of package" in (tmp_path / "run" / "report.md").read_text()
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    (tmp_path / "policy.toml").write_text('min_documents = 2\n[privacy]\nunit = "package"\ndelta = 1e-3\n')
    journal = tmp_path / "clients" / name / f"{name}.journal.jsonl"
    asked = tmp_path / "policy.toml", {}, journal, str(tmp_path / "recipe.toml")
    (finding,) = [one for one in rehearse(tmp_path / "no.kit", data, *asked) if one.what == "privacy"]
    assert "may have 0 of 2 rounds, of which 2 were trained before" in finding.found


def test_a_rehearsal_knows_a_recipe_whose_commit_the_server_named(tmp_path: Path) -> None:
    told = pack_recipe(private())
    pinned = {**told, "model": {**told["model"], "revision": "c" * 40}}
    other = {**told, "seed": 8}
    path = tmp_path / "alice.journal.jsonl"
    path.write_text(line("meet", "m", hides=True, alike=hash_alike(pinned)).replace('"run": "r"', '"run": "pinned"'))
    entries = Journal(path).read()
    assert find_run(entries, told) == find_run(entries, {**told}) == "pinned"
    assert find_run(entries, other) == hash_json(other)
    assert find_run(entries, {**told, "model": {**told["model"], "revision": "d" * 40}}) != "pinned", "it says which"
    assert find_run(entries, pinned) == hash_json(pinned)


def test_a_rehearsal_says_that_join_takes_no_number_of_documents(tmp_path: Path) -> None:
    """Its owner would be told that all is well, and be refused once the server asks."""
    client(tmp_path)
    told = private()
    recipe = told.model_copy(update={"data": told.data.model_copy(update={"documents_per_client": 8})})
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(recipe))
    found = rehearse(
        tmp_path / "no.kit", tmp_path / "rows.jsonl", None, {}, tmp_path / "a.jsonl", str(tmp_path / "recipe.toml")
    )
    (finding,) = [one for one in found if one.what == "privacy"]
    assert not finding.well
    assert finding.found.startswith("data.documents_per_client: ")


def test_a_rehearsal_says_that_join_would_not_take_the_secret(tmp_path: Path) -> None:
    """Where there is none yet, none is made: a rehearsal leaves nothing behind."""
    secret = tmp_path / "a.secret"
    for state, told in ((None, "0 of"), (b"s" * 32, "0 of"), (b"short", "not a secret"), (b"t" * 32, "by others")):
        if state:
            secret.write_bytes(state)
            secret.chmod(0o644 if told == "by others" else 0o600)
        found = rehearse(tmp_path / "no.kit", None, None, {}, tmp_path / "a.jsonl", None)
        (finding,) = [one for one in found if one.what == "journal"]
        assert told in finding.found
        assert finding.well == (told == "0 of")
        assert secret.exists() == bool(state)


def test_a_rehearsal_leaves_a_policy_that_is_wrong_to_its_own_owner(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[privacy]\nunit = 5\n")
    found = rehearse(tmp_path / "no.kit", None, tmp_path / "policy.toml", {}, tmp_path / "a.jsonl", None)
    (finding,) = [one for one in found if one.what == "policy"]
    assert "policy.toml:2: `privacy.unit`" in finding.found
    assert finding.mend == "change it there"


# --- One task, one answer.


def test_a_task_that_is_asked_again_has_the_same_answer_and_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = train(client(tmp_path))
    once = spent(tmp_path)
    again = train(client(tmp_path))  # another process, which has nothing in memory
    assert (again.payload, again.manifest) == (given.payload, given.manifest)
    assert "costs nothing more" in capsys.readouterr().out
    assert spent(tmp_path) == once > 0
    assert kinds(tmp_path).count("train") == 1
    assert (tmp_path / "alice.journal.answer").stat().st_mode & 0o777 == 0o600


def test_an_older_task_whose_answer_is_gone_has_other_noise_and_costs_anew(tmp_path: Path) -> None:
    given = train(client(tmp_path), 1)
    train(client(tmp_path), 2)
    twice = spent(tmp_path)
    again = train(client(tmp_path), 1)
    assert again.payload != given.payload
    assert spent(tmp_path) > twice
    assert kinds(tmp_path).count("train") == 3


@pytest.mark.parametrize("damage", first([b"\0" * 100, b"", None]))
def test_a_damaged_answer_is_none(damage: bytes | None, tmp_path: Path) -> None:
    given = train(client(tmp_path))
    path = tmp_path / "alice.journal.answer"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert train(client(tmp_path)).payload != given.payload, "it has other noise"
    assert kinds(tmp_path).count("train") == 2


PLACES = ("answer.written", "training.stepped", "round.noted", "answer.noted")


@pytest.mark.parametrize("place", first(PLACES))
def test_what_ends_at_a_failpoint_gives_the_same_answer_when_it_is_asked_again(place: str, tmp_path: Path) -> None:
    whole = [train(client(tmp_path / "whole"), round) for round in (1, 2)]
    for round in (1, 2):
        failpoints.arm(f"{place}=raise")
        try:
            assert train(client(tmp_path / "parts"), round).manifest["refused"] == "internal"
        finally:
            failpoints.arm("")
        begun = json.loads((tmp_path / "parts" / "alice.journal.jsonl").read_text().splitlines()[-1])
        assert (begun["kind"], begun["round"]) in (("train", round), ("answer", round)), "it is charged by then"
        assert train(client(tmp_path / "parts"), round).payload == whole[round - 1].payload
    assert spent(tmp_path / "parts") == spent(tmp_path / "whole")
    assert ledger(tmp_path / "parts").epsilon(1e-3) == ledger(tmp_path / "whole").epsilon(1e-3)


@pytest.mark.long
def test_an_answer_that_was_kept_when_it_ended_is_known_once_it_has_left(tmp_path: Path) -> None:
    """Else its task would have the same noise again, once another answer has taken its place."""
    failpoints.arm("answer.written=raise")
    try:
        train(client(tmp_path), 1)
    finally:
        failpoints.arm("")
    given = train(client(tmp_path), 1)
    train(client(tmp_path), 2)
    assert train(client(tmp_path), 1).payload != given.payload
    assert kinds(tmp_path).count("train") == 3


def test_a_round_that_ended_and_is_trained_with_other_noise_is_charged_as_both(tmp_path: Path) -> None:
    failpoints.arm("training.stepped=raise")
    try:
        train(client(tmp_path, owner(min_noise_multiplier=9.0)))
    finally:
        failpoints.arm("")
    assert "report" in train(client(tmp_path)).manifest
    costs = costs_of(tmp_path)
    assert len(costs) == 2
    assert spent(tmp_path) == Ledger(costs).epsilon(1e-3) > Ledger(costs[1:]).epsilon(1e-3)


def test_an_answer_that_can_not_be_kept_does_not_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = client(tmp_path)
    (tmp_path / "alice.journal.answer").mkdir()
    assert train(worker).manifest["refused"] == "journal"
    assert "alice.journal.answer: the last answer can't be read" in capsys.readouterr().out


def test_late_work_is_not_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.deployment.client import worker as workers
    from fedloom.errors import LateError

    def too_late(*given: Any) -> Any:
        raise LateError("late")

    with monkeypatch.context() as patch:
        patch.setattr(workers.ClientModel, "train", too_late)
        assert train(client(tmp_path)).manifest["refused"] == "late"
    assert spent(tmp_path) == 0
    assert "report" in train(client(tmp_path)).manifest


@pytest.mark.long
def test_noise_is_of_all_that_an_answer_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def watched(secret: bytes, *facts: str) -> bytes:
        keys.append(derive_key(secret, *facts))
        return keys[-1]

    monkeypatch.setattr(client_model, "derive_key", watched)

    def key(name: str, recipe: Recipe | None = None, policy: Policy | None = None, **how: Any) -> bytes:
        (tmp_path / name).mkdir(exist_ok=True)
        if secret := how.pop("secret", None):
            (tmp_path / name / "alice.journal.secret").write_bytes(secret)
            (tmp_path / name / "alice.journal.secret").chmod(0o600)
        worker = client(tmp_path / name, policy, how.pop("texts", TEXTS))
        assert "report" in train(worker, how.pop("round", 1), recipe, **how).manifest
        return keys[-1]

    found = {
        "as it is": key("a"),
        "round": key("b", round=2),
        "adapter": key("c", moved=1e-6),
        "documents": key("d", texts=[*TEXTS[:-1], "another text of a patient, of as many words as any"]),
        "noise": key("e", policy=owner(min_noise_multiplier=9.0)),
        "recipe": key("f", private(max_norm=2.0)),
        "secret": key("g", secret=b"o" * 32),
    }
    assert key("b", round=1) == found["as it is"], "and of nothing else"
    (tmp_path / "b" / "alice.journal.answer").unlink()
    found["an answer that is gone"] = key("b", round=1)
    assert len(set(found.values())) == len(found)


# --- A server that lies.


def test_a_round_that_is_asked_twice_with_another_adapter_has_other_noise_and_both_count(tmp_path: Path) -> None:
    worker = client(tmp_path)
    one, other = (train(worker, 1, moved=moved) for moved in (0.0, 1e-5))
    change = torch.frombuffer(bytearray(one.payload), dtype=torch.float32) - torch.frombuffer(
        bytearray(other.payload), dtype=torch.float32
    )
    assert change.abs().max() > 1e-3, "the difference of both is noise, and not of the documents alone"
    assert ledger(tmp_path).epsilon(1e-3) == epsilon(*ledger_of_rounds(tmp_path, 2), 1e-3)


def ledger_of_rounds(folder: Path, rounds: int) -> tuple[float, float, int]:
    cost = costs_of(folder)[0]
    return cost.rate, cost.noise, rounds * cost.steps


def test_no_more_rounds_are_trained_than_the_recipe_says_whatever_they_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = private()
    for number in range(ROUNDS):
        assert "report" in train(client(tmp_path), 1, recipe, moved=number / 100).manifest
    whole = spent(tmp_path)
    assert whole <= 4.0, "the recipe's promise"
    for ask in (
        lambda: train(client(tmp_path), 1, recipe, moved=9.0),
        lambda: train(client(tmp_path), 2, recipe),
        lambda: train(client(tmp_path), 1, recipe),  # its answer is gone
    ):
        assert ask().manifest["refused"] == "privacy"
    assert "3 rounds of this recipe were trained, and its ε is for no more" in capsys.readouterr().out
    assert train(client(tmp_path), 4, recipe).manifest["refused"] == "question"
    assert spent(tmp_path) == whole
    assert "report" in train(client(tmp_path), 1, recipe, moved=(ROUNDS - 1) / 100).manifest, "the last, once more"


def test_less_noise_in_a_task_is_another_recipe_and_is_charged_as_it_is(tmp_path: Path) -> None:
    worker = client(tmp_path, owner(max_epsilon=4.5))
    assert "report" in train(worker).manifest
    asking = server(worker)
    honest = asking.question("train", round=2)
    for changes in ({"noise_multiplier": 0.1, "epsilon": None}, {"epsilon": 900.0}):
        told = {key: value for key, value in {**asking.told["privacy"], **changes}.items() if value is not None}
        recipe = {**asking.told, "privacy": told}
        answer = asking.ask(replace(honest, manifest={**honest.manifest, "recipe": recipe}))
        assert answer.manifest == {"name": "alice", "refused": "privacy"}
    without = {key: value for key, value in asking.told.items() if key != "privacy"}
    answer = asking.ask(replace(honest, manifest={**honest.manifest, "recipe": without}))
    assert answer.manifest == {"name": "alice", "refused": "privacy"}
    assert kinds(tmp_path).count("train") == 1


def test_a_thousand_questions_for_a_score_are_told_nothing_and_leave_nothing(tmp_path: Path) -> None:
    texts = [*TEXTS]
    worker = client(tmp_path, Policy(), texts)
    recipe = make_recipe(
        training={"engine": "reference"}, data={"documents_per_client": None}, privacy={"epsilon": 4.0, "delta": 1e-3}
    )
    asking = server(worker, recipe)
    asking.meet()
    for number in range(1000):
        question = asking.question("evaluate")
        payload = torch.full((len(question.payload) // 4,), float(number)).numpy().tobytes()
        assert asking.ask(replace(question, payload=payload)).manifest == {"score": None, "progress": []}
    assert kinds(tmp_path) == ["meet"]


# --- The same as on one machine.


@pytest.mark.parametrize("unit", first(["document", "package"]))
def test_noise_of_the_seed_makes_the_update_of_a_local_run_and_is_said_to_be_none(
    unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = private(rounds=1, noise="seed", unit=unit).model_copy(
        update={"data": make_recipe(data={"clients": 1, "documents_per_client": 12, "client_holdout": 0.0}).data}
    )
    # A run says so to its clients, whether they are here or there; and noise is of all that a task says.
    at_once = recipe.training.model_copy(update={"clients_at_once": 1})
    recipe = recipe.model_copy(update={"training": at_once})
    (split,) = write_splits(recipe, tmp_path / "split", Observer())
    policy = Policy(columns=("package",), min_documents=2)
    worker = Worker("alice", split, policy, Journal(tmp_path / "alice.journal.jsonl"))
    asking = server(worker, recipe)
    answer = asking.ask(asking.question("train", round=1, seed=recipe.seed))
    local = run(recipe, tmp_path / "local", Observer())
    reported = {
        key: value for key, value in answer.manifest["report"].items() if "seconds" not in key and value is not None
    }
    assert reported == {key: local.clients[0][key] for key in reported}  # type: ignore[literal-required]
    assert "NOT PRIVATE" in capsys.readouterr().out
    assert spent(tmp_path) == float("inf")
