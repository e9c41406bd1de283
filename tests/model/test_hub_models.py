"""Models of a hub whose weights are pickles: the hub's own conversion is read, or one is made if asked for, or none.

The hub is one of this machine (`support.hub_here`).
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load, save
from support.hub_here import OWNER, Hub, Repository, ask_here, digest, files_of, make_opt, open_hub
from support.marks import first
from transformers import OPTForCausalLM

from fedloom import hub as hub_module
from fedloom.errors import ModelError
from fedloom.model import conversion, unpickle
from fedloom.model.loading import load_model
from fedloom.model.source import ModelSource, open_model

NAME = "facebook/opt-350m"
HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original() -> OPTForCausalLM:
    return make_opt(64)


@pytest.fixture(scope="module")
def files(original: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model's files with a pickle alone, as torch wrote them then: the head is there, in the embedding's memory."""
    made = files_of(original, tmp_path_factory.mktemp("model"))
    found = {name: content for name, content in made.items() if name.endswith(".json")}
    state = original.state_dict()
    assert state[HEAD].data_ptr() == state[EMBEDDING].data_ptr()
    return {**found, conversion.PICKLE: pickled({**state, "model.decoder.version": torch.tensor([3.0])})}


@pytest.fixture(scope="module")
def converted(original: OPTForCausalLM) -> Tensors:
    """What the hub's bot makes of it: without the tied head."""
    return {name: value for name, value in original.state_dict().items() if name != HEAD}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with open_hub() as here:
        ask_here(here, tmp_path, monkeypatch)
        yield here


@pytest.fixture
def model(hub: Hub, files: dict[str, bytes]) -> Repository:
    return hub.add_model(NAME, files)


