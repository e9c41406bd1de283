"""Models that transformers has no fused attention for: slower, and as right as the others, in both engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.marks import first
from support.tiny import make_recipe

from fedloom import run
from fedloom.experiment.preparation import prepare
from fedloom.model.attention import MASKLESS, choose_attention
from fedloom.model.source import byte_tokenizer
from fedloom.monitoring.observer import Observer

SMALL: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32}
CONFIGS = {
    "bloom": transformers.BloomConfig(**SMALL, n_layer=2, n_head=4),
    "gptj": transformers.GPTJConfig(vocab_size=260, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128),
    "gpt_neo": transformers.GPTNeoConfig(
        **SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=128,
    ),
    "gemma2": transformers.Gemma2Config(
        **SMALL, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=8, max_position_embeddings=128,
    ),
}  # fmt: skip
TARGETS = {"bloom": ["query_key_value"], "gpt_neo": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("counted", first([False, True]))
@pytest.mark.parametrize("kind", first(CONFIGS))
def test_both_engines_make_the_same_of_it_and_transformers_gives_its_loss(
    kind: str, counted: bool, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    torch.manual_seed(1)
    config = CONFIGS[kind]
    assert choose_attention(config, masked=counted) == ("eager" if counted or kind != "gemma2" else MASKLESS)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    # So much padding that behind it nothing real is in a window of 8.
    texts = write_jsonl([f"text {number} " * 3 for number in range(30)])
    weights = {}
    for engine in ("batched", "reference"):
        recipe = make_recipe(
            model={"source": str(tmp_path / "model"), "dtype": "float32"},
            adapter={"targets": TARGETS.get(kind, ["q_proj", "v_proj"])},
            data={"source": str(texts), "pad_in_loss": counted},
            training={"engine": engine, "optimizer": "sgd", "learning_rate": 0.1},
            federation={"rounds": 1},
        )
        finished = run(recipe, tmp_path / engine, Observer())
        weights[engine] = load_file(finished.folder / "adapters" / "last" / "adapter_model.safetensors")
        central = prepare(recipe, Observer(), predict=False).central
        losses, targets = 0.0, 0
        for row_T, length, width in zip(central.tokens_NT, central.lengths_N, central.widths.tolist(), strict=True):
            tokens_BT, mask_BT = row_T[None, :width], (torch.arange(width) < length).long()[None]
            with torch.inference_mode():
                loss = model(input_ids=tokens_BT, attention_mask=mask_BT, labels=tokens_BT).loss
            losses, targets = losses + float(loss) * (width - 1), targets + width - 1
        assert finished.rounds[0]["central_loss"] == pytest.approx(losses / targets, rel=1e-5)
        assert finished.plan["engine"] == engine
        assert finished.plan["slow_attention"]
    for name, value in weights["reference"].items():
        torch.testing.assert_close(weights["batched"][name], value, rtol=1e-4, atol=1e-6)
