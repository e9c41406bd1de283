"""The batched engine against the reference under settings drawn at random, many at a time."""

import random
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.marks import first
from support.small_models import write_small_model
from support.tape import fix_shapes, record_steps
from support.tiny import (
    ARCHITECTURES,
    count_answers,
    make_adapted,
    make_blocks,
    make_job,
    make_recipe,
    switch_off_dropout,
)

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import TokenBlocks
from fedloom.experiment.building import load_adapted_model, open_source
from fedloom.federation.lora_rules import trained_part
from fedloom.model import source
from fedloom.privacy.noise import derive_key
from fedloom.privacy.ration import Ration, Terms
from fedloom.training import client_slots, stretches
from fedloom.training.batched import BatchedEngine
from fedloom.training.jobs import ClientJob, ClientUpdate
from fedloom.training.reference import ReferenceEngine

WINDOWED = "tiny-gemma2"
"""A model with narrow windows, and caps on its scores and its logits."""
WINDOWED_CONFIG = partial(
    transformers.Gemma2Config,
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=6,
    attn_logit_softcapping=5.0,
    final_logit_softcapping=3.0,
)
# Where a gradient is none at all but for rounding, as that of a query which sees one key, Adam makes a step of it. With
# this ε rounding stays below the bound.
ADAMW = {"kind": "adamw", "eps": 1e-2}


PACKED_KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama": (["q_proj", "v_proj"], {}),
    "qwen2": (["q_proj", "v_proj"], {}),
    "gpt2": (["c_attn"], {}),
    "opt": (["q_proj", "v_proj"], {"word_embed_proj_dim": 64, "ffn_dim": 96}),
}
"""Models that are packed: some layers to adapt, and what their configuration needs."""
PACKINGS = (
    ("4bit", "nf4", "float32", True),
    ("4bit", "fp4", "float32", False),
    ("4bit", "nf4", "bfloat16", True),
    ("8bit", None, None, False),
)
"""Bits, and of four of them the form, the dtype that they are computed in, and whether their scales are packed too."""


@cache
def model_of(shape: str, targets: str, dropout: float, own_dropout: bool, freeze_a: bool) -> AdaptedModel:
    chosen = "all-linear" if targets == "all" else ARCHITECTURES.get(shape, ("q_proj", "v_proj"))
    adapted = make_adapted(shape, "float64", targets=chosen, dropout=dropout, freeze_a=freeze_a)
    if not (own_dropout or dropout):
        switch_off_dropout(adapted)
    return adapted


def draw_training(draw: random.Random) -> dict[str, Any]:
    scope = draw.choice(["round", "run", "rounds"])
    return {
        "batch_size": draw.choice([1, 2, 3, 64]),
        "epochs": draw.choice([1, 2]),
        "gradient_accumulation": draw.choice([1, 1, 2, 64]),
        "learning_rate": draw.choice([1e-3, 1e-2]),
        "learning_rate_end": 1e-4,
        "optimizer": draw.choice([ADAMW, "sgd", {"kind": "sgd", "momentum": 0.9}]),
        "optimizer_state": draw.choice(["keep", "reset"]),
        "schedule": draw.choice(["constant", "linear", "cosine"]),
        "schedule_scope": scope,
        "warmup": 0 if scope == "rounds" else draw.choice([0, 0.5, 1]),
        "weight_decay": draw.choice([0, 0.3]),
        "gradient_checkpointing": draw.random() < 0.2,
        "clients_at_once": draw.choice([None, 1, 2, 3]),
    }


def draw_blocks(draw: random.Random, client: int, kind: str) -> TokenBlocks:
    """Some documents, half of them of two to five tokens."""
    size, width = draw.choice([1, 2, 5, 8]), draw.choice([5, 12, 33])
    whole = make_blocks(size, width, seed=client)
    lengths_N = torch.tensor([draw.choice([draw.randint(2, 5), length]) for length in whole.lengths_N.tolist()])
    is_real_NT = torch.arange(width) < lengths_N[:, None]
    blocks = TokenBlocks(whole.tokens_NT.masked_fill(~is_real_NT, 0), lengths_N, is_real_NT)
    blocks = count_answers(blocks, seed=client) if kind == "answers" else blocks
    return pack_blocks(blocks) if kind == "packed" else blocks


