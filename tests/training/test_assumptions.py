"""Assumptions of training about a model are tried on it, and refused by what they mean where they do not hold."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.shapes import ARCHITECTURES
from support.tiny import make_adapted, make_recipe
from torch import Tensor, nn
from torch.nn import functional

from fedloom import run
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import build_config
from fedloom.errors import ModelError, RecipeError
from fedloom.model.source import byte_tokenizer
from fedloom.training.assumptions import check_model, check_repeatable, noise_of
from fedloom.training.engines import choose_engine, open_engine
from fedloom.training.own_randomness import check_own_dropout, check_own_randomness

SMALL: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
MOE = {**SMALL, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {**SMALL, "head_dim": 16, "sliding_window": 64}


def bert(**changes: Any) -> transformers.PretrainedConfig:
    return transformers.BertConfig(
        **{key: value for key, value in SMALL.items() if key != "num_key_value_heads"}, **changes
    )


def build(config: transformers.PretrainedConfig, dtype: str = "float32", **adapter: Any) -> AdaptedModel:
    torch.manual_seed(3)
    attention = "eager" if config.model_type == "xglm" else "sdpa"
    values = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    base = transformers.AutoModelForCausalLM.from_config(config, **values)
    base.requires_grad_(False)
    for value in base.parameters():  # as large as trained ones: the attention of a fresh model hardly looks anywhere
        if value.dim() > 1:
            value.data.mul_(4)
    return AdaptedModel(base.eval(), build_config(make_recipe(adapter={"rank": 2, **adapter}).adapter, base), 7)


def nothing_moves(adapted: AdaptedModel) -> None:
    """Check a model, and that the check leaves it, and everybody's random numbers, as they were."""
    before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    state = torch.random.get_rng_state()
    check_model(adapted, 32)
    check_repeatable(adapted, 32)
    check_own_randomness(adapted, 32)
    check_own_dropout(adapted, 32)
    assert not adapted.gradient_P.any()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in adapted.model.state_dict().items())
    assert not adapted.model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", ARCHITECTURES)
