"""Runs under settings drawn at random, killed at a place drawn at random: each goes on to what it is uninterrupted."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.asked import write_tasks
from support.killed_runs import carry_out, result_of
from support.tiny import ARCHITECTURES, PEFT_NEEDS

from fedloom.errors import FedloomError
from fedloom.host.failpoints import NAMES
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import STRATEGY_DEFAULTS
from fedloom.records.check import check_run

pytestmark = pytest.mark.xdist_group("kills")
"""One test worker alone starts the process that all of these are forked from: it imports everything."""
LORA_RULES = ("factors", "ffa", "rolora", "fedsa", "svd", "fedex")


def draw_adapter(draw: random.Random, shape: str) -> dict[str, Any]:
    """Plain LoRA mostly; all weights, or another method of PEFT's, now and then."""
    how = draw.choice(["lora"] * 6 + ["dora", "full", "ia3", "prompt_tuning", "vera"])
    if how == "full":
        return {"method": "full"}
    if how not in ("lora", "dora"):
        ranked = {"rank": 2} if how == "vera" else {}
        return {"method": how, "options": PEFT_NEEDS.get(how, {}), **ranked}
    return {
        "rank": draw.choice([1, 2, 3]),
        "alpha": 4,
        "dropout": draw.choice([0.0, 0.3]),
        "targets": draw.choice([[*ARCHITECTURES[shape]], "all-linear"]),
        "dora": how == "dora",
        "rslora": draw.random() < 0.2,
    }


def draw_training(draw: random.Random) -> dict[str, Any]:
    return {
        "engine": draw.choice(["auto", "reference", "batched"]),
        "clients_at_once": draw.choice([None, 1, 2]),
        "epochs": draw.choice([1, 1, 2]),
        "max_steps": draw.choice([None, None, 3]),
        "batch_size": draw.choice([1, 2, 4]),
        "gradient_accumulation": draw.choice([1, 1, 3]),
        "gradient_checkpointing": draw.random() < 0.15,
        "optimizer": draw.choice(["adamw", "sgd", "adafactor", {"kind": "sgd", "momentum": 0.9}]),
        "optimizer_state": draw.choice(["keep", "reset"]),
        "learning_rate": draw.choice([1e-3, 1e-2]),
        "learning_rate_end": 1e-4,
        "schedule": draw.choice(["constant", "linear", "cosine"]),
        "schedule_scope": draw.choice(["round", "run", "rounds"]),
        "warmup": draw.choice([0, 0, 2, 0.5]),
        "weight_decay": draw.choice([0.0, 0.1]),
        "max_gradient_norm": draw.choice([None, 0.05]),
        "proximal_mu": draw.choice([0.0, 0.1, 2.0]),
        "proximal_schedule": draw.choice(["constant", "linear", "cosine", "adaptive"]),
    }


def draw_federation(draw: random.Random, clients: int) -> dict[str, Any]:
    rule = draw.choice([*LORA_RULES[:1] * 3, *LORA_RULES])
    kind = draw.choice([*STRATEGY_DEFAULTS] if rule == "factors" else ["fedavg", "fedavg", *STRATEGY_DEFAULTS])
    own = {"bulyan": {"malicious": 0}, "multi_krum": {"keep": 2}, "norm_clipped": {"max_norm": 0.01}}.get(kind, {})
    stop = {"patience": draw.choice([1, 2]), "min_delta": draw.choice([0.0, 0.1])}
    return {
        "rounds": draw.choice([2, 3]),
        "fraction": draw.choice([1.0, 1.0, 0.6]),
        "min_clients": draw.choice([1, 2]),
        "max_share": draw.choice([None, None, 0.5]),
        "max_change": draw.choice([None, None, 5.0]),
        "lora_rule": rule,
        "client_ranks": draw.choice([None, [1] * clients]) if rule == "svd" else None,
        "strategy": {"kind": kind, **own},
        "early_stop": draw.choice([None, None, stop]),
        "keep_every": draw.choice([None, 1, 2]),
        "max_bytes": draw.choice([None] * 5 + [100_000]),
    }


