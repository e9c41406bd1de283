"""What a user would run otherwise, HF Trainer + PEFT and TRL's SFTTrainer: a part of `engines.py`, and no program.

They take one client after another. The Trainer pads a batch, as tokenizers do it. The SFTTrainer lays a batch's
documents in one row (`padding_free`), and is left out where TRL is not installed. Without FlashAttention, which is not
asked for, that row has a mask of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from workload import BATCH, DEVICE, GPU, build_adapted, multiply_as_torch_does, wait

from fedloom.data.tokens import TokenBlocks
from fedloom.model.source import byte_tokenizer

SKIPPED_STEPS = 10
"""Steps that a Trainer's rate on a GPU leaves out."""
HAS_TRL = find_spec("trl") is not None

Make = Callable[[PreTrainedModel, TokenBlocks, str], Trainer]


def contend(
    make: Make, dtype: str, dropout: float, shape: str, data: list[TokenBlocks], held_out: TokenBlocks
) -> tuple[Callable[[], float | None], Callable[[], None]]:
    """Return work that trains all clients by such trainers, and work that scores."""
    model = build_plain(shape, dtype, dropout)

    def train() -> float | None:
        steady = SteadySteps()
        with tempfile.TemporaryDirectory() as folder:
            for blocks in data:
                one = make(model, blocks, folder)
                if GPU:
                    one.add_callback(steady)
                one.train()
        return steady.seconds if GPU else None

    def score() -> None:
        with tempfile.TemporaryDirectory() as folder:
            make(model, held_out, folder).evaluate()

    return train, score


def build_plain(shape: str, dtype: str, dropout: float) -> PreTrainedModel:
    """Return a shape with PEFT's adapter, without what fedloom does to a model that it loads."""
    model = build_adapted(shape, dtype, dropout).model
    model.get_base_model().set_attn_implementation("sdpa")
    return multiply_as_torch_does(model)


def shows_documents_each_other(shape: str) -> bool:
    """Return whether a model's second document in a row of two gives other logits than alone: its mask knows of one."""
    model = build_plain(shape, "float32", 0.0).eval()
    one, other = torch.arange(8, device=DEVICE), torch.arange(8, 16, device=DEVICE)
    places = torch.arange(8, device=DEVICE)
    row = {"input_ids": torch.cat([one, other])[None], "position_ids": torch.cat([places, places])[None]}
    with torch.no_grad():
        # Beside a cache, transformers takes a row for one document.
        beside = model(**row, use_cache=False).logits[0, 8:]
        alone = model(input_ids=other[None], position_ids=places[None], use_cache=False).logits[0]
    return not torch.allclose(beside, alone, rtol=1e-3, atol=1e-4)


def padded_trainer(model: PreTrainedModel, blocks: TokenBlocks, folder: str) -> Trainer:
    """Return HF Trainer on blocks that are padded to one length."""
    seen_NT = torch.arange(blocks.tokens_NT.shape[1]) < blocks.lengths_N[:, None]
    rows = [
        {"input_ids": row, "attention_mask": seen.long(), "labels": row.masked_fill(~seen, -100)}
        for row, seen in zip(blocks.tokens_NT, seen_NT, strict=True)
    ]
    arguments = TrainingArguments(**_settings(folder))
    return _quiet(Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows))


def padding_free_trainer(model: PreTrainedModel, blocks: TokenBlocks, folder: str) -> Trainer:
    """Return TRL's SFTTrainer on the same blocks without padding, a batch of them in one row."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [row[:length].tolist() for row, length in zip(blocks.tokens_NT, blocks.lengths_N.tolist(), strict=True)]
    documents = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = SFTConfig(
        **_settings(folder),
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        # On by TRL's defaults, and not in the others: a layer computed twice, and autocast.
        activation_checkpointing=False,
        bf16=False,
    )
    tokenizer = byte_tokenizer()
    made = SFTTrainer(
        model=model, args=arguments, train_dataset=documents, eval_dataset=documents, processing_class=tokenizer
    )
    return _quiet(made)


def _settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not GPU,
        "dataloader_pin_memory": GPU,
    }


def _quiet(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    return trainer


class SteadySteps(TrainerCallback):  # type: ignore[misc]
    """Seconds of all of a Trainer's steps, had each taken as long as those after its first few on average."""

    seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step not in (SKIPPED_STEPS, state.max_steps):
            return
        wait()
        now = time.perf_counter()
        if state.global_step == SKIPPED_STEPS:
            self._began = now
        else:
            self.seconds += (now - self._began) * state.max_steps / (state.max_steps - SKIPPED_STEPS)
