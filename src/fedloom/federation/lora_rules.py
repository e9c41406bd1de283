"""Rules for averaging LoRA's factors: what each client trains, and what the server makes of the updates.

The mean update is Σ p_k B_k A_k; averaging A and B apart gives another one (`lora_error`). Each rule but the first is
exact, or the best of its rank. The product is never formed: QR of the factors side by side leaves a small core.

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
from fedloom.federation.aggregation import WEIGHTS, Aggregate, describe_table, once_all_are_there, weighted_mean
from fedloom.federation.lora_error import stack_factors
from fedloom.federation.own_parts import OwnParts
from fedloom.federation.strategies import build_strategy
from fedloom.training.jobs import ClientUpdate

if TYPE_CHECKING:
    from fedloom.recipe.sections import Federation

Held = tuple[Tensor, list[dict[str, Tensor]]]
"""Updates of a round: the shares p_k, [K], and each client's tensors by name."""


def factors(section: Federation) -> Aggregate:
    """Average A and B apart, by any strategy: `FedIT` (Zhang et al. 2023, arXiv 2305.05644)."""
    return build_strategy(section.strategy)


def ffa(section: Federation) -> Aggregate:
    """Leave A as it began, train and send B alone: exact, half the bytes (Sun et al. 2024, arXiv 2403.12313)."""
    return factors(section)


def rolora(section: Federation) -> Aggregate:
    """Train B in odd rounds, A in even: exact, half the bytes (Chen et al. 2025, arXiv 2502.01755, algorithm 1)."""
    return factors(section)


def fedsa(section: Federation) -> Aggregate:
    """Share A, and leave to each client a B of its own: half the bytes (Guo et al. 2024, arXiv 2410.01463).

    The global adapter has the mean of the clients' B beside that of A: no client trains from it. Since A is the same
    for all, it is the mean of their models.
    """
    return factors(section)


def svd(section: Federation) -> Aggregate:
    """Take the best rank-r approximation of the exact mean, r up to each client (Bai et al. 2024, arXiv 2402.11505).

    A gets orthonormal rows, about as long as those that LoRA starts with, and B the rest, with the largest singular
    values first: a client of a smaller rank takes the first ranks.
    """

    def combine(adapter: Adapter, updates: Sequence[ClientUpdate]) -> Adapter:
        share_K, held = by_client(section, updates)
        # A copy, which is written through its views below: adapters are never changed in place.
        tensors = adapter.layout.split(adapter.weights_P.clone())
        for a_name, b_name in lora_pairs(adapter.layout.names).values():
            a_KRI, b_KOR = stack_factors(held, a_name, b_name)
            u_OS, s_S, v_SI = factored_svd(side_by_side(b_KOR, share_K), a_KRI.flatten(0, 1))
            # A product of K factors may have fewer ranks than the adapter; its other ranks become zero.
            rank = min(len(s_S), len(tensors[a_name]))
            tensors[a_name].zero_()[:rank] = v_SI[:rank]
            tensors[b_name].zero_()[:, :rank] = (u_OS * s_S)[:, :rank]
        return replace(adapter, weights_P=torch.cat([value.reshape(-1) for value in tensors.values()]))

    return once_all_are_there(combine)