def draw_privacy(draw: random.Random) -> dict[str, Any] | None:
    """Noise of the seed: what a secret draws is never the same twice."""
    unit = draw.choice([None, None, None, "document", "owner", "client"])
    led = {"norm_quantile": 0.5} if unit == "client" and draw.random() < 0.5 else {}
    return unit and {"unit": unit, "noise_multiplier": 0.5, "delta": 1e-3, "noise": "seed", "max_norm": 0.1, **led}


def draw_settings(draw: random.Random, folder: Path) -> dict[str, Any]:
    clients, shape = draw.choice([3, 4, 5]), draw.choice([*ARCHITECTURES])
    partition = draw.choice([{"kind": "iid"}, {"kind": "linear"}, {"kind": "dirichlet", "by": "owner", "alpha": 1.0}])
    data = {
        "source": str(folder / "rows.jsonl"),
        "clients": clients,
        "client_holdout": draw.choice([0.0, 0.2]),
        "central_holdout": draw.choice([3, 3, 0]),
        "window": draw.choice(["truncate", "truncate", "blocks", "pack"]),
        "max_length": draw.choice([16, 24]),
        "partition": partition,
    }
    evaluation = {
        "every": draw.choice([1, 1, 2]),
        "batch_size": draw.choice([1, 3, 8]),
        "clients": draw.choice([None, 2]),
        **draw.choice([{}, {}, {"tasks": [str(folder / "asked.toml")], "tasks_every": draw.choice([0, 1])}]),
    }
    return {
        "seed": draw.randrange(1000),
        "baselines": draw.choice([[]] * 4 + [["local"], ["round0", "pooled"]]),
        "personalise": draw.choice([None, None, {"epochs": 1}]),
        "model": {"source": f"random:{shape}", "dtype": draw.choice(["float32", "float32", "bfloat16"])},
        "data": data,
        "training": draw_training(draw),
        "federation": draw_federation(draw, clients),
        "evaluation": evaluation,
        "privacy": draw_privacy(draw),
        "adapter": draw_adapter(draw, shape),
    }


def draw_recipe(draw: random.Random, folder: Path) -> Recipe:
    """Draw until the settings can be combined."""
    for _ in range(10_000):
        drawn = {"name": "drawn", **draw_settings(draw, folder)}
        try:
            return Recipe.model_validate(without_none(drawn))
        except (FedloomError, ValidationError):
            continue
    raise AssertionError("no settings that can be combined")


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is None, which TOML has no word for."""
    return {
        key: without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths and several owners, and a task."""
    home = tmp_path_factory.mktemp("settings")
    rows = [
        {"text": f"{number} " + f"word{number * 7919 % 101} " * (1 + number * 5 % 11), "owner": f"o{number % 5}"}
        for number in range(36)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = [{"q": f"And {number}?", "c": ["yes", "no"], "a": ["yes", "no"][number % 2]} for number in range(4)]
    write_tasks(home, questions, {}, file="asked.toml")
    return home


def draw_run(draw: random.Random, folder: Path, home: Path) -> tuple[Recipe, dict[str, Any]]:
    """Draw until a run is not refused for what only its plan knows; return its recipe, and what it comes to."""
    for number in range(100):
        recipe = draw_recipe(draw, folder)
        if (code := carry_out(recipe, home / f"whole-{number}")) == 0:
            return recipe, result_of(home / f"whole-{number}")
        assert code == 2, (home / f"whole-{number}.error").read_text()
    raise AssertionError("no settings with which a run begins")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_killed_under_any_settings_it_goes_on_to_the_same_result(seed: int, folder: Path, tmp_path: Path) -> None:
    draw = random.Random(seed)
    recipe, result = draw_run(draw, folder, tmp_path)
    for _ in range(draw.choice([1, 1, 2])):
        carry_out(recipe, tmp_path / "run", f"{draw.choice(NAMES)}=kill@{draw.choice([1, 1, 2, 3, 5])}")
    assert carry_out(recipe, tmp_path / "run") == 0, (tmp_path / "run.error").read_text()
    assert result_of(tmp_path / "run") == result
    assert all(finding.well for finding in check_run(tmp_path / "run"))
