"""Sum of weighted updates in fixed point: whole numbers are added, so no addition rounds, in whatever groups."""

from __future__ import annotations

import torch
from torch import Tensor

LIMB_BITS, LIMBS = 30, 6
UNITS = [2.0 ** (-LIMB_BITS * place) for place in range(LIMBS)]
"""Units of the limbs: 1 to 2⁻¹⁵⁰. The last bit of any float32 is 2⁻¹⁴⁹ or more, so a whole multiple of one fits."""


class ExactSum:
    """Σ n_k w_k and Σ n_k. Letters: P weights, L limbs.

    A limb takes 30 bits of an update, the first what is above, so 2³² updates fit, and their n_k w_k up to 2⁵² / K.
    """

    def __init__(self, count: int) -> None:
        self.limbs_LP = torch.zeros(LIMBS, count, dtype=torch.int64)
        self.total = 0.0

    def add(self, weights_P: Tensor, weight: float) -> None:
        """Add one update: exactly where its weight is whole and below 2²⁹, else rounded once, by itself."""
        rest_P = weights_P.double() * weight
        for limb_P, unit in zip(self.limbs_LP, UNITS, strict=True):
            part_P = (rest_P / unit).trunc()  # a power of two: exact, as is what is left
            limb_P += part_P.long()
            rest_P -= part_P * unit
        self.total += weight

    def merge(self, other: ExactSum) -> None:
        """Add what another node has summed."""
        self.limbs_LP += other.limbs_LP
        self.total += other.total

    def mean(self) -> Tensor:
        """Return the mean, float32: of the same numbers the same bits, for it is reckoned from the whole sum alone."""
        limbs_LP = self.limbs_LP.clone()
        for place in range(LIMBS - 1, 0, -1):  # carried, so that equal sums are equal limbs
            limbs_LP[place - 1] += limbs_LP[place] >> LIMB_BITS
            limbs_LP[place] &= (1 << LIMB_BITS) - 1
        sum_P = torch.zeros(limbs_LP.shape[1], dtype=torch.float64)
        for limb_P, unit in reversed([*zip(limbs_LP, UNITS, strict=True)]):
            sum_P += limb_P.double() * unit
        return (sum_P / self.total).float()
