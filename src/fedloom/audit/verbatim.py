"""Verbatim: whether the trained model goes on with a document's own words (Carlini et al. 2021, arXiv 2012.07805).

Greedy writing repeats a document as long as each of its tokens is the likeliest behind those before it: so one pass
over the document says how far it would go, without writing.
"""

from __future__ import annotations

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.audit.attack import Attack, interval, not_tried, read_blocks
from fedloom.audit.statistics import NO, RECOGNISED, TOO_FEW, YES, measure_share
from fedloom.data.tokens import TokenBlocks
from fedloom.progress import Watch, ignore

VERBATIM = "verbatim"
PROMPT = 20
"""Tokens of a document that the model is given."""
REPEATED = 20
"""Tokens in a row, behind those, from which a document is repeated."""
LESS_BEFORE = 10
"""Tokens fewer that the model must have written before training."""


def repeat_verbatim(
    adapted: AdaptedModel,
    before: Adapter,
    after: Adapter,
    members: TokenBlocks,
    others: TokenBlocks,
    *,
    clients: int = 1,
    watch: Watch = ignore,
) -> Attack:
    """Return how many members of one of so many clients a trained model repeats, which it did not before, and how many
    of the others.
    """
    long = [blocks.take(blocks.widths >= PROMPT + REPEATED) for blocks in (members, others)]
    if not len(long[0]):
        return not_tried(VERBATIM, f"no document has {PROMPT + REPEATED} tokens")
    repeated, of_others = (count_repeated(adapted, before, after, blocks, watch=watch) for blocks in long)
    share = measure_share(repeated, len(long[0]), clients)
    # What is written of others as well was not learnt from the members (headers that all documents have, say), unless
    # it is of so many more of the members that chance does not explain it.
    most = measure_share(of_others, len(long[1]), clients).high if of_others else 0.0
    word = YES if share.low > most else NO if share.high < RECOGNISED else TOO_FEW
    found = {"repeated": repeated, "members": len(long[0]), "repeated_others": of_others, "others": len(long[1])}
    return Attack(VERBATIM, word, {**found, **interval("share", share)})


def count_repeated(
    adapted: AdaptedModel, before: Adapter, after: Adapter, blocks: TokenBlocks, *, watch: Watch = ignore
) -> int:
    """Return how many blocks are repeated with one adapter, and not with another."""
    written = read_blocks(adapted, after, blocks, prompt=PROMPT, watch=watch).matched
    rows = [row for row, length in enumerate(written) if length >= REPEATED]
    if not rows:
        return 0
    known = read_blocks(adapted, before, blocks.take(blocks.lengths_N.new_tensor(rows)), prompt=PROMPT).matched
    return sum(written[row] - length >= LESS_BEFORE for row, length in zip(rows, known, strict=True))
