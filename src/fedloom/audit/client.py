"""Attacks on what was sent of one client, by documents that it trained on and others that it did not."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.audit.attack import Attack, Sent, read_blocks
from fedloom.audit.membership import ALIGNMENT, LOSS, judge_scores, score_alignment
from fedloom.audit.rounds import adapter_after
from fedloom.audit.verbatim import repeat_verbatim
from fedloom.data.tokens import TokenBlocks, join_blocks
from fedloom.privacy.ration import Terms
from fedloom.progress import Watch, ignore

MOST = 300
"""Blocks of members, and as many of others, that are scored: more make the answer surer and the wait longer.

One of each unit, since intervals are those of scores that have nothing to do with each other.
"""


def attack_client(
    adapted: AdaptedModel,
    sent: Sequence[Sent],
    members: TokenBlocks,
    others: TokenBlocks,
    terms: Terms | None,
    rounds: int,
    *,
    clients: int = 1,
    watch: Watch = ignore,
) -> tuple[Attack, Attack, Attack]:
    """Return what alignment, losses and the model's own writing tell of the documents of one of so many clients."""
    members, others = (blocks.take(blocks.firsts[:MOST]) for blocks in (members, others))
    both, after = join_blocks([members, others]), adapter_after(sent)
    aligned, before = score_alignment(adapted, sent, both, watch=watch)
    gained = before - read_blocks(adapted, after, both, watch=watch).means
    scores = {ALIGNMENT: aligned, LOSS: gained}
    first, second = (
        judge_scores(name, values[: len(members)], values[len(members) :], terms, rounds, clients)
        for name, values in scores.items()
    )
    repeated = repeat_verbatim(adapted, sent[0].start, after, members, others, clients=clients, watch=watch)
    return first, second, repeated
