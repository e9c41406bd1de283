"""Every key of the recipe, and every value of a choice, changes the plan, the result or a message.

The keys and the choices are those of the schema, so a new one without a line in `CASES` fails by its name.
"""

import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from support.asked import write_tasks
from support.marks import first
from support.quick_runs import attempt, result_of
from support.tiny import PEFT_NEEDS, make_blocks, make_job, write_tiny_gguf

from fedloom.errors import FedloomError
from fedloom.experiment import run as runs
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.preparation import prepare
from fedloom.experiment.run import plan
from fedloom.model.source import open_model
from fedloom.recipe.data_section import PARTITION_KEYS
from fedloom.recipe.loading import SWEEP_TABLE
from fedloom.recipe.methods import METHODS, own_keys
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.schema import recipe_schema
from fedloom.recipe.sections import STRATEGY_DEFAULTS
from fedloom.training.jobs import ClientJob
from fedloom.training.memory import StepMemory
from fedloom.training.reference import train_client

LEFT_OUT: Any = None
Overrides = dict[str, Any]
"""Values by dotted key; LEFT_OUT leaves a key out."""

PLAN, RESULT, TRAINED, REFUSAL, NOTE, REPORT = "plan", "result", "training", "refusal", "note", "report"
"""Where a change shows: in what a run needs, in what comes of it, in what a client trains, in an error, in a note of
the plan, in the report."""


@dataclass(frozen=True)
class Case:
    """A key, values of which no two come to the same, where that shows, and the recipe around it.

    The first value is accepted and says nothing; one that shows in an error or a note is among the others.
    """

    key: str
    values: tuple[Any, ...]
    shows: str
    beside: Overrides = field(default_factory=dict)
    loses_a_client: bool = False
    """True where client 1's training explodes."""

    def __str__(self) -> str:
        kind = self.beside.get("federation.strategy", {}).get("kind") or self.beside.get("adapter", {}).get("method")
        return f"{self.key}{f' of {kind}' if kind else ''} in {self.shows}"


BASE: Overrides = {
    "name": "every-key",
    "seed": 5,
    "model.source": "random:tiny-llama",
    "model.dtype": "float32",
    "model.device": "cpu",
    "adapter.rank": 2,
    "adapter.alpha": 4,
    "adapter.targets": ["q_proj"],
    "data.source": "rows.jsonl",
    "data.max_length": 24,
    "data.client_holdout": 0.25,
    "data.central_holdout": 3,
    "training.engine": "reference",
    "training.batch_size": 2,
    "training.learning_rate": 1e-2,
    "federation.rounds": 1,
}
"""Three clients that take several steps in one round: a plan of 0.03 s, a run of 0.3 s."""

UNEQUAL = {"data.partition": {"kind": "linear"}}
"""Clients of different sizes, so that it matters how they are weighed."""
SEVEN = {**UNEQUAL, "data.clients": 7, "data.client_holdout": 0.0}
"""Clients enough for every strategy."""
DIRICHLET = {"kind": "dirichlet", "by": "owner", "alpha": 1.0}
STRATEGIES: dict[str, Overrides] = {
    "multi_krum": {"keep": 3},  # with 1 it is krum
    "norm_clipped": {"max_norm": 0.01},
    "bulyan": {"malicious": 1},
}
"""Settings with which a kind is no other one."""


CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHATS = {
    "data.source": "chats.jsonl",
    "data.messages": "messages",
    "data.chat_template": CHATML,
    "data.max_length": 128,
}
PRIVATE = {"privacy": {"epsilon": 8.0, "delta": 1e-3, "noise": "seed"}}
CENTRAL = {"data.client_holdout": 0.0, "federation.strategy": {"kind": "fedavg", "weight_by": "equal"}}
LED = {
    **CENTRAL,
    "federation.rounds": 2,
    "privacy": {"unit": "client", "noise_multiplier": 0.2, "delta": 1e-3, "noise": "seed"},
}
"""So little noise that three clients can lead the norm."""
ASKED = {"data.source": "chats.jsonl", "data.prompt": "{q}>", "data.completion": "{a}", "data.max_length": 64}


def strategy(kind: str) -> Overrides:
    return {"kind": kind, **STRATEGIES.get(kind, {})}


