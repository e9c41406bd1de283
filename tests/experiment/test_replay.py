"""The recipe `-as-run` against the program that it replays: HF Trainer and PEFT, driven as that program drove them.

One Trainer for each client, kept, so that AdamW's moments and step count are kept while the schedule starts again with
every `train()`; documents padded to one length, masked in attention and counted in the loss; adapters averaged by
examples. What the recipe leaves out on purpose is given to both: the split, and the order of batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from support.marks import first
from torch import Tensor

from fedloom import load_recipe, run
from fedloom.data.documents import Document
from fedloom.data.tokens import TokenBlocks
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.preparation import gather
from fedloom.model.source import byte_tokenizer
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.records.run import Run
from fedloom.seeds import derive_seed

Rows = list[dict[str, Tensor]]

LENGTH, ROUNDS = 48, 4
RATE = 1e-3
"""Learning rate: with the recipe's 1e-5 the loss of this model falls by 0.02 in all, and wrong settings hardly show."""
AS_IT_IS, BROKEN = 1e-5, 1e-4
"""Nats: the largest difference of a loss that follows, and the least of one that does not."""


class Order:
    """Sampler of a client's rows, in the order that fedloom draws for each round and epoch."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._size, generator=self.generator).tolist()


class ClientTrainer(transformers.Trainer):
    """Trainer of one client, for all rounds."""

    def __init__(self, rows: Rows, **others: Any) -> None:
        self.rows, self.order = rows, Order(len(rows))
        super().__init__(train_dataset=rows, **others)
        self.remove_callback(transformers.PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> Order:
        return self.order


@dataclass(frozen=True)
class Program:
    """What the program made of documents: losses in nats, padding counted."""

    central: list[float]
    """By round, from round 0."""
    holdouts: list[float]
    """By round and client, after training."""
    adapter: dict[str, Tensor]


def write_model(folder: Path) -> None:
    """Write a tiny OPT without dropout, whose gradients are long enough to be clipped, and a tokenizer that pads."""
    torch.manual_seed(3)
    config = transformers.OPTConfig(
        vocab_size=260, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, max_position_embeddings=256, dropout=0.0, init_std=0.1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def pad(documents: Sequence[Document], tokenizer: Any) -> Rows:
    """Rows as the program made them: labels are the tokens, padding and all."""
    texts = [document.text for document in documents]
    padded = tokenizer(texts, truncation=True, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return [
        {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
        for tokens, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]


@torch.no_grad()
def mean_loss(model: Any, rows: Rows) -> float:
    model.eval()
    losses = [float(model(**{name: value[None] for name, value in row.items()}).loss) for row in rows]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The shipped recipe with another model, other documents, and sizes for both."""
    folder = tmp_path_factory.mktemp("given")
    write_model(folder / "model")
    (folder / "texts").mkdir()
    for number in range(48):
        text = f"def f{number}(x):\n    return x + {number * number}\n" * 3
        (folder / "texts" / f"{number}.txt").write_text(text[: 24 + 7 * number % 60])
    overrides = [
        f"model.source={folder / 'model'}", f"data.source={folder / 'texts'}", f"data.max_length={LENGTH}",
        # Clients of 6, 12 and 18 documents: a mean by examples is not the plain one, and some last batches are short.
        "data.documents_per_client=12", "data.partition.kind=linear", "data.central_holdout=12",
        "adapter.dropout=0", f"training.learning_rate={RATE}", f"federation.rounds={ROUNDS}",
    ]  # fmt: skip
    return load_recipe("opt350m-lora-fedprox-6k-as-run", overrides)


@pytest.fixture(scope="module")
def program(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder, material = tmp_path_factory.mktemp("program"), gather(recipe, Observer())
    splits, tokenizer = material.splits, material.source.tokenizer
    adapted = load_adapted_model(recipe, material.source)
    adapted.save(adapted.read(), folder / "start")

    def open_start() -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.source, dtype="float32")
        return PeftModel.from_pretrained(base, folder / "start", is_trainable=True)

    # What is not named is Trainer's default, as it was for the program.
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=2, learning_rate=RATE,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainers = [
        ClientTrainer(pad(client.train, tokenizer), model=open_start(), args=arguments) for client in splits.clients
    ]
    examples = sum(len(trainer.rows) for trainer in trainers)
    server, central = open_start(), pad(splits.central, tokenizer)
    adapter = {name: value.clone() for name, value in get_peft_model_state_dict(server).items()}
    losses, holdouts = [mean_loss(server, central)], []
    for round in range(1, ROUNDS + 1):
        mean = {name: torch.zeros_like(value) for name, value in adapter.items()}
        for client, trainer in enumerate(trainers):
            set_peft_model_state_dict(trainer.model, adapter)
            trainer.order.generator.manual_seed(derive_seed(recipe.seed, "order", round, client))
            trainer.train()
            holdouts.append(mean_loss(trainer.model, pad(splits.clients[client].holdout, tokenizer)))
            for name, value in get_peft_model_state_dict(trainer.model).items():
                mean[name] += len(trainer.rows) / examples * value
        adapter = mean
        set_peft_model_state_dict(server, adapter)
        losses.append(mean_loss(server, central))
    return Program(losses, holdouts, adapter)


def follow(recipe: Recipe, program: Program, folder: Path, **training: Any) -> tuple[Run, float]:
    """A run of the recipe, and the largest difference of its central loss in any round."""
    changed = recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})
    finished = run(changed, folder, Observer())
    ours = [record["central_loss"] for record in finished.rounds]
    return finished, max(abs(our - their) for our, their in zip(ours, program.central, strict=True))


@pytest.mark.parametrize("engine", first(["batched", "reference"]))
def test_the_recipe_does_what_the_program_did(recipe: Recipe, program: Program, engine: str, tmp_path: Path) -> None:
    finished, difference = follow(recipe, program, tmp_path / "run", engine=engine)
    assert difference < AS_IT_IS
    assert program.central[-1] < program.central[0] - 0.1
    told = sorted(finished.clients, key=lambda client: (client["round"], client["client"]))
    assert len({client["examples"] for client in told}) == 3
    assert [client["holdout_loss_after"] for client in told] == pytest.approx(program.holdouts, abs=AS_IT_IS)
    ours = load_file(finished.folder / "adapters" / "last" / "adapter_model.safetensors")
    for name, value in program.adapter.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)
    clients = finished.plan["clients"]
    real, rows = sum(client["tokens"] for client in clients), sum(client["blocks"] for client in clients)
    assert real < 0.95 * rows * LENGTH, "padding is what this is about"


@pytest.mark.parametrize(
    "other",
    first(
        [
            {"optimizer_state": "reset"},
            {"max_gradient_norm": None},
            {"schedule_scope": "run"},
            {"weight_decay": 0.01},
            {"proximal_mu": 0.1},
        ]
    ),
    ids=lambda other: next(iter(other)),
)
def test_another_setting_would_show(recipe: Recipe, program: Program, other: dict[str, Any], tmp_path: Path) -> None:
    assert follow(recipe, program, tmp_path / "run", **other)[1] > BROKEN


@pytest.mark.long
def test_attention_without_the_mask_would_show(
    recipe: Recipe, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenBlocks, "pad_counts", False)
    assert follow(recipe, program, tmp_path / "run")[1] > BROKEN
