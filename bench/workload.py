"""Models, blocks and jobs that benchmarks share: a part of them, and no program."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.peft_config import build_config
from fedloom.data.tokens import TokenBlocks
from fedloom.model.devices import choose_dtype, open_device
from fedloom.model.loading import build_meta_model, load_model
from fedloom.model.source import open_model
from fedloom.recipe.sections import Adapter as AdapterSection
from fedloom.recipe.training_section import Training
from fedloom.training.jobs import ClientJob
from fedloom.training.memory import StepMemory, predict_step
from fedloom.training.memory_alone import predict_alone
from fedloom.training.reference import ReferenceEngine

BATCH, LENGTH = 2, 128
VOCABULARY = 250
"""Tokens that blocks are made of: those that every shape has, the tiny ones too."""
DEVICE = open_device("auto")
GPU = DEVICE.type == "cuda"
DTYPE = choose_dtype("auto", DEVICE)


def make_blocks(
    num_blocks: int, seed: int, length: int = LENGTH, *, lengths: tuple[int, int] | None = None
) -> TokenBlocks:
    """Return blocks of random tokens; with `lengths`, of lengths that are evenly spread from the first to the last."""
    length = lengths[1] if lengths else length
    generator = torch.Generator().manual_seed(seed)
    tokens_NT = torch.randint(0, VOCABULARY, (num_blocks, length), generator=generator)
    lengths_N = torch.full((num_blocks,), length)
    if lengths:
        order_N = torch.randperm(num_blocks, generator=generator)
        lengths_N = torch.linspace(*lengths, num_blocks).round().long()[order_N]
    return TokenBlocks(tokens_NT, lengths_N, torch.arange(length) < lengths_N[:, None])


def build_adapted(
    shape: str,
    dtype: str = "float32",
    dropout: float = 0.0,
    own_dropout: bool = True,
    layers: int | None = None,
    *,
    whole: bool = False,
) -> AdaptedModel:
    """Return a random base model of a shape, with LoRA of rank 16 on queries and values, or to be trained as a `whole`.

    The adapter has this dropout; without `own_dropout`, the base model has none. With `layers`, the model has so many
    of them, and no memory for its weights.
    """
    source = open_model(f"random:{shape}")
    if layers is None:
        base = load_model(source, dtype=dtype, device=DEVICE)
    else:
        base = build_meta_model(source, dtype=dtype, layers=layers)
    return AdaptedModel(base, None, 1) if whole else adapt(base, dropout, own_dropout)


def adapt(base: PreTrainedModel, dropout: float, own_dropout: bool) -> AdaptedModel:
    """Put LoRA of rank 16 with this dropout on queries and values; without `own_dropout`, the model's own is off."""
    for module in () if own_dropout else base.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    section = AdapterSection(rank=16, alpha=32, dropout=dropout, targets=("q_proj", "v_proj"))
    return AdaptedModel(base, build_config(section, base), 1)


def predict_memory(
    shape: str,
    clients: int,
    length: int = LENGTH,
    *,
    dtype: str = "float32",
    dropout: float = 0.0,
    own_dropout: bool = True,
) -> StepMemory:
    """Return the memory that a step of so many clients is predicted to need."""
    return predict_step(
        lambda layers: build_adapted(shape, dtype, dropout, own_dropout, layers),
        open_model(f"random:{shape}").num_layers,
        Training(batch_size=BATCH, learning_rate=1e-5),
        clients=clients,
        length=length,
        device=DEVICE,
    )


def predict_whole(shape: str, length: int = LENGTH) -> StepMemory:
    """Return the memory that a step of one client is predicted to need, which trains the whole model."""
    return predict_alone(
        lambda layers: build_adapted(shape, layers=layers, whole=True),
        open_model(f"random:{shape}").num_layers,
        Training(batch_size=BATCH, learning_rate=1e-5),
        length=length,
        device=DEVICE,
    )


def make_jobs(start: Adapter, data: list[TokenBlocks], **changes: object) -> list[ClientJob]:
    """Return a job of one epoch for each client's blocks; `changes` are settings of training."""
    training = Training.model_validate({"batch_size": BATCH, "learning_rate": 1e-5, **changes})
    return [
        ClientJob(round=1, client=client, adapter=start, training=training, rounds=1, seed=1, blocks=blocks)
        for client, blocks in enumerate(data)
    ]


def multiply_as_torch_does(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without the products that fedloom loads it with, which other programs do not know."""
    for layer in model.modules():
        vars(layer).pop("forward", None)
    return model


def count_flops(shape: str, length: int = LENGTH) -> float:
    """Return the floating-point operations of the matrix products of one sample's training step."""
    adapted = build_adapted(shape, DTYPE)
    # Operations that torch does not know the size of would not be counted.
    multiply_as_torch_does(adapted.model)
    jobs = make_jobs(adapted.read(), [make_blocks(BATCH, 1, length)])
    with FlopCounterMode(display=False) as counter:
        for _ in ReferenceEngine(adapted).train(jobs):
            pass
    return counter.get_total_flops() / BATCH


def measure_products(dtype: str, rows: int, features: int, seconds: float = 1.0) -> float:
    """Return the FLOP/s that this machine reaches on products of [rows, features] with a square weight."""
    left, right = (torch.randn(size, features, dtype=getattr(torch, dtype), device=DEVICE) for size in (rows, features))
    left @ right
    wait()
    # A GPU is waited for once in many products: a wait takes longer than one of them.
    bunch = 1000 if GPU else 1
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(bunch):
            left @ right
        wait()
        count += bunch
    return count * 2 * rows * features**2 / (time.perf_counter() - started)


def wait() -> None:
    """Wait for the GPU, where there is one."""
    if GPU:
        torch.cuda.synchronize()
