"""GGUF files that are read back: the very change of every layer, and the very model."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file
from support.marks import first
from support.small_models import SPLITTERS, TEXTS, make_tokenizer, write_small_model
from support.tiny import make_recipe
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fedloom import run
from fedloom.cli import app
from fedloom.errors import FedloomError, ModelError, RunError
from fedloom.experiment.building import load_base
from fedloom.handover.export import export
from fedloom.handover.finished_run import recipe_of
from fedloom.model.gguf_layout import GgufLayout
from fedloom.model.gguf_vocabulary import vocabulary_of
from fedloom.model.gguf_writer import write_gguf
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.monitoring.observer import Observer
from fedloom.records.run import Run

STRONG = {"learning_rate": 0.01, "epochs": 2}


def train(folder: Path, source: str = "random:tiny-llama", adapter: dict[str, Any] | None = None, **more: Any) -> Run:
    """A run of one round whose adapter changes a lot."""
    recipe = make_recipe(
        model={"source": source},
        adapter={"rank": 4, "alpha": 6, "targets": "all-linear", **(adapter or {})},
        training=STRONG,
        **{"federation": {"rounds": 1}, **more},
    )
    return run(recipe, folder / "run", Observer())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    return train(folder, str(write_small_model(folder / "model")))


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}


def keys_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def interleave(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows as llama.cpp's converter does it, by axes: ours counts places."""
    return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def changes_of(run: Run) -> dict[str, torch.Tensor]:
    """The change of every layer's weights, as stock PEFT merges it."""
    recipe = recipe_of(run.folder)
    base = load_base(recipe, open_model(recipe.model.source))
    before = {name: value.clone() for name, value in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, run.folder / "adapters" / "best").merge_and_unload()
    return {name: value - before[name] for name, value in merged.named_parameters() if name.endswith("proj.weight")}


NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def check_changes(file: Path, run: Run, heads: tuple[int, int]) -> None:
    """α/r · B A of the file, with the rank that llama.cpp takes, is the change of each layer."""
    tensors, alpha = tensors_of(file), keys_of(file)["adapter.lora.alpha"]
    wanted = changes_of(run)
    assert len(tensors) == 2 * len(wanted)
    for name, change in wanted.items():
        _, _, layer, _, kind, _ = name.split(".")
        title = f"blk.{layer}.{NAMES[kind]}.weight"
        a, b = tensors[f"{title}.lora_a"], tensors[f"{title}.lora_b"]
        expected = interleave(change, heads[kind == "k_proj"]) if kind in ("q_proj", "k_proj") else change
        assert change.norm() > 1e-3
        assert torch.allclose(b @ a * (alpha / b.shape[1]), expected, atol=2e-7), name


