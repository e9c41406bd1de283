"""Base models that are incomplete, hostile or unusual: refused by name, never executed, or trained as any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import first
from support.tiny import make_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom import run
from fedloom.errors import DataError, ModelError
from fedloom.handover.export import export
from fedloom.handover.generate import generate
from fedloom.model.loading import load_model
from fedloom.model.source import byte_tokenizer, open_model
from fedloom.monitoring.observer import Observer

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def load(folder: Path) -> torch.nn.Module:
    return load_model(open_model(str(folder)), dtype="float32", device=CPU)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "sharded"
    load_model(open_model("random:tiny-opt"), dtype="float32", device=CPU).save_pretrained(
        folder, max_shard_size="100KB"
    )
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


class Canary:
    """A pickle of it touches a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def leave_only_a_pickle(folder: Path, name: str = "pytorch_model.bin") -> None:
    for path in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({"weight": Canary(folder / "executed")}, folder / name)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plant_code(folder: Path) -> None:
    """Code that a model brings along, which touches a file when it is imported."""
    code = f"import pathlib\npathlib.Path({str(folder / 'executed')!r}).touch()\n"
    (folder / "planted.py").write_text(code + "class Config: ...\nclass Model: ...\nclass Tokenizer: ...\n")


def ask_for_code(folder: Path, model_type: str) -> None:
    plant_code(folder)
    auto_map = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
    rewrite(folder / "config.json", model_type=model_type, auto_map=auto_map)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda folder: shard(folder).unlink(), "model-00002-of-00005.safetensors is missing"),
    "a shard is cut off": (lambda folder: cut(shard(folder), 0.5), "model-00002-of-00005.safetensors is damaged"),
    "a shard is cut by a byte": (
        lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-1]),
        "model-00002-of-00005.safetensors is damaged",
    ),
    "a shard is empty": (lambda folder: shard(folder).write_bytes(b""), "model-00002-of-00005.safetensors is damaged"),
    "a shard is noise": (lambda folder: shard(folder).write_bytes(b"\xff" * 99), "is damaged or cut off"),
    "the index is cut off": (lambda folder: cut(folder / INDEX, 0.5), f"{INDEX} is damaged"),
    "the index is another thing": (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX} is damaged"),
    "a pickle": (leave_only_a_pickle, "pytorch_model.bin is a pickle"),
    "a checkpoint": (lambda folder: leave_only_a_pickle(folder, "model.ckpt"), "model.ckpt is a pickle"),
    "code of its own": (lambda folder: ask_for_code(folder, "planted"), "contains custom code"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_whole_model_is_refused_by_name_and_nothing_is_executed(kind: str, folder: Path) -> None:
    damage, words = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    for word in (words, str(folder), "safetensors weights"):
        assert word in str(caught.value)
    assert "trust_remote_code" not in str(caught.value), "what would run it is not advised"
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("brings", ["a tokenizer", "a model of a known kind", "an adapter in a pickle"])
def test_code_that_is_not_needed_is_not_executed(brings: str, folder: Path) -> None:
    if brings == "a tokenizer":
        plant_code(folder)
        auto_map = {"AutoTokenizer": ["planted.Tokenizer", None]}
        rewrite(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=auto_map)
    elif brings == "a model of a known kind":
        ask_for_code(folder, "opt")
    else:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps({**adapter, "task_type": "CAUSAL_LM"}))
        torch.save({"weight": Canary(folder / "executed")}, folder / "adapter_model.bin")
    try:
        load(folder)
    except ModelError:
        assert brings == "an adapter in a pickle"
    assert not (folder / "executed").exists()


def test_a_loader_of_pickles_and_remote_code_would_be_caught(folder: Path) -> None:
    """The twins that these tests must not let through: the canaries do sing."""
    leave_only_a_pickle(folder)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (folder / "executed").exists()
    (folder / "executed").unlink()
    plant_code(folder)
    exec((folder / "planted.py").read_text())
    assert (folder / "executed").exists()


def save(folder: Path, tokenizer: Any, *, vocabulary: int = 260, tied: bool = False) -> Path:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_with(**tokens: str | None) -> Any:
    tokenizer = byte_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


TOKENIZERS = {
    "no special token": {"eos_token": None},
    "no padding": {},
    "padding that is the end": {"pad_token": "<|end|>"},
    "a beginning that is the end": {"bos_token": "<|end|>"},
    "a padding of its own": {"pad_token": "!"},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", first(TOKENIZERS))
def test_any_set_of_special_tokens_trains_and_writes(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tokenizer_with(**TOKENIZERS[kind]))
    recipe = make_recipe(model={"source": str(folder)}, data={"clients": 2}, federation={"rounds": 1})
    finished = run(recipe, tmp_path / "run", Observer())
    assert finished.rounds[1]["central_loss"] < finished.rounds[0]["central_loss"]
    said: list[str] = []
    generate(finished.folder, "def", max_new_tokens=3, say=said.append)
    assert said[-1].endswith("\n")


def test_tied_embeddings_are_trained_with_and_handed_on(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", byte_tokenizer(), tied=True)
    finished = run(make_recipe(model={"source": str(folder)}, federation={"rounds": 1}), tmp_path / "run", Observer())
    assert export(finished.folder, tmp_path / "merged", merged=True) < 1e-4
    merged = load(tmp_path / "merged")
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("vocabulary", [100, 256])
def test_a_vocabulary_larger_than_the_embedding_is_refused_before_anything_is_trained(
    vocabulary: int, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", tokenizer_with(pad_token="<|end|>"), vocabulary=vocabulary)
    recipe = make_recipe(model={"source": str(folder)}, data={"pad_in_loss": True, "max_length": 2000})
    with pytest.raises(
        DataError, match=rf"token 256 \(<\|end\|>\) is outside the base model's vocabulary of {vocabulary}"
    ):
        run(recipe, tmp_path / "run", Observer())
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_tokenizer_puts_before_a_text_is_named_where_the_model_lacks_it(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_with()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    template = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 257)])
    tokenizer.backend_tokenizer.post_processor = template
    recipe = make_recipe(model={"source": str(save(tmp_path / "model", tokenizer, vocabulary=257))})
    with pytest.raises(DataError, match=r"token 257 \(<begin>\) is outside the base model's vocabulary of 257"):
        run(recipe, tmp_path / "run", Observer())


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(tmp_path: Path, write_jsonl: Any) -> None:
    source = save(tmp_path / "model", tokenizer_with(eos_token=None), vocabulary=221)
    documents = write_jsonl([f"only plain letters, {number} times" for number in range(40)])
    recipe = make_recipe(
        model={"source": str(source)}, data={"source": str(documents), "clients": 2}, federation={"rounds": 1}
    )
    finished = run(recipe, tmp_path / "run", Observer())
    letter = next(letter for letter in map(chr, range(160, 500)) if max(byte_tokenizer()(letter)["input_ids"]) >= 221)
    with pytest.raises(DataError, match="outside the base model's vocabulary of 221"):
        generate(finished.folder, letter, say=str)


@pytest.mark.parametrize(("said", "holds"), [(True, False), (False, True)])
def test_a_head_that_its_configuration_does_not_describe_is_refused(said: bool, holds: bool, tmp_path: Path) -> None:
    """A file whose head is its own where the configuration says that it is the embedding, or the other way round."""
    folder = save(tmp_path / "model", byte_tokenizer(), tied=holds)
    rewrite(folder / "config.json", tie_word_embeddings=said)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(folder)
