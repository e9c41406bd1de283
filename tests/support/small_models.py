"""Tiny models with a real small vocabulary, as folders: what is exported for other programs is tried with them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fedloom.model.gguf_vocabulary import SPLITS

PATTERNS = {name: pattern for pattern, name in SPLITS.items()}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SPLITTERS: dict[str, Any] = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    **{
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])
        for name, pattern in PATTERNS.items()
    },
}
"""llama.cpp's name of a way to split texts into words -> the same in the package tokenizers."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = (
    "def main(argv): return 12345 + x\n\n\n    # it's   four  spaces, isn't it?\n",
    "Grüße aus Köln: 3,14 € und ½ — naïve? 你好 🙂\t!",
    "<|im_start|>user\nWhat?<|im_end|>\n",
)
"""Texts that the ways of splitting split differently."""


def learn(tokenizer: Tokenizer, size: int, alphabet: list[str]) -> Tokenizer:
    """Learn a vocabulary from the source of some packages."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([inspect.getsource(module) for module in (json, inspect, tokenizers)], trainer)
    return tokenizer


def make_pieces() -> Tokenizer:
    """A tokenizer like SentencePiece's: whole texts, with visible blanks, and bytes for what is in no token."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    told = json.loads(learn(learnt, 240, []).to_str())["model"]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(told["vocab"], key=told["vocab"].get)]
    merges = [tuple(merge) for merge in told["merges"]]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", *SPECIAL])
    return made


def make_tokenizer(split: str = "smollm", chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of about 500 tokens: byte-level, with this way of splitting, or `pieces`."""
    if split == "pieces":
        tokenizer = make_pieces()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = SPLITTERS[split]
        tokenizer.decoder = decoders.ByteLevel()
        learn(tokenizer, 500, sorted(pre_tokenizers.ByteLevel.alphabet()))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[0])
    made.chat_template = chat_template
    return made


def write_small_model(
    folder: Path, kind: str = "llama", split: str = "smollm", chat_template: str | None = CHATML, **changes: Any
) -> Path:
    """A random two-layer model of one of transformers' kinds, with a tokenizer; heads for keys are fewer."""
    tokenizer = make_tokenizer(split, chat_template)
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "sliding_window": None, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        # Freshly drawn weights are so small that layers hardly change anything, and biases are nought.
        for name, value in model.named_parameters():
            value.data = torch.randn_like(value) * 0.1 if name.endswith("bias") else value.data * 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