def pickled(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def loaded(source: ModelSource, say: Callable[[str], object] = str) -> OPTForCausalLM:
    return load_model(source, dtype="float32", device=torch.device("cpu"), say=say)


def check_same(found: OPTForCausalLM, original: OPTForCausalLM) -> None:
    """Every weight is the original's to the bit, and the head is its embedding: one tensor, not two equal ones."""
    wanted, state = original.state_dict(), found.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert found.lm_head.weight is found.model.decoder.embed_tokens.weight


def namespaces_are_allowed() -> bool:
    """Return whether this kernel gives a process a network of its own, as `unshare` of util-linux finds it."""
    return any(subprocess.run(["unshare", *flags, "true"], check=False).returncode == 0 for flags in (["-Un"], ["-n"]))


class Canary:
    """A pickle of it touches a file when it is carried out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def converted_folders(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "converted"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ---- the hub's own conversion


def test_the_hubs_conversion_is_read_at_its_commit(
    hub: Hub, model: Repository, original: OPTForCausalLM, converted: Tensors
) -> None:
    commit = model.request({"model.safetensors": save(converted, {"format": "pt"})})
    said: list[str] = []
    source = open_model(NAME, say=said.append)
    assert source.revision == model.references["main"][-1].id
    assert source.weights is not None
    assert source.weights.record == {"commit": commit}
    assert said == [f"its weights are pickles; reading the hub's own conversion instead, commit {commit[:12]}"]
    check_same(loaded(source, said.append), original)
    assert len(said) == 1, "a version number of old is no weight"
    assert not hub.downloads(".bin"), "nobody looks at the pickle"
    weights = f"GET /{NAME}/resolve/{commit}/model.safetensors"
    assert {line.split("/")[4] for line in hub.downloads("") if line != weights} == {source.revision}
    assert weights in hub.asked


def test_it_stays_the_one_that_was_found_first_and_needs_no_hub(
    hub: Hub, model: Repository, original: OPTForCausalLM, converted: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.request({"model.safetensors": save(converted)})
    loaded(open_model(NAME))
    worse = {name: value + 1 for name, value in converted.items()}
    model.commit({"model.safetensors": save(worse)}, author=hub_module.BOT, reference="refs/pr/1")
    again = open_model(NAME)
    assert again.weights is not None
    assert again.weights.revision == first
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    check_same(loaded(open_model(NAME, again.revision)), original)
    assert not hub.asked


def stranger(model: Repository, files: dict[str, bytes]) -> None:
    model.request(files, author="SFconvertb0t")


def closed(model: Repository, files: dict[str, bytes]) -> None:
    model.request(files, status="closed")


def pushed_to(model: Repository, files: dict[str, bytes]) -> None:
    model.request(files)
    model.commit({"README.md": b""}, author="stranger", reference="refs/pr/1")


def opened_by_a_stranger(model: Repository, files: dict[str, bytes]) -> None:
    model.request(files)
    model.discussions[0]["author"]["name"] = "stranger"


def replaced(model: Repository, files: dict[str, bytes]) -> None:
    model.request(files, author="stranger")
    model.discussions[0]["author"]["name"] = hub_module.BOT


def on_top_of_a_stranger(model: Repository, files: dict[str, bytes]) -> None:
    model.request({"README.md": b""}, author="stranger")
    model.commit(files, author=hub_module.BOT, reference="refs/pr/1")
    model.discussions[0]["author"]["name"] = hub_module.BOT


def of_other_weights(model: Repository, files: dict[str, bytes]) -> None:
    model.request(files)
    model.commit({conversion.PICKLE: model.references["main"][-1].files[conversion.PICKLE] + b"\0"})


def empty(model: Repository, files: dict[str, bytes]) -> None:
    model.request({"README.md": b""})


@pytest.mark.parametrize(
    "request_by",
    first(
        [
            stranger,
            pushed_to,
            of_other_weights,
            closed,
            opened_by_a_stranger,
            replaced,
            on_top_of_a_stranger,
            empty,
            lambda *_: None,
        ],
        keep=2,
    ),
)
def test_what_the_bot_did_not_make_of_these_very_weights_is_not_believed(
    request_by: Callable[..., None], hub: Hub, model: Repository, converted: Tensors
) -> None:
    request_by(model, {"model.safetensors": save(converted)})
    with pytest.raises(ModelError) as caught:
        open_model(NAME)
    assert str(caught.value) == (
        f'model.source = "{NAME}": pytorch_model.bin is a pickle, which could run code, and is never opened unasked,'
        f" and the hub has no conversion of its own; fedloom convert {NAME}, or model.convert = true, reads it once, in"
        " a process without network, and keeps safetensors weights"
    )
    assert not hub.downloads(".bin")
    assert not hub.downloads(".safetensors")


@pytest.mark.long
def test_a_later_change_of_the_readme_does_not_make_a_conversion_stale(model: Repository, converted: Tensors) -> None:
    commit = model.request({"model.safetensors": save(converted)})
    model.commit({"README.md": b"# OPT"})
    assert open_model(NAME).weights is not None
    assert open_model(NAME).weights.revision == commit  # type: ignore[union-attr]


def test_a_recipe_may_name_where_the_weights_are(
    model: Repository, original: OPTForCausalLM, converted: Tensors
) -> None:
    commit = model.request({"model.safetensors": save(converted)}, author="somebody who is trusted")
    source = open_model(NAME, weights_revision="refs/pr/1")
    assert source.weights is not None
    assert source.weights.record == {"commit": commit}
    check_same(loaded(source), original)


def cut_off(tensors: Tensors) -> bytes:
    return save(tensors)[:-40]


def without(name: str) -> Callable[[Tensors], bytes]:
    return lambda tensors: save({key: value for key, value in tensors.items() if key != name})


def with_changed(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], bytes]:
    return lambda tensors: save({**tensors, name: value(tensors[name]).contiguous()})


Q = "model.decoder.layers.1.self_attn.q_proj.weight"
BROKEN: dict[str, tuple[Callable[[Tensors], bytes], str]] = {
    "cut off": (cut_off, "incomplete metadata, file not fully covered"),
    "a weight is missing": (without(Q), f"lack 1 weight of the model, {Q} for one"),
    "head and embedding are missing": (without(EMBEDDING), f"lack 2 weights of the model, {HEAD} for one"),
    "another shape": (with_changed(Q, lambda value: value[:16]), f"{Q} is 16 × 32 in the files of"),
    "a head that is not its embedding": (
        lambda tensors: save({**tensors, HEAD: tensors[EMBEDDING] + 1}),
        f"{HEAD} and {EMBEDDING} differ in the files of",
    ),
    "a scale beside a weight": (
        lambda tensors: save({**tensors, f"{Q}_scale": torch.ones(1)}),
        f"have {Q}_scale, and the configuration builds this layer without it",
    ),
}


@pytest.mark.parametrize("kind", first(BROKEN, every=2))
def test_a_broken_conversion_is_refused_by_name(kind: str, model: Repository, converted: Tensors) -> None:
    damage, words = BROKEN[kind]
    commit = model.request({"model.safetensors": damage(converted)})
    source = open_model(NAME)
    with pytest.raises(ModelError) as caught:
        loaded(source)
    for word in (words, f"the weights are those of commit {commit}: fedloom convert {NAME} makes others"):
        assert word in str(caught.value)


@pytest.mark.long
def test_weights_that_the_model_has_no_layer_for_are_said(
    model: Repository, original: OPTForCausalLM, converted: Tensors
) -> None:
    extra = {"score.weight": torch.ones(2, 2), "score.bias": torch.ones(2)}
    model.request({"model.safetensors": save({**converted, **extra})})
    said: list[str] = []
    source = open_model(NAME)
    check_same(loaded(source, said.append), original)
    assert said == [
        f"the files of {source.weights.revision[:12]} have 2 weights that the model has no layer for,"  # type: ignore[union-attr]
        " score.bias for one: not used"
    ]


@pytest.mark.long
def test_a_missing_head_that_is_not_tied_ends_the_run_by_name(
    hub: Hub, files: dict[str, bytes], converted: Tensors
) -> None:
    untied = json.dumps({**json.loads(files["config.json"]), "tie_word_embeddings": False}).encode()
    hub.add_model(NAME, {**files, "config.json": untied}).request({"model.safetensors": save(converted)})
    with pytest.raises(ModelError, match=f"lack 1 weight of the model, {HEAD} for one"):
        loaded(open_model(NAME))


# ---- converted here


@pytest.mark.long
def test_with_leave_the_pickle_is_read_once_to_the_same_weights(
    hub: Hub, model: Repository, files: dict[str, bytes], original: OPTForCausalLM, tmp_path: Path
) -> None:
    said: list[str] = []
    source = open_model(NAME, say=said.append, convert=True)
    check_same(loaded(source), original)
    assert source.weights is not None
    folder = Path(source.weights.location)
    content = (folder / "model.safetensors").read_bytes()
    hashes = {conversion.PICKLE: digest(files[conversion.PICKLE]), "model.safetensors": digest(content)}
    assert source.weights.record == hashes
    record = json.loads((folder / conversion.RECORD).read_text())
    assert record["hashes"] == hashes
    assert (record["model"], record["commit"]) == (NAME, source.revision)
    assert record["network_namespace"] == namespaces_are_allowed()
    assert HEAD not in load(content), "of weights that share their memory, one is kept"
    assert any("reading pytorch_model.bin, once, in a process without network" in line for line in said)
    hub.asked.clear()
    shutil.rmtree(next((tmp_path / "hub").glob("models--*/blobs")))  # the pickle is gone
    model.commit({}, title="the hub's files are the same")
    again = open_model(NAME, source.revision)
    assert again.weights == source.weights, "no leave is needed any more"
    assert not hub.downloads(".bin")


@pytest.mark.long
def test_shards_are_converted_to_one_file(hub: Hub, files: dict[str, bytes], original: OPTForCausalLM) -> None:
    state = list(original.state_dict().items())
    shards = {"pytorch_model-00001-of-00002.bin": dict(state[:9]), "pytorch_model-00002-of-00002.bin": dict(state[9:])}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    whole = {name: content for name, content in files.items() if name != conversion.PICKLE}
    hub.add_model(
        NAME,
        {
            **whole,
            conversion.INDEX: json.dumps(index).encode(),
            # Of the second, the older format.
            **{
                shard: pickled(held, _use_new_zipfile_serialization=shard.startswith("pytorch_model-00001"))
                for shard, held in shards.items()
            },
        },
    )
    source = open_model(NAME, convert=True)
    assert source.weights is not None
    assert set(source.weights.record) == {*shards, "model.safetensors"}
    check_same(loaded(source), original)


@pytest.mark.parametrize("map", first(['{"weight_map": {"a": "../../elsewhere.bin"}}', "not JSON", "{}"]))
def test_a_damaged_index_is_refused(map: str, hub: Hub, files: dict[str, bytes]) -> None:
    whole = {name: content for name, content in files.items() if name != conversion.PICKLE}
    hub.add_model(NAME, {**whole, conversion.INDEX: map.encode()})
    with pytest.raises(ModelError, match=rf"{conversion.INDEX} is damaged"):
        open_model(NAME, convert=True)


@pytest.fixture
def folder(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model in a folder, and an empty cache."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


@pytest.mark.long
def test_a_folder_with_a_pickle_is_converted_too(folder: Path, original: OPTForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"fedloom convert {folder}, or model.convert = true"):
        open_model(str(folder))
    assert converted_folders(tmp_path) == []
    check_same(loaded(open_model(str(folder), convert=True)), original)
    (kept,) = converted_folders(tmp_path)
    check_same(loaded(open_model(str(folder))), original)
    # Other content is another model, which nobody gave leave for.
    (folder / conversion.PICKLE).write_bytes(pickled(original.state_dict()))
    with pytest.raises(ModelError, match="never opened unasked"):
        open_model(str(folder))
    assert converted_folders(tmp_path) == [kept]


@pytest.mark.long
def test_a_conversion_that_was_changed_is_not_read(folder: Path, tmp_path: Path) -> None:
    open_model(str(folder), convert=True)
    (kept,) = (tmp_path / "cache" / "converted").iterdir()
    path = kept / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match=f"{kept}: the converted weights are damaged; remove this folder"):
        open_model(str(folder), convert=True)


def planted(path: Path) -> bytes:
    return pickled({"weight": Canary(path)})


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (planted, "it asks for getattr"),
    "code in the older format": (
        lambda path: pickled({"weight": Canary(path)}, _use_new_zipfile_serialization=False),
        "it asks for getattr",
    ),
    "the system's shell": (lambda path: pickled({"weight": Shell(path)}), "it asks for posix.system"),
    "noise": (lambda _: b"\xff" * 999, "it is damaged, or no pickle of weights"),
    "nothing": (lambda _: b"", "it is damaged, or no pickle of weights"),
    "a list": (lambda _: pickled([torch.zeros(2)]), "it is no table of weights by name"),
    "a table of tables": (lambda _: pickled({"state_dict": {"a": torch.zeros(2)}}), "state_dict is no plain tensor"),
    "complex numbers": (lambda _: pickled({"a": torch.zeros(2, dtype=torch.complex64)}), "a is no plain tensor"),
    "weights without end": (
        lambda _: pickled({"a": torch.zeros(1).expand(2**28)}),
        "it takes more memory than its size allows",
    ),
}


class Shell:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", [*first([*HOSTILE][:2]), *first([*HOSTILE][2:], keep=0, every=2)])
def test_a_planted_pickle_is_refused_by_name_and_never_carried_out(kind: str, folder: Path, tmp_path: Path) -> None:
    make, words = HOSTILE[kind]
    marker = tmp_path / "executed"
    (folder / conversion.PICKLE).write_bytes(make(marker))
    with pytest.raises(ModelError) as caught:
        open_model(str(folder), convert=True)
    assert f"{conversion.PICKLE} can't be converted: {words}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert converted_folders(tmp_path) == [], "whole or not at all"


def test_a_reader_of_anything_would_be_caught(tmp_path: Path) -> None:
    """The twin that must not be let through: the canary does sing."""
    torch.load(io.BytesIO(planted(tmp_path / "executed")), weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_reading_that_takes_too_long_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conversion, "LEAST_SECONDS", 0)
    with pytest.raises(ModelError, match="it takes more than 0 s or too much memory"):
        open_model(str(folder), convert=True)
    assert converted_folders(tmp_path) == []


def test_a_cache_that_cannot_be_written_to_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("FEDLOOM_CACHE", str(folder / "file"))
    with pytest.raises(ModelError, match="set FEDLOOM_CACHE"):
        open_model(str(folder), convert=True)


ESCAPE = """
import json, os, socket, sys
sys.path.insert(0, {folder!r})
import unpickle
isolated = unpickle.leave_network()
unpickle.warm_up()
memory = 2**28
unpickle.confine(memory, 5, 2**20)
def tried(what):
    try:
        what()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", str(error))
    except MemoryError:
        return "no memory"
    return "it worked"
def connect():
    socket.create_connection(("127.0.0.1", {port}), 2)
def spend():
    bytearray(2 * memory)
print(json.dumps({{
    "isolated": isolated,
    "connect": tried(connect),
    "read": tried(lambda: open("/etc/hostname")),
    "write": tried(lambda: open({marker!r}, "w")),
    "raise": tried(lambda: __import__("resource").setrlimit(7, (64, 64))),
    "spend": tried(spend),
}}))
"""


@pytest.mark.parametrize("namespaces", first([False, True]))
def test_what_is_carried_out_all_the_same_has_no_network_and_opens_nothing(namespaces: bool, tmp_path: Path) -> None:
    """Should the guard fail: code in that process, once it reads, with the kernel's namespaces and without them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = ESCAPE.format(
            folder=str(Path(unpickle.__file__).parent),
            port=server.getsockname()[1],
            marker=str(tmp_path / "written"),
        )
        if not namespaces:
            code = code.replace("unpickle.leave_network()", "False")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={}, check=True)
        told = json.loads(done.stdout)
    assert told["connect"] in ("Too many open files", "Network is unreachable")
    assert told["read"] == told["write"] == "Too many open files"
    assert told["spend"] == "no memory"
    assert not (tmp_path / "written").exists()
    if told["isolated"]:
        assert told["raise"] == "not allowed to raise maximum limit"


