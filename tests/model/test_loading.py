"""Base models from everywhere they come from."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.marks import first
from support.tiny import make_recipe, write_tiny_gguf

from fedloom.errors import ModelError
from fedloom.experiment.preparation import prepare
from fedloom.model.devices import choose_dtype
from fedloom.model.loading import build_meta_model, check_quantization, load_model, quantized
from fedloom.model.source import SHAPES, byte_tokenizer, open_model, unpack_gguf
from fedloom.monitoring.observer import Observer
from fedloom.recipe.sections import QuantizationOptions

CPU = torch.device("cpu")


def load(source: str, dtype: str = "float32") -> torch.nn.Module:
    return load_model(open_model(source), dtype=dtype, device=CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as `save_pretrained` leaves it."""
    load("random:tiny-opt").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_random_shapes_are_always_the_same_and_frozen() -> None:
    first, again, other = (load(f"random:{shape}") for shape in ("tiny-llama", "tiny-llama", "tiny-opt"))
    digest = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other)]
    assert torch.equal(digest[0], digest[1])
    assert digest[0].shape != digest[2].shape
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not first.training


@pytest.mark.parametrize(("shape", "count"), [("opt-350m", 331_196_416), ("smollm2-135m", 134_515_008)])
def test_real_shapes_have_the_real_counts(shape: str, count: int) -> None:
    model = build_meta_model(open_model(f"random:{shape}"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtypes(dtype: str) -> None:
    assert load("random:tiny-gpt2", dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("flags", "dtype"), [("fma avx2 avx512f", "float32"), ("avx512_bf16", "bfloat16")])
def test_auto_is_bfloat16_where_the_processor_has_it(
    flags: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor\t: 0\nmodel name\t: Some: Processor\nflags\t\t: fpu {flags} sse\n\nprocessor\t: 1\n")
    monkeypatch.setattr("fedloom.host.machine.CPU_FACTS", facts)
    assert choose_dtype("auto", CPU) == dtype
    assert choose_dtype("float64", CPU) == "float64"
    monkeypatch.setattr("fedloom.host.machine.CPU_FACTS", tmp_path / "none")
    assert choose_dtype("auto", CPU) == "float32"


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_shape_can_have_other_layers(shape: str, layers: int) -> None:
    source = open_model(f"random:{shape}")
    model = build_meta_model(source, dtype="bfloat16", layers=layers)
    assert model.config.num_hidden_layers == layers
    assert source.num_layers == 2
    assert model.dtype == torch.bfloat16


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load("random:tiny-opt")
    assert torch.equal(torch.rand(4), expected)


def test_the_byte_tokenizer_gives_every_text_back() -> None:
    tokenizer = byte_tokenizer()
    for text in ("def f():\n    return 'ß→🙂'\t", " leading", "\x00\x7f"):
        tokens = tokenizer(text)["input_ids"]
        assert len(tokens) == len(text.encode())
        assert tokenizer.decode(tokens) == text
    assert tokenizer.pad_token is None
    assert all(max(tokenizer("<|end|>")["input_ids"]) < SHAPES[name]().vocab_size for name in SHAPES)


def test_a_folder_is_loaded(folder: Path) -> None:
    ours = load(str(folder))
    assert ours.name_or_path == str(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, load("random:tiny-opt")(tokens).logits)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "can't be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 50), "can't be loaded"),
    ],
)
def test_a_damaged_folder_is_an_error_that_names_it(damage, words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=words) as raised:
        load(str(folder))
    assert str(folder) in str(raised.value)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match=r"lack \d+ weights of the model, .*layers.2"):
        load(str(folder))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("config.json", '{"model_type": "t5"}'),
        ("config.json", '{"model_type": "opt", "hidden_size": "x"}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
    ],
)
def test_files_that_make_no_causal_model_are_one_error(
    file: str, text: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match="can't be loaded") as raised:
        build_meta_model(open_model(str(folder)))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set FEDLOOM_CACHE"):
        unpack_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"))


def test_pickled_weights_are_refused(folder: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return (Path.touch, (folder / "executed",))

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load(str(folder))
    assert not (folder / "executed").exists()


def test_a_file_that_is_no_gguf_is_an_error_and_leaves_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="not a GGUF model"):
        open_model(str(tmp_path / "model.gguf"))
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_a_gguf_file_is_unpacked_once_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    said: list[str] = []
    source = open_model(str(path), say=said.append)
    assert len(said) == 1
    assert source.revision.startswith("sha256 ")
    model = load_model(source, dtype="float32", device=CPU)
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32
    assert not isinstance(embedding, torch.nn.UninitializedParameter)
    assert embedding[3, 5] == pytest.approx(3 * 0.01 + 5 * 0.001, rel=1e-3)
    unpacked, _ = unpack_gguf(path, say=said.append)
    assert len(said) == 1, "the second time it is there"
    assert [p.name for p in unpacked.parent.iterdir()] == [unpacked.name]
    shutil.rmtree(tmp_path / "cache")


def test_weights_without_their_tokenizer_are_an_error(tmp_path: Path) -> None:
    load("random:tiny-opt").save_pretrained(tmp_path / "model")
    save_file({"x": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    with pytest.raises(ModelError, match="tokenizer"):
        open_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, {}),
        ("8bit", {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 0.0}),
        (
            "4bit",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
        ),
    ],
)
def test_what_transformers_is_told_of_packed_weights(quantization: str | None, expected: dict) -> None:
    gpu = torch.device("cuda:0")
    told = quantized(quantization, gpu)
    assert (told == {}) == (quantization is None)
    assert {key: getattr(told["quantization_config"], key) for key in expected} == expected
    if quantization:
        assert told["device_map"] == {"": gpu}


def test_options_of_four_bits_are_told_and_flowertunes_are_bitsandbytes_own() -> None:
    gpu = torch.device("cuda:0")
    plain = {"type": "fp4", "compute_dtype": "float32", "double": False}
    told = quantized("4bit", gpu, QuantizationOptions(**plain))["quantization_config"]
    assert told.to_dict() == transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    usual = quantized("4bit", gpu)["quantization_config"]
    assert quantized("4bit", gpu, QuantizationOptions())["quantization_config"].to_dict() == usual.to_dict()
    assert told.to_dict() != usual.to_dict()


def test_packed_weights_that_can_not_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model("random:tiny-llama")
    check_quantization(None, source)
    monkeypatch.setattr("fedloom.model.loading.find_spec", lambda name: None)
    real = dataclasses.replace(source, location="somewhere")
    says = r"4bit weights need bitsandbytes, which is not installed; pip install 'fedloom\[quantized\]'"
    with pytest.raises(ModelError, match=says):
        check_quantization("4bit", real)
    # Who has no bitsandbytes is not sent for it in vain.
    with pytest.raises(ModelError, match="a random model has no weights to pack as 8bit"):
        check_quantization("8bit", source)
    monkeypatch.setattr("fedloom.model.loading.find_spec", lambda name: object())
    check_quantization("4bit", real)


@pytest.mark.parametrize(("flags", "slow"), first([("fma", True), ("avx512_bf16", False)]))
def test_a_plan_says_that_a_dtype_is_computed_by_another(
    flags: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr("fedloom.host.machine.CPU_FACTS", facts)
    for dtype, told in (("bfloat16", slow), ("float32", False), ("auto", False)):
        plan = prepare(make_recipe(model={"dtype": dtype}), Observer(), predict=False).plan
        assert any("not in this device's hardware" in line for line in plan.warnings) is told
        assert ("slow_dtype" in plan.to_json()) is told
