"""Tiny real things that tests share: recipes, two-layer models, blocks, jobs, updates. No mocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation.held_out import Asked, Score, evaluate, evaluate_together
from fedloom.federation.fleet import Scorer
from fedloom.federation.rounds import FederatedRun
from fedloom.model.attention import choose_attention, settle_attention
from fedloom.model.loading import load_model
from fedloom.model.source import open_model
from fedloom.recipe.recipe import Recipe
from fedloom.training.client_report import ClientReport
from fedloom.training.jobs import ClientFailure, ClientJob, ClientResult, ClientUpdate, OptimizerState
from support.shapes import ARCHITECTURES

DEVICE = torch.device(os.environ.get("FEDLOOM_TEST_DEVICE", "cpu"))
"""Device of models that a test makes and does not place itself: with `cuda`, engines are compared on a GPU."""

PEFT_NEEDS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 1},
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 32},
    "fourierft": {"n_frequency": 50},
    "oft": {"oft_block_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "road": {"group_size": 32},
    "trainable_tokens": {"token_indices": [*range(0, 256, 4)]},
    "vblora": {"vector_length": 32, "num_vectors": 16},
    "waveft": {"n_frequency": 50},
}
"""Options without which PEFT, or a model this small, can't do."""


def make_recipe(**sections: Any) -> Recipe:
    """The recipe of most tests: seconds long; sections given replace its keys; an adapter's None leaves one out."""
    values: dict[str, Any] = {
        "name": "test",
        "seed": 7,
        # Whatever the machine computes in: bfloat16 on some, where "auto" was meant.
        "model": {"source": "random:tiny-llama", "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {
            "source": "python:stdlib",
            "max_length": 32,
            "clients": 3,
            "documents_per_client": 8,
            "client_holdout": 0.25,
            "central_holdout": 6,
        },
        "training": {"batch_size": 2, "learning_rate": 1e-2, "proximal_mu": 0.1},
        "federation": {"rounds": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    values["adapter"] = {key: value for key, value in values["adapter"].items() if value is not None}
    return Recipe.model_validate(values)


def make_adapted(
    shape: str = "tiny-llama",
    dtype: str = "float32",
    seed: int = 7,
    *,
    freeze_a: bool = False,
    residuals: bool = False,
    device: str | torch.device = DEVICE,
    attention: str | None = None,
    **adapter: Any,
) -> AdaptedModel:
    """A random two-layer model with a LoRA adapter."""
    base = load_model(open_model(f"random:{shape}"), dtype=dtype, device=torch.device(device), attention=attention)
    section = make_recipe(adapter={"rank": 2, "targets": ARCHITECTURES.get(shape), **adapter}).adapter
    return AdaptedModel(base, build_config(section, base), seed, freeze_a=freeze_a, residuals=residuals)


def make_windowed(model_type: str, **changes: Any) -> AdaptedModel:
    """Return Gemma 2, 3 or 3n in float64, whose layers see a window or all, with dropout of attention and adapter."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=5, attention_dropout=0.1,
        **changes,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=choose_attention(config)
    )
    settle_attention(base.eval().requires_grad_(False))
    section = make_recipe(adapter={"rank": 2, "targets": ["q_proj", "v_proj"], "dropout": 0.2}).adapter
    return AdaptedModel(base, build_config(section, base), 7)


def switch_off_dropout(adapted: AdaptedModel) -> None:
    """Switch off the dropout of the base model and of the adapter."""
    for module in adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def start_from(adapted: AdaptedModel) -> Adapter:
    """Not PEFT's zeros in B: a federation that has been under way."""
    noise_P = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(5)).to(adapted.weights_P.dtype)
    return Adapter(adapted.layout, adapted.read().weights_P + 0.02 * noise_P)


def make_blocks(num_blocks: int = 8, max_length: int = 16, seed: int = 0) -> TokenBlocks:
    """Learnable blocks of several lengths: each counts upwards from a random byte."""
    generator = torch.Generator().manual_seed(seed)
    start_N1 = torch.randint(0, 200, (num_blocks, 1), generator=generator)
    tokens_NT = start_N1 + torch.arange(max_length)
    lengths_N = torch.randint(max_length // 2, max_length + 1, (num_blocks,), generator=generator)
    tokens_NT = tokens_NT.masked_fill(torch.arange(max_length) >= lengths_N[:, None], 0)
    return TokenBlocks(tokens_NT, lengths_N, torch.arange(max_length) < lengths_N[:, None])


def count_answers(blocks: TokenBlocks, seed: int = 3) -> TokenBlocks:
    """Blocks of which only the end counts, as of prompts with their answers: at least the last token."""
    generator = torch.Generator().manual_seed(seed)
    begins_N = (torch.rand(len(blocks), generator=generator) * (blocks.lengths_N - 1)).long() + 1
    return replace(blocks, counted_NT=blocks.is_real & (torch.arange(blocks.tokens_NT.shape[1]) >= begins_N[:, None]))


SIZES = (7, 2, 11, 4, 1)
"""Blocks of each adapter that is to be scored."""


def draw_asked(
    adapted: AdaptedModel, change: Callable[[TokenBlocks], TokenBlocks] = lambda blocks: blocks, width: int = 24
) -> list[Asked]:
    """Adapters far from each other, each with as many blocks as no other has, of many lengths."""
    start, generator = adapted.read(), torch.Generator().manual_seed(1)
    noises = [torch.randn(start.layout.size, generator=generator, dtype=start.weights_P.dtype) for _ in SIZES]
    return [
        (replace(start, weights_P=start.weights_P + 0.1 * noise_P), change(make_blocks(size, width, seed=size)))
        for size, noise_P in zip(SIZES, noises, strict=True)
    ]


def make_parts(width: int = 24) -> list[TokenBlocks]:
    """Blocks of three clients, in which only the ends count."""
    return [count_answers(make_blocks(size, width, seed=size), seed=size) for size in (7, 4, 9)]


def count_padding(blocks: TokenBlocks) -> TokenBlocks:
    """Blocks whose padding counts in the loss, and is masked in attention."""
    return replace(blocks, counted_NT=torch.ones_like(blocks.counted_NT))


def updates_of(results: Iterable[ClientResult]) -> Iterator[ClientUpdate]:
    """What an engine gave; a client's failure is raised."""
    for result in results:
        if isinstance(result, ClientFailure):
            raise result.error
        yield result


def make_update(
    adapter: Adapter, client: int = 0, *, round: int = 1, examples: int = 1, tokens: int = 1, trial: int = 0
) -> ClientUpdate:
    """An update of made-up weights."""
    report = ClientReport(
        round=round, client=client, examples=examples, tokens=tokens, steps=1, proximal_mu=0.0, loss_first=1.0,
        loss_last=1.0, loss_mean=1.0, proximal_loss=0.0, proximal_ratio=0.0, drift=0.0, seconds=0.0,
    )  # fmt: skip
    return ClientUpdate(report, adapter, {}, trial)


def make_scorer(adapted: AdaptedModel, at_once: int = 1) -> Scorer:
    """Whoever scores adapters in batches of 4 blocks: one after another, or up to so many in one pass."""

    def score(asked: Sequence[Asked]) -> list[Score]:
        if at_once > 1:
            return evaluate_together(adapted, asked, batch_size=4, at_once=at_once)
        return [evaluate(adapted, *one, batch_size=4) for one in asked]

    return Scorer(score, at_once)


def run_of(recipe: Recipe, *arguments: Any, **named: Any) -> FederatedRun:
    """The rounds of a recipe."""
    return FederatedRun(recipe.training, recipe.federation, recipe.seed, *arguments, **named)


def make_job(
    blocks: TokenBlocks,
    adapter: Adapter,
    *,
    round: int = 1,
    client: int = 0,
    rounds: int = 3,
    state: OptimizerState | None = None,
    trains_P: torch.Tensor | None = None,
    trial: int = 0,
    **training: Any,
) -> ClientJob:
    """A client's job of two epochs without a proximal term, unless told otherwise."""
    return ClientJob(
        round=round,
        client=client,
        adapter=adapter,
        training=make_recipe(training={"epochs": 2, "proximal_mu": 0.0, **training}).training,
        rounds=rounds,
        seed=7,
        trains_P=trains_P,
        trial=trial,
        blocks=blocks,
        optimizer_state=state,
    )


def write_tiny_gguf(path: Path, packed: str | None = None) -> Path:
    """A one-layer Llama with a vocabulary of eight, as a GGUF file; random and `packed` as `Q8_0`, say."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, "llama")
    width, hidden, words = 32, 64, ["<unk>", "<s>", "</s>", "a", "b", "ab", "c", "d"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rows, columns = numpy.arange(len(words))[:, None], numpy.arange(width)
    writer.add_tensor("token_embd.weight", (rows * 0.01 + columns * 0.001).astype(numpy.float32))
    shapes = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width),
              "attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
              "ffn_down": (width, hidden), "attn_norm": (width,), "ffn_norm": (width,)}  # fmt: skip
    for name, shape in shapes.items():
        weights = numpy.full(shape, 0.02, numpy.float32)
        if packed and len(shape) == 2:
            kind = gguf.GGMLQuantizationType[packed]
            weights = numpy.random.default_rng(len(name)).normal(0, 0.2, shape).astype(numpy.float32)
            writer.add_tensor(f"blk.0.{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"blk.0.{name}.weight", weights)
    writer.add_tensor("output_norm.weight", numpy.ones(width, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