def test_a_causal_model_passes(shape: str, dtype: str) -> None:
    nothing_moves(make_adapted(shape, dtype, dropout=0.3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen3MoeConfig(**MOE),
        transformers.MixtralConfig(**SMALL, num_local_experts=4),
        transformers.Gemma3TextConfig(**GEMMA),
        transformers.MistralConfig(**SMALL, sliding_window=4),
        bert(is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)
def test_so_do_experts_windows_and_decoders(config: transformers.PretrainedConfig, dtype: str) -> None:
    nothing_moves(build(config, dtype, targets=["query"] if config.model_type == "bert" else ["q_proj"]))


@pytest.mark.parametrize(
    ("config", "targets", "says"),
    [
        (bert(), "query", "earlier tokens see later ones"),
        (transformers.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True), "q_proj", "tokens see later"),
        (transformers.OPTConfig(vocab_size=260, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                                word_embed_proj_dim=48, layerdrop=0.1), "q_proj", '"layerdrop" to 0'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_no_causal_model_is_refused(config: Any, targets: str, says: str, dtype: str) -> None:
    with pytest.raises(ModelError, match=says):
        check_model(build(config, dtype, targets=[targets]), 32)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_width_are_refused_where_texts_are_as_long(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "original_max_position_embeddings": 24}
    longest = 24 if kind == "dynamic" else 96
    config = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": longest}, rope_parameters=rope)
    adapted = build(config)
    check_model(adapted, 24)
    with pytest.raises(ModelError, match=r"a text's loss changes when it is padded to 64 tokens \(positions"):
        check_model(adapted, 64)


class Around(nn.Module):
    """A layer that a model's author could have written, in place of the embedding's output."""

    def __init__(self, inner: nn.Module, change: Any) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, tokens: Tensor) -> Tensor:
        return self.change(self.inner(tokens))  # type: ignore[no-any-return]


def from_the_right(x_BTD: Tensor) -> Tensor:
    return x_BTD + torch.arange(x_BTD.shape[1], 0, -1)[None, :, None] * 0.1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (from_the_right, "what is padded to its right .positions that depend on the width"),
        (lambda x_BTD: x_BTD - x_BTD.mean(0, keepdim=True) * (len(x_BTD) > 1), "the texts beside it in a batch"),
        (lambda x_BTD: x_BTD + x_BTD.flip(1), "earlier tokens see later ones"),
    ],
)
def test_each_assumption_has_a_model_that_breaks_it(change: Any, says: str) -> None:
    adapted = make_adapted()
    adapted.base.set_input_embeddings(Around(adapted.base.get_input_embeddings(), change))
    with pytest.raises(ModelError, match=says):
        check_model(adapted, 32)


class Statistics(nn.Module):
    """Normalisation over the tokens of a batch, with statistics that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.norm(x_BTD.mT).mT  # type: ignore[no-any-return]


class Remembering(nn.Module):
    """Adds what it saw before."""

    last: Tensor | float = 0.0

    def forward(self, x_BTD: Tensor) -> Tensor:
        self.last, before = x_BTD.detach().mean((0, 1)), self.last
        return x_BTD + before * self.training


def unseeded(x_BTD: Tensor) -> Tensor:
    return x_BTD + torch.rand(x_BTD.shape, generator=torch.Generator().manual_seed(time.perf_counter_ns()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Statistics, r"a pass changes .*norm\.running_mean"),
        (Remembering, "two passes with the same seed differ"),
        (lambda: unseeded, "two passes with the same seed differ"),
    ],
)
def test_a_model_that_is_another_after_a_pass_is_refused(change: Any, says: str) -> None:
    adapted = make_adapted()
    adapted.base.set_input_embeddings(Around(adapted.base.get_input_embeddings(), change()))
    with pytest.raises(ModelError, match=says):
        check_repeatable(adapted, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    adapted = make_adapted()
    adapted.base.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has a weight that is not finite"):
        check_model(adapted, 32)


@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: torch.empty_like(x).uniform_(0.9, 1.1), torch.bernoulli])
def test_randomness_of_the_models_own_is_refused_for_the_batched_engine(draw: Any) -> None:
    adapted = make_adapted()
    adapted.base.set_input_embeddings(Around(adapted.base.get_input_embeddings(), lambda x: x + 0 * draw(x.sigmoid())))
    check_model(adapted, 32)
    data = make_recipe().data
    with pytest.raises(ModelError, match=r'draws random numbers of its own.*use "reference"'):
        open_engine("batched", adapted, data, lambda _: None, lambda *_: None)
    open_engine("reference", adapted, data, lambda _: None, lambda *_: None)


def test_a_layer_whose_weights_are_only_read_can_have_no_adapter() -> None:
    adapted = make_adapted(targets=["q_proj", "down_proj"])
    check_model(adapted, 32)
    for layer in adapted.base.model.layers:
        down = layer.mlp.down_proj
        layer.mlp.forward = lambda x, mlp=layer.mlp, down=down: functional.linear(mlp.up_proj(x), down.weight)
    with pytest.raises(ModelError, match="does not reach the model's layers down_proj"):
        check_model(adapted, 32)


@pytest.mark.parametrize("change", [torch.Tensor.detach, lambda x: x[:, :, :3]])
def test_a_model_that_cant_be_computed_or_trained_has_a_line(change: Any) -> None:
    adapted = make_adapted()
    adapted.base.model.norm = Around(adapted.base.model.norm, change)
    with pytest.raises(ModelError, match=r"does not reach|can't compute 16 tokens: .*mul"):
        check_model(adapted, 32)


def test_router_noise_is_found_and_sends_to_the_reference_engine() -> None:
    adapted = build(
        transformers.MixtralConfig(**SMALL, num_local_experts=4, router_jitter_noise=0.1), targets=["q_proj"]
    )
    sections = make_recipe()
    assert choose_engine(sections.adapter, sections.training, sections.model, adapted) == "reference"
    with pytest.raises(ModelError, match="draws random numbers"):
        check_own_randomness(adapted, 32)


def test_dropout_whose_masks_are_not_each_texts_own_is_refused() -> None:
    # XGLM's heads are no dimension of their own: taken for places, they would be others in a wider batch.
    sizes = {"d_model": 64, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}
    folded = transformers.XGLMConfig(vocab_size=512, dropout=0.1, attention_dropout=0.1, **sizes)
    nothing_moves(build(folded, targets=["q_proj"]))
    adapted = make_adapted()

    def drop_time_first(x_BTD: Tensor) -> Tensor:
        return functional.dropout(x_BTD.transpose(0, 1), 0.1, adapted.model.training).transpose(0, 1)

    adapted.base.set_input_embeddings(Around(adapted.base.get_input_embeddings(), drop_time_first))
    with pytest.raises(ModelError, match="takes another mask for a text that stands beside a longer one"):
        open_engine("batched", adapted, make_recipe().data, bool, bool)


@pytest.mark.parametrize(
    ("bits", "dtype", "noise"),
    [(0, "float32", 1e-3), (4, "float32", 0.05), (8, "float32", 1e-3), (4, "bfloat16", 0.05), (8, "bfloat16", 0.5)],
)
def test_what_rounding_may_do_is_told_by_dtype_and_bits(bits: int, dtype: str, noise: float) -> None:
    adapted = make_adapted(dtype=dtype)
    setattr(adapted.base, f"is_loaded_in_{bits}bit", True)
    assert noise_of(adapted) == noise


def test_layers_that_are_not_plainly_linear_go_to_the_reference_engine() -> None:
    moe = build(transformers.Qwen3MoeConfig(**MOE), targets="all-linear")
    sections = make_recipe(adapter={"targets": "all-linear"})
    assert choose_engine(sections.adapter, sections.training, sections.model) == "batched"
    assert choose_engine(sections.adapter, sections.training, sections.model, moe) == "reference"
    asked = make_recipe(adapter={"targets": "all-linear"}, training={"engine": "batched"})
    with pytest.raises(RecipeError, match=r"batched has no adapter on model\.layers\.0\.mlp\."):
        choose_engine(asked.adapter, asked.training, asked.model, moe)
    plain = make_adapted(targets="all-linear")
    assert choose_engine(sections.adapter, sections.training, sections.model, plain) == "batched"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    base.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_adapter_beside_the_weights_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    left_over = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj", "o_proj"]))
    left_over.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"an adapter lies beside the weights \(adapter_config\.json\)"):
        run(make_recipe(model={"source": str(folder)}), tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
    for path in folder.glob("adapter_*"):
        path.unlink()
    assert run(make_recipe(model={"source": str(folder)}), tmp_path / "run").status["state"] == "done"


def test_a_run_names_the_targets_that_peft_chose(folder: Path, tmp_path: Path) -> None:
    finished = run(make_recipe(model={"source": str(folder)}, federation={"rounds": 1}), tmp_path / "run")
    written = json.loads((finished.folder / "adapters" / "last" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]
