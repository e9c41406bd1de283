"""Call of a model, and causal attention without a mask of padding, which stands to the right of all that counts.

A token looks to its left only, so padding on its right changes nothing. Left alone, transformers would look for packed
sequences all the same, which asks the GPU for an answer in every forward pass, and would build a mask, which keeps the
flash kernels out. Where padding counts itself, models are built with transformers' own attention, and get a mask. A
layer whose tokens see a window of those to their left says so in its call, and gets a mask where a text is longer.
Where several texts share a block, the models served here get a mask of who sees whom, and positions that begin anew.

Letters: B sequences, H heads, T tokens, D features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedloom.host.machine import has_tiles
from fedloom.model.unpadding import EvenRow, RealRow, Row, current_row, in_a_row, see_own_text

MASKLESS = "fedloom_causal"
"""Name under which transformers knows `causal_attention`."""
LOOKS_ELSEWHERE = (
    *("attention_window_size", "keep_window_size", "attention_chunk_size", "index_local_blocks"),
    *("prefix_lm", "use_bidirectional_attention"),
)
"""Settings with which a token does not see all to its left, or sees more; some tell only at a length that is not tried
at loading."""
TRIED_TOKENS = 8
"""Tokens by which a loaded model's attention is tried."""
TRIED_WINDOW = 3
"""Tokens that a layer with a window sees in that trial, whatever its own window is."""
NOISE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest share of the logits' spread that is taken for rounding, by dtype."""
COARSE_NOISE = 0.02
"""The same in 16 bits."""
EVEN = 32
"""Number of which the tokens of texts, and of rows, are a multiple where oneDNN multiplies: it keeps what it compiles
for each number that it meets, a megabyte and more, for good (docs/log.md)."""


def choose_attention(config: PretrainedConfig, *, masked: bool = False) -> str:
    """Return the name of the attention to build a model with: `MASKLESS` where it needs no mask, else `sdpa`.

    It may need none where each token looks at all to its left, or at a window of it, as far as the configuration says,
    and transformers lets others compute it; `settle_attention` tries it. With `masked`, a mask is needed. It is
    `eager`, which is slower, for models that transformers has no fused attention for.
    """
    text = config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ())}
    elsewhere = not kinds <= {"full_attention", "sliding_attention"}
    elsewhere = elsewhere or any(getattr(text, name, None) for name in LOOKS_ELSEWHERE)
    built = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    built = built[0] if isinstance(built, tuple) else built
    if built is None:
        return "sdpa"
    own = _own_attention(built)
    # What keeps some from transformers' fused attention is a cap on the scores, which is computed here.
    computed = own == "sdpa" or _caps_scores(config)
    return MASKLESS if built._supports_attention_backend and computed and not elsewhere and not masked else own


def _own_attention(kind: type[PreTrainedModel]) -> str:
    """Return the name of the fastest attention that transformers itself has for a kind of model."""
    return "sdpa" if kind._supports_sdpa else "eager"


def _caps_scores(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


@torch.inference_mode()
def settle_attention(model: PreTrainedModel) -> None:
    """Give a loaded model transformers' own attention where without a mask it would give other logits."""
    if model.config._attn_implementation != MASKLESS or model.device.type == "meta":
        return
    # Not from token 0 on: where that is padding, a model that counts its positions from there would seem to count as
    # all others do.
    tokens_1T = (
        7 * torch.arange(TRIED_TOKENS, device=model.device)[None] + 3
    ) % model.config.get_text_config().vocab_size

    def compute_theirs() -> Tensor:
        with with_masks(model):
            told = model(input_ids=tokens_1T, attention_mask=torch.ones_like(tokens_1T), use_cache=False)
        logits: Tensor = told.logits
        return logits.double()

    try:
        noise = NOISE.get(model.dtype, COARSE_NOISE)
        theirs = compute_theirs()
        # Its own window may be longer than any text that could be tried.
        with _narrow_windows(model) as narrowed:
            ours, narrow = call_model(model, tokens_1T, None).logits.double(), compute_theirs()
        alike = bool((ours - narrow).abs().mean() <= noise * narrow.std())
        # A window that changes nothing when it is narrow is kept somewhere else than is known here.
        alike = alike and not (narrowed and torch.equal(theirs, narrow))
    # Whatever its own code makes of a call that it does not know: it gets the one that it knows.
    except Exception:
        alike = False
    if not alike:
        model.set_attn_implementation(_own_attention(type(model)))


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[bool]:
    """Have a model's layers that see a window see a narrow one inside; False if it has none."""
    places = [model.config, model.config.get_text_config(), *model.modules()]
    told = [(place, getattr(place, "sliding_window", None)) for place in places]
    kept = [(place, window) for place, window in told if isinstance(window, int) and window]
    try:
        for place, _ in kept:
            place.sliding_window = TRIED_WINDOW
        yield bool(kept)
    finally:
        for place, window in kept:
            place.sliding_window = window


def call_model(model: Any, tokens_BT: Tensor, mask_BT: Tensor | None) -> Any:
    """Return what a model gives for tokens.

    `mask_BT` is 0 at padding and the number of its text at every other token, or None where no mask is needed. A model
    that was built to do without one (`MASKLESS`) keeps texts apart by these numbers; to every other they are all 1.
    Within `without_padding` it gives what is of the real tokens alone, as one row.
    """
    if row := current_row():
        places_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        positions_BT = places_BT if mask_BT is None else positions_in_text(mask_BT)
        return model(input_ids=row.take(tokens_BT), position_ids=row.take(positions_BT), use_cache=False)
    if mask_BT is not None and model.config._attn_implementation == MASKLESS:
        return model(
            input_ids=tokens_BT,
            attention_mask=see_own_text(mask_BT),
            position_ids=positions_in_text(mask_BT),
            use_cache=False,
        )
    if mask_BT is None and isinstance(model, PreTrainedModel) and model.config._attn_implementation == MASKLESS:
        # Told, not left to the model: OPT would sum a mask of ones for them, for which a GPU has no kernel that gives
        # the same sum each time.
        positions_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return model(input_ids=tokens_BT, position_ids=positions_1T, use_cache=False)
    if mask_BT is None:
        return model(input_ids=tokens_BT, use_cache=False)
    return model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)


