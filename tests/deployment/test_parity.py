"""Parity of one machine and Flower: the same recipe makes the same adapter and the same records, but for times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedloom[deploy]'")

from support.asked import write_tasks
from support.federation_here import QUICK, WHOLE_ROUNDS, Served, federation, run_here, split, timeless, tiny

from fedloom.deployment.server.nginx import find_nginx
from fedloom.recipe.loading import load_recipe, recipe_to_toml
from fedloom.records.run import Run


def records_of_clients(run: Run, rounds: int) -> list[dict[str, Any]]:
    """List the records of the first rounds in one order: a served run writes them as they come."""
    found = [record for record in run.clients if record["round"] <= rounds]
    return timeless(sorted(found, key=lambda record: (record["round"], record["client"])))


def check_parity(served: Run, local: Run, clients: int, rounds: int) -> None:
    ours, theirs = (run.rounds[: rounds + 1] for run in (served, local))
    assert [record["adapter_sha256"] for record in ours] == [record["adapter_sha256"] for record in theirs]
    assert timeless(ours) == timeless(theirs)
    assert [record["round"] for record in ours] == [*range(rounds + 1)]
    assert records_of_clients(served, rounds) == records_of_clients(local, rounds)
    assert len(records_of_clients(served, rounds)) == clients * rounds
    assert (served.folder / "report.html").is_file()


@pytest.mark.timeout(900)
@pytest.mark.xdist_group("served")
def test_clients_over_flower_and_tls_make_the_adapter_of_a_local_run(served: Served) -> None:
    check_parity(served.run, served.local, clients=2, rounds=WHOLE_ROUNDS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_of_tiny_over_flower_and_tls_makes_the_adapter_of_a_local_run(tmp_path: Path) -> None:
    recipe = tiny("data.clients=3", "federation.rounds=3")
    file = tmp_path / "tiny.toml"
    file.write_text(recipe_to_toml(recipe))
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(recipe, tmp_path / "split")):
            there.join(f"client-{client}", data)
        served = there.finish(there.serve(str(file), "--out", str(there.out)))
    check_parity(served, run_here(recipe, tmp_path / "local"), clients=3, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_controls_of_training_reach_clients_that_remember_nothing(tmp_path: Path) -> None:
    """Where a client walks on through its rows, and at which rate, the round alone says; tasks are the server's own."""
    tasks = write_tasks(tmp_path / "tasks", [{"q": "so", "c": ["yes", "no"], "a": "yes"}] * 3, {"name": "quiz"})
    recipe = tiny(
        f"evaluation.tasks=['{tasks}']", "evaluation.tasks_every=2",
        "data.clients=2", "federation.rounds=3", "evaluation.every=2", "federation.keep_every=2",
        "training.max_steps=3", "training.epochs=4", "training.batch_size=1", "training.gradient_accumulation=2",
        "training.optimizer={kind='sgd',momentum=0.5}",
        "training.schedule=cosine", "training.schedule_scope=rounds", "training.learning_rate_end=1e-5",
    )  # fmt: skip
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(recipe, tmp_path / "split")):
            there.join(f"client-{client}", data)
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
    local = run_here(recipe, tmp_path / "local")
    check_parity(served, local, clients=2, rounds=3)
    assert {record.get("round") for record in served.evaluations} == {None, 2, served.best_round}
    # Whether a question is among documents that are elsewhere, nobody can tell.
    known = [{key: value for key, value in one.items() if key != "in_training"} for one in local.evaluations]
    assert known != local.evaluations
    assert timeless(served.evaluations) == timeless(known)
    assert all(record["steps"] == 3 for record in served.clients)
    assert (there.out / "adapters" / "round-2" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_batched_engine_makes_the_same_over_flower_within_rounding(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    """Held to both engines of a local run: one client at a time is another order of sums than all at once.

    Padding counts, so that everybody has to mask it, and scores are over more than the real tokens.
    """
    texts = write_jsonl([f"def f{number}(x):\n    return x + {number}"[: 16 + number % 20] for number in range(60)])
    overrides = (
        f"data.source={texts}", "data.pad_in_loss=true", "data.clients=2", "federation.rounds=2",
        "training.optimizer=sgd", "training.learning_rate=0.1",
    )  # fmt: skip
    batched = tiny(*overrides, "training.engine=batched")
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(batched, tmp_path / "split")):
            there.join(f"client-{client}", data)
        (tmp_path / "tiny.toml").write_text(recipe_to_toml(batched))
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
    last = read_weights(there.out)
    start = load_file(there.out / "adapters" / "initial" / "adapter_model.safetensors")
    for engine in ("batched", "reference"):
        local = run_here(tiny(*overrides, f"training.engine={engine}"), tmp_path / engine)
        for name, expected in read_weights(tmp_path / engine).items():
            assert torch.allclose(last[name], expected, rtol=1e-3, atol=1e-5), (engine, name)
        assert [record["client_loss"] for record in served.rounds] == pytest.approx(
            [record["client_loss"] for record in local.rounds], rel=1e-4
        )
    assert any(not torch.allclose(last[name], start[name], atol=1e-3) for name in start), "it learned"


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapters" / "last" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_private_run_over_flower_makes_the_adapter_and_the_records_of_a_local_one(tmp_path: Path) -> None:
    """Its noise comes from the recipe's seed, which is for such a test alone."""
    recipe = tiny(
        "data.clients=2", "federation.rounds=2", "data.client_holdout=0.0", "data.central_holdout=20",
        "training.epochs=2", "federation.lora_rule=ffa",
        "privacy.epsilon=8.0", "privacy.delta=1e-3", "privacy.noise=seed",
    )  # fmt: skip
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(recipe, tmp_path / "split")):
            there.join(f"client-{client}", data)
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
        assert "NOT PRIVATE" in there.said("client-0")
        assert "NOT PRIVATE" in there.said("serve")
    local = run_here(recipe, tmp_path / "local")
    check_parity(served, local, clients=2, rounds=2)
    assert served.rounds[-1]["epsilon"] == local.rounds[-1]["epsilon"] > 0
    assert served.plan["elsewhere"] == ["client-0", "client-1"]
    of_clients_own = ("copies", "repeated")
    known = {key: told for key, told in local.plan["privacy"].items() if key not in of_clients_own}
    assert served.plan["privacy"] == known


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_recipe_of_whole_models_comes_to_the_same_over_a_network(tmp_path: Path) -> None:
    asked = load_recipe("tiny-full", ["data.clients=2", *QUICK])
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(asked))
    (tmp_path / "policy.toml").write_text('methods = ["full"]\n')
    with federation(tmp_path, secure=True, host="127.0.0.2" if find_nginx() else "localhost") as there:
        server = there.serve(str(tmp_path / "recipe.toml"), "--out", str(there.out))
        for number, data in enumerate(split(asked, tmp_path / "split")):
            there.join(f"client-{number}", data, "--policy", str(tmp_path / "policy.toml"))
        served = there.finish(server)
    local = run_here(asked, tmp_path / "local")
    assert [record["adapter_sha256"] for record in served.rounds] == [
        record["adapter_sha256"] for record in local.rounds
    ]
    assert [record["lost"] for record in served.rounds] == [[]] * 4
    assert served.plan["payload_bytes"] == 4 * served.plan["parameters"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_conversations_are_learnt_and_what_is_a_clients_own_stays_with_it_over_flower(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    """The server's template is rendered by each client whose owner asks for it, and what counts is the same.

    Own is its part of the adapter, the whole one that it keeps, and its tasks: by the processes that people start.
    """
    policy = tmp_path / "policy.toml"
    policy.write_text('chat_template = "server"\n')
    quiz = write_tasks(tmp_path / "quiz", [{"q": "so", "c": ["yes", "no"], "a": "yes"}] * 3, {"name": "quiz"})
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": f"no, not {number}, and never again"},
            ]
        }
        for number in range(40)
    ]
    template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    recipe = tiny(
        f"data.source={write_jsonl(rows)}", "data.clients=2", "data.documents_per_client=10", "data.central_holdout=0",
        "data.messages=messages", f"data.chat_template='{template}'", "data.system=brief", "data.window=pack",
        "federation.rounds=2", "federation.lora_rule=fedsa", "report.samples=0",
    )  # fmt: skip
    (tmp_path / "tiny.toml").write_text(recipe_to_toml(recipe))
    with federation(tmp_path, secure=True) as there:
        for client, data in enumerate(split(recipe, tmp_path / "split")):
            own = ("--tasks", str(quiz), "--keep", str(tmp_path / "mine")) if client else ()
            there.join(f"client-{client}", data, "--policy", str(policy), *own)
        served = there.finish(there.serve(str(tmp_path / "tiny.toml"), "--out", str(there.out)))
        said = there.said("client-1")
    assert served.plan["learns"] == "what the assistant says with its end", (
        "and no share of what clients elsewhere have"
    )
    local = run_here(recipe, tmp_path / "local")
    for ours, theirs in zip(served.rounds, local.rounds, strict=True):
        assert ours["client_losses"] == theirs["client_losses"]
    assert records_of_clients(served, 2) == records_of_clients(local, 2)
    assert len(records_of_clients(served, 2)) == 2 * 2
    (beside,) = (tmp_path / "client-0" / "client-0.journal.adapters").iterdir()
    (kept,) = (tmp_path / "mine").iterdir()
    for number, home in enumerate((beside, kept)):
        mine = load_file(home / "adapter_model.safetensors")
        expected = load_file(local.folder / "clients" / str(number) / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
        assert home.stat().st_mode & 0o077 == 0, "its owner's alone, whatever the umask"
    assert [(one["holder"], one["task"], one["questions"]) for one in served.own_evaluations] == [(1, "quiz", 3)] * 2
    assert "tasks     quiz: how many answers are right goes to the server, and nothing else of them" in said
    assert f"own       {kept}: an adapter of this client's own, which stays here" in said
