"""FedSA: A is shared, each client's B is its own; the server counts half of the bytes and changes no B."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.marks import first
from support.planted import run_planted
from support.quick_runs import attempt, result_of
from support.quick_runs import make_recipe as make_quick
from support.tiny import make_adapted, make_blocks, make_recipe, make_scorer, make_update, run_of

from fedloom import run
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.lora import lora_pairs
from fedloom.data.tokens import ClientBlocks
from fedloom.experiment.building import load_base
from fedloom.experiment.run import plan
from fedloom.federation.aggregation import Aggregate
from fedloom.federation.fleet import LocalFleet
from fedloom.federation.lora_rules import build_aggregate, shared_part
from fedloom.federation.own_parts import OwnParts
from fedloom.federation.rounds import RoundResult, run_rounds
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.records.check import check_run
from fedloom.training.jobs import ClientJob, ClientUpdate
from fedloom.training.reference import ReferenceEngine

FEDSA = {"lora_rule": "fedsa"}
HELD = [ClientBlocks(make_blocks(6, seed=k), make_blocks(4, seed=20 + k)) for k in range(3)]


class Watched:
    """A few rounds of fedsa, and every job and update of theirs."""

    def __init__(self, *, fraction: float = 1.0, spoil: bool = False, rounds: int = 3) -> None:
        adapted = make_adapted(targets=["k_proj", "q_proj"])
        recipe = make_recipe(federation={**FEDSA, "rounds": rounds, "fraction": fraction})
        self.initial = adapted.read()
        shared_P = shared_part(adapted.layout, "fedsa")
        assert shared_P is not None
        self.shared_P = shared_P
        self.jobs: dict[tuple[int, int], ClientJob] = {}
        self.updates: dict[tuple[int, int], ClientUpdate] = {}
        engine = ReferenceEngine(adapted).train

        def train(jobs: Any) -> Any:
            self.jobs |= {(job.round, job.client): job for job in jobs}
            for update in engine(jobs):
                self.updates[update.report.round, update.client] = update
                yield update

        fleet = LocalFleet(HELD, train, make_scorer(adapted), own=OwnParts(self.initial, shared_P))
        aggregate = build_aggregate(recipe.federation)
        self.results: list[RoundResult] = [
            *run_rounds(
                run_of(recipe, fleet, self.spoiling(aggregate) if spoil else aggregate, lambda a: None, self.initial),
                fleet,
            )
        ]

    def spoiling(self, right: Aggregate) -> Aggregate:
        """A server that writes something else where the clients' own parts are."""

        def open_round(state: Any, adapter: Adapter) -> Any:
            round = right.open(state, adapter)

            def spoiled() -> Any:
                new, made = round.finish()
                return new, replace(made, weights_P=torch.where(self.shared_P, made.weights_P, 9.0))

            return round._replace(finish=spoiled)

        return replace(right, open=open_round)


def test_a_client_begins_with_the_shared_a_and_with_its_own_b_to_the_bit() -> None:
    seen = Watched()
    for (round, client), job in seen.jobs.items():
        own = seen.updates[round - 1, client].adapter if round > 1 else seen.initial
        given = seen.results[round - 1].adapter
        assert torch.equal(job.adapter.weights_P[~seen.shared_P], own.weights_P[~seen.shared_P])
        assert torch.equal(job.adapter.weights_P[seen.shared_P], given.weights_P[seen.shared_P])
    first_bs = {client: seen.jobs[3, client].adapter.weights_P[~seen.shared_P] for client in range(3)}
    assert not torch.equal(first_bs[0], first_bs[1])
    assert first_bs[0].any()


def test_a_server_that_writes_where_the_b_are_changes_no_client() -> None:
    honest, spoiled = Watched(), Watched(spoil=True)
    assert not torch.equal(honest.results[-1].adapter.weights_P, spoiled.results[-1].adapter.weights_P)
    for key, update in honest.updates.items():
        assert update.adapter.sha256() == spoiled.updates[key].adapter.sha256()
    for one, other in zip(honest.results, spoiled.results, strict=True):
        assert one.clients == other.clients, "each is scored with its own"


def test_a_client_that_never_trained_has_the_b_that_all_began_with() -> None:
    seen = Watched(fraction=0.34, rounds=2)
    (trained,), (later,) = (result.cohort for result in seen.results[1:])
    idle = ({0, 1, 2} - {trained, later}).pop()
    # B is zero, so that a shared A adds nothing to the base model.
    assert seen.results[2].clients[idle] == seen.results[0].clients[idle]
    assert seen.results[1].clients[trained] != seen.results[0].clients[trained]


def test_half_the_bytes_travel_in_the_plan_and_in_the_records(tmp_path: Path) -> None:
    told = {}
    for rule in ("factors", "fedsa"):
        recipe = make_recipe(federation={"lora_rule": rule}, adapter={"targets": ["q_proj"]})
        told[rule] = plan(recipe), run(recipe, tmp_path / rule, Observer())
    (whole, plain), (half, fedsa) = told.values()
    assert half.bytes_per_round * 2 == whole.bytes_per_round
    for one, other in zip(plain.rounds[1:], fedsa.rounds[1:], strict=True):
        assert other["bytes_up"] * 2 == one["bytes_up"]
        assert other["bytes_down"] * 2 == one["bytes_down"]
        assert other["bytes_up"] + other["bytes_down"] == half.bytes_per_round