def strategy_case(kind: str, key: str, *values: Any) -> Case:
    """A key of a strategy's own; LEFT_OUT stands for its default."""
    around = {"federation.strategy": {**strategy(kind), key: LEFT_OUT}, "federation.rounds": 2, **SEVEN}
    return Case(f"federation.strategy.{key}", values, RESULT, around)


CASES = [
    Case("name", ("every-key", "another"), PLAN),
    Case("description", (LEFT_OUT, "one", "another"), REPORT),
    Case("seed", (5, 6), PLAN),
    Case("baselines", ([], ["round0"], ["local"], ["pooled"], ["local", "pooled"]), RESULT),
    Case("personalise.epochs", (1, 2), RESULT),
    Case("personalise", (LEFT_OUT, {"epochs": 1}), RESULT),
    Case("personalise", (LEFT_OUT, {"epochs": 2}), NOTE, {"data.client_holdout": 0.0}),
    Case("contributions", (False, True), PLAN),
    Case("contributions", (False, True), RESULT),
    Case("contributions", (False, True), NOTE, {"data.clients": 1}),
    Case("contributions", (False, True), REFUSAL, {"federation.strategy": {"kind": "krum"}}),
    Case("model.source", ("random:tiny-llama", "random:tiny-opt", "random:tiny-gpt2"), PLAN,
         {"adapter.targets": LEFT_OUT}),
    Case("model.revision", (LEFT_OUT, "main"), REFUSAL),
    Case("model.weights_revision", (LEFT_OUT, "main"), REFUSAL),
    Case("model.convert", (False, True), NOTE),
    Case("model.dtype", ("float32", "bfloat16", "float64"), PLAN),
    Case("model.device", ("cpu", "cuda:7"), REFUSAL),
    Case("model.quantization", (LEFT_OUT, "4bit", "8bit"), REFUSAL),
    Case("model.quantization", (LEFT_OUT, "packed"), PLAN, {"model.source": "tiny.gguf"}),
    *(Case("model.quantization_options", (LEFT_OUT, options), REFUSAL)
      for options in ({"type": "nf4"}, {"type": "fp4"}, {"double": True}, {"double": False},
                      *({"compute_dtype": name} for name in ("bfloat16", "float16", "float32")))),
    Case("model.device_map", (LEFT_OUT, "auto"), PLAN,
         {"model.source": "tiny.gguf", "training.gradient_checkpointing": True}),
    Case("adapter.rank", (1, 2), PLAN),
    Case("adapter.alpha", (4, 8), RESULT),
    Case("adapter.alpha", (LEFT_OUT, 8.0), NOTE, {"adapter": {"method": "psoft", "rank": 4}}),
    Case("adapter.rslora", (False, True), RESULT),
    Case("adapter.dora", (False, True), PLAN),
    Case("adapter.dropout", (0.0, 0.1, 0.5), RESULT),
    Case("adapter.targets", (["q_proj"], ["q_proj", "k_proj"], "all-linear"), PLAN),
    Case("adapter.options", (LEFT_OUT, {"layers_to_transform": [0]}, {"rank_pattern": {"q_proj": 4}}), PLAN),
    Case("adapter.options", (LEFT_OUT, {"alpha_pattern": {"q_proj": 9}}, {"init_lora_weights": "gaussian"}), RESULT),
    Case("adapter.options", (LEFT_OUT, {"rank_pattern": {"q_prj": 4}}, {"modules_to_save": ["no_head"]}), NOTE),
    Case("data.source", ("rows.jsonl", "others.jsonl", "texts.txt", "folder", "python:stdlib"), PLAN,
         {"data.documents_per_client": 8}),
    Case("data.revision", (LEFT_OUT, "main"), REFUSAL),
    Case("data.subset", (LEFT_OUT, "default"), REFUSAL),
    Case("data.split", (LEFT_OUT, "test"), REFUSAL),
    Case("data.files", (LEFT_OUT, "a/*", "**/*[1-6].txt"), PLAN, {"data.source": "folder"}),
    Case("data.files", (LEFT_OUT, "*.py"), REFUSAL, {"data.source": "python:stdlib", "data.documents_per_client": 8}),
    Case("data.text", ("text", "title"), PLAN),
    Case("data.text", (LEFT_OUT, "text"), REFUSAL, {"data.source": "python:stdlib", "data.documents_per_client": 8}),
    Case("data.text", ("text", "title"), NOTE, {"data.source": "folder"}),
    Case("data.prompt", ("{q}>", "{q}: [[{more}]]", "Question: {q}"), PLAN, ASKED),
    Case("data.completion", ("{a}", "{a}{a}"), PLAN, ASKED),
    Case("data.messages", ("messages", "talk"), PLAN, CHATS),
    Case("data.chat_template", (CHATML, CHATML.replace("</>", "</end>")), PLAN, CHATS),
    Case("data.system", (LEFT_OUT, "Be brief.", "Be long and kind."), PLAN, CHATS),
    Case("data.loss", ("completion", "assistant", "all"), PLAN, CHATS),
    Case("data.loss", (LEFT_OUT, "completion"), REFUSAL),
    Case("data.end", (True, False), PLAN, ASKED),
    Case("data.end", (LEFT_OUT, True), RESULT, {"data.max_length": 64}),
    Case("data.on_bad_row", ("skip", "error"), REFUSAL, {"data.source": "bad.jsonl", "data.max_bad_fraction": 0.5}),
    Case("data.max_bad_fraction", (0.5, 0.01), REFUSAL, {"data.source": "bad.jsonl"}),
    Case("data.max_length", (16, 24), PLAN),
    Case("data.window", ("truncate", "blocks"), PLAN),
    Case("data.window", ("truncate", "pack"), PLAN, {"data.max_length": 200}),
    Case("data.pad_in_loss", (False, True), RESULT, {"data.max_length": 64}),
    Case("data.clients", (2, 3), PLAN),
    Case("data.documents_per_client", (LEFT_OUT, 6, 7), PLAN),
    Case("data.client_holdout", (0.0, 0.25, 0.5), PLAN),
    Case("data.central_holdout", (0, 3, 4), PLAN),
    Case("data.duplicates", ("drop", "report"), PLAN, {"data.source": "copies.jsonl"}),
    Case("data.near_duplicate", (0.3, 0.9), PLAN, {"data.source": "copies.jsonl"}),
    Case("data.partition", tuple({"kind": kind, **{key: {"by": "owner", "alpha": 1.0, "shards_per_client": 2}[key]
                                                   for key in PARTITION_KEYS[kind]}} for kind in PARTITION_KEYS), PLAN),
    *(Case("data.partition.by", ("owner", "town"), PLAN,
           {"data.partition": {"kind": kind, "alpha": 1.0 if kind == "dirichlet" else None,
                               "shards_per_client": 2 if kind == "shard" else None}})
      for kind in ("dirichlet", "natural", "shard")),
    Case("data.partition.alpha", (0.3, 1.0, 100.0), PLAN, {"data.partition": DIRICHLET}),
    Case("data.partition.shards_per_client", (1, 2), PLAN, {"data.partition": {"kind": "shard", "by": "owner"}}),
    Case("training.engine", ("reference", "batched"), PLAN),
    Case("training.clients_at_once", (1, 3), PLAN, {"training.engine": "batched"}),
    Case("training.clients_at_once", (LEFT_OUT, 2), NOTE),
    Case("training.gradient_checkpointing", (False, True), PLAN),
    Case("training.cuda_graph", (LEFT_OUT, False), NOTE),
    Case("training.cuda_graph", (LEFT_OUT, True), NOTE, {"training.engine": "batched"}),
    Case("training.devices", (LEFT_OUT, ["cpu"], ["cpu", "cpu"]), PLAN),
    Case("training.devices", (LEFT_OUT, "all"), REFUSAL),
    Case("training.epochs", (1, 2), PLAN),
    Case("training.max_steps", (LEFT_OUT, 1, 2), PLAN),
    Case("training.max_steps", (1, 99), NOTE),
    Case("training.batch_size", (2, 3), PLAN),
    Case("training.gradient_accumulation", (1, 2), PLAN),
    Case("training.gradient_accumulation", (1, 4), RESULT),
    Case("training.gradient_accumulation", (1, 2), NOTE, {"training.batch_size": 50}),
    Case("training.learning_rate", (1e-2, 1e-3), RESULT),
    Case("training.learning_rate_end", (0.0, 1e-3, 2e-3), RESULT, {"training.schedule": "linear"}),
    Case("training.learning_rate_end", (LEFT_OUT, 1e-3), NOTE),
    Case("training.learning_rate_end", (1e-2, 2e-2), REFUSAL),
    Case("training.schedule", ("constant", "linear", "cosine"), RESULT),
    Case("training.schedule_scope", ("round", "run", "rounds"), RESULT,
         {"training.schedule": "linear", "training.learning_rate_end": 1e-3, "federation.rounds": 2}),
    Case("training.schedule_scope", ("round", "rounds"), REFUSAL, {"training.schedule": "linear"}),
    Case("training.warmup", (0, 2, 0.9), RESULT),
    Case("training.warmup", (2, 99), NOTE),
    Case("training.warmup", (1, 1.5), REFUSAL),
    Case("training.warmup", (LEFT_OUT, 1), REFUSAL,
         {"training.schedule": "linear", "training.schedule_scope": "rounds", "training.learning_rate_end": 1e-3}),
    Case("training.schedule_scope", ("round", "run"), NOTE),
    Case("training.optimizer", ("adamw", "sgd", "adafactor"), RESULT),
    Case("training.optimizer", ("adamw", "adamw_8bit"), REFUSAL),
    Case("training.optimizer.kind", ("adamw", "sgd", "adafactor"), RESULT),
    Case("training.optimizer.kind", ("adamw", "adamw_8bit"), REFUSAL),
    Case("training.optimizer.betas", (LEFT_OUT, [0.5, 0.999], [0.9, 0.5]), RESULT),
    Case("training.optimizer.eps", (LEFT_OUT, 1e-3, 1.0), RESULT),
    Case("training.optimizer.momentum", (LEFT_OUT, 0.5, 0.9), RESULT, {"training.optimizer": {"kind": "sgd"}}),
    Case("training.optimizer_state", ("reset", "keep"), RESULT, {"federation.rounds": 2}),
    Case("training.weight_decay", (0.0, 0.1), RESULT),
    Case("training.weight_decay", (0.0, 0.1), RESULT, {"training.optimizer": "sgd"}),
    Case("training.max_gradient_norm", (LEFT_OUT, 1e-3, 1e-4), RESULT, {"training.optimizer": "sgd"}),
    Case("training.proximal_mu", (0.0, 0.1), PLAN),
    Case("training.proximal_mu", (0.0, 0.1, 0.2), RESULT),
    # So high a rate that the loss rises, which an adaptive μ waits for.
    Case("training.proximal_schedule", ("constant", "linear", "cosine", "adaptive"), RESULT,
         {"training.proximal_mu": 0.2, "training.learning_rate": 0.5, "federation.rounds": 3}),
    Case("federation.rounds", (1, 2), PLAN),
    Case("federation.fraction", (0.3, 0.7, 1.0), PLAN),
    Case("federation.min_clients", (1, 2), PLAN, {"federation.fraction": 0.3}),
    Case("federation.min_clients", (1, 2), NOTE),
    Case("federation.max_lost_clients", (0, 1), RESULT, loses_a_client=True),
    Case("federation.on_quorum_lost", ("stop", "skip"), RESULT, loses_a_client=True),
    Case("federation.on_quorum_lost", ("stop", "wait"), NOTE),
    Case("federation.round_deadline", (LEFT_OUT, 60.0), NOTE),
    Case("federation.max_share", (LEFT_OUT, 0.4, 0.3), RESULT, UNEQUAL),
    Case("federation.max_share", (LEFT_OUT, 0.9), NOTE),
    Case("federation.max_change", (LEFT_OUT, 5.0), NOTE),
    Case("federation.max_client_blocks", (LEFT_OUT, 100), NOTE),
    Case("federation.lora_rule", ("factors", "ffa", "rolora", "fedsa", "svd", "fedex"), RESULT,
         {"federation.rounds": 2}),
    Case("federation.client_ranks", (LEFT_OUT, [1, 2, 2], [2, 1, 1]), RESULT, {"federation.lora_rule": "svd"}),
    Case("federation.strategy", tuple(strategy(kind) for kind in STRATEGY_DEFAULTS), RESULT,
         {"federation.rounds": 2, **SEVEN}),
    Case("federation.strategy.kind", ("fedavg", "bulyan"), NOTE),
    Case("federation.strategy.options", (LEFT_OUT, {"a": 1}), REFUSAL),
    Case("federation.strategy.weight_by", (LEFT_OUT, "equal"), NOTE,
         {"data.source": "alike.jsonl", "data.client_holdout": 0.0}),
    *(Case("federation.strategy.weight_by", ("examples", "tokens", "equal"), RESULT,
           {"federation.strategy": {**strategy(kind), "weight_by": LEFT_OUT}, **SEVEN})
      for kind in ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "multi_krum", "norm_clipped")),
    strategy_case("fedavgm", "learning_rate", LEFT_OUT, 0.5),
    strategy_case("fedavgm", "momentum", 0.0, 0.5, LEFT_OUT),
    strategy_case("fedavgm", "nesterov", False, True),
    strategy_case("fedadam", "learning_rate", LEFT_OUT, 0.05),
    strategy_case("fedadam", "beta_1", LEFT_OUT, 0.5),
    strategy_case("fedadam", "beta_2", LEFT_OUT, 0.5),
    strategy_case("fedadam", "tau", LEFT_OUT, 1e-3),
    strategy_case("fedyogi", "learning_rate", LEFT_OUT, 0.05),
    strategy_case("fedyogi", "beta_1", LEFT_OUT, 0.5),
    strategy_case("fedyogi", "beta_2", LEFT_OUT, 0.5),
    strategy_case("fedyogi", "tau", LEFT_OUT, 1e-9),
    strategy_case("fedadagrad", "learning_rate", LEFT_OUT, 0.05),
    strategy_case("fedadagrad", "tau", LEFT_OUT, 1e-3),
    strategy_case("trimmed_mean", "trim", 0.0, 0.15, 0.3, 0.45),
    strategy_case("krum", "malicious", LEFT_OUT, 2),
    strategy_case("multi_krum", "malicious", LEFT_OUT, 2),
    strategy_case("multi_krum", "keep", 1, 3, 7),
    strategy_case("bulyan", "malicious", LEFT_OUT, 1),
    strategy_case("norm_clipped", "max_norm", 0.01, 0.02, LEFT_OUT),
    Case("federation.early_stop.patience", (1, 2, 9), RESULT,
         {"federation.rounds": 3, "federation.early_stop": {"min_delta": 9.0}}),
    Case("federation.early_stop.min_delta", (0.0, 9.0), RESULT,
         {"federation.rounds": 2, "federation.early_stop": {"patience": 1}}),
    Case("federation.keep_every", (LEFT_OUT, 1, 2), PLAN, {"federation.rounds": 2}),
    Case("federation.keep_every", (LEFT_OUT, 1, 2), RESULT, {"federation.rounds": 2}),
    Case("federation.keep_every", (LEFT_OUT, 9), NOTE),
    Case("federation.max_bytes", (LEFT_OUT, 13_000, 25_000), RESULT, {"federation.rounds": 3}),
    Case("federation.max_bytes", (LEFT_OUT, 10**9), NOTE),
    Case("federation.max_bytes", (LEFT_OUT, 1), NOTE),
    Case("evaluation.every", (1, 2, 3), PLAN, {"federation.rounds": 5}),
    Case("evaluation.every", (1, 2, 3), RESULT, {"federation.rounds": 4}),
    Case("evaluation.tasks", ([], ["asked.toml"], ["asked.toml", "first-steps"]), PLAN),
    Case("evaluation.tasks", ([], ["asked.toml"]), RESULT),
    Case("evaluation.tasks_every", (0, 1, 2), RESULT, {"evaluation.tasks": ["asked.toml"], "federation.rounds": 2}),
    Case("evaluation.tasks_every", (LEFT_OUT, 1), NOTE),
    Case("evaluation.tasks_every", (0, 9), NOTE, {"evaluation.tasks": ["asked.toml"]}),
    Case("report.samples", (0, 1, 2), REPORT, ASKED),
    Case("evaluation.batch_size", (8, 2), RESULT),
    Case("evaluation.clients", (1, 2), PLAN, UNEQUAL),
    Case("evaluation.clients", (LEFT_OUT, 3), NOTE),
    Case("evaluation.clients", (LEFT_OUT, 1), NOTE, PRIVATE),
    Case("privacy", (LEFT_OUT, PRIVATE["privacy"]), RESULT),
    Case("privacy.unit", ("document", "owner"), RESULT, PRIVATE),
    Case("privacy.unit", ("document", "nobody"), REFUSAL, PRIVATE),
    Case("privacy.epsilon", (8.0, 4.0), PLAN, PRIVATE),
    Case("privacy.noise_multiplier", (1.0, 2.0), RESULT, {"privacy": {"delta": 1e-3, "noise": "seed"}}),
    Case("privacy.delta", (1e-3, 1e-4), PLAN, PRIVATE),
    Case("privacy.delta", (1e-3, 0.5), REFUSAL, PRIVATE),
    Case("privacy.max_norm", (1.0, 0.1), RESULT, PRIVATE),
    Case("privacy.noise", ("seed", "secret"), RESULT, PRIVATE),
    Case("privacy.unit", ("document", "client"), RESULT, {**PRIVATE, **CENTRAL}),
    Case("privacy.unit", ("client", "patient"), REFUSAL, {**PRIVATE, **CENTRAL}),
    Case("privacy.norm_quantile", (LEFT_OUT, 0.5, 0.9), RESULT, LED),
    Case("privacy.norm_rate", (LEFT_OUT, 0.5), RESULT, {**LED, "privacy": {**LED["privacy"], "norm_quantile": 0.5}}),
]  # fmt: skip

