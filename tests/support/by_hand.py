"""Federated training by hand: an oracle of plain transformers, PEFT and torch.optim that uses nothing of fedloom's.

One document at a time, so there is no padding. A client minimises the mean token loss of all its documents
+ μ/2 ‖w − w_global‖², in a step for each epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

Documents = Sequence[Tensor]
"""Tokens of each document, [1, T]."""
Weights = dict[str, Tensor]
"""Tensors of an adapter by their names in PEFT's file."""


@dataclass(frozen=True)
class Round:
    """A round's outcome: the global adapter, and each client's mean training loss."""

    weights: Weights
    losses: list[float]


@dataclass(frozen=True)
class Setting:
    """Settings of plain stochastic gradient descent, and how the model is loaded."""

    rate: float
    mu: float
    epochs: int
    dtype: torch.dtype
    attention: str


def tokenize(folder: Path, texts: Sequence[str], longest: int) -> Documents:
    """Return the first tokens of each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor([tokenizer(text)["input_ids"][:longest]]) for text in texts]


def load(folder: Path, setting: Setting, adapter: Path | None = None) -> Any:
    """Load a model anew, with an adapter that PEFT opens, which is then all that is trained."""
    with quietly():
        # Experts one after another, not in the fused product that fedloom's model has.
        values = {"attn_implementation": setting.attention, "experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=setting.dtype, **values)
        return model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)


def token_loss(model: Any, documents: Documents) -> Tensor:
    """Return the mean loss over all tokens that have one before them."""
    losses = []
    for tokens in documents:
        logits = model(input_ids=tokens, use_cache=False).logits
        losses.append(functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"))
    return torch.stack(losses).sum() / sum(tokens.shape[1] - 1 for tokens in documents)


def library_loss(model: Any, documents: Documents) -> float:
    """Return the same as transformers computes it, in float32, from `labels`."""
    counts = [tokens.shape[1] - 1 for tokens in documents]
    with torch.no_grad():
        losses = [float(model.eval()(input_ids=tokens, labels=tokens, use_cache=False).loss) for tokens in documents]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def score(model: Any, documents: Documents) -> float:
    """Return the mean token loss of a model that is only looked at."""
    with torch.no_grad():
        return float(token_loss(model.eval(), documents))


def trained_weights(model: Any) -> Weights:
    """Return the adapter's own tensors, which change as it is trained, by PEFT's names without the adapter's."""
    return {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}


def retrain(model: Any, start: Weights, documents: Documents, setting: Setting) -> tuple[Weights, float]:
    """Train a client from the global weights; return its own, and the mean loss of its steps."""
    weights = trained_weights(model)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(start[name])
    optimizer = torch.optim.SGD(list(weights.values()), lr=setting.rate)
    losses = []
    model.train()
    for _ in range(setting.epochs):
        optimizer.zero_grad()
        loss = token_loss(model, documents)
        distance = sum((value - start[name]).square().sum() for name, value in weights.items())
        (loss + setting.mu / 2 * distance).backward()
        optimizer.step()
        losses.append(float(loss))
    return copy(weights), sum(losses) / len(losses)


def copy(weights: Weights) -> Weights:
    """Return weights that no training changes."""
    return {name: value.detach().clone() for name, value in weights.items()}


def federate(model: Any, clients: Sequence[Documents], rounds: int, setting: Setting) -> Iterator[Round]:
    """Yield the rounds, from the adapter in the model on; its clients are averaged by their numbers of documents."""
    globally = copy(trained_weights(model))
    shares = [len(documents) / sum(map(len, clients)) for documents in clients]
    for _ in range(rounds):
        trained, losses = zip(*(retrain(model, globally, documents, setting) for documents in clients), strict=True)
        globally = {name: sum(share * weights[name] for share, weights in zip(shares, trained, strict=True))
                    for name in globally}  # fmt: skip
        yield Round(globally, list(losses))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the libraries' warnings about each other off the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
