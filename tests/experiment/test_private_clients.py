"""A run that protects whole clients: what is promised, what is on record, and what would break it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import killed_runs
from support.marks import first
from support.quick_runs import attempt, make_recipe, result_of

from fedloom.deployment.server.serving import check_deployable
from fedloom.errors import FedloomError, RecipeError, TrainingError
from fedloom.experiment import recorder
from fedloom.experiment.private import SECRET, Account
from fedloom.experiment.run import plan, run
from fedloom.federation.aggregation import STRATEGIES
from fedloom.monitoring.observer import Observer
from fedloom.privacy.accounting import calibrate, epsilon
from fedloom.privacy.central import CentralNoise, CentralTerms, RoundNoise
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Strategy
from fedloom.records.privacy import NOT_PRIVATE
from fedloom.records.run import read_run
from fedloom.training.jobs import ClientJob

CLIENTS = {"unit": "client", "epsilon": 8.0, "delta": 1e-2}
EQUAL = {"kind": "fedavg", "weight_by": "equal"}


def private(folder: Path, **changes: Any) -> Recipe:
    """A run with twelve clients, of which each round draws half, and whose secret is the recipe's seed."""
    return make_recipe(
        folder,
        data={"clients": 12, "client_holdout": 0.0, "central_holdout": 4, **changes.pop("data", {})},
        training={"optimizer_state": "reset", **changes.pop("training", {})},
        federation={"rounds": 4, "fraction": 0.5, "strategy": EQUAL, **changes.pop("federation", {})},
        privacy={**CLIENTS, "noise": "seed", **changes.pop("privacy", {})},
        **changes,
    )


def test_a_plan_says_what_is_promised(tmp_path: Path) -> None:
    told = plan(private(tmp_path)).privacy
    terms = told["central"]
    assert (told["unit"], told["delta"], terms["clients"], terms["rate"]) == ("client", 1e-2, 12, 0.5)
    assert 7.9 < terms["epsilon"] == epsilon(0.5, terms["noise_multiplier"], 4, 1e-2) <= 8
    given = plan(private(tmp_path, privacy={"epsilon": None, "noise_multiplier": 5.0})).privacy["central"]
    assert given["noise_multiplier"] == given["change_noise"] == 5.0
    assert given["epsilon"] < terms["epsilon"]


def test_what_was_spent_is_on_record_round_by_round(tmp_path: Path) -> None:
    finished = run(private(tmp_path), tmp_path / "run", Observer())
    terms = finished.plan["privacy"]["central"]
    spent = [record["epsilon"] for record in finished.rounds]
    assert spent == [epsilon(0.5, terms["noise_multiplier"], round, 1e-2) for round in range(5)]
    sizes = {len(record["clients"]) for record in finished.rounds[1:]}
    assert len(sizes) > 1, "each client is drawn by itself"
    for record in finished.rounds:
        assert record["client_losses"] == {}
        assert "shares" not in record
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"have spent ε = {spent[-1]:.3g}" in text
    assert "give away adapters and their cards alone" in text
    assert NOT_PRIVATE in text


def test_a_card_tells_nothing_of_how_much_a_client_has(tmp_path: Path) -> None:
    """A card goes with its adapter, and the number of all documents is one client's, less those of the others."""
    run(private(tmp_path), tmp_path / "run", Observer())
    card = (tmp_path / "run" / "adapters" / "best" / "README.md").read_text()
    assert "for each client, over the whole run" in card
    assert "to train on" not in card
    assert "copies on two sides" not in card
    run(make_recipe(tmp_path), tmp_path / "plain", Observer())
    assert "to train on" in (tmp_path / "plain" / "adapters" / "best" / "README.md").read_text()