OWN: dict[str, tuple[Any, ...]] = {
    "rank": (2, 4),
    "alpha": (4.0, 8.0),
    "dropout": (0.0, 0.5),
    "targets": (["q_proj"], ["q_proj", "v_proj"]),
}
"""Values of the keys that methods share."""
OWN_OF_ONE = {("trainable_tokens", "targets"): (["embed_tokens"], ["lm_head"])}


def method(name: str) -> Overrides:
    """A whole section `[adapter]` with a method, beside which no other method's keys stand."""
    ranked = {"rank": 4} if METHODS[name].rank else {}
    return {"method": name, "rank": LEFT_OUT, "alpha": LEFT_OUT, "targets": LEFT_OUT, **ranked,
            "options": PEFT_NEEDS.get(name, {})}  # fmt: skip


ALLOWED = [name for name, method in METHODS.items() if not method.refused]
METHOD_CASES = [
    Case("adapter", tuple(method(name) for name in ALLOWED), TRAINED),
    *(
        Case(f"adapter.{key}", OWN_OF_ONE.get((name, key), OWN[key]), TRAINED, {"adapter": method(name)})
        for name in ALLOWED
        for key in own_keys(name).values()
        if name != "lora" and (name, key) != ("psoft", "alpha")
    ),
]
"""Every method, and each key of each."""

