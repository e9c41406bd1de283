"""The recipe `-as-run` against the program that it replays: HF Trainer and PEFT as that program drove them.

Its own text is not here. What it did is: one Trainer for a client's process, so that AdamW's moments and step count
are kept while the schedule starts again with each `train()`; every document padded to one length, masked in attention
and counted in the loss; the clients' adapters averaged by their examples.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fedloom import load_recipe, run
from fedloom.data import tokens
from fedloom.experiment.preparation import Material, gather
from fedloom.model.source import byte_tokenizer
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run
from fedloom.seeds import derive_seed

NATS = 1e-5
"""Largest difference between a loss of ours and the program's."""
LENGTH = 48


class Order:
    """Sampler that gives the rows of each epoch in the order that fedloom draws."""

    def __init__(self, recipe: Recipe, client: int, size: int) -> None:
        self._recipe, self._client, self._size = recipe, client, size
        self._round = 0
        self._drawn = torch.Generator()

    def __len__(self) -> int:
        return self._size

    def next_round(self) -> None:
        self._round += 1
        self._drawn.manual_seed(derive_seed(self._recipe.seed, "order", self._round, self._client))

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._size, generator=self._drawn).tolist()


class OrderedTrainer(Trainer):
    """Trainer of one client, which takes its examples in a given order."""

    def __init__(self, order: Order, **named: Any) -> None:
        super().__init__(**named)
        self.order = order
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> Order:
        return self.order


def write_model(folder: Path) -> Path:
    """A tiny OPT without dropout, and a tokenizer that pads."""
    torch.manual_seed(3)
    config = transformers.OPTConfig(
        vocab_size=260, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=256, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(documents: Any, tokenizer: Any) -> list[dict[str, Tensor]]:
    rows = [
        tokenizer(document.text, truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt")
        for document in documents
    ]
    return [
        {"input_ids": row["input_ids"][0], "attention_mask": row["attention_mask"][0], "labels": row["input_ids"][0]}
        for row in rows
    ]


def drive_trainers(recipe: Recipe, material: Material, start: Path, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Central loss by round, and the last adapter, as the program makes them."""
    tokenizer, training = material.source.tokenizer, recipe.training
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=training.epochs, per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate, seed=42, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    def open_start():
        base = AutoModelForCausalLM.from_pretrained(recipe.model.source, dtype=getattr(torch, recipe.model.dtype))
        return PeftModel.from_pretrained(base, start, is_trainable=True)
    trainers = []
    for client, documents in enumerate(material.splits.clients):
        rows = rows_of(documents.train, tokenizer)
        trainers.append(
            OrderedTrainer(Order(recipe, client, len(rows)), model=open_start(), args=arguments, train_dataset=rows)
        )
    server = open_start().eval()
    held_out = rows_of(material.splits.central, tokenizer)

    @torch.no_grad()
    def central_loss() -> float:
        return sum(float(server(**{name: value[None] for name, value in row.items()}).loss) for row in held_out) / len(held_out)

    adapter = get_peft_model_state_dict(server)
    losses = [central_loss()]
    for _ in range(recipe.federation.rounds):
        updates = []
        for trainer in trainers:
            set_peft_model_state_dict(trainer.model, adapter)
            trainer.order.next_round()
            trainer.train()
            updates.append((len(trainer.train_dataset), {k: v.clone() for k, v in get_peft_model_state_dict(trainer.model).items()}))
        total = sum(examples for examples, _ in updates)
        adapter = {name: sum(examples / total * update[name] for examples, update in updates) for name in adapter}
        set_peft_model_state_dict(server, adapter)
        losses.append(central_loss())
    return losses, adapter
