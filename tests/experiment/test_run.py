"""A whole run: what it leaves behind, that it can be repeated, and what plain PEFT makes of its adapter."""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.marks import first
from support.tiny import make_recipe

from fedloom import load_recipe, read_run, run
from fedloom.data.documents import load_documents
from fedloom.data.splits import documents_needed, split_documents
from fedloom.data.tokens import tokenize_documents
from fedloom.errors import ModelError, RecipeError, TrainingError
from fedloom.experiment.preparation import prepare
from fedloom.experiment.run import plan
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.progress import Progress, StageName
from fedloom.records.run import Run
from fedloom.training.engines import choose_engine

TIMES = ("seconds", "finished", "peak_bytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(make_recipe(adapter={"dropout": 0.1}), tmp_path_factory.mktemp("runs") / "run")


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.endswith(TIMES)} for record in records]


def test_a_run_directory_has_what_the_design_says(finished: Run) -> None:
    found = {str(path.relative_to(finished.folder)) for path in finished.folder.rglob("*") if path.is_file()}
    adapters = {
        f"adapters/{which}/{file}"
        for which in ("initial", "best", "last")
        for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    files = {"recipe.toml", "resolved.json", "environment.json", "plan.json", "status.json"}
    files |= {"report.md", "report.html", *(f"plots/{name}.svg" for name in ("loss", "clients", "time", "drift"))}
    states = {
        f"state/round-{round:06d}/{file}"
        for round in (1, 2)
        for file in ("manifest.json", "server.safetensors", "clients.safetensors")
    }
    assert found == adapters | files | states | {"rounds.jsonl", "clients.jsonl", ".lock"}
    assert finished.status["state"] == "done"
    assert finished.environment["versions"]["torch"] == torch.__version__


def test_records_have_their_keys(finished: Run) -> None:
    assert [record["round"] for record in finished.rounds] == [0, 1, 2]
    assert {
        "round", "client_loss", "central_loss", "central_perplexity", "central_accuracy", "clients", "lost",
        "train_seconds", "aggregate_seconds", "evaluate_seconds", "train_tokens", "bytes_up", "bytes_down",
    } <= finished.rounds[0].keys()  # fmt: skip
    assert "train_loss" not in finished.rounds[0], "absent rather than invented"
    for record in finished.rounds[1:]:
        assert {"train_loss", "proximal_loss", "drift"} <= record.keys()
        assert record["clients"] == [0, 1, 2]
        assert record["lost"] == []
        assert record["proximal_loss"] > 0
        assert record["bytes_up"] == record["bytes_down"] == 3 * finished.plan["payload_bytes"] > 0
        assert record["central_perplexity"] == pytest.approx(math.exp(record["central_loss"]))
    assert sorted((r["round"], r["client"]) for r in finished.clients) == [(r, c) for r in (1, 2) for c in (0, 1, 2)]
    assert {
        "round", "client", "examples", "tokens", "steps", "loss_first", "loss_last", "loss_mean", "proximal_loss",
        "proximal_ratio", "drift", "holdout_loss_before", "holdout_loss_after",
    } <= finished.clients[0].keys()  # fmt: skip


def test_the_rounds_train_loss_is_the_mean_over_steps(finished: Run) -> None:
    for record in finished.rounds[1:]:
        clients = [client for client in finished.clients if client["round"] == record["round"]]
        steps = sum(client["steps"] for client in clients)
        assert record["train_loss"] == pytest.approx(sum(c["loss_mean"] * c["steps"] for c in clients) / steps)
        assert record["train_tokens"] == sum(client["tokens"] for client in clients)


def test_the_loss_falls_and_the_best_adapter_is_the_last(finished: Run) -> None:
    losses = [record["central_loss"] for record in finished.rounds]
    assert losses == sorted(losses, reverse=True)
    assert finished.best_round == 2
    best, last = (finished.folder / "adapters" / which / "adapter_model.safetensors" for which in ("best", "last"))
    assert best.read_bytes() == last.read_bytes()


def test_the_best_adapter_is_kept_when_the_loss_rises(tmp_path: Path) -> None:
    rising = make_recipe(adapter={"targets": ["lm_head"]}, training={"learning_rate": 3.0}, federation={"rounds": 1})
    finished = run(rising, tmp_path / "run")
    assert finished.rounds[1]["central_loss"] > finished.rounds[0]["central_loss"]
    assert finished.best_round == 0
    initial, best = (tmp_path / "run/adapters" / which / "adapter_model.safetensors" for which in ("initial", "best"))
    assert initial.read_bytes() == best.read_bytes()


def test_the_same_recipe_twice_gives_the_same_run(finished: Run, tmp_path: Path) -> None:
    again = run(load_recipe(finished.folder / "recipe.toml"), tmp_path / "again")
    assert again.rounds[-1]["adapter_sha256"] == finished.rounds[-1]["adapter_sha256"]
    assert without_times(again.rounds) == without_times(finished.rounds)
    assert without_times(again.clients) == without_times(finished.clients)
    other = run(load_recipe(finished.folder / "recipe.toml", ["seed=8"]), tmp_path / "other")
    assert other.rounds[-1]["adapter_sha256"] != finished.rounds[-1]["adapter_sha256"]


@pytest.mark.parametrize("source", first(["random:tiny-opt", "random:tiny-llama", "random:tiny-gpt2"]))
def test_plain_peft_gives_the_central_loss_on_record(source: str, tmp_path: Path) -> None:
    recipe = make_recipe(model={"source": source}, federation={"rounds": 1})
    finished = run(recipe, tmp_path / "run")
    opened = open_model(source)
    base = load_model(opened, dtype="float32", device=torch.device("cpu"))
    model = PeftModel.from_pretrained(base, finished.folder / "adapters" / "last").eval()
    found = load_documents(recipe.data, recipe.seed, documents_needed(recipe.data))
    blocks = tokenize_documents(split_documents(found, recipe.data, recipe.seed).central, opened.tokenizer, recipe.data)
    loss, count = 0.0, 0
    for tokens, length in zip(blocks.tokens_NT, blocks.lengths_N, strict=True):
        with torch.no_grad():
            sequence = tokens[None, : int(length)]
            loss += model(input_ids=sequence, labels=sequence).loss.item() * (int(length) - 1)
        count += int(length) - 1
    assert finished.rounds[-1]["central_loss"] == pytest.approx(loss / count, rel=1e-5)


def test_a_run_without_central_documents_is_judged_by_its_clients(tmp_path: Path) -> None:
    finished = run(make_recipe(data={"central_holdout": 0}, federation={"rounds": 1}), tmp_path / "run")
    assert "central_loss" not in finished.rounds[0]
    assert finished.rounds[1]["client_loss"] < finished.rounds[0]["client_loss"]
    assert finished.best_round == 1


def test_without_client_hold_outs_there_is_no_client_loss(tmp_path: Path) -> None:
    finished = run(make_recipe(data={"client_holdout": 0.0}, federation={"rounds": 1}), tmp_path / "run")
    assert "client_loss" not in finished.rounds[1]
    assert "holdout_loss_after" not in finished.clients[0]


def test_a_diverging_run_stays_readable_and_says_where(tmp_path: Path) -> None:
    recipe = make_recipe(training={"learning_rate": 1e30, "optimizer": "sgd", "epochs": 3, "proximal_mu": 0.0})
    with pytest.raises(TrainingError, match=r"round 1, client \d, step \d+: the (loss|drift) is"):
        run(recipe, tmp_path / "run")
    stopped = read_run(tmp_path / "run")
    assert stopped.status["state"] == "failed"
    assert re.search(r"round 1, client \d, step", stopped.status["error"])
    assert [record["round"] for record in stopped.rounds] == [0]
    assert (tmp_path / "run" / "adapters" / "best").is_dir()


class Impatient(Observer):
    """A person who presses Ctrl-C after the first round."""

    def show_round(self, record: dict) -> None:
        if record["round"] == 1:
            raise KeyboardInterrupt


def test_an_interrupted_run_stays_readable(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(make_recipe(), tmp_path / "run", Impatient())
    stopped = read_run(tmp_path / "run")
    assert stopped.status["state"] == "interrupted"
    assert [record["round"] for record in stopped.rounds] == [0, 1]


class Watching(Observer):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.done: dict[str, Counter[str]] = {}

    def show_stage(self, name: StageName, share: float = 1.0) -> None:
        assert share == 1
        self.done[name] = self.now = Counter()

    def watch(self, progress: Progress) -> None:
        self.now[progress.phase] += progress.tokens
        self.now["steps"] += progress.phase == "train"


@pytest.mark.parametrize("changes", first([{}, {"federation": {"fraction": 0.67}}, {"data": {"window": "blocks"}}]))
def test_the_plan_says_what_the_run_then_does(changes: dict, tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl([f"document {i}: " + "some more words " * (i % 7) for i in range(30)])
    recipe = make_recipe(**{**changes, "data": {"source": str(path), **changes.get("data", {})}})
    planned, watching = plan(recipe), Watching()
    finished = run(recipe, tmp_path / "run", watching)
    then = json.loads(json.dumps(planned.to_json()))
    # A run predicts memory only where the free memory leaves a doubt; all else is the same.
    assert then.pop("peak_bytes") > 0
    assert then.pop("clients_that_fit") > then["clients_at_once"]
    assert finished.plan.pop("ample_memory")
    assert finished.plan.pop("peak_bytes") is finished.plan.pop("clients_that_fit") is None
    assert finished.plan == then
    assert planned.bytes_per_round == finished.rounds[1]["bytes_up"] + finished.rounds[1]["bytes_down"]
    whole = "fraction" not in changes.get("federation", {})
    tolerance = 0.0 if whole else 0.3  # who is drawn has more or less than the average
    (done,) = watching.done.values()
    assert done["steps"] == pytest.approx(planned.rounds * planned.steps_per_round, rel=tolerance)
    assert done["train"] == pytest.approx(planned.rounds * planned.train_tokens_per_round, rel=tolerance)
    assert done["evaluate"] == pytest.approx(planned.evaluate_tokens, rel=tolerance)


@pytest.mark.parametrize(
    "changes",
    first(
        [
            {"data": {"client_holdout": 0.25}},
            {"data": {"central_holdout": 0}, "training": {"max_steps": 3}},
            {"data": {"client_holdout": 0.0}, "training": {"epochs": 2, "max_steps": None}},
        ]
    ),
)
def test_what_follows_the_rounds_is_planned_as_it_is_done(changes: dict, tmp_path: Path, write_jsonl) -> None:
    """Steps and tokens to train on to the last one; what is scored of a client's own adapter depends on its losses."""
    path = write_jsonl([f"document {i}: " + "some more words " * (i % 7) for i in range(40)])
    recipe = make_recipe(
        **{**changes, "data": {"source": str(path), **changes["data"]}},
        baselines=["round0", "local", "pooled"],
        personalise={"epochs": 2},
        contributions=True,
    )
    watching = Watching()
    finished = run(recipe, tmp_path / "run", watching)
    planned = {stage.name: stage for stage in plan(recipe).stages}
    assert [*watching.done] == [*planned] == ["rounds", "baselines", "personalise", "contributions"]
    assert finished.plan["later"] == [asdict(stage) for stage in [*planned.values()][1:]]
    for name, stage in planned.items():
        done = watching.done[name]
        assert (done["steps"], done["train"]) == (stage.steps, stage.train), name
        assert 0.5 * stage.evaluate <= done["evaluate"] <= stage.evaluate, name
    for name in ("rounds", "personalise", "contributions"):
        assert watching.done[name]["evaluate"] == planned[name].evaluate


def test_documents_texts_never_reach_the_run_directory(tmp_path: Path, write_jsonl) -> None:
    canary = "qX7canaryZ9"
    path = write_jsonl([f"{canary} document number {i} with words that say {i * 7919}" for i in range(40)])
    finished = run(make_recipe(data={"source": str(path)}), tmp_path / "run")
    for file in finished.folder.rglob("*"):
        if file.is_file():
            assert canary.encode() not in file.read_bytes(), file


def test_padding_can_be_counted_to_replay_a_program_that_did(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl([f"short {i}" for i in range(40)])
    one_round = {"federation": {"rounds": 1}}
    right = run(make_recipe(data={"source": str(path)}, **one_round), tmp_path / "right")
    wrong = run(make_recipe(data={"source": str(path), "pad_in_loss": True}, **one_round), tmp_path / "wrong")
    # Padding is easy to predict: what the published program took for a falling loss.
    fall = [r.rounds[0]["central_loss"] - r.rounds[1]["central_loss"] for r in (right, wrong)]
    assert fall[1] > fall[0]


@pytest.mark.long
def test_files_that_begin_alike_are_not_trained_on_and_evaluated(tmp_path: Path, write_jsonl) -> None:
    header = "# This licence stands at the head of every file of the project. " * 2
    alike = [header + " ".join(str(i * 7919 + j) for j in range(200)) for i in range(10)]
    path = write_jsonl([*alike, *(f"{i * 7919} begins otherwise" for i in range(30))])
    dropped = plan(make_recipe(data={"source": str(path)}))
    reported = plan(make_recipe(data={"source": str(path), "duplicates": "report"}))
    assert dropped.shared_blocks == reported.shared_blocks > 0
    blocks = [sum(client.blocks for client in planned.clients) for planned in (dropped, reported)]
    assert blocks[1] - blocks[0] >= dropped.shared_blocks


@pytest.mark.parametrize(
    ("adapter", "lacks"),
    [
        ({}, None),
        ({"options": {"init_lora_weights": "gaussian", "layers_to_transform": [0]}}, None),
        ({"dora": True}, "adapter.dora"),
        ({"options": {"lora_bias": True}}, "adapter.options.lora_bias"),
        ({"method": "ia3", "rank": None, "alpha": None}, 'method "ia3"'),
    ],
)
def test_auto_takes_batched_where_it_has_the_method(adapter: dict, lacks: str | None) -> None:
    def choose(engine: str) -> str:
        recipe = make_recipe(adapter=adapter, training={"engine": engine})
        return choose_engine(recipe.adapter, recipe.training, recipe.model)

    assert choose("auto") == ("reference" if lacks else "batched")
    assert choose("reference") == "reference"
    if lacks:
        with pytest.raises(RecipeError, match=rf"batched has no {lacks}.*reference or auto"):
            choose("batched")
    else:
        assert choose("batched") == "batched"


@pytest.mark.long
@pytest.mark.parametrize(("name", "engine"), first([("tiny-dora", "reference"), ("tiny-full", "reference")]))
def test_a_small_twin_learns_in_seconds(name: str, engine: str, tmp_path: Path) -> None:
    finished = run(load_recipe(name), tmp_path / "run", Observer())
    assert finished.plan["engine"] == engine
    assert finished.rounds[-1]["central_loss"] < finished.rounds[0]["central_loss"]
    assert sum(record["train_seconds"] + record["evaluate_seconds"] for record in finished.rounds) < 60
    assert ("full" in name) == (finished.plan["trainable_parameters"] == finished.plan["parameters"])
    assert ("lora_error" in finished.rounds[1]) == ("dora" in name)


@pytest.mark.long
def test_a_frozen_a_halves_what_travels(tmp_path: Path) -> None:
    both = plan(make_recipe())
    ffa = make_recipe(federation={"rounds": 1, "lora_rule": "ffa"})
    assert plan(ffa).payload_bytes < 0.7 * both.payload_bytes
    finished = run(ffa, tmp_path / "run", Observer())
    assert finished.rounds[1]["bytes_up"] == 3 * plan(ffa).payload_bytes
    saved = [
        load_file(tmp_path / "run" / "adapters" / name / "adapter_model.safetensors") for name in ("initial", "last")
    ]
    a_names = [name for name in saved[0] if ".lora_A." in name]
    assert a_names
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in a_names)


@pytest.mark.long
def test_clients_at_once_is_what_was_asked_for() -> None:
    assert plan(make_recipe()).clients_at_once == 3
    assert plan(make_recipe(training={"clients_at_once": 2})).clients_at_once == 2
    alone = plan(make_recipe(training={"engine": "reference"}))
    assert (alone.clients_at_once, alone.clients_that_fit) == (1, None)
    assert alone.peak_bytes is not None


@pytest.mark.long
@pytest.mark.parametrize("predict", [True, False])
def test_a_processor_trains_no_more_at_once_than_pays_unless_asked_to(predict: bool) -> None:
    """Ten thousand at once took twice the time of 64, and 4 GB."""
    many = {"clients": 80, "documents_per_client": 2, "client_holdout": 0.0}
    device = {"device": "cpu"}
    assert prepare(make_recipe(model=device, data=many), Observer(), predict=predict).plan.clients_at_once == 64
    asked = make_recipe(model=device, data=many, training={"clients_at_once": 70})
    assert prepare(asked, Observer(), predict=predict).plan.clients_at_once == 70


def test_a_length_that_the_model_lacks_is_refused_before_anything_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("documents were tokenized")

    monkeypatch.setattr("fedloom.experiment.building.tokenize_documents", refuse)
    with pytest.raises(ModelError, match="16777216 tokens are more than the model's 256; at most 256"):
        plan(make_recipe(data={"max_length": 2**24}))


@pytest.mark.long
def test_layers_named_by_their_path_can_be_planned() -> None:
    recipe = make_recipe(model={"source": "random:smollm2-135m"}, adapter={"targets": ["layers.29.self_attn.q_proj"]})
    found = plan(recipe)
    assert found.peak_bytes is not None
    assert found.trainable_parameters == 2 * (576 + 576)


def test_a_model_that_can_not_be_traced_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise RuntimeError("no meta function")

    monkeypatch.setattr("fedloom.experiment.step_memory.predict_step", refuse)
    monkeypatch.setattr("fedloom.experiment.preparation.leaves_no_doubt", lambda *given, **named: False)
    finished = run(make_recipe(federation={"rounds": 1}), tmp_path / "run", Observer())
    assert finished.plan["peak_bytes"] is None
    assert finished.plan["clients_at_once"] == 1
    assert finished.status["state"] == "done"


@pytest.mark.long
def test_a_fixed_share_of_the_clients_is_scored(tmp_path: Path) -> None:
    recipe = make_recipe(data={"clients": 6}, evaluation={"clients": 2}, federation={"rounds": 2, "fraction": 0.5})
    planned, finished = plan(recipe), run(recipe, tmp_path / "run", Observer())
    scored = [set(record["client_losses"]) for record in finished.rounds]
    assert [len(clients) for clients in scored] == [2, 2, 2]
    assert scored[0] == scored[1] == scored[2]
    holdouts = [planned.clients[int(client)].holdout_tokens for client in scored[0]]
    assert planned.judged_tokens == sum(holdouts)
    assert finished.rounds[0]["evaluate_tokens"] == planned.central_tokens + planned.judged_tokens
