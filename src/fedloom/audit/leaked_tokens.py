"""Tokens out of the update: which words a client trained on, read from the first layer's A.

In a Llama the input of the first layer's projections is x = RMSNorm(E[token]), which depends on the token alone. The
gradient of A is Σ_t (Bᵀ g_t) x_tᵀ, so where the optimizer is linear the rows of A's change lie in the span of the x of
the tokens trained on (DAGER, arXiv 2405.15586, whose span check this is). A token whose x lies in that span is read for
certain. Whether a layer's input depends on the token alone is tried, not looked up: a model that adds positions to its
embedding has no such layer, and this attack does not know it.

Letters: V vocabulary, T tokens, I features in, R rank, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.lora import A_SUFFIX, split_name
from fedloom.audit.attack import Attack, Sent, interval, not_tried
from fedloom.audit.statistics import NO, TOO_FEW, YES, Interval, measure_auc
from fedloom.data.tokens import TokenBlocks
from fedloom.model.attention import call_model

TOKENS = "tokens"
CERTAIN = 0.01
"""Share of a token's x outside the span, below which it was trained on."""
LEAST_SINGULAR = 1e-5
"""Share of the largest singular value, below which a direction of the change is rounding."""
BETTER_THAN_RANDOM = 0.1
"""AUC above that of a random span, from which words are told."""
WIDTH = 64
"""Tokens of a sequence in which the vocabulary is shown to the model."""
WHY_NOT = (
    "it reads LoRA's A on a layer whose input depends on the token alone (Llama, Mistral, Qwen and their like, with"
    " the first layer's projections among adapter.targets); this model has none that is trained"
)


@dataclass(frozen=True)
class FirstLayer:
    """Trained A's over the embedding alone, and their input for every token."""

    names: tuple[str, ...]
    """Names of the A's in the layout."""
    inputs_VI: Tensor


def find_first_layer(adapted: AdaptedModel) -> FirstLayer | None:
    """Return the A's whose input depends on the token alone; None where there are none, or none of them is trained."""
    layers = {name: split_name(name)[0] for name in adapted.layout.names if name.endswith(A_SUFFIX)}
    if not layers:
        return None
    tried_2T = torch.arange(8)[None].repeat(2, 1).to(adapted.device)
    tried_2T[1] = tried_2T[0].flip(0)
    with _watched(adapted, layers) as seen:
        call_model(adapted.base, tried_2T, None)
    known: list[str] = []
    first: Tensor | None = None
    for name in layers:
        x_2TI = seen.get(name)
        # The same token at another place and among others: the same input?
        if x_2TI is None or not torch.allclose(x_2TI[0], x_2TI[1].flip(0), atol=1e-5 * float(x_2TI.abs().max())):
            continue
        if first is None or (first.shape == x_2TI.shape and torch.equal(first, x_2TI)):
            first = x_2TI if first is None else first
            known.append(name)
    if not known:
        return None
    vocabulary = adapted.loss_head.vocabulary_size
    inputs = []
    for tokens_T in torch.arange(vocabulary).split(WIDTH * WIDTH):
        padded_T = torch.cat([tokens_T, tokens_T.new_zeros(-len(tokens_T) % WIDTH)]).to(adapted.device)
        with _watched(adapted, {known[0]: layers[known[0]]}, stop=True) as seen:
            call_model(adapted.base, padded_T.view(-1, WIDTH), None)
        inputs.append(seen[known[0]].flatten(0, 1)[: len(tokens_T)].double().cpu())
    return FirstLayer(tuple(known), torch.cat(inputs))


class _SeenError(Exception):
    """End of a forward pass whose rest nobody needs."""


@contextmanager
def _watched(adapted: AdaptedModel, layers: dict[str, str], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Keep the input of these layers, [B, T, I], by name; with `stop`, the pass ends at the first."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], Tensor) and arguments[0].dim() == 3:
                seen[name] = arguments[0].detach()
            if stop:
                raise _SeenError

        return hook

    hooks = [adapted.base.get_submodule(path).register_forward_pre_hook(keep(name)) for name, path in layers.items()]
    adapted.model.eval()
    try:
        with torch.no_grad():
            yield seen
    except _SeenError:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def read_tokens(adapted: AdaptedModel, sent: Sequence[Sent], trained_on: TokenBlocks) -> Attack:
    """Return how many of the tokens that a client trained on can be read from its updates, and how many falsely.

    For certain by any of them; set against a random span by the last, where B is not 0 from the first step on.
    """
    layer = find_first_layer(adapted)
    if layer is None:
        return not_tried(TOKENS, WHY_NOT)
    spans = [span_of(layer, start, change_P) for start, change_P in sent]
    spans = [span for span in spans if len(span)]
    features = layer.inputs_VI.shape[1]
    if not spans:
        return not_tried(TOKENS, "no A of the first layer was sent")
    if 2 * len(spans[-1]) > features:
        return not_tried(TOKENS, f"A's rank is too large for {features} features: every token is near its span")
    outside_V = [outside_span(layer.inputs_VI, span) for span in spans]
    certain_V = torch.stack(outside_V).amin(0) < CERTAIN
    own_V = torch.zeros(len(layer.inputs_VI), dtype=torch.bool)
    own_V[trained_on.tokens_NT[trained_on.is_real].unique()] = True
    drawn = torch.randn(len(spans[-1]), features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    random_V = outside_span(layer.inputs_VI, torch.linalg.qr(drawn.mT).Q.mT)
    found, chance = (_apart(own_V, values_V) for values_V in (outside_V[-1], random_V))
    # Both errors, as if the two were independent: more than there is.
    error = ((found.high - found.low) ** 2 + (chance.high - chance.low) ** 2) ** 0.5 / 2
    better = Interval(
        found.value - chance.value, found.value - chance.value - error, found.value - chance.value + error
    )
    read, false = int((certain_V & own_V).sum()), int((certain_V & ~own_V).sum())
    word = (
        YES if read > false or better.low > BETTER_THAN_RANDOM else NO if better.high < BETTER_THAN_RANDOM else TOO_FEW
    )
    figures = {"distinct": int(own_V.sum()), "read": read, "false": false, "directions": len(spans[-1])}
    return Attack(TOKENS, word, {**figures, **interval("auc", found), "auc_random": chance.value})


def span_of(layer: FirstLayer, start: Adapter, change_P: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows of A's change, [R', I], in float64: without rounding's own directions."""
    changes, weights = start.layout.split(change_P.double()), start.layout.split(start.weights_P)
    stacked_RI = torch.cat([changes[name] for name in layer.names]).cpu()
    largest = max(float(weights[name].abs().max()) for name in layer.names)
    rounding = torch.finfo(start.weights_P.dtype).eps * largest * sum(size**0.5 for size in stacked_RI.shape)
    _, s_R, rows_RI = torch.linalg.svd(stacked_RI, full_matrices=False)
    basis_RI: Tensor = rows_RI[s_R > max(LEAST_SINGULAR * float(s_R[0]), rounding)]
    return basis_RI


def outside_span(inputs_VI: Tensor, basis_RI: Tensor) -> Tensor:
    """Return the share of each token's x that lies outside a span, [V], from 0 to 1."""
    squares_V = inputs_VI.square().sum(1)
    inside_V = (inputs_VI @ basis_RI.mT).square().sum(1)
    return (1 - inside_V / squares_V.clamp(min=1e-30)).clamp(min=0).sqrt()


def _apart(own_V: Tensor, outside_V: Tensor) -> Interval:
    return measure_auc((-outside_V[own_V]).numpy(), (-outside_V[~own_V]).numpy())
