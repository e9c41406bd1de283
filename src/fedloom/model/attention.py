"""Causal attention that needs no mask, because padding stands to the right of every token that counts.

A token looks to its left only, so padding on its right changes nothing. Transformers would look for packed sequences
all the same, which asks the GPU for an answer in every forward pass, and would build a mask, which keeps the flash
kernels out.

Letters: B sequences, H heads, T tokens, D features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

MASKLESS = "fedloom_causal"
MODEL_TYPES = frozenset({"gpt2", "gpt_neox", "llama", "opt", "qwen2", "qwen3"})
"""Those whose attention is known, by test, to be plainly causal; the others keep transformers' own masks."""


def choose_attention(config: PretrainedConfig) -> str:
    """The name of the attention to build a model with."""
    text = config.get_text_config()
    local = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ())
    return MASKLESS if config.model_type in MODEL_TYPES and not local else "sdpa"


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [B, H, T, D] in, [B, T, H, D] out.

    In bfloat16 on a processor, matmul, softmax and matmul are faster than the fused kernel, whose backward pass is
    slow there.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        groups = getattr(module, "num_key_value_groups", 1)
        drop = partial(functional.dropout, p=dropout, training=module.training)
        result = plain_attention(
            query, *repeat_heads(key, value, groups), drop=drop, scale=scaling, mask=attention_mask
        )
        return result.transpose(1, 2).contiguous(), None
    result, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return result, None


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    drop: Callable[[Tensor], Tensor],
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(s Q Kᵀ + mask) V, with dropout on the probabilities; s is 1/√D by default, no mask is a causal one."""
    scores = query @ key.mT * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if mask is None:
        queries, keys = scores.shape[-2:]
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
        scores = scores.masked_fill(ahead, -math.inf)
    else:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return drop(scores.softmax(-1)) @ value


def repeat_heads(key: Tensor, value: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Keys and values that serve `groups` query heads each, once for every query head."""
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


AttentionInterface.register(MASKLESS, causal_attention)