def multiple_for(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of which tokens that are multiplied together are to be a multiple."""
    return EVEN if device.type == "cpu" and dtype == torch.bfloat16 else 1


def see_window(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which of the last tokens sees which, [queries, keys]: those of a window that ends with itself."""
    places_K = torch.arange(keys, device=device)
    behind_QK = places_K[keys - queries :, None] - places_K
    return (behind_QK >= 0) & (behind_QK < window)


def positions_in_text(texts_BT: Tensor) -> Tensor:
    """Return each token's place in its own text, from 0, [B, T]; the tokens of a text stand side by side."""
    places_BT = torch.arange(texts_BT.shape[1], device=texts_BT.device).expand_as(texts_BT)
    begins_BT = torch.zeros_like(texts_BT)
    begins_BT[:, 1:] = places_BT[:, 1:] * (texts_BT[:, 1:] != texts_BT[:, :-1])
    return places_BT - begins_BT.cummax(1).values


@contextmanager
def without_padding(real_M: Tensor | None, shape: tuple[int, ...], texts_BT: Tensor | None = None) -> Iterator[None]:
    """Have a model that does without masks compute the real tokens of a batch alone inside; its shape is [B, T].

    `real_M` are their places in the flattened batch, or [K, R] with equally many of each client (`EvenRow`), or None
    where all is computed; `texts_BT` the numbers of the texts that share a sequence. Needed in the backward pass too,
    where layers are computed again.
    """
    if real_M is None:
        row = None
    else:
        row = RealRow(real_M, shape, texts_BT) if real_M.ndim == 1 else EvenRow(real_M, shape, texts_BT)
    with in_a_row(row):
        yield


@contextmanager
def with_masks(model: PreTrainedModel) -> Iterator[None]:
    """Have a model that was built to do without masks take them inside, for prompts that are filled up on the left.

    Its attention is then transformers' own, whose kernels are slower and whose results are the same up to rounding.
    """
    if model.config._attn_implementation != MASKLESS:
        yield
        return
    model.set_attn_implementation(_own_attention(type(model)))
    try:
        yield
    finally:
        model.set_attn_implementation(MASKLESS)


def is_slow(config: PretrainedConfig) -> bool:
    """Return whether a model's attention is not fused; one that has no attention has no heads either."""
    plain = choose_attention(config) == "eager" or _caps_scores(config)
    return plain and hasattr(config.get_text_config(), "num_attention_heads")


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
    """Compute attention as transformers calls it: [B, H, T, D] in, [B, T, H, D] out, and no probabilities.

    Of a row, it is [1, H, M, D] in and [1, M, H, D] out.
    """
    row = current_row()
    if row is None:
        return _attend(module, query, key, value, attention_mask, dropout, scaling, **others), None
    if row.texts is not None and not dropout:
        # A text after another: padding among the scores would cost the square of the longest one for each.
        texts = zip(*(part.split(row.texts, dim=2) for part in (query, key, value)), strict=True)
        heads = [_attend(module, q, k, v, None, dropout, scaling, **others) for q, k, v in texts]
        return torch.cat(heads, dim=1), None
    query, key, value = (_spread_heads(row, part) for part in (query, key, value))
    attended = _attend(module, query, key, value, row.seen, dropout, scaling, **others)
    return row.gather(attended.flatten(0, 1))[None], None


def _spread_heads(row: Row, heads_1HMD: Tensor) -> Tensor:
    """Return queries, keys or values of a row as those of its batch, [B, H, T, D]."""
    # Not taken by its number, whose gradient is a tensor of zeros and a copy into it.
    spread = row.spread(heads_1HMD.squeeze(0).transpose(0, 1))
    return spread.view(row.sequences, row.width, *spread.shape[1:]).transpose(1, 2)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    if sliding_window is not None and key.shape[2] > sliding_window:
        near_QK = see_window(query.shape[2], key.shape[2], sliding_window, key.device)
        attention_mask = near_QK if attention_mask is None else attention_mask & near_QK
    # In bfloat16 on a processor the fused kernel has a slow backward pass; matmul, softmax and matmul are faster.
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    # Forward it is the faster one, where the processor multiplies tiles (docs/benchmarks.md). Asked by the mode, not by
    # gradients: what a checkpoint computes twice must come out the same.
    slow = slow and not (torch.is_inference_mode_enabled() and attention_mask is None and has_tiles())
    if softcap is not None or slow:
        groups = getattr(module, "num_key_value_groups", 1)
        drop = partial(functional.dropout, p=dropout, training=module.training)
        queries = query.shape[2]
        if slow and not (dropout and module.training):
            query, key, value, attention_mask = _fill_up(query, key, value, attention_mask)
        key, value = repeat_heads(key, value, groups)
        heads = plain_attention(query, key, value, drop=drop, scale=scaling, mask=attention_mask, cap=softcap)
        return heads[:, :, :queries].transpose(1, 2).contiguous()
    result: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )[0]
    return result