def test_a_round_may_draw_nobody(tmp_path: Path) -> None:
    finished = run(private(tmp_path, federation={"rounds": 6, "fraction": 0.05}), tmp_path / "run", Observer())
    empty = [record for record in finished.rounds[1:] if not record["clients"]]
    assert empty
    for record in empty:
        assert record["adapter_sha256"] != finished.rounds[record["round"] - 1]["adapter_sha256"], "noise moves it"
        assert record["bytes_up"] == 0
        assert record["epsilon"] > finished.rounds[record["round"] - 1]["epsilon"], "and it is accounted"
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("engine", first(["reference", "batched"]))
def test_a_client_that_explodes_ends_no_run(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To stop would tell of its documents: it counts as a client that changes nothing."""
    right = ClientJob.rate
    monkeypatch.setattr(ClientJob, "rate", lambda job, *step: 1e35 if job.client in (1, 2) else right(job, *step))
    recipe = private(tmp_path, training={"engine": engine}, federation={"fraction": 1.0})
    finished = run(recipe, tmp_path / "run", Observer())
    assert [record["lost"] for record in finished.rounds[1:]] == [[1, 2]] * 4
    assert finished.status["state"] == "done"


@pytest.mark.long
def test_updates_are_not_judged_by_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that the others would have had refused is scaled down as any other."""
    right = ClientJob.rate
    monkeypatch.setattr(
        ClientJob, "rate", lambda job, *step: 1e-9 * right(job, *step) * (1e12 if job.client == 1 else 1)
    )
    recipe = private(
        tmp_path,
        training={"optimizer": "sgd", "proximal_mu": 0.0},
        adapter={"dropout": 0.0},
        federation={"fraction": 1.0},
    )
    finished = run(recipe, tmp_path / "run", Observer())
    drifts = [report["drift"] for report in finished.clients if report["round"] == 1]
    assert max(drifts) > 10_000 * sorted(drifts)[len(drifts) // 2]
    assert not any(record["lost"] for record in finished.rounds)


def test_a_client_too_large_for_the_machine_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(job: ClientJob) -> None:
        raise MemoryError

    monkeypatch.setattr(ClientJob, "draw_batches", short)
    with pytest.raises(TrainingError, match="not enough memory"):
        run(private(tmp_path, federation={"on_quorum_lost": "skip"}), tmp_path / "run", Observer())


def test_the_norm_is_led_and_told(tmp_path: Path) -> None:
    recipe = private(
        tmp_path, data={"clients": 24}, federation={"fraction": 1.0}, privacy={"norm_quantile": 0.5, "max_norm": 10.0}
    )
    finished = run(recipe, tmp_path / "run", Observer())
    norms = [record["next_max_norm"] for record in finished.rounds]
    assert norms[0] == 10.0
    assert norms[-1] < norms[1] < 10.0, "all changes were shorter"
    terms = finished.plan["privacy"]["central"]
    assert terms["change_noise"] > terms["noise_multiplier"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "led to leave 50 % of them as they are" in text
    assert f"The norm was led from 10 to {norms[-1]:.3g}." in text


@pytest.mark.long
def test_two_private_runs_have_other_clients_and_other_noise(tmp_path: Path) -> None:
    runs = [run(private(tmp_path, privacy={"noise": "secret"}), tmp_path / name, Observer()) for name in "ab"]
    assert len({one.rounds[-1]["adapter_sha256"] for one in runs}) == 2
    assert len({json.dumps([record["clients"] for record in one.rounds]) for one in runs}) == 2
    assert NOT_PRIVATE not in (tmp_path / "a" / "report.md").read_text()
    assert not (tmp_path / "a" / SECRET).exists(), "removed once the run is done"


@pytest.mark.long
@pytest.mark.parametrize(
    "where", first(["training.stepped", "record.client", "round.aggregated", "state.renamed"], every=2)
)
@pytest.mark.parametrize("led", first([{"norm_quantile": 0.5}, {}]))
def test_a_run_that_goes_on_ends_where_it_would_have(
    where: str, led: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = {"kind": "fedadam", "learning_rate": 0.01, "weight_by": "equal"}
    recipe = private(
        tmp_path,
        data={"clients": 24},
        federation={"strategy": server},
        training={"optimizer_state": "keep"},
        privacy={"noise": "secret", **led},
    )
    with monkeypatch.context() as patch:
        patch.setattr("fedloom.experiment.private.os.urandom", lambda size: b"s" * 32)
        run(recipe, tmp_path / "whole", Observer())
        with pytest.raises(RuntimeError, match="a failpoint"):
            attempt(
                recipe, tmp_path / "parts", f"{where}=raise@{30 if 'client' in where or 'training' in where else 3}"
            )
    assert (tmp_path / "parts" / SECRET).read_bytes() == b"s" * 32
    assert not attempt(recipe, tmp_path / "parts")
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_killed_again_and_again_it_comes_to_the_same(tmp_path: Path) -> None:
    """Killed for good in processes of their own: with a cohort half trained, a sum half made, a state half written."""
    recipe = private(tmp_path, training={"clients_at_once": 2, "engine": "batched"})
    assert killed_runs.carry_out(recipe, tmp_path / "whole") == 0
    for where in ("client.trained=kill@9", "round.aggregated=kill@1", "state.manifest=kill@2"):
        assert killed_runs.carry_out(recipe, tmp_path / "parts", where) == -9
    assert killed_runs.carry_out(recipe, tmp_path / "parts") == 0
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


@pytest.mark.long
def test_engines_agree_on_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The recipe is among the facts of a round: two engines that round differently never answer with the same noise.
    monkeypatch.setattr(CentralNoise, "open", lambda self, round, start: RoundNoise(self.terms, bytes([round] * 32)))
    found = []
    for engine in ("reference", "batched"):
        recipe = private(tmp_path, model={"dtype": "float64"}, adapter={"dropout": 0.0}, training={"engine": engine})
        found.append(run(recipe, tmp_path / engine, Observer()).rounds[-1]["central_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("rule", first(["rolora", "ffa"]))
def test_factors_that_are_not_trained_get_no_noise(rule: str, tmp_path: Path) -> None:
    finished = run(private(tmp_path, federation={"lora_rule": rule, "keep_every": 1}), tmp_path / "run", Observer())
    assert finished.status["state"] == "done"
    if rule == "rolora":
        from safetensors.torch import load_file

        tensors = [
            load_file(path / "adapter_model.safetensors")
            for path in (tmp_path / "run" / "adapters" / name for name in ("initial", "round-1", "round-2"))
        ]
        for before, after, still in ((*tensors[:2], "lora_A"), (*tensors[1:], "lora_B")):
            moved = {name for name in before if not before[name].equal(after[name])}
            assert moved
            assert not [name for name in moved if still in name]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        *(
            ({"federation": {"strategy": {"kind": kind}}}, "federation.strategy.kind")
            for kind in ("fedmedian", "trimmed_mean", "krum", "multi_krum", "bulyan", "norm_clipped", "other:rule")
        ),
        ({"federation": {"strategy": {"weight_by": "examples"}}}, "federation.strategy.weight_by"),
        ({"federation": {"strategy": {"weight_by": "tokens"}}}, "federation.strategy.weight_by"),
        ({"federation": {"lora_rule": "svd"}}, "federation.lora_rule"),
        ({"federation": {"lora_rule": "fedex"}}, "federation.lora_rule"),
        ({"federation": {"lora_rule": "fedsa"}}, "federation.lora_rule"),
        ({"federation": {"min_clients": 2}}, "federation.min_clients"),
        ({"federation": {"max_share": 0.5}}, "federation.max_share"),
        ({"federation": {"max_bytes": 10**9}}, "federation.max_bytes"),
        ({"data": {"client_holdout": 0.2}}, "data.client_holdout"),
        ({"data": {"central_holdout": 0}}, "data.central_holdout"),
        ({"baselines": ["pooled"]}, "baselines"),
        ({"contributions": True}, "contributions"),
        ({"personalise": {"epochs": 1}}, "personalise"),
        ({"privacy": {"unit": "document", "norm_quantile": 0.5}}, "norm_quantile"),
        ({"privacy": {"norm_rate": 0.5}}, "norm_rate"),
        ({"privacy": {"norm_quantile": 1.0}}, "norm_quantile"),
        ({"privacy": {"epsilon": None}}, "epsilon"),
    ],
    ids=str,
)
def test_what_would_break_the_promise_is_refused_by_name(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises((FedloomError, ValueError)) as caught:
        private(tmp_path, **changes)
    assert key.rpartition(".")[2] in str(caught.value)


@pytest.mark.long
def test_what_documents_can_not_have_clients_can(tmp_path: Path) -> None:
    """A client's own training is its own: only what comes of it is scaled down."""
    told = plan(private(tmp_path, data={"window": "pack"}, training={"max_gradient_norm": 1.0}))
    assert told.privacy["unit"] == "client"


@pytest.mark.parametrize("delta", first([0.5, 1 / 12]))
def test_a_delta_that_gives_a_client_away_is_refused(delta: float, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"privacy\.delta: .* is no less than one over the 12 clients"):
        plan(private(tmp_path, privacy={"delta": delta}))


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    values = private(tmp_path).model_dump()
    with pytest.raises(RecipeError, match=r"adapter\.method: every weight of a model would have noise"):
        Recipe.model_validate({**values, "adapter": {"method": "full"}})


@pytest.mark.long
def test_a_norm_can_not_be_led_by_a_handful(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"privacy\.norm_quantile: with 6 clients a round .* below 0\.6"):
        plan(private(tmp_path, privacy={"norm_quantile": 0.5, "epsilon": 4.0}))


def test_deployments_and_strategies_of_ones_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match='unit = "client": clients elsewhere would have to trust the server'):
        check_deployable(private(tmp_path))
    with pytest.raises(RecipeError, match="would see each client's update"):
        run(private(tmp_path), tmp_path / "run", Observer(), aggregate=STRATEGIES["fedavg"](Strategy()))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_settings_without_effect_are_told_and_no_others(tmp_path: Path) -> None:
    recipe = private(tmp_path, federation={"max_lost_clients": 2, "on_quorum_lost": "wait", "fraction": 0.99})
    unused = [line.partition(" has no effect")[0] for line in plan(recipe).unused]
    assert unused == ["federation.max_lost_clients", "federation.on_quorum_lost"]


# ---- the account of any private run


@pytest.mark.long
def test_an_account_adds_each_round_once_and_reads_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    right = recorder.read_run
    monkeypatch.setattr(recorder, "read_run", lambda folder: reads.append(folder) or right(folder))
    found = {}
    for rounds in (2, 5):
        reads.clear()
        document = {"unit": "document", "epsilon": 8.0, "delta": 1e-3}
        recipe = make_recipe(tmp_path, federation={"rounds": rounds, "fraction": 0.6}, privacy=document)
        finished = run(recipe, tmp_path / str(rounds), Observer())
        found[rounds] = len(reads)
        told = finished.plan["privacy"]
        taken = dict.fromkeys(told["clients"], 0)
        for record in finished.rounds:
            for client in record["clients"]:
                taken[str(client)] += 1
            costs = [
                epsilon(one["rate"], one["noise_multiplier"], taken[client] * one["steps"], 1e-3)
                for client, one in told["clients"].items()
            ]
            assert record["epsilon"] == max(costs)
    assert found[2] == found[5]


def test_an_account_that_goes_on_knows_what_was_spent(tmp_path: Path) -> None:
    recipe = private(tmp_path)
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "run", "state.renamed=raise@4")
    assert not attempt(recipe, tmp_path / "run")
    records = read_run(tmp_path / "run").rounds
    account = Account(read_run(tmp_path / "run").plan["privacy"])
    for record in records:
        account.add(record["round"], record["clients"])
    assert account.epsilon == records[-1]["epsilon"]


def test_the_page_has_the_noise_that_is_computed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+), (\d+) % \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for clients, share, noise, left in rows:
        number, rate = int(clients.replace(",", "")), int(share) / 100
        found = calibrate(rate, 20, 8.0, 1 / (10 * number))
        terms = CentralTerms(found, 1.0, number, rate, 1 / (10 * number))
        assert f"{found:.3g} {terms.noise_over_norm(368_640):.3g}" == f"{noise} {left}"
