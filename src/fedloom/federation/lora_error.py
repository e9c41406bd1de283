"""How wrong it is to average LoRA's factors apart: the meter.

Averaging A and B is not averaging BA. With p_k a client's weight, the mean update is Σ p_k B_k A_k; of the averaged
factors it is B̄Ā; the difference E = Σ p_k (B_k − B̄)(A_k − Ā) is the covariance of the clients' drifts. Measured by Gram
matrices of the factors, so that no matrix of the layer's own size is ever made: with the clients' factors side by side,
‖XY‖² = ⟨XᵀX, YYᵀ⟩. The scale α/r is in numerator and denominator alike.

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
"""Updates that are held for it; a round with more is not measured."""


@dataclass(frozen=True)
class AveragingError:
    """‖E‖ over ‖Σ p_k B_k A_k‖ (Frobenius), of each layer and of all together."""

    whole: float
    layers: dict[str, float]


class AveragingMeter:
    """Takes a round's updates as they come, and tells the error of averaging their factors."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pairs = lora_pairs(layout.names)
        self._updates: list[tuple[float, Tensor]] = []
        self._count = 0

    def add(self, weights_P: Tensor, share: float) -> None:
        """One client's adapter, and its weight in the mean (any scale)."""
        self._count += 1
        if self._pairs and self._count <= MOST_CLIENTS:
            self._updates.append((share, weights_P))

    def take(self) -> AveragingError | None:
        """The error of the updates since the last time; None where it can't be told."""
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
        return AveragingError(
            whole=_ratio(errors, means), layers={layer: _ratio(*found) for layer, found in squares.items()}
        )


def stack_factors(tensors: Sequence[Mapping[str, Tensor]], a_name: str, b_name: str) -> tuple[Tensor, Tensor]:
    """A [K, R, I] and B [K, O, R] of one layer of K adapters, in float64."""
    a_KRI, b_KOR = (torch.stack([named[name].double() for named in tensors]) for name in (a_name, b_name))
    return a_KRI, b_KOR


def covariance_and_mean(a_KRI: Tensor, b_KOR: Tensor, share_K: Tensor) -> tuple[float, float]:
    """‖Σ p_k (B_k − B̄)(A_k − Ā)‖² and ‖Σ p_k B_k A_k‖² of one layer."""
    share_K11 = share_K[:, None, None]
    offset_a_KRI = a_KRI - (share_K11 * a_KRI).sum(0)
    offset_b_KOR = b_KOR - (share_K11 * b_KOR).sum(0)
    return product_norm_squared(share_K11 * offset_b_KOR, offset_a_KRI), product_norm_squared(share_K11 * b_KOR, a_KRI)


def product_norm_squared(b_KOR: Tensor, a_KRI: Tensor) -> float:
    """‖Σ_k B_k A_k‖² by Gram matrices of [KR, KR]."""
    b_OS = b_KOR.movedim(0, 1).flatten(1)
    a_SI = a_KRI.flatten(0, 1)
    return float(((b_OS.T @ b_OS) * (a_SI @ a_SI.T)).sum())


def _ratio(error: float, mean: float) -> float:
    return math.sqrt(max(error, 0.0) / mean) if mean > 0 else 0.0
