"""Membership: whether whoever sees a client's updates can tell its documents from others of the same owner.

Two scores. The alignment of a document is the cosine between its own gradient and what the updates did ("Effective
passive membership inference", ICLR 2023 submission QsCSLPP55Ku; FedMIA, arXiv 2402.06289). The other is its loss before
training minus that after it (the adapter that came in is the one reference model of LiRA, arXiv 2112.03570).

Letters: N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.audit.attack import Attack, Sent, interval
from fedloom.audit.statistics import Array, judge_membership, measure_auc, measure_recognised
from fedloom.data.tokens import TokenBlocks
from fedloom.privacy.ration import Terms
from fedloom.progress import Watch, ignore
from fedloom.training.document_gradients import alignments

ALIGNMENT, LOSS = "alignment", "loss"


def score_alignment(
    adapted: AdaptedModel, sent: Sequence[Sent], blocks: TokenBlocks, *, watch: Watch = ignore
) -> tuple[Array, Array]:
    """Return each block's alignment with all updates together, and its mean loss before the first.

    Gradients are those at the start: a pass over the blocks, however many rounds there were. Those at the start of each
    round, against its own update, told members apart no better (docs/log.md).
    """
    change_P = torch.stack([one.change_P for one in sent]).sum(0)
    cosines_N, losses_N = alignments(adapted, sent[0].start, change_P, blocks, watch=watch)
    return cosines_N.numpy(), losses_N.numpy()


def judge_scores(
    name: str, inside: Array, outside: Array, terms: Terms | None, rounds: int, clients: int = 1
) -> Attack:
    """Return what scores tell of membership, and the most that any could tell under a client's terms."""
    apart = measure_auc(inside, outside, clients)
    recognised, alarms = measure_recognised(inside, outside, clients)
    bound = {}
    if terms:
        # The bar is a place among the others: one more of their kind is above it with this probability, on average.
        least = (alarms * len(outside) + 1) / (len(outside) + 1)
        bound = {"auc": terms.most_apart(rounds), "recognised": terms.recognised(rounds, least)}
    return Attack(
        name,
        judge_membership(apart, recognised, len(outside)),
        {
            **interval("auc", apart),
            **interval("recognised", recognised),
            "false_alarms": alarms,
            "members": len(inside),
            "others": len(outside),
        },
        bound,
    )