# ---- gated, unknown, pinned


def test_a_gated_model_says_how_to_get_it(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add_model(NAME, files, gated=True)
    with pytest.raises(ModelError, match="it is gated: ask for access on its page, then hf auth login"):
        open_model(NAME)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [(NAME, "no-such", "the hub has no such revision"), ("nobody/nothing", None, "check the name and the network")],
)
def test_what_the_hub_does_not_have_is_an_error(
    name: str, revision: str | None, words: str, hub: Hub, model: Repository
) -> None:
    with pytest.raises(ModelError, match=words):
        open_model(name, revision)
    with pytest.raises(ModelError, match=words):
        conversion.convert_model(name, revision, str)


@pytest.mark.long
def test_a_revision_that_is_pinned_stays(hub: Hub, files: dict[str, bytes], original: OPTForCausalLM) -> None:
    safe = {name: content for name, content in files.items() if name != conversion.PICKLE}
    model = hub.add_model(NAME, {**safe, "model.safetensors": save(original.model.state_dict())})
    pinned = model.references["main"][-1].id
    model.commit({"model.safetensors": b"another"}, author=OWNER)
    source = open_model(NAME, pinned)
    assert source.revision == pinned
    assert source.weights is None
    check_same(loaded(source), original)
    assert f"GET /{NAME}/resolve/{pinned}/model.safetensors" in hub.asked
    with pytest.raises(ModelError, match="it has safetensors weights: there is nothing to convert"):
        conversion.convert_model(NAME, pinned, str)


def test_only_a_hub_model_has_weights_elsewhere() -> None:
    with pytest.raises(ModelError, match=r"model.weights_revision: only a hub model has revisions"):
        open_model("random:tiny-opt", weights_revision="refs/pr/1")
