"""Evaluation under settings drawn at random, beside plain transformers and PEFT, one document after another."""

import random
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from support.marks import first
from support.small_models import write_small_model
from support.tiny import make_recipe
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.data.packing import pack_blocks
from fedloom.data.tokens import TokenBlocks
from fedloom.evaluation.held_out import Score, evaluate, evaluate_together
from fedloom.model.loading import load_model
from fedloom.model.source import open_model

KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama": (["q_proj", "v_proj"], {}),
    "qwen2": (["k_proj", "down_proj"], {}),
    "gpt2": (["c_attn"], {}),
    "opt": (["q_proj", "fc1"], {"word_embed_proj_dim": 64, "ffn_dim": 96}),
    "mistral": (["q_proj", "o_proj"], {"sliding_window": 7}),
    "gemma2": (["q_proj", "v_proj"], {"sliding_window": 6, "final_logit_softcapping": 3.0}),
    "gpt_neox": (["query_key_value"], {}),
}
"""Kinds of models: some layers to adapt, and what their configuration needs, or has narrow windows by."""
WIDTH = 40


@dataclass(frozen=True)
class Document:
    """A text by itself: its tokens, and which of them are to be predicted."""

    tokens_T: Tensor
    counted_T: Tensor


def draw_documents(draw: random.Random, size: int, counting: str) -> list[Document]:
    """Texts of two tokens and more; what counts is all, the end, or any tokens, with one at least behind the first."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    documents = []
    for _ in range(size):
        length = draw.choice([2, 3, draw.randint(2, WIDTH), WIDTH])
        counted_T = torch.ones(length, dtype=torch.bool)
        if counting == "ends":
            counted_T[: draw.randint(1, length - 1)] = False
        elif counting == "any":
            counted_T = torch.rand(length, generator=generator) < 0.4
            counted_T[draw.randint(1, length - 1)] = True
        documents.append(Document(torch.randint(0, 500, (length,), generator=generator), counted_T))
    return documents


def to_blocks(documents: list[Document], *, packed: bool) -> TokenBlocks:
    """Put documents into blocks as wide as the longest, or packed, into some that are wider."""
    width = max(len(document.tokens_T) for document in documents) + (30 if packed else 0)
    tokens_NT = torch.full((len(documents), width), 9)  # padding with a word of its own
    counted_NT = torch.zeros(len(documents), width, dtype=torch.bool)
    for row, document in enumerate(documents):
        tokens_NT[row, : len(document.tokens_T)] = document.tokens_T
        counted_NT[row, : len(document.tokens_T)] = document.counted_T
    blocks = TokenBlocks(tokens_NT, torch.tensor([len(document.tokens_T) for document in documents]), counted_NT)
    return pack_blocks(blocks) if packed else blocks


@torch.no_grad()
def score_alone(model: Any, documents: list[Document]) -> Score:
    """Sum over documents, each in a pass of its own."""
    loss, correct, num_targets = 0.0, 0, 0
    for document in documents:
        logits_TV = model(input_ids=document.tokens_T[None], use_cache=False).logits[0, :-1]
        targets_T, counted_T = document.tokens_T[1:], document.counted_T[1:]
        losses_T = functional.cross_entropy(logits_TV, targets_T, reduction="none")
        loss += float(losses_T[counted_T].sum())
        correct += int((logits_TV.argmax(-1) == targets_T)[counted_T].sum())
        num_targets += int(counted_T.sum())
    return Score(loss, correct, num_targets)


@cache
def folder_of(home: Path, kind: str) -> Path:
    return write_small_model(home / kind, kind, **KINDS[kind][1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def open_plainly(folder: Path, config: LoraConfig, adapter: Adapter) -> Any:
    """Return the model with an adapter as transformers and PEFT open them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Conv1D, that its weights lie the other way round
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(adapted, adapter.layout.split(adapter.weights_P.clone()))
    return adapted.eval()


@pytest.mark.parametrize("seed", [*first(range(6), keep=2), *first(range(6, 120), keep=0, rest=pytest.mark.slow)])
def test_scores_are_those_of_one_document_after_another(seed: int, home: Path) -> None:
    draw = random.Random(seed)
    kind = draw.choice([*KINDS])
    folder, targets = folder_of(home, kind), draw.choice([KINDS[kind][0], "all-linear"])
    told = {"rank": draw.choice([1, 3]), "alpha": 4, "targets": targets, "dropout": draw.choice([0.0, 0.5])}
    section = make_recipe(adapter={**told, "rslora": draw.random() < 0.3}).adapter
    base = load_model(open_model(str(folder)), dtype="float64", device=torch.device("cpu"))
    config = build_config(section, base)
    adapted = AdaptedModel(base, config, draw.randrange(100))
    start, generator = adapted.read(), torch.Generator().manual_seed(seed)
    asked, expected = [], []
    for _ in range(draw.randint(1, 6)):
        noise_P = torch.randn(start.layout.size, generator=generator, dtype=torch.float64)
        adapter = replace(start, weights_P=start.weights_P + 0.1 * noise_P)
        documents = draw_documents(draw, draw.choice([1, 2, 5, 9]), draw.choice(["all", "ends", "any"]))
        asked.append((adapter, documents))
        expected.append(score_alone(open_plainly(folder, config, adapter), documents))
    packed = draw.random() < 0.4
    lanes = [(adapter, to_blocks(documents, packed=packed)) for adapter, documents in asked]
    batch_size, at_once = draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 8])
    most = draw.choice([None, 1, WIDTH, 4 * WIDTH])
    alone = [evaluate(adapted, *lane, batch_size=batch_size, most_tokens=most) for lane in lanes]
    together = evaluate_together(adapted, lanes, batch_size=batch_size, at_once=at_once, most_tokens=most)
    for found in (alone, together):
        for ours, plain in zip(found, expected, strict=True):
            # In transformers' plain attention, weights are rounded to float32.
            assert ours.loss_sum == pytest.approx(plain.loss_sum, rel=1e-6)
            assert (ours.correct, ours.num_targets) == (plain.correct, plain.num_targets)