AUTO = {
    "model.dtype": ("float32", "bfloat16"),
    "model.device": ("cpu", "cuda"),
    "training.engine": ("batched", "reference"),
}
"""Values that "auto" may stand for."""


def texts() -> Iterator[dict[str, str]]:
    """Rows of many lengths, with two columns of text and two of labels."""
    for number in range(36):
        words = " ".join(f"word{number * 7919 % 101 + place}" for place in range(1 + number * 5 % 17))
        title = f"title {number}" + " and more" * (number % 5)
        yield {"text": f"{number} {words}", "title": title, "owner": f"o{number % 5}", "town": f"t{number % 4}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every source of the cases."""
    home, rows = tmp_path_factory.mktemp("every-key"), [*texts()]
    common = "the same words stand in all of these copies but for the last of them which is"
    copies = [{"text": f"{common} {'other ' * (number % 4)}{number}"} for number in range(18)]
    lines = {
        "rows.jsonl": [json.dumps(row) for row in rows],
        "others.jsonl": [json.dumps({**row, "text": f"{row['text']} more"}) for row in rows],
        "copies.jsonl": [json.dumps(row) for row in [*rows, *copies]],
        "bad.jsonl": [json.dumps(row) for row in rows] + ["no row"] * 2,
        "texts.txt": [row["text"] for row in rows],
        "chats.jsonl": [json.dumps(talk_about(number)) for number in range(30)],
        "alike.jsonl": [json.dumps({"text": f"the number {number}"}) for number in range(100, 133)],
    }
    for name, content in lines.items():
        (home / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    for number, row in enumerate(rows):
        path = home / "folder" / "ab"[number % 2] / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"], encoding="utf-8")
    write_tiny_gguf(home / "tiny.gguf", packed="Q8_0")
    questions = [{"q": f"And {number}?", "c": ["yes", "no"], "a": "yes"} for number in range(3)]
    write_tasks(home, questions, {}, file="asked.toml")
    return home


@pytest.fixture(scope="module")
def predicted() -> dict[Hashable, StepMemory]:
    """What the steps of all cases need, traced once for those that are alike, as a sweep does it."""
    return {}


@pytest.fixture(autouse=True)
def traced_once(predicted: dict[Hashable, StepMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan with what other cases' steps were found to need: tracing is most of a plan."""
    monkeypatch.setattr(runs, "prepare", partial(prepare, predicted=predicted))


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], str]:
    """What each recipe came to: most cases have a value with which it is the recipe of others too."""
    return {}


def talk_about(number: int) -> dict[str, Any]:
    """A row with two conversations, and with a question and its answer."""
    said = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"It is {number * 7}."}]
    more = [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}]
    return {"messages": said + more, "talk": said, "q": f"And {number}?", "a": f"That is {number * 3}.", "more": "x"}


