"""Meter of the error of averaging LoRA's factors apart.

Averaging A and B is not averaging BA. With p_k a client's weight, the mean update is Σ p_k B_k A_k, and the
averaged factors give B̄Ā. The difference E = Σ p_k (B_k − B̄)(A_k − Ā) is the covariance of the clients' drifts. It
is measured by Gram matrices of the factors, so that no matrix of the layer's own size is ever made: with the
clients' factors side by side, ‖XY‖² = ⟨XᵀX, YYᵀ⟩. The scale α/r is in numerator and denominator alike.

Letters: K clients, R rank, I and O features in and out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.adapters.adapter import Layout
from fedloom.adapters.lora import lora_pairs

MOST_CLIENTS = 64
"""Number of updates that are held at most; a round with more is not measured."""


@dataclass(frozen=True)
class AveragingError:
    """Error ‖E‖ / ‖Σ p_k B_k A_k‖ (Frobenius norms) of all layers together and of each."""

    whole: float
    layers: dict[str, float]


class AveragingMeter:
    """Meter that takes a round's updates as they arrive, and tells the error of averaging their factors."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pairs = lora_pairs(layout.names)
        self._updates: list[tuple[float, Tensor]] = []
        self._count = 0

    def add(self, weights_P: Tensor, share: float) -> None:
        """Take one client's adapter, [P], and its weight in the mean, on any scale.

        It is held without a copy. Adapters that are lent are whole models, which have no LoRA layers to measure.
        """
        self._count += 1
        if self._pairs and self._count <= MOST_CLIENTS:
            self._updates.append((share, weights_P))

    def take(self) -> AveragingError | None:
        """Return the error of the updates since the last call; None if no product of LoRA came, or too many."""
        updates, count = self._updates, self._count
        self._updates, self._count = [], 0
        if not updates or count > MOST_CLIENTS:
            return None
        total = sum(share for share, _ in updates)
        share_K = torch.tensor([share / total for share, _ in updates], dtype=torch.float64)
        tensors = [self._layout.split(weights_P) for _, weights_P in updates]
        squares = {}
        for layer, (a_name, b_name) in self._pairs.items():
            a_KRI, b_KOR = stack_factors(tensors, a_name, b_name)
            squares[layer] = covariance_and_mean(a_KRI, b_KOR, share_K)
        errors, means = (sum(values) for values in zip(*squares.values(), strict=True))
        # Every B is zero where clients elsewhere keep theirs: there is no product to measure.
        if not means:
            return None
        return AveragingError(
            whole=_ratio(errors, means), layers={layer: _ratio(*found) for layer, found in squares.items()}
        )


def stack_factors(tensors: Sequence[Mapping[str, Tensor]], a_name: str, b_name: str) -> tuple[Tensor, Tensor]:
    """Return A [K, R, I] and B [K, O, R] of one layer of K adapters, in float64."""
    a_KRI, b_KOR = (torch.stack([named[name].double() for named in tensors]) for name in (a_name, b_name))
    return a_KRI, b_KOR


def covariance_and_mean(a_KRI: Tensor, b_KOR: Tensor, share_K: Tensor) -> tuple[float, float]:
    """Return ‖Σ p_k (B_k − B̄)(A_k − Ā)‖² and ‖Σ p_k B_k A_k‖² of one layer."""
    share_K11 = share_K[:, None, None]
    offset_a_KRI = a_KRI - (share_K11 * a_KRI).sum(0)
    offset_b_KOR = b_KOR - (share_K11 * b_KOR).sum(0)
    return product_norm_squared(share_K11 * offset_b_KOR, offset_a_KRI), product_norm_squared(share_K11 * b_KOR, a_KRI)


def product_norm_squared(b_KOR: Tensor, a_KRI: Tensor) -> float:
    """Return ‖Σ_k B_k A_k‖², by Gram matrices of [KR, KR]."""
    b_OS = b_KOR.movedim(0, 1).flatten(1)
    a_SI = a_KRI.flatten(0, 1)
    return float(((b_OS.T @ b_OS) * (a_SI @ a_SI.T)).sum())


def _ratio(error: float, mean: float) -> float:
    # The difference of Gram matrices may round to a little less than zero.
    return math.sqrt(max(error, 0.0) / mean) if mean > 0 else 0.0
