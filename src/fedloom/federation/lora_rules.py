"""How LoRA's factors are averaged: what each client trains, and what the server makes of it.

The mean update is Σ p_k B_k A_k; averaging A and B apart gives another (`averaging_error`). Each rule but the first
is exact, or the best of its rank. The product is never formed: QR of the factors side by side leaves a small core.

Letters: K clients, R rank, S ranks side by side, I and O features in and out, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedloom.adapters.adapter import Adapter, Layout
from fedloom.adapters.lora import A_SUFFIX, B_SUFFIX, Residual, lora_pairs
from fedloom.errors import RecipeError
from fedloom.federation.aggregation import (
    STRATEGIES,
    WEIGHTS,
    Aggregate,
    describe_table,
    once_all_are_there,
    weighted_mean,
)
from fedloom.federation.lora_error import stack_factors
from fedloom.training.jobs import ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation

Held = tuple[Tensor, list[dict[str, Tensor]]]
"""A round's updates: p_k, [K], and each client's tensors by name."""


def factors(section: Federation) -> Aggregate:
    """Average A and B apart, by any strategy: `FedIT` (Zhang et al. 2023, arXiv 2305.05644)."""
    return STRATEGIES[section.strategy.kind](section.strategy)


def ffa(section: Federation) -> Aggregate:
    """A stays as it began, B alone is trained and sent: exact, half the bytes (Sun et al. 2024, arXiv 2403.12313)."""
    return factors(section)


def rolora(section: Federation) -> Aggregate:
    """B in odd rounds, A in even ones: exact, half the bytes (Chen et al. 2025, arXiv 2502.01755, algorithm 1)."""
    return factors(section)


def svd(section: Federation) -> Aggregate:
    """The best rank-r approximation of the exact mean, r up to each client (Bai et al. 2024, arXiv 2402.11505).

    A gets orthonormal rows, about as long as those that LoRA starts with, and B the rest, largest first: a client of
    a smaller rank takes the first of them.
    """

    def combine(adapter: Adapter, updates: Sequence[ClientUpdate]) -> Adapter:
        share_K, held = by_client(section, updates)
        tensors = adapter.layout.split(adapter.weights_P.clone())
        for a_name, b_name in lora_pairs(adapter.layout.names).values():
            a_KRI, b_KOR = stack_factors(held, a_name, b_name)
            u_OS, s_S, v_SI = factored_svd(side_by_side(b_KOR, share_K), a_KRI.flatten(0, 1))
            rank = min(len(s_S), len(tensors[a_name]))
            tensors[a_name].zero_()[:rank] = v_SI[:rank]
            tensors[b_name].zero_()[:, :rank] = (u_OS * s_S)[:, :rank]
        return replace(adapter, weights_P=torch.cat([value.reshape(-1) for value in tensors.values()]))

    return once_all_are_there(combine)


def fedex(section: Federation) -> Aggregate:
    """Average A and B apart, and add what that leaves out to the model itself (Singhal et al. 2024, arXiv 2410.09432).

    The residual Σ p_k (B_k − B̄)(A_k − Ā) joins those of the rounds before, as factors of the least rank that holds
    them.
    """
    weigh = WEIGHTS[section.strategy.weight_by]

    def combine(adapter: Adapter, updates: Sequence[ClientUpdate]) -> Adapter:
        share_K, held = by_client(section, updates)
        mean = weighted_mean(adapter, updates, weigh)
        means = mean.layout.split(mean.weights_P.double())
        found = {}
        for layer, (a_name, b_name) in lora_pairs(mean.layout.names).items():
            a_KRI, b_KOR = stack_factors(held, a_name, b_name)
            b_OS = side_by_side(b_KOR - means[b_name], share_K)
            a_SI = (a_KRI - means[a_name]).flatten(0, 1)
            if adapter.residual is not None:
                old_b_OS, old_a_SI = adapter.residual.factors[layer]
                b_OS, a_SI = torch.cat([b_OS, old_b_OS.double()], dim=1), torch.cat([a_SI, old_a_SI.double()])
            u_OS, s_S, v_SI = factored_svd(b_OS, a_SI)
            dtype = mean.weights_P.dtype
            rank = int((s_S > torch.finfo(dtype).eps * s_S.max()).sum())
            found[layer] = (u_OS * s_S)[:, :rank].to(dtype).contiguous(), v_SI[:rank].to(dtype).contiguous()
        some = any(a_SI.shape[0] for _, a_SI in found.values())
        return replace(mean, residual=Residual(found) if some else None)

    return once_all_are_there(combine)


LORA_RULES: dict[str, Callable[[Federation], Aggregate]] = {
    "factors": factors,
    "ffa": ffa,
    "rolora": rolora,
    "svd": svd,
    "fedex": fedex,
}


def build_aggregate(section: Federation) -> Aggregate:
    """Return the strategy of a recipe's federation, with its rule for LoRA's factors."""
    return LORA_RULES[section.lora_rule](section)


@lru_cache(maxsize=64)
def _part(layout: Layout, suffix: str | None, rank: int | None) -> Tensor:
    """True where a name has this ending, and where a rank is no higher than this, [P]."""
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        part = torch.full(shape, suffix is None or name.endswith(suffix))
        if rank is not None:
            (part if name.endswith(A_SUFFIX) else part.mT)[rank:] = False
        parts.append(part.flatten())
    return torch.cat(parts)


def check_lora_rule(layout: Layout, section: Federation) -> None:
    """Refuse a rule that knows LoRA's factors alone where more than those is trained.

    Raises:
        RecipeError
    """
    known = {name for pair in lora_pairs(layout.names).values() for name in pair}
    others = [name for name in layout.names if name not in known]
    if section.lora_rule in ("rolora", "svd") and others:
        raise RecipeError(
            f'"{section.lora_rule}" is about LoRA\'s factors alone, and {others[0]} is trained too',
            where="federation.lora_rule",
            mend="leave it out, or what adapter.options adds to LoRA",
        )


def trained_part(layout: Layout, rule: str, round: int, rank: int | None = None) -> Tensor | None:
    """Where an adapter may change in a round (from 1) at a client with this rank, bool [P]; None for everywhere."""
    suffix = (B_SUFFIX if round % 2 else A_SUFFIX) if rule == "rolora" else None
    return None if suffix is None and rank is None else _part(layout, suffix, rank)


def adapter_of_rank(adapter: Adapter, rank: int | None) -> Adapter:
    """The adapter with zeros beyond a rank: of what `svd` gives, the best of that rank."""
    if rank is None:
        return adapter
    return replace(adapter, weights_P=adapter.weights_P * _part(adapter.layout, None, rank))


def factored_svd(b_OS: Tensor, a_SI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, S'], s [S'] and V [S', I] of the product b a, in float64, with S' ≤ min(O, S, I); it is never formed."""
    q_b, r_b = torch.linalg.qr(b_OS.double())
    q_a, r_a = torch.linalg.qr(a_SI.double().mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, s, v @ q_a.mT


def by_client(section: Federation, updates: Iterable[ClientUpdate]) -> Held:
    """A round's updates by client, whatever order they came in."""
    weigh = WEIGHTS[section.strategy.weight_by]
    arrived = sorted(updates, key=lambda update: update.report.client)
    weight_K = torch.tensor([float(weigh(update.report)) for update in arrived], dtype=torch.float64)
    return weight_K / weight_K.sum(), [update.adapter.layout.split(update.adapter.weights_P) for update in arrived]


def side_by_side(b_KOR: Tensor, share_K: Tensor) -> Tensor:
    """[p_1 B_1, …, p_K B_K], so that its product with the A below each other is Σ p_k B_k A_k; [O, S]."""
    return (share_K[:, None, None] * b_KOR).movedim(0, 1).flatten(1)


def describe_lora_rules() -> str:
    """Every rule with what it does and where it comes from, as Markdown: the README's table."""
    return describe_table("lora_rule | what is done and where it comes from", LORA_RULES)