def make(case: Case, value: Any) -> Recipe:
    """The recipe of a case with one of its values."""
    values: dict[str, Any] = {}
    for key, given in [*BASE.items(), *case.beside.items(), (case.key, value)]:
        *sections, name = key.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = dict(given) if isinstance(given, dict) else given
    return Recipe.model_validate(without_left_out(values))


def without_left_out(values: dict[str, Any]) -> dict[str, Any]:
    cleaned = {key: without_left_out(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in cleaned.items() if value is not LEFT_OUT}


def explode(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ClientJob.rate
    monkeypatch.setattr(ClientJob, "rate", lambda job, *step: 1e35 if job.client == 1 else right(job, *step))


def outcome(case: Case, value: Any, out: Path) -> str:
    """What a recipe comes to where the case says that it shows, as a text that can be compared."""
    if case.shows == TRAINED:
        recipe = make(case, value)
        adapted = load_adapted_model(recipe, open_model(recipe.model.source))
        update = train_client(adapted, make_job(make_blocks(4), adapted.read(), learning_rate=0.1, batch_size=2))
        return f"{update.adapter.layout} {update.adapter.sha256()} {update.report.loss_mean}"
    if case.shows in (RESULT, REPORT):
        why = attempt(make(case, value), out)
        assert case.loses_a_client or not why
        if case.shows == RESULT:
            return json.dumps([why, result_of(out)])
        return "\n".join(line for line in (out / "report.md").read_text().splitlines() if not re.search(r"\d", line))
    try:
        told = plan(make(case, value)).to_json()
    except (FedloomError, ValueError) as error:
        if case.shows != REFUSAL:
            raise
        return f"refused: {error}"
    notes = told.pop("unused", ())
    if case.shows == NOTE:
        return json.dumps(notes)
    return "accepted" if case.shows == REFUSAL else json.dumps(told, sort_keys=True)


def outcome_once(case: Case, value: Any, out: Path, known: dict[tuple[str, str], str]) -> str:
    """`outcome`, or that of an earlier case whose recipe was the same one, where a recipe alone decides."""
    if case.loses_a_client or case.shows not in (RESULT, TRAINED):
        return outcome(case, value, out)
    key = case.shows, make(case, value).model_dump_json()
    if key not in known:
        known[key] = outcome(case, value, out)
    return known[key]


OFTEN = [
    case
    for case in CASES
    if case.shows == REFUSAL or (case.shows != RESULT and case.key.startswith(("federation.", "privacy.")))
]
"""Cases that stand for the others: a plan that needs no other step than the one before takes a tenth of a second."""
PLANS = [case for case in CASES if case.shows != RESULT and case not in OFTEN]
RUNS = sorted((case for case in CASES if case.shows == RESULT), key=lambda case: len(case.values))


@pytest.mark.parametrize("case", [*OFTEN, *first([*RUNS, *METHOD_CASES, *PLANS], keep=3, every=4)], ids=str)
def test_no_two_values_of_a_key_come_to_the_same(
    case: Case, folder: Path, tmp_path: Path, known: dict[tuple[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if case.loses_a_client:
        explode(monkeypatch)
    found = [outcome_once(case, value, tmp_path / str(number), known) for number, value in enumerate(case.values)]
    for one, other in combinations(range(len(found)), 2):
        assert found[one] != found[other], f"{case.values[one]} and {case.values[other]}"
    if case.shows == REFUSAL:
        assert [answer == "accepted" for answer in found] == [True, *[False] * (len(found) - 1)]
    if case.shows == NOTE:
        assert [case.key in answer for answer in found] == [False, *[True] * (len(found) - 1)]


@pytest.mark.parametrize("key", first(AUTO))
def test_auto_stands_for_a_value_that_the_plan_names(key: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    chosen = plan(make(Case(key, (), PLAN), "auto")).to_json()[key.rpartition(".")[2]]
    assert any(chosen.startswith(value) for value in AUTO[key])


def keys_and_choices(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, set[Any]]]:
    """Yield each key of the recipe, and the values that are the only ones, where there are such."""
    for key, about in schema["properties"].items():
        if "properties" in about:
            yield from keys_and_choices(about, f"{prefix}{key}.")
        else:
            kinds = [about, about.get("items", {}), *about.get("anyOf", []), *about.get("oneOf", [])]
            for table in about.get("oneOf", []):
                if "properties" in table:
                    yield from keys_and_choices(table, f"{prefix}{key}.")
            choices = {
                choice for kind in kinds for choice in [*kind.get("enum", []), *filter(None, [kind.get("const")])]
            }
            yield prefix + key, {False, True} if about.get("type") == "boolean" else choices


def tried() -> dict[str, set[Any]]:
    """Every key of the cases with its values; of a list, its members."""
    found: dict[str, set[Any]] = {key: {"auto"} for key in AUTO}
    for case in [*CASES, *METHOD_CASES]:
        for value in case.values:
            pairs = {f"{case.key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {}
            for key, given in {case.key: value, **pairs}.items():
                members = given if isinstance(given, list) else [] if isinstance(given, dict) else [given]
                found.setdefault(key, set()).update(members)
    return found


@pytest.mark.parametrize(
    ("key", "choices"), [(key, choices) for key, choices in keys_and_choices(recipe_schema()) if key != SWEEP_TABLE]
)
def test_every_key_and_every_choice_has_a_case(key: str, choices: set[Any]) -> None:
    assert key in tried(), f"add a case for {key}"
    lacking = {choice for choice in choices - tried()[key] if LEFT_OUT not in tried()[key] or choice != default_of(key)}
    assert not lacking, f"add to a case for {key}: {lacking}"


def default_of(key: str) -> Any:
    section: Any = Recipe.model_validate({"name": "a", "model": {"source": "a"}, "data": {"source": "a"}})
    for name in key.split("."):
        section = getattr(section, name)
    return section


@pytest.mark.parametrize(
    ("section", "table"), [("data.partition", PARTITION_KEYS), ("federation.strategy", STRATEGY_DEFAULTS)]
)
def test_every_key_of_every_kind_has_a_case(section: str, table: dict[str, Any]) -> None:
    found = {(case.beside[section]["kind"], case.key) for case in CASES if section in case.beside}
    assert {(kind, f"{section}.{key}") for kind, keys in table.items() for key in keys} <= found


def test_the_same_recipe_comes_to_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a difference would say nothing of the key."""
    monkeypatch.chdir(folder)
    for case in (Case("seed", (), shows) for shows in (PLAN, RESULT, TRAINED, REPORT)):
        assert outcome(case, 5, tmp_path / f"{case.shows} a") == outcome(case, 5, tmp_path / f"{case.shows} b")
