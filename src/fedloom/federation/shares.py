"""Shares of clients in what is averaged: none above a cap, and none that decides a judgement, whatever it says.

Sizes of clients elsewhere are their own words. What is proportional to them, a weight in the mean or tokens of a
hold-out, is capped here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from operator import add
from statistics import median_high

from fedloom.evaluation.held_out import Score

ROUNDING = 1e-9
"""Part of itself by which a share may exceed the cap without being capped: equal ones do, by rounding."""


def cap_weights(weights: Mapping[int, float], max_share: float | None) -> dict[int, float]:
    """Return weights of which none has a larger share of their sum than `max_share`; None caps nothing.

    Of K clients each may have 1/K. What a larger one loses goes to the others in proportion to theirs, which may lift
    the next above the cap, which then is capped too. Weights that are not lowered are returned to the bit.
    """
    if max_share is None or len(weights) < 2:
        return dict(weights)
    cap, rest, capped = max(max_share, 1 / len(weights)), sum(weights.values()), 0
    for weight in sorted(weights.values(), reverse=True)[:-1]:
        # The others share what those above leave: 1 − capped·cap.
        if weight * (1 - capped * cap) <= cap * rest * (1 + ROUNDING):
            break
        rest, capped = rest - weight, capped + 1
    if not capped:
        return dict(weights)
    most = cap * rest / (1 - capped * cap)
    return {client: min(weight, most) for client, weight in weights.items()}


def to_shares(weights: Mapping[int, float]) -> dict[int, float]:
    """Return each weight's part of their sum."""
    total = sum(weights.values())
    return {client: weight / total for client, weight in weights.items()}


def mean_loss(scores: Mapping[int, Score], max_share: float | None) -> float:
    """Return the loss over all clients' hold-outs, every token alike, but for a client's whose share is capped."""
    told = {client: score.num_targets for client, score in scores.items()}
    capped = cap_weights(told, max_share)
    whole = reduce(add, scores.values()).loss
    # Losses that are told can be so large that their sum is infinite, and their mean is not.
    if capped == told and math.isfinite(whole):
        return whole
    return sum(share * scores[client].loss for client, share in to_shares(capped).items())


def judge_losses(losses: Mapping[int, float], began: Mapping[int, float], start: float) -> float:
    """Return `start` and the median, over clients, of how far each loss has moved since it `began`.

    A client has one voice, whatever loss it tells: with three and more, no one of them takes the result out of what
    the others say. Of two middle ones the higher counts, so that none alone makes an adapter look better.
    """
    moved = [losses[client] - began[client] for client in losses.keys() & began.keys()]
    return start + (median_high(moved) if moved else 0.0)
