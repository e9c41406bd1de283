"""A GGUF file's blocks in the place of weights: the same numbers in less memory."""

from pathlib import Path
from random import Random

import pytest
import torch
from support.marks import CI, first
from support.tiny import make_recipe, write_tiny_gguf

from fedloom import run
from fedloom.errors import ModelError, RecipeError, RunError
from fedloom.experiment.run import plan
from fedloom.handover.export import export
from fedloom.model.loading import build_meta_model, load_model
from fedloom.model.packed import PackedLinear, pack_model, shape_as_packed
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe

CPU = torch.device("cpu")
KINDS = ("Q8_0", "Q4_0", "Q4_1")


@pytest.fixture(params=first(KINDS, rest=CI))
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    return write_tiny_gguf(tmp_path / "tiny.gguf", request.param)


def load(file: Path, quantization: str | None, dtype: str = "float32") -> torch.nn.Module:
    return load_model(open_model(str(file)), dtype=dtype, device=CPU, quantization=quantization)


def make_packed(file: Path, **sections: dict) -> Recipe:
    data = {"source": str(write_letters(file.parent / "letters.jsonl")), "max_length": 16}
    return make_recipe(
        **{"model": {"source": str(file), "quantization": "packed", "dtype": "float32"}, "data": data, **sections}
    )


def write_letters(path: Path) -> Path:
    letters = Random(1)
    lines = [f'{{"text": "{"".join(letters.choices("abcd", k=40))}"}}' for _ in range(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_layers_give_the_logits_and_gradients_of_the_unpacked_ones(file: Path, dtype: str) -> None:
    results = []
    for quantization in (None, "packed"):
        model = load(file, quantization, dtype)
        inputs = model.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        results.append((logits.detach(), inputs.grad))
        layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
        assert len(layers) == (7 if quantization else 0)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert all(layer.weight.numel() < 1.1 * layer.in_features * layer.out_features for layer in layers)


def test_memory_is_predicted_for_what_is_kept(file: Path) -> None:
    shape = build_meta_model(open_model(str(file)), dtype="float32")
    shape_as_packed(shape, file)
    taken, told = (
        {name: value.nbytes for name, value in model.named_parameters()} for model in (load(file, "packed"), shape)
    )
    assert told == taken
    plain = make_packed(file, model={"source": str(file), "dtype": "float32"})
    saved = sum(value.nbytes for value in load(file, None).parameters()) - sum(taken.values())
    packed_bytes, plain_bytes = (plan(recipe).peak_bytes or 0 for recipe in (make_packed(file), plain))
    assert plain_bytes - saved <= packed_bytes < plain_bytes - saved / 2


def test_what_is_not_the_same_is_left_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    model = load(file, None)
    model.model.layers[0].mlp.up_proj.weight.data += 1e-3
    assert pack_model(model, file) == 6
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with pytest.raises(ModelError, match="none of its layers can be kept packed"):
        load(write_tiny_gguf(tmp_path / "wide.gguf"), "packed")


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_an_adapter_is_trained_over_packed_weights_as_over_unpacked_ones(
    file: Path, engine: str, tmp_path: Path
) -> None:
    sections = {"training": {"engine": engine}, "federation": {"rounds": 1}}
    packed = run(make_packed(file, **sections), tmp_path / "packed", Observer())
    plain = make_packed(file, model={"source": str(file), "dtype": "float32"}, **sections)
    unpacked = run(plain, tmp_path / "unpacked", Observer())
    assert packed.rounds[1]["adapter_sha256"] == unpacked.rounds[1]["adapter_sha256"]
    assert packed.rounds[1]["central_loss"] == pytest.approx(unpacked.rounds[1]["central_loss"], rel=1e-6)
    assert export(packed.folder, tmp_path / "adapter") == 0.0
    assert export(packed.folder, tmp_path / "adapter.gguf") == 0.0
    with pytest.raises(RunError, match="an adapter can't be merged into packed weights"):
        export(packed.folder, tmp_path / "merged", merged=True)


@pytest.mark.parametrize("adapter", [{"dora": True}, {"method": "ia3", "rank": None, "alpha": None}])
def test_over_packed_weights_there_is_plain_lora_alone(
    adapter: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "Q8_0")
    with pytest.raises(RecipeError, match=r"model.quantization: .*plain LoRA alone"):
        plan(make_packed(file, adapter=adapter))