def test_the_global_adapter_is_the_mean_of_the_clients_models() -> None:
    """Σ p_k B_k Ā = B̄ Ā: with an A that is shared, averaging B is exact."""
    adapted = make_adapted(targets=["k_proj", "down_proj"])
    start, shared_P = adapted.read(), shared_part(adapted.layout, "fedsa")
    assert shared_P is not None
    own, updates, weights = OwnParts(start, shared_P), [], (5, 1, 3)
    for client, examples in enumerate(weights):
        drawn = torch.randn(start.layout.size, generator=torch.Generator().manual_seed(client))
        updates.append(make_update(replace(start, weights_P=drawn), client, examples=examples))
        own.keep(client, updates[-1].adapter)
    aggregate = build_aggregate(make_recipe(federation=FEDSA).federation)
    _, mean = aggregate.update(aggregate.init(start), start, updates)
    named = mean.layout.split(mean.weights_P)
    clients = [own.adapter_of(client, mean) for client in range(3)]
    for a_name, b_name in lora_pairs(mean.layout.names).values():
        models = [one.layout.split(one.weights_P) for one in clients]
        assert all(torch.equal(one[a_name], named[a_name]) for one in models)
        dense = sum(w * one[b_name] @ one[a_name] for w, one in zip(weights, models, strict=True)) / sum(weights)
        assert (named[b_name] @ named[a_name] - dense).norm() < 1e-6 * dense.norm()


def test_of_one_client_it_is_plain_averaging_to_the_bit(tmp_path: Path) -> None:
    for rule in ("factors", "fedsa"):
        run(make_recipe(federation={"lora_rule": rule}, data={"clients": 1}), tmp_path / rule, Observer())
    one, other = (
        load_file(tmp_path / rule / "adapters/last/adapter_model.safetensors") for rule in ("factors", "fedsa")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_the_engines_agree(tmp_path: Path) -> None:
    found = {}
    for engine in ("batched", "reference"):
        recipe = make_recipe(federation=FEDSA, model={"dtype": "float64"}, training={"engine": engine, "epochs": 2})
        found[engine] = run(recipe, tmp_path / engine, Observer()).rounds
        assert not [finding for finding in check_run(tmp_path / engine) if not finding.well]
    for one, other in zip(*found.values(), strict=True):
        assert one["client_losses"] == pytest.approx(other["client_losses"], rel=1e-9)
        assert one["central_loss"] == pytest.approx(other["central_loss"], rel=1e-9)


@pytest.mark.parametrize(
    "failpoint", first(["round.begins=raise@3", "record.client=raise@4", "state.manifest=raise@3"])
)
def test_stopped_it_goes_on_to_the_same_to_the_bit(failpoint: str, tmp_path: Path) -> None:
    federation = {**FEDSA, "strategy": {"kind": "fedavg"}, "fraction": 0.7, "rounds": 4}
    recipe = make_quick(tmp_path, federation=federation)
    assert attempt(recipe, tmp_path / "whole") == ""
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "run", failpoint)
    assert attempt(recipe, tmp_path / "run") == ""
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
    assert "clients/0/adapter/adapter_model.safetensors" in result_of(tmp_path / "run")


@pytest.mark.long
def test_a_state_that_forgets_the_clients_parts_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_quick(tmp_path, federation={**FEDSA, "strategy": {"kind": "fedavg"}})
    assert attempt(recipe, tmp_path / "whole") == ""
    with pytest.raises(RuntimeError, match="a failpoint"):
        attempt(recipe, tmp_path / "run", "round.begins=raise@2")
    monkeypatch.setattr(OwnParts, "restore", lambda own, parts: None)
    assert attempt(recipe, tmp_path / "run") == ""
    assert result_of(tmp_path / "run") != result_of(tmp_path / "whole")


def test_each_clients_adapter_is_written_and_is_what_was_judged(tmp_path: Path) -> None:
    recipe = make_recipe(federation=FEDSA)
    finished = run_planted(recipe, tmp_path / "run", [ClientBlocks(b.train, make_blocks(4, 16, seed=9)) for b in HELD])
    blocks = make_blocks(4, 16, seed=9)
    for client in range(3):
        home = tmp_path / "run" / "clients" / str(client) / "adapter"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = PeftModel.from_pretrained(load_base(recipe, open_model(recipe.model.source)), home).eval()
        losses, targets = 0.0, 0
        for tokens_T, length in zip(blocks.tokens_NT, blocks.lengths_N.tolist(), strict=True):
            words_1T = tokens_T[None, :length]
            with torch.no_grad():
                losses += float(opened(input_ids=words_1T, labels=words_1T).loss) * (length - 1)
            targets += length - 1
        assert finished.rounds[-1]["client_losses"][str(client)] == pytest.approx(losses / targets, rel=1e-5)
        card = (home / "README.md").read_text()
        assert f"client {client}'s own" in card
        rows = [line for line in card.splitlines() if line.startswith("| Loss")]
        assert rows == [f"| Loss on what its client holds out (nats per token) | {losses / targets:.4f} |"]
    assert "| client 2 | " in (tmp_path / "run" / "report.md").read_text().partition("Was it worth it?")[2]
    (tmp_path / "run/clients/1/adapter/adapter_model.safetensors").write_bytes(b"nothing")
    assert [one.what for one in check_run(tmp_path / "run") if not one.well] == ["clients/1/adapter"]
    assert len({finished.rounds[-1]["client_losses"][str(client)] for client in range(3)}) == 3
