"""A setting that has no effect on a run is said in its plan, its records and its report; one that has, never."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.marks import first
from support.tiny import make_adapted, make_recipe

from fedloom.errors import DataError, RecipeError
from fedloom.experiment.preparation import Material, gather, prepare
from fedloom.experiment.run import plan, run
from fedloom.experiment.sweep import sweep
from fedloom.experiment.unused import find_unused
from fedloom.federation.aggregation import STRATEGIES
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer
from fedloom.recipe.loading import load_recipe, recipe_to_toml, shipped_recipes
from fedloom.recipe.recipe import Recipe

Sections = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and text files, of texts of more than 24 tokens and fewer than 128, but for one of `short.jsonl`."""
    home = tmp_path_factory.mktemp("unused")
    texts = [f"{number} " + f"word{number * 7919 % 101} " * (4 + number % 3) for number in range(30)]
    rows = [json.dumps({"text": text, "owner": f"o{number % 4}"}) for number, text in enumerate(texts)]
    (home / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (home / "short.jsonl").write_text("\n".join([*rows, json.dumps({"text": "short"})]), encoding="utf-8")
    (home / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    for place in ("plain", "mixed"):
        (home / place).mkdir()
        for number, text in enumerate(texts):
            (home / place / f"{number}.md").write_text(text, encoding="utf-8")
    (home / "mixed" / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return home


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    data = {"source": "rows.jsonl", "max_length": 24, "documents_per_client": None, **sections.pop("data", {})}
    if not str(data["source"]).startswith("python:"):
        data["source"] = str(folder / data["source"])
    model = {"dtype": "float32", "device": "cpu", **sections.pop("model", {})}
    adapter = {"targets": ["q_proj"], **sections.pop("adapter", {})}
    training = {"engine": "reference", "proximal_mu": 0.0, **sections.pop("training", {})}
    return make_recipe(data=data, model=model, adapter=adapter, training=training, **sections)


def notes_of(recipe: Recipe, material: Material | None = None) -> list[str]:
    # Notes tell nothing of memory, and to predict it takes longer than all else.
    return list(prepare(recipe, Observer(), material, predict=False).plan.unused)


def training(**keys: Any) -> Sections:
    return {"training": keys}


def federation(rounds: int = 2, **keys: Any) -> Sections:
    return {"federation": {"rounds": rounds, **keys}}


def strategy(rounds: int = 2, clients: int = 3, **keys: Any) -> Sections:
    return {"data": {"clients": clients, "client_holdout": 0.0}, "federation": {"rounds": rounds, "strategy": keys}}


def data(**keys: Any) -> Sections:
    return {"data": keys}


def options(**keys: Any) -> Sections:
    return {"adapter": {"options": keys}}


ASKED = {"prompt": "{text}>", "completion": "{owner}", "max_length": 200}

CASES: dict[str, tuple[list[Sections], list[Sections]]] = {
    "data.max_bad_fraction": (
        [data(on_bad_row="error", max_bad_fraction=0.5), data(on_bad_row="error", max_bad_fraction=0.0)],
        [data(max_bad_fraction=0.5)],
    ),
    "data.text": (
        [data(source="texts.txt", text="content"), data(source="plain", text="body")],
        [data(source="mixed", text="text"), data(source="texts.txt")],
    ),
    "data.partition.kind": (
        [data(clients=1, partition={"kind": kind, "by": by}) for kind, by in (("linear", None), ("natural", "owner"))],
        [data(clients=2, partition={"kind": "linear"}), data(clients=1, partition={"kind": "iid"})],
    ),
    "data.pad_in_loss": (
        [data(pad_in_loss=True, max_length=length) for length in (8, 24)],
        [data(pad_in_loss=True, max_length=200), data(pad_in_loss=True, source="short.jsonl", max_length=24)],
    ),
    "data.window": (
        [*(data(window="blocks", max_length=length) for length in (128, 200)), data(window="pack", max_length=8)],
        [data(window="blocks", max_length=24), data(window="pack", max_length=200)],
    ),
    "adapter.rslora": (
        [{"adapter": {"rank": 1, "alpha": alpha, "rslora": True}} for alpha in (1, 4)],
        [{"adapter": {"rank": 2, "rslora": True}},
         {"adapter": {"rank": 1, "rslora": True, "options": {"rank_pattern": {"q_proj": 2}}}}],
    ),
    "adapter.rank": (
        [{"adapter": {"rank": rank}} for rank in (65, 128)],
        [{"adapter": {"rank": 64}}, {"adapter": {"rank": 65, "options": {"rank_pattern": {"q_proj": 4}}}}],
    ),
    "adapter.alpha": (
        [{"adapter": {"method": "psoft", "rank": 4, "alpha": alpha}} for alpha in (4, 8.0)],
        [{"adapter": {"method": "deft", "rank": 4, "alpha": 4}}],
    ),
    'adapter.options.rank_pattern "q_prj"': (
        [options(rank_pattern={"q_prj": 4}), options(rank_pattern={"q_proj": 4, "q_prj": 2})],
        [options(rank_pattern={"q_proj": 4}), options(rank_pattern={"layers.0.self_attn.q_proj": 4})],
    ),
    'adapter.options.alpha_pattern "v_proj"': (
        [options(alpha_pattern={"v_proj": 4}), options(alpha_pattern={"v_proj": 4}, layers_to_transform=[0])],
        [{"adapter": {"targets": ["v_proj"], "options": {"alpha_pattern": {"v_proj": 4}}}}],
    ),
    'adapter.options.layers_to_transform "9"': (
        [options(layers_to_transform=[0, 9]), options(layers_to_transform=[9, 1])],
        [options(layers_to_transform=[1]), options(layers_to_transform=[0, 1])],
    ),
    'adapter.options.exclude_modules "nowhere"': (
        [options(exclude_modules=["nowhere"]), options(exclude_modules=["v_proj", "nowhere"])],
        [options(exclude_modules=["layers.0.self_attn.q_proj"]), options(exclude_modules=r".*layers\.1.*")],
    ),
    'adapter.options.modules_to_save "no_head"': (
        [options(modules_to_save=["no_head"]), options(modules_to_save=["lm_head", "no_head"])],
        [options(modules_to_save=["lm_head"])],
    ),
    'adapter.options.bias "all"': (
        [options(bias="all"), options(bias="all", layers_to_transform=[0])],
        [options(bias="none"), {"model": {"source": "random:tiny-opt"}, "adapter": {"options": {"bias": "all"}}}],
    ),
    "training.schedule_scope": (
        [training(schedule_scope="run"), {**training(schedule="cosine", schedule_scope="run"), **federation(1)}],
        [training(schedule="linear", schedule_scope="run"), training(schedule_scope="round")],
    ),
    "training.schedule": (
        [training(schedule="linear", batch_size=64), {**training(schedule="cosine", schedule_scope="run",
                                                                 batch_size=64), **federation(1)}],
        [training(schedule="linear", batch_size=2), training(schedule="linear", schedule_scope="run", batch_size=64),
         training(schedule="linear", batch_size=64, epochs=2)],
    ),
    "training.optimizer_state": (
        [training(optimizer="sgd", optimizer_state="keep"), {**training(optimizer_state="keep"), **federation(1)}],
        [training(optimizer_state="keep"), training(optimizer="sgd", optimizer_state="reset")],
    ),
    "training.proximal_schedule": (
        [training(proximal_schedule="linear"), training(proximal_schedule="cosine")],
        [training(proximal_schedule="adaptive"), training(proximal_schedule="linear", proximal_mu=0.1)],
    ),
    "training.clients_at_once": (
        [training(clients_at_once=2), {**training(engine="auto", clients_at_once=2), "adapter": {"dora": True}}],
        [training(engine="batched", clients_at_once=2)],
    ),
    "training.devices": (
        [training(devices=["cpu"]), training(devices=["cpu"] * 4)],
        [training(devices=["cpu"] * 3), training(devices=None)],
    ),
    "training.cuda_graph": (
        [training(cuda_graph=False), training(engine="batched", cuda_graph=False), training(cuda_graph=True)],
        [training(engine="batched")],
    ),
    "federation.fraction": (
        [federation(fraction=0.9), federation(fraction=0.3, min_clients=3)],
        [federation(fraction=0.7), federation(fraction=1.0)],
    ),
    "federation.min_clients": (
        [federation(min_clients=2), federation(fraction=0.7, min_clients=2)],
        [federation(fraction=0.3, min_clients=2), federation(min_clients=1)],
    ),
    "federation.early_stop": (
        [federation(2, early_stop={"patience": 2}), federation(1, early_stop={"patience": 4})],
        [federation(2, early_stop={"patience": 1})],
    ),
    "federation.client_ranks": (
        [{**federation(lora_rule="svd", client_ranks=[rank] * 3), "adapter": {"rank": rank}} for rank in (1, 2)],
        [federation(lora_rule="svd", client_ranks=[1, 2, 2])],
    ),
    "federation.lora_rule": (
        [federation(lora_rule="fedex", fraction=0.3), {**federation(lora_rule="fedex"), **data(clients=1)}],
        [federation(lora_rule="fedex"), federation(lora_rule="svd", fraction=0.3), federation(fraction=0.3)],
    ),
    "federation.round_deadline": ([federation(round_deadline=60.0), federation(round_deadline=0.5)], [federation()]),
    "federation.on_quorum_lost": (
        [federation(on_quorum_lost="wait"), federation(on_quorum_lost="wait", max_lost_clients=1)],
        [federation(on_quorum_lost="skip"), federation(on_quorum_lost="stop")],
    ),
    "federation.strategy.kind": (
        [strategy(kind="bulyan"), strategy(kind="bulyan", malicious=0, clients=7), strategy(kind="multi_krum", keep=3),
         strategy(kind="trimmed_mean", trim=0.0), strategy(kind="fedmedian", clients=2),
         strategy(kind="fedmedian", clients=1)],
        [strategy(kind="bulyan", malicious=1, clients=7), strategy(kind="fedmedian"), strategy(kind="fedavg"),
         strategy(kind="trimmed_mean", clients=5), strategy(kind="multi_krum", keep=2), strategy(kind="krum")],
    ),
    "federation.strategy.weight_by": (
        [strategy(kind="fedavg", weight_by="tokens", clients=1), strategy(kind="multi_krum", weight_by="tokens"),
         strategy(kind="fedavg", weight_by="tokens")],
        [{"data": {"max_length": 200}, "federation": {"strategy": {"weight_by": "tokens"}}},
         strategy(kind="fedavg", weight_by="examples", clients=1)],
    ),
    "federation.strategy.nesterov": (
        [strategy(kind="fedavgm", momentum=0.0, nesterov=True, rounds=rounds) for rounds in (1, 2)],
        [strategy(kind="fedavgm", nesterov=True), strategy(kind="fedavgm", momentum=0.5, nesterov=True, rounds=1)],
    ),
    "federation.strategy.momentum": (
        [strategy(kind="fedavgm", momentum=momentum, rounds=1) for momentum in (0.5, 0.8)],
        [strategy(kind="fedavgm", momentum=0.5), strategy(kind="fedavgm", momentum=0.5, nesterov=True, rounds=1)],
    ),
    "evaluation.clients": (
        [{"evaluation": {"clients": 3}}, {"evaluation": {"clients": 9}},
         {"evaluation": {"clients": 1}, "data": {"client_holdout": 0.0}}],
        [{"evaluation": {"clients": 2}}],
    ),
    "report.samples": (
        [{"report": {"samples": 7}}, {"report": {"samples": 7}, **data(**ASKED, loss="all")},
         {"report": {"samples": 7}, **data(**ASKED, central_holdout=0)}],
        [{"report": {"samples": 7}, **data(**ASKED)}, {"report": {"samples": 3}},
         {"report": {"samples": 0}, **data(**ASKED, central_holdout=0)}],
    ),
}  # fmt: skip
"""Recipes in which a key has no effect, and recipes in which it has, or in which nobody wrote it."""


@pytest.mark.parametrize("key", first(CASES, keep=4))
def test_a_key_is_named_where_it_has_no_effect_and_nowhere_else(key: str, folder: Path) -> None:
    idle, at_work = CASES[key]
    for sections in idle:
        assert [note for note in notes_of(recipe_of(folder, **sections)) if note.startswith(f"{key} ")], sections
    for sections in at_work:
        assert not [note for note in notes_of(recipe_of(folder, **sections)) if note.startswith(f"{key} ")], sections


@pytest.mark.parametrize(("kind", "options"), [("fedmedian", {}), ("trimmed_mean", {"trim": 0.0}), ("bulyan", {})])
def test_a_mean_of_equal_weights_is_told_from_fedavg(kind: str, options: dict[str, Any], folder: Path) -> None:
    """With clients of different sizes it is no setting without effect: fedavg weighs them."""
    data = {"clients": 2 if kind == "fedmedian" else 4, "partition": {"kind": "linear"}, "client_holdout": 0.0}
    sections = federation(1, strategy={"kind": kind, **options})
    (note,) = [note for note in notes_of(recipe_of(folder, **sections, data=data)) if "strategy.kind" in note]
    assert note.startswith("federation.strategy.kind is a mean in which every client counts the same")


def test_ranks_beside_a_pattern_of_ranks_are_no_note(folder: Path) -> None:
    adapter = {"rank": 2, "options": {"rank_pattern": {"q_proj": 4}}}
    sections = federation(lora_rule="svd", client_ranks=[2, 2, 2])
    assert not [note for note in notes_of(recipe_of(folder, **sections, adapter=adapter)) if "client_ranks" in note]


@pytest.mark.parametrize("key", ["files", "text"])
@pytest.mark.parametrize("value", ["**/*", "text", "content"])
def test_the_standard_library_has_neither_a_glob_nor_columns(key: str, value: str, folder: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}: this key has no effect on such a source; leave it out"):
        plan(recipe_of(folder, data={"source": "python:stdlib", "documents_per_client": 8, key: value}))


@pytest.mark.parametrize("targets", [["self_attn"], ["q_proj"], "all-linear"])
def test_a_method_whose_layers_are_no_choice_refuses_targets(targets: Any) -> None:
    with pytest.raises((RecipeError, ValueError), match='"adaption_prompt" does not use targets'):
        make_recipe(adapter={"method": "adaption_prompt", "rank": None, "alpha": None, "targets": targets})


@pytest.mark.parametrize(
    "name", first([name for name in shipped_recipes() if name.startswith("tiny") and "clients" not in name], every=2)
)
def test_what_is_left_out_or_written_out_as_it_is_anyway_is_no_note(name: str) -> None:
    shipped = load_recipe(name, ["model.device=cpu", "training.engine=reference"])
    material = gather(shipped, Observer())  # for both: of a recipe with a thousand documents it is nearly all the work
    assert notes_of(shipped, material) == []
    values, whole = shipped.model_dump(exclude_unset=True), shipped.model_dump(exclude_none=True)
    for section in ("training", "federation", "evaluation"):
        values[section] = {**whole[section], **values.get(section, {})}
    values["federation"]["strategy"] = {"kind": "fedavg"}
    del values["training"]["cuda_graph"]  # which is switched on
    written_out = Recipe.model_validate(values)
    assert notes_of(written_out, material) == []


@pytest.mark.long
def test_clients_elsewhere_have_documents_and_machines_of_their_own(folder: Path) -> None:
    idle = recipe_of(
        folder,
        data={"files": "*.md", "source": "plain", "central_holdout": 0, "partition": {"kind": "linear"}},
        training={"clients_at_once": 2},
        federation={"round_deadline": 60.0, "on_quorum_lost": "wait"},
    )
    here, adapted = plan(idle), make_adapted()
    assert {note.split()[0] for note in find_unused(idle, here, adapted)} == {
        "data.files", "data.partition.kind", "training.clients_at_once"
    }  # fmt: skip
    held_out = idle.model_copy(update={"data": idle.data.model_copy(update={"central_holdout": 3})})
    assert "data.files" not in {note.split()[0] for note in find_unused(held_out, here, adapted)}
    assert {"federation.round_deadline", "federation.on_quorum_lost"} <= {note.split()[0] for note in notes_of(idle)}


def test_a_run_shows_records_and_reports_it_and_goes_on_with_it(folder: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    recipe = recipe_of(folder, **federation(1, strategy={"kind": "bulyan"}), evaluation={"clients": 5})
    finished = run(recipe, tmp_path / "run", Terminal(Console(file=screen, width=200)))
    told = [
        "federation.strategy.kind has no effect: with malicious = 0 it leaves no value out, and is a plain mean",
        "evaluation.clients has no effect: 3 of 3 clients hold anything out",
    ]
    assert finished.plan["unused"] == told
    report = (tmp_path / "run" / "report.md").read_text()
    for line in told:
        assert f"note      {line}" in screen.getvalue()
        assert f"{line}." in report
    again = run(load_recipe(tmp_path / "run" / "recipe.toml"), tmp_path / "run", Observer(), resume=True)
    assert again.rounds == finished.rounds


def test_a_strategy_of_ones_own_leaves_the_recipes_without_effect(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, **federation(1, strategy={"kind": "bulyan"}))
    own = STRATEGIES["fedavg"](make_recipe().federation.strategy)
    finished = run(recipe, tmp_path / "run", Observer(), aggregate=own)
    assert finished.plan["unused"] == ["federation.strategy has no effect: aggregate= takes its place"]
    plain = run(recipe_of(folder, **federation(1)), tmp_path / "plain", Observer(), aggregate=own)
    assert "unused" not in plain.plan


@pytest.mark.long
def test_a_sweep_goes_through_the_neutral_value_and_says_in_how_many_runs(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.toml"
    path.write_text(recipe_to_toml(recipe_of(folder, **training(engine="batched", proximal_schedule="linear"))))
    screen = io.StringIO()
    display = Terminal(Console(file=screen, width=200))
    sweep(path, ["training.proximal_mu=0,0.1", "training.schedule_scope=run"], tmp_path / "sweep", display)
    lines = screen.getvalue().splitlines()
    assert (
        "note      1 of 2 runs: training.proximal_schedule has no effect: training.proximal_mu is 0 throughout" in lines
    )
    assert "note      training.schedule_scope has no effect: the learning rate is constant" in lines