def fedex(section: Federation) -> Aggregate:
    """Average A and B apart, and add what that leaves out to the model itself (Singhal et al. 2024, arXiv 2410.09432).

    The residual Σ p_k (B_k − B̄)(A_k − Ā) is added to that of the rounds before, and the sum is kept as factors of the
    smallest rank that holds it.
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
            # Singular values below the dtype's own rounding are noise, and would make the residual grow every round.
            rank = int((s_S > torch.finfo(dtype).eps * s_S.max()).sum())
            found[layer] = (u_OS * s_S)[:, :rank].to(dtype).contiguous(), v_SI[:rank].to(dtype).contiguous()
        some = any(a_SI.shape[0] for _, a_SI in found.values())
        return replace(mean, residual=Residual(found) if some else None)

    return once_all_are_there(combine)


LORA_RULES: dict[str, Callable[[Federation], Aggregate]] = {
    "factors": factors,
    "ffa": ffa,
    "rolora": rolora,
    "fedsa": fedsa,
    "svd": svd,
    "fedex": fedex,
}
"""Rules by their name in `federation.lora_rule`."""


def build_aggregate(section: Federation) -> Aggregate:
    """Return the strategy of a recipe's federation, with its rule for LoRA's factors."""
    return LORA_RULES[section.lora_rule](section)


@lru_cache(maxsize=64)
def _part(layout: Layout, suffix: str | None, rank: int | None) -> Tensor:
    """Return a mask, bool [P]: true for names with this ending, and in them for the first `rank` ranks.

    Without a suffix all names count, without a rank all ranks. The mask is kept: it is as large as a quarter of the
    adapter, and needed for every client of every round.
    """
    parts = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        part = torch.full(shape, suffix is None or name.endswith(suffix))
        if rank is not None:
            # Ranks are the rows of A [R, I] and the columns of B [O, R].
            (part if name.endswith(A_SUFFIX) else part.mT)[rank:] = False
        parts.append(part.flatten())
    return torch.cat(parts)


def check_lora_rule(layout: Layout, section: Federation) -> None:
    """Refuse a rule that can average only LoRA's factors if other tensors are trained too.

    Raises:
        RecipeError: the rule can't average one of the trained tensors.
    """
    known = {name for pair in lora_pairs(layout.names).values() for name in pair}
    others = [name for name in layout.names if name not in known]
    if section.lora_rule in ("rolora", "fedsa", "svd") and others:
        raise RecipeError(
            f'"{section.lora_rule}" can average only LoRA\'s factors, and {others[0]} is trained too',
            where="federation.lora_rule",
            mend="leave it out, or remove from adapter.options what trains more than A and B",
        )


def trained_part(layout: Layout, rule: str, round: int, rank: int | None = None) -> Tensor | None:
    """Return where a client of this rank may change an adapter in a round (from 1), bool [P]; None if everywhere."""
    suffix = (B_SUFFIX if round % 2 else A_SUFFIX) if rule == "rolora" else None
    return None if suffix is None and rank is None else _part(layout, suffix, rank)


def shared_part(layout: Layout, rule: str) -> Tensor | None:
    """Return what of an adapter is shared, where the rest is each client's own, bool [P]; None if all of it is."""
    return _part(layout, A_SUFFIX, None) if rule == "fedsa" else None


def open_own_parts(layout: Layout, rule: str, read_initial: Callable[[], Adapter]) -> OwnParts | None:
    """Return what each client keeps of its adapter, before any has trained; None where all of it is shared."""
    shared_P = shared_part(layout, rule)
    return None if shared_P is None else OwnParts(read_initial(), shared_P)


def adapter_of_rank(adapter: Adapter, rank: int | None) -> Adapter:
    """Return the adapter with zeros beyond a rank: if `svd` made it, the best adapter of that rank."""
    if rank is None:
        return adapter
    return replace(adapter, weights_P=adapter.weights_P * _part(adapter.layout, None, rank))


def factored_svd(b_OS: Tensor, a_SI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [O, S'], s [S'] and V [S', I] of the product b a, in float64, with S' ≤ min(O, S, I).

    The product [O, I] is never formed: b = Q_b R_b and aᵀ = Q_a R_a leave the SVD of R_b R_aᵀ, at most [S, S].
    """
    q_b, r_b = torch.linalg.qr(b_OS.double())
    q_a, r_a = torch.linalg.qr(a_SI.double().mT)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, s, v @ q_a.mT


def by_client(section: Federation, updates: Iterable[ClientUpdate]) -> Held:
    """Return a round's updates in the order of the clients: a sum in another order would round otherwise."""
    weigh = WEIGHTS[section.strategy.weight_by]
    arrived = sorted(updates, key=lambda update: update.report.client)
    weights = [float(weigh(update.report)) * update.weight_scale for update in arrived]
    weight_K = torch.tensor(weights, dtype=torch.float64)
    return weight_K / weight_K.sum(), [update.adapter.layout.split(update.adapter.weights_P) for update in arrived]


def side_by_side(b_KOR: Tensor, share_K: Tensor) -> Tensor:
    """Return [p_1 B_1, …, p_K B_K], [O, S]: its product with the A_k below each other, [S, I], is Σ p_k B_k A_k."""
    return (share_K[:, None, None] * b_KOR).movedim(0, 1).flatten(1)


def describe_lora_rules() -> str:
    """Return the table of rules for the documentation, in Markdown: what each does and where it comes from."""
    return describe_table("lora_rule | what is done and where it comes from", LORA_RULES)