def test_an_adapter_is_read_back_as_the_change_of_every_layer(finished: Run, tmp_path: Path) -> None:
    assert export(finished.folder, tmp_path / "adapter.gguf") == 0.0
    keys = keys_of(tmp_path / "adapter.gguf")
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    assert (keys["general.architecture"], keys["adapter.lora.alpha"]) == ("llama", 6.0)
    check_changes(tmp_path / "adapter.gguf", finished, (4, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.gguf"]
    assert export(finished.folder, tmp_path / "IN-CAPITALS.GGUF") == 0.0
    assert keys_of(tmp_path / "IN-CAPITALS.GGUF") == keys
    assert export(finished.folder, tmp_path / "WHOLE.GGUF", merged=True, kind="f32") < 1e-4


def test_rows_in_another_order_are_never_written(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin that leaves queries and keys as transformers has them is caught, of an adapter and of a whole model."""
    monkeypatch.setattr(GgufLayout, "to_file", lambda self, name, rows: rows)
    for options in ({}, {"merged": True, "kind": "q8_0"}):
        with pytest.raises(RunError, match="does not match the run's adapter"):
            export(finished.folder, tmp_path / "twin.gguf", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_rows_in_another_order_would_be_other_changes(finished: Run, tmp_path: Path) -> None:
    """The formula that the changes are compared by tells the order of rows apart."""
    export(finished.folder, tmp_path / "adapter.gguf")
    with pytest.raises(AssertionError, match="q_proj"):
        check_changes(tmp_path / "adapter.gguf", finished, (2, 2))


OTHERS = {
    "rslora": ({"rslora": True}, "factors"),
    "fedex": ({}, "fedex"),
    "ranks": ({"options": {"rank_pattern": {"q_proj": 2}}}, "factors"),
    "ffa": ({}, "ffa"),
}


@pytest.mark.parametrize("name", first(OTHERS))
def test_other_scales_and_rules_give_the_change_of_every_layer(name: str, tmp_path: Path) -> None:
    adapter, rule = OTHERS[name]
    other = train(tmp_path, adapter=adapter, federation={"rounds": 2, "lora_rule": rule})
    assert export(other.folder, tmp_path / "adapter.gguf") < 1e-6
    check_changes(tmp_path / "adapter.gguf", other, (4, 2))
    if name == "rslora":
        assert keys_of(tmp_path / "adapter.gguf")["adapter.lora.alpha"] == pytest.approx(6 * math.sqrt(4))


@pytest.mark.parametrize(
    ("adapter", "says"),
    first(
        [
            ({"dora": True}, "^adapter: llama.cpp can't hold DoRA in an adapter; write the merged model with --merged"),
            ({"options": {"modules_to_save": ["norm"]}}, r"_layernorm\.weight, trained as a whole \(modules_to_save\)"),
            ({"targets": ["q_proj", "lm_head"]}, "can't hold an adapted head"),
            ({"options": {"alpha_pattern": {"q_proj": 2}}}, "ranks and scales that differ from layer to layer"),
            ({"rslora": True, "options": {"rank_pattern": {"q_proj": 2}}}, "ranks and scales that differ"),
            ({"method": "ia3", "rank": None, "alpha": None, "targets": None}, "can't hold the method ia3"),
        ],
        every=2,
    ),
)
def test_what_llama_cpp_can_not_hold_is_refused_by_name(adapter: dict[str, Any], says: str, tmp_path: Path) -> None:
    other = train(tmp_path, str(write_small_model(tmp_path / "model")), adapter)
    with pytest.raises(RunError, match=says):
        export(other.folder, tmp_path / "adapter.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert export(other.folder, tmp_path / "merged.gguf", merged=True, kind="f32") < 1e-4


@pytest.mark.long
def test_trained_biases_are_refused_by_name(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model", "qwen2")
    other = train(tmp_path, str(model), {"targets": ["q_proj"], "options": {"bias": "all"}})
    with pytest.raises(RunError, match="can't hold trained biases in an adapter"):
        export(other.folder, tmp_path / "adapter.gguf")


@pytest.mark.long
def test_a_model_that_llama_cpp_has_in_a_way_unknown_here_is_refused(tmp_path: Path) -> None:
    other = train(tmp_path, "random:tiny-gpt2", {"targets": ["c_attn"]})
    for options in ({}, {"merged": True}):
        with pytest.raises(ModelError, match=r"fedloom writes GGUF of llama, .*, and this is gpt2; export a folder"):
            export(other.folder, tmp_path / "model.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", first(["q8_0", "f32", "f16"]))
def test_a_merged_file_is_the_model_in_its_format(finished: Run, kind: str, tmp_path: Path) -> None:
    distance = export(finished.folder, tmp_path / "model.gguf", merged=True, kind=kind)
    assert distance < {"f32": 1e-5, "f16": 5e-3, "q8_0": 1e-1}[kind]
    reader = GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.ffn_down.weight"] == kind.upper()
    assert kinds["blk.1.ffn_norm.weight"] == "F32"
    base = load_base(recipe_of(finished.folder), open_model(recipe_of(finished.folder).model.source))
    merged = PeftModel.from_pretrained(base, finished.folder / "adapters" / "best").merge_and_unload()
    if kind == "f32":
        written = tensors_of(tmp_path / "model.gguf")
        layer = merged.model.layers[1].self_attn
        assert torch.equal(written["blk.1.attn_k.weight"], interleave(layer.k_proj.weight, 2))
        assert torch.equal(written["blk.1.attn_output.weight"], layer.o_proj.weight)
        assert torch.equal(written["output.weight"], merged.lm_head.weight)


@pytest.mark.long
@pytest.mark.parametrize("kind", first(["qwen2", "qwen3", "mistral"]))
def test_other_kinds_of_models_are_written_as_they_are(kind: str, tmp_path: Path) -> None:
    width = 128 if kind == "qwen3" else 16
    other = train(tmp_path, str(write_small_model(tmp_path / "model", kind, head_dim=width)))
    assert export(other.folder, tmp_path / "adapter.gguf") < 1e-6
    assert export(other.folder, tmp_path / "merged.gguf", merged=True, kind="f32") < 1e-5
    layer = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"]
    assert tensors_of(tmp_path / "merged.gguf")["blk.0.attn_v.weight"].shape == layer.shape


@pytest.mark.long
def test_a_merged_file_is_a_base_model_for_the_next_run(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, trained on and written again: what the file says beside its weights stays."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    export(finished.folder, tmp_path / "first.gguf", merged=True, kind="f32")
    again = train(tmp_path, str(tmp_path / "first.gguf"))
    export(again.folder, tmp_path / "second.gguf", merged=True, kind="f32")
    one, two = keys_of(tmp_path / "first.gguf"), keys_of(tmp_path / "second.gguf")
    assert {name: value for name, value in one.items() if not name.startswith("GGUF.")}.items() <= two.items()


@pytest.mark.parametrize("split", SPLITTERS)
def test_a_vocabulary_is_told_by_the_way_in_which_it_splits(split: str) -> None:
    tokenizer = make_tokenizer(split)
    told = vocabulary_of(tokenizer, 512)
    assert told["tokenizer.ggml.pre"] == split
    assert len(told["tokenizer.ggml.tokens"]) == len(told["tokenizer.ggml.token_type"]) == 512
    assert told["tokenizer.ggml.token_type"][:6] == [3] * 6
    assert told["tokenizer.ggml.token_type"][-1] == 5
    tokens = told["tokenizer.ggml.tokens"]
    assert [tokens[number] for number in tokenizer(TEXTS[0])["input_ids"]] == tokenizer.tokenize(TEXTS[0])


def test_a_vocabulary_of_pieces_is_told_with_what_is_merged_first() -> None:
    tokenizer = make_tokenizer("pieces")
    told = vocabulary_of(tokenizer, 512)
    assert (told["tokenizer.ggml.model"], told["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    kinds = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<0x0A>"], kinds["<|im_end|>"], kinds["▁"]) == (2, 6, 3, 1)
    scores = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.scores"], strict=True))
    # llama.cpp's rule: of neighbours that are a token together, the best first, and of equal ones the leftmost.
    pieces = list("▁return▁self.value")
    while pairs := [(-scores[a + b], n) for n, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]:
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    assert pieces == tokenizer.tokenize("return self.value")
    assert len(pieces) < 12


def test_a_tokenizer_that_llama_cpp_has_not_is_refused() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"no tokenizer of llama.cpp that splits texts as this model's does"):
        vocabulary_of(tokenizer, 512)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "the kind linear"),
        ("mistral", {"sliding_window": 16}, "attention to the last 16 tokens alone"),
        ("llama", {"attention_bias": True}, "biases where llama.cpp's Llama has none"),
        ("qwen2", {"hidden_act": "gelu"}, "the activation gelu"),
    ],
)
def test_what_a_file_can_not_say_of_a_model_is_refused(
    kind: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    source = open_model(str(write_small_model(tmp_path / "model", kind, **changes)))
    base = load_model(source, dtype="float32", device=torch.device("cpu"))
    with pytest.raises(ModelError, match=f"can't say in a GGUF file that the model has .*{says}"):
        write_gguf(base, source, tmp_path / "model.gguf", "f32", name="odd")
    assert not (tmp_path / "model.gguf").exists()


LONGER = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.long
def test_the_longer_positions_of_llama_3_travel(tmp_path: Path) -> None:
    other = train(tmp_path, str(write_small_model(tmp_path / "model", rope_parameters=LONGER)))
    assert export(other.folder, tmp_path / "model.gguf", merged=True, kind="f32") < 1e-5
    # Some positions turn as they did, and the slowest eight times more slowly; the formula is of Llama 3.1's own code.
    factors = tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"]
    turns = 64 * 1e4 ** -(torch.arange(8) / 8) / (2 * math.pi)
    blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
    assert torch.allclose(factors, 1 / (blend + (1 - blend) / 8), rtol=1e-5)
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)


def test_the_command_says_what_is_wrong_in_a_line(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    shown = {
        "the target exists": ["--to", str(tmp_path / "there.gguf")],
        "only a merged .gguf file has a choice of formats": ["--to", str(tmp_path / "a.gguf"), "--as", "f16"],
        'no format "q4"': ["--to", str(tmp_path / "a.gguf"), "--merged", "--as", "q4"],
        "not a possible target": ["--to", str(tmp_path / ("x" * 300))],
        "can't be written": ["--to", "/proc/none/a.gguf"],
    }
    for says, options in shown.items():
        result = CliRunner().invoke(app, ["export", str(finished.folder), *options])
        assert isinstance(result.exception, FedloomError), says
        assert says in str(result.exception)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


@pytest.mark.long
def test_a_chat_template_is_in_every_export(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = write_small_model(tmp_path / "model")
    own = "{% for m in messages %}{{ m.content + '<|eot_id|>' }}{% endfor %}"
    data = {"source": str(tmp_path / "rows.jsonl"), "messages": "messages", "chat_template": own}
    other = train(tmp_path, str(model), data=data)
    export(other.folder, tmp_path / "adapter")
    export(other.folder, tmp_path / "merged", merged=True)
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == own
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == own
    for name, merged in (("adapter.gguf", False), ("merged.gguf", True)):
        export(other.folder, tmp_path / name, merged=merged)
        assert keys_of(tmp_path / name)["tokenizer.chat_template"] == own
    end = keys_of(tmp_path / "merged.gguf")["tokenizer.ggml.eot_token_id"]
    assert np.array(make_tokenizer().convert_tokens_to_ids("<|eot_id|>")) == end
