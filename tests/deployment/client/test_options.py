"""Options of PEFT's that a server may name: each with values of every kind, sent to a client without a policy."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.liars import LyingServer, merged
from support.tiny import make_recipe

from fedloom.deployment.client import client_model
from fedloom.deployment.client.client_model import measure
from fedloom.deployment.client.journal import Journal
from fedloom.deployment.client.policy import Policy
from fedloom.deployment.client.worker import Worker
from fedloom.deployment.message_fields import REFUSALS
from fedloom.model.source import open_model

WATCHED = ("os.system", "subprocess.Popen", "socket.connect", "os.exec", "ctypes.dlopen", "pickle.find_class")
"""What Python is asked to do where another's code is run or asked for."""
NUMBERS = [None, True, False, 0, 1, -1, 4, 4096, 0.5, -1e6, [], [0], [[0, 1]]]
WORDS = ["x", "all", "SAMPLE_VOCAB", "os.system"]
LISTS = [["lm_head"], ["model.embed_tokens.weight"]]
TABLES = [{}, {"q_proj": 4}, {"embed_tokens": [1]}]
VALUES: list[Any] = [*NUMBERS, *WORDS, *LISTS, *TABLES]
NEEDED = {method: {"num_virtual_tokens": 4} for method in ("prefix_tuning", "prompt_tuning")}
"""Options that a method can't do without."""
DOCUMENTS = [f"{number} is a text: " + f"word{number} " * (number + 9) for number in range(12)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", DOCUMENTS)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def worker_of(data: Path) -> Worker:
    return Worker("alice", data, Policy(max_meets_a_day=10**6), Journal(data.parent / "alice.journal.jsonl"))


@pytest.fixture(scope="module")
def heard() -> list[str]:
    """Things that Python is asked to do from now on: such a hook can't be taken away."""
    found: list[str] = []
    sys.addaudithook(lambda event, told: found.append(f"{event} {told[:1]}") if event in WATCHED else None)
    return found


SOON = "lora"
"""Method that is tried in the long stage; all of them take minutes."""


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.long if name == SOON else pytest.mark.slow) for name in Policy().methods],
)
def test_no_option_runs_code_trains_the_words_or_ends_in_a_traceback(
    method: str, data: Path, heard: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(client_model, "measure", lambda adapted: loaded.append(measure(adapted)) or loaded[-1])
    recipe = make_recipe(training={"engine": "reference"})
    taken = 0
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]):
        for value in VALUES:
            server = LyingServer(worker_of(data).answer, recipe)
            adapter = {"method": method, "options": {**NEEDED.get(method, {}), field.name: value}}
            server.told = merged(server.told, {"adapter": None}) | {"adapter": adapter}
            heard.clear()
            answer = server.meet()
            assert not heard, (field.name, value)
            assert answer.get("refused", "policy") in REFUSALS.keys() - {"internal"}, (field.name, value)
            if "refused" not in answer:
                taken += 1
                assert loaded[-1]["share"] <= Policy().max_trained, (field.name, value)
                assert not loaded[-1]["embedding"], (field.name, value)
    assert taken, "some values are options that a recipe may have"


def test_no_compiler_is_started_for_a_server(data: Path, heard: list[str]) -> None:
    """BOFT, for which PEFT builds an extension when its layers are made."""
    server = LyingServer(worker_of(data).answer, make_recipe(adapter={"method": "boft", "rank": None, "alpha": None}))
    heard.clear()
    assert server.meet()["refused"] == "policy"
    assert not heard


def test_an_adapter_that_is_switched_off_is_refused_and_no_traceback(data: Path) -> None:
    adapter = {"method": "loha", "rank": 2, "alpha": 4, "options": {"module_dropout": 1.0}}
    server = LyingServer(worker_of(data).answer, make_recipe(adapter=adapter, training={"engine": "reference"}))
    assert server.meet()["refused"] == "model"


def test_no_document_is_trained_on_alone_for_the_words_in_it(tmp_path: Path) -> None:
    """An adapter that works behind some words alone: its update was that of one document of twelve, to the bit."""
    tokens = open_model("random:tiny-llama").tokenizer.encode("Zoe")[-3:-1]
    recipe = make_recipe(training={"engine": "reference"}, data={"client_holdout": 0.0})
    for number, others in enumerate((DOCUMENTS[1:], [text.upper() for text in DOCUMENTS[1:]])):
        (tmp_path / str(number)).mkdir()
        worker = worker_of(write(tmp_path / str(number) / "rows.jsonl", ["Zoe was here, and is ill", *others]))
        server = LyingServer(worker.answer, recipe)
        options = {"alora_invocation_tokens": tokens}
        assert server.train(sections={"adapter": {"options": options}}) == {"name": "alice", "refused": "question"}


@pytest.mark.parametrize("value", [False, 0, [], {}])
@pytest.mark.parametrize("option", ["trainable_token_indices", "modules_to_save"])
def test_an_empty_value_is_refused_as_any_other(option: str, value: Any, data: Path) -> None:
    server = LyingServer(worker_of(data).answer, make_recipe())
    assert server.meet({"adapter": {"options": {option: value}}})["refused"] == "policy"


NAMES = {
    "tiny-opt": ("embed_tokens", "decoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    "tiny-gpt2": ("wte", "transformer.wte", "lm_head"),
    "tiny-llama": ("embed_tokens", "model.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape, names in NAMES.items() for name in names])
def test_the_embedding_is_trained_under_none_of_its_names(shape: str, name: str, data: Path) -> None:
    recipe = make_recipe(model={"source": f"random:{shape}"}, training={"engine": "reference"})
    server = LyingServer(worker_of(data).answer, recipe)
    for options in ({}, {"rank_pattern": {f"{name}.weight": 1}}):
        told = {"adapter": {"rank": 1, "options": {**options, "target_parameters": [f"{name}.weight"]}}}
        # PEFT has no adapter of a parameter for GPT-2's kind of layers.
        assert server.meet(told)["refused"] == ("model" if shape == "tiny-gpt2" else "policy")
    assert server.meet({"adapter": {"targets": [name], "rank": 1}})["refused"] in ("policy", "model")