def draw_jobs(draw: random.Random, adapted: AdaptedModel) -> list[ClientJob]:
    """Up to five clients, in the second round of four."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    noise_P = torch.randn(adapted.layout.size, generator=generator, dtype=torch.float64)
    untouched = adapted.read()
    start = replace(untouched, weights_P=untouched.weights_P + 0.02 * noise_P.to(untouched.weights_P))
    training, private = draw_training(draw), draw.random() < 0.3
    kind = draw.choice(["all", "answers"] if private else ["all", "answers", "packed"])
    if not private:
        training |= {"max_gradient_norm": draw.choice([None, 0.05]), "max_steps": draw.choice([None, None, 2])}
    part = trained_part(adapted.layout, "svd", 1, rank=1) if draw.random() < 0.2 else None
    jobs, max_norm = [], draw.choice([0.01, 0.4])
    for client in range(draw.randint(1, 5)):
        told = {**training, "proximal_mu": draw.choice([0.0, 0.1, 5.0])}
        blocks = draw_blocks(draw, client, kind)
        job = make_job(blocks, start, round=2, rounds=4, client=client, trains_P=draw.choice([part, None]), **told)
        if private:
            terms = Terms(0.5, max_norm, draw.randint(1, len(blocks)), len(blocks), 3, 1e-3)
            job = replace(job, ration=Ration(terms, derive_key(b"secret", str(client))))
        jobs.append(job)
    return jobs


def assert_same(our: ClientUpdate, their: ClientUpdate, start: Adapter, bound: float = 1e-9) -> None:
    moved = (their.adapter.weights_P - start.weights_P).norm()
    assert (our.adapter.weights_P - their.adapter.weights_P).norm() <= bound * moved
    for name, value in vars(their.report).items():
        if name != "seconds":
            assert getattr(our.report, name) == pytest.approx(value, rel=10 * bound), name
    assert our.own_losses == pytest.approx(their.own_losses, rel=bound)
    assert our.optimizer_state.keys() == their.optimizer_state.keys()
    for name, state in their.optimizer_state.items():
        assert (our.optimizer_state[name] - state).norm() <= 10 * bound * state.norm(), name


def compare_engines(
    draw: random.Random, adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, bound: float = 1e-9
) -> None:
    """Compare both engines on jobs drawn at random; what is no setting of a recipe's is drawn for the batched one."""
    untouched = adapted.read()
    jobs = draw_jobs(draw, adapted)
    theirs = {result.client: result for result in ReferenceEngine(adapted).train(jobs)}
    if (how := draw.choice(["plain", "fixed", "recorded"])) == "fixed":
        fix_shapes(monkeypatch)
    elif how == "recorded":
        record_steps(monkeypatch)
    monkeypatch.setattr(stretches, "STRETCH", draw.choice([2, 5, 64]))
    monkeypatch.setattr(client_slots, "WIDTHS", draw.choice([1, 8, 32]))
    if draw.random() < 0.6:
        rows = {"ROW_LAUNCHES": draw.choice([0, 300]), "ROW_TRAFFIC": 0, "RECORDING": draw.choice([0, 0.5, 40])}
        for name, value in rows.items():
            monkeypatch.setattr(client_slots, name, value)
    ours = {result.client: result for result in BatchedEngine(adapted).train(jobs)}
    adapted.load(untouched)
    assert ours.keys() == theirs.keys()
    for job in jobs:
        our, their = ours[job.client], theirs[job.client]
        assert isinstance(our, ClientUpdate), our.error
        assert isinstance(their, ClientUpdate), their.error
        assert_same(our, their, job.adapter, bound)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(120))
def test_engines_agree_under_any_settings(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    monkeypatch.setitem(source.SHAPES, WINDOWED, WINDOWED_CONFIG)
    shape = draw.choice([*ARCHITECTURES, WINDOWED])
    dropout, own_dropout, freeze_a = draw.choice([0.0, 0.4]), draw.random() < 0.5, draw.random() < 0.2
    adapted = model_of(shape, draw.choice(["few", "all"]), dropout, own_dropout, freeze_a)
    compare_engines(draw, adapted, monkeypatch)


@cache
def packed_model_of(
    folder: Path, kind: str, packing: tuple[str, str | None, str | None, bool], targets: str, dropout: float
) -> AdaptedModel:
    """Return a small model in float32 with packed layers, opened as a run opens it."""
    if not (folder / kind).exists():
        write_small_model(folder / kind, kind, **PACKED_KINDS[kind][1])
    quantization, form, computed, double = packing
    options = {"type": form, "compute_dtype": computed, "double": double} if form else None
    chosen = "all-linear" if targets == "all" else PACKED_KINDS[kind][0]
    recipe = make_recipe(
        model={
            "source": str(folder / kind),
            "dtype": "float32",
            "quantization": quantization,
            "quantization_options": options,
        },
        adapter={"targets": chosen, "dropout": dropout},
    )
    return load_adapted_model(recipe, open_source(recipe))


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.mark.oracles("bitsandbytes")
@pytest.mark.parametrize("seed", first(range(120), keep=10, rest=pytest.mark.slow))
def test_engines_agree_over_packed_weights_under_any_settings(
    seed: int, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    kind, packing = draw.choice([*PACKED_KINDS]), draw.choice(PACKINGS)
    adapted = packed_model_of(packed_folder, kind, packing, draw.choice(["few", "all"]), draw.choice([0.0, 0.4]))
    # In bfloat16, what an adapter adds is rounded at another place: of 120 settings one comes to 3.03 % of what was
    # moved on a processor with AVX512-BF16, and none to 3 % with AMX.
    compare_engines(draw, adapted, monkeypatch, 4e-2 if packing[2] == "bfloat16" else 3e-4)
