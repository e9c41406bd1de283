"""Canaries: made-up secrets that only a rehearsal plants, to see whether training remembers what it saw.

The exposure of a secret is log₂(r + 1) − log₂ of its rank among r secrets of the same form that were never planted
(Carlini et al. 2019, arXiv 1802.08232, section 4). Ranks are by the loss after training minus that before it: without
the second, a lucky secret would count as remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.audit.attack import Attack, Figure, interval, not_tried, read_blocks
from fedloom.audit.statistics import NO, TOO_FEW, YES, Array, chance_of, measure_auc
from fedloom.data.documents import Document
from fedloom.data.tokens import TokenBlocks
from fedloom.privacy.ration import Terms
from fedloom.progress import Watch, ignore

CANARIES = "canaries"
COPIES = (1, 1, 1, 1, 4, 4, 4, 4)
"""Copies of each planted secret."""
REFERENCES = 100
"""Secrets of the same form that are never planted."""
DIGITS = 8
BEGIN = "The access code of {name} is "
UNLIKELY = 0.01
"""Probability of what was found, by chance alone, below which secrets are remembered."""
APART = 0.75
"""AUC of planted secrets against the others below which none of it is remembered to speak of."""


@dataclass(frozen=True)
class Canaries:
    """Secrets as blocks of which the secret alone counts, those that are planted first."""

    blocks: TokenBlocks
    planted: tuple[Document, ...]
    """Documents to train on with the client's own: each secret, in its copies."""


def make_canaries(key: bytes, tokenize: Callable[[list[Document]], TokenBlocks], *, max_length: int) -> Canaries | None:
    """Draw secrets from a key; None where one is longer than a block."""
    drawn = Random(key)
    names = ["".join(drawn.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=4)) for _ in range(len(COPIES) + REFERENCES)]
    begins = [BEGIN.format(name=name) for name in names]
    texts = [begin + "".join(drawn.choices("0123456789", k=DIGITS)) for begin in begins]
    documents = [Document(text, f"canary {number}") for number, text in enumerate(texts)]
    whole = tokenize(documents)
    begun = tokenize([Document(begin, "") for begin in begins])
    if len(whole) != len(texts) or int(whole.lengths_N.max()) >= max_length:
        return None
    # A tokenizer may join a part of the secret with what stands before it: what differs from there on is the secret.
    width = whole.tokens_NT.shape[1]
    same_NT = (whole.tokens_NT == begun.tokens_NT) & (torch.arange(width) < begun.lengths_N[:, None])
    begins_N = same_NT.long().cumprod(1).sum(1)
    secret_NT = whole.is_real & (torch.arange(width) >= begins_N[:, None])
    planted = [document for document, copies in zip(documents, COPIES, strict=False) for _ in range(copies)]
    return Canaries(replace(whole, counted_NT=secret_NT), tuple(planted))


def seek_canaries(
    adapted: AdaptedModel,
    canaries: Canaries,
    before: Adapter,
    after: Adapter,
    terms: Terms | None,
    rounds: int,
    *,
    watch: Watch = ignore,
) -> Attack:
    """Return whether a model that trained on secrets remembers them."""
    first, second = (read_blocks(adapted, adapter, canaries.blocks, watch=watch).sums for adapter in (before, after))
    return judge_canaries(first - second, terms, rounds)


def judge_canaries(gains: Array, terms: Terms | None, rounds: int) -> Attack:
    """Return what the fall of each secret's loss tells, of those that were planted first."""
    planted, others = gains[: len(COPIES)], gains[len(COPIES) :]
    ranks = 1 + (others[None] >= planted[:, None]).sum(1)
    exposures = np.log2(len(others) + 1) - np.log2(ranks)
    spread = float(others.std()) or math.inf
    fitted = [
        -math.log2(max(0.5 * math.erfc((one - others.mean()) / spread / math.sqrt(2)), 1e-300)) for one in planted
    ]
    copies = np.array(COPIES)
    looks = [chance_of(planted[copies == number], others) for number in sorted(set(COPIES))]
    # Two looks, at those planted once and at those planted often: that of either is twice as large (Bonferroni).
    chance = min(1.0, len(looks) * min(looks))
    word = YES if chance < UNLIKELY else TOO_FEW
    apart = measure_auc(planted, others)
    if word == TOO_FEW and apart.high < APART:
        word = NO
    found: dict[str, Figure] = {
        "planted": len(planted),
        "references": len(others),
        "remembered": int((ranks == 1).sum()),
        "remembered_of_once": int((ranks[copies == 1] == 1).sum()),
        "copies": list(COPIES),
        "exposures": [round(float(one), 2) for one in exposures],
        "fitted": [round(one, 2) for one in fitted],
        "chance": chance,
        **interval("auc", apart),
        "extracted": sum(one >= DIGITS * math.log2(10) for one in fitted),
    }
    bound = {}
    if terms:
        # To be first of r + 1 is a test of membership with 1 / (r + 1) of false alarms (arXiv 2306.00133).
        bound = {"remembered_of_once": terms.recognised(rounds, 1 / (len(others) + 1))}
    return Attack(CANARIES, word, found, bound)


def no_canaries(why: str) -> Attack:
    """Return that no secrets could be planted."""
    return not_tried(CANARIES, why)
