"""Documents that have nothing in common: each is random tokens, so each pulls a model its own way."""

import random
import string
from pathlib import Path

import torch

from fedloom.data.tokens import TokenBlocks


def random_blocks(num_blocks: int, length: int = 24, seed: int = 0, vocabulary: int = 256) -> TokenBlocks:
    """Blocks of random tokens, for a model of that vocabulary."""
    tokens_NT = torch.randint(0, vocabulary, (num_blocks, length), generator=torch.Generator().manual_seed(seed))
    return TokenBlocks(tokens_NT, torch.full((num_blocks,), length), torch.ones_like(tokens_NT, dtype=torch.bool))


def random_texts(number: int, length: int = 40, seed: int = 0) -> list[str]:
    """Texts of a few letters and digits, each of its own few."""
    drawn = random.Random(seed)
    alphabets = (drawn.sample(string.ascii_letters + string.digits, 6) for _ in range(number))
    return ["".join(drawn.choices(alphabet, k=length)) for alphabet in alphabets]


def write_texts(folder: Path, texts: list[str]) -> Path:
    """A folder of texts, each a file of its own."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return folder