def _fill_up(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return them with tokens on the right, up to a multiple of `EVEN`, which no token sees; a single query stays.

    What is filled in sees something, so that it is a number and its gradient 0.
    """
    queries, keys = query.shape[2], key.shape[2]
    more_queries, more_keys = -queries % EVEN if queries > 1 else 0, -keys % EVEN
    if not (more_queries or more_keys):
        return query, key, value, mask  # to fill in nothing would copy them
    if more_keys and mask is None and not queries == keys > 1:  # the last query would be beside the last key filled in
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if mask is not None:
        sees, hidden = (True, False) if mask.dtype == torch.bool else (0.0, -math.inf)
        mask = functional.pad(mask, (0, more_keys), value=hidden)
        if mask.shape[-2] > 1:
            mask = functional.pad(mask, (0, 0, 0, more_queries), value=sees)
    query = functional.pad(query, (0, 0, 0, more_queries))
    key, value = (functional.pad(part, (0, 0, 0, more_keys)) for part in (key, value))
    return query, key, value, mask


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    drop: Callable[[Tensor], Tensor],
    scale: float | None = None,
    mask: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Compute softmax(s Q Kᵀ + mask) V, [B, H, T, D], with `drop` applied to the probabilities.

    The scale s is 1/√D by default; with a `cap` c, scores x are c·tanh(x / c) before they are masked (Gemma 2, arXiv
    2408.00118, section 2). Without a mask, attention is causal; a boolean mask is true where a token is seen.
    Who sees nothing at all (padding beyond a sliding window) gets zeros, as from torch's own.
    """
    scale = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    if mask is None and cap is None:
        scores = _causal_scores(query, key, scale)
    else:
        scores = query @ key.mT * scale
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        if mask is None:
            scores = scores + _hide_ahead(query, key)
        else:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(-1)
    if mask is not None and mask.dtype == torch.bool:
        probabilities = probabilities.masked_fill(~mask, 0.0)  # a row of −∞ is NaN
    return drop(probabilities) @ value


def _causal_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return s Q Kᵀ, and −∞ where a key is ahead of its query: one product that scales and adds as it goes.

    Autograd keeps no more of it than queries and keys, and scales gradients of these, not of the scores.
    """
    flat = torch.baddbmm(_hide_ahead(query, key), query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale)
    return flat.view(*query.shape[:2], *flat.shape[1:])


def _hide_ahead(query: Tensor, key: Tensor) -> Tensor:
    """Return 0 for each key that a query sees, and −∞ for those ahead of it, [T, T]."""
    queries, keys = query.shape[-2], key.shape[-2]
    # The last query sees every key: in generation there are fewer queries than keys, which were kept from before.
    return torch.full((queries, keys), -math.inf, dtype=query.dtype, device=query.device).triu(keys - queries + 1)


def repeat_heads(key: Tensor, value: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Repeat keys and values, [B, H / groups, T, D], for each of the `groups` query heads that share them."""
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


# Transformers builds no mask for an attention that has a name of its own and no mask function under that name.
AttentionInterface.register(MASKLESS, causal_attention)
