"""Losses out of a model, a few rows of logits at a time, so that the logits of a batch never exist at once.

A vocabulary of 50,000 makes logits of 200 kB a token in float32, kept for the backward pass and copied in it. Here
the gradient of a row is made together with its loss, as in Liger Kernel (arXiv 2410.10989, section 3.2), and only
rows that count are computed.

Letters: B sequences, T tokens, M rows that count (of the B·T), D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_BYTES = 64 * 2**20
"""Logits that exist at a time."""


CHANGES_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")
"""Settings of models whose logits are more than their head's product."""


class LossHead:
    """The losses of a causal language model's counted tokens.

    The model is taken apart into a body and a frozen head where its logits are exactly `head(body(tokens))`. That is
    tried, not assumed: some models scale or cap their logits, and an adapter may sit on the head. Then all logits
    are made at once. On the meta device there are no values to try, and the configuration is asked. `logits` stands
    for a model that is more than `model`: it gives the logits of tokens, and nothing is taken apart.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Tensor], Tensor] | None = None) -> None:
        self._model = model
        self._logits = logits or self._own_logits
        self._head = None if logits else self._find_head()

    @property
    def vocabulary_size(self) -> int:
        """Logits of a token."""
        return int(self._model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]

    def losses(self, tokens_BT: Tensor, rows_M: Tensor, targets_M: Tensor) -> Tensor:
        """Negative log-likelihood of each counted row's target, [M], in float32 at least; differentiable.

        The head's own weights get no gradient: where they are trained, the logits are not for this.
        """
        if self._head is None:
            return functional.cross_entropy(self._whole_logits(tokens_BT, rows_M), targets_M, reduction="none")
        losses_M: Tensor = _RowLosses.apply(
            self._states(tokens_BT)[rows_M], targets_M, self._head.weight, self._head.bias
        )  # type: ignore[no-untyped-call]
        return losses_M

    def score(self, tokens_BT: Tensor, rows_M: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        """The counted rows' losses summed, and how many targets were the likeliest token; no gradients."""
        if self._head is None:
            chunks = iter([(self._whole_logits(tokens_BT, rows_M), targets_M)])
        else:
            states_MD = self._states(tokens_BT)[rows_M]
            chunks = _logit_chunks(states_MD, targets_M, self._head.weight, self._head.bias)
        losses, correct = zip(
            *(
                (functional.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum())
                for logits, targets in chunks
            ),
            strict=True,
        )
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _states(self, tokens_BT: Tensor) -> Tensor:
        states: Tensor = self._model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state  # type: ignore[operator]
        return states.flatten(0, 1)

    def _whole_logits(self, tokens_BT: Tensor, rows_M: Tensor) -> Tensor:
        return _at_least_float32(self._logits(tokens_BT).flatten(0, 1)[rows_M])

    def _own_logits(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens_BT, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _find_head(self) -> nn.Linear | None:
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not nn.Linear or self._model.base_model is self._model:
            return None
        if head.weight.is_meta:
            text = self._model.config.get_text_config()  # type: ignore[union-attr, operator]
            return None if any(getattr(text, name, None) not in (None, 0, 1) for name in CHANGES_LOGITS) else head
        tokens_BT = torch.arange(8, device=head.weight.device)[None] % head.out_features
        logits_BTV = self._own_logits(tokens_BT)
        return head if torch.equal(logits_BTV.flatten(0, 1), head(self._states(tokens_BT))) else None


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_MD: Tensor, targets_M: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        losses, gradients = [], []
        for logits, targets in _logit_chunks(states_MD, targets_M, weight_VD, bias_V):
            log_p = functional.log_softmax(logits, dim=-1)
            losses.append(-log_p.gather(1, targets[:, None])[:, 0])
            # d loss / d logits = softmax − one-hot
            slope = log_p.exp_()
            slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -1.0))
            gradients.append(slope.to(weight_VD.dtype) @ weight_VD)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_MD,) = ctx.saved_tensors
        return gradient_MD * grad_M[:, None].to(gradient_MD.dtype), None, None, None


def rows_at_a_time(vocabulary_size: int) -> int:
    """Rows whose logits exist together."""
    return max(1, CHUNK_BYTES // (4 * vocabulary_size))


def _logit_chunks(
    states_MD: Tensor, targets_M: Tensor, weight_VD: Tensor, bias_V: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    rows = rows_at_a_time(len(weight_VD))
    for states, targets in zip(states_MD.split(rows), targets_M.split(rows), strict=True):
        yield _at_least_float32(functional.linear(states, weight_VD, bias_V)), targets


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
