"""Losses of a model, a few rows of logits at a time: the logits of a whole batch never exist at once.

With a vocabulary of 50,000 a token's logits take 200 kB in float32; autograd would keep them for the backward pass and
copy them there. Here the gradient of a row is made together with its loss, as in Liger Kernel (arXiv 2410.10989,
section 3.2), and only rows that count are computed.

Letters: B sequences, T tokens, M rows that count (of the B·T), D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from fedloom.model.attention import call_model, multiple_for
from fedloom.model.devices import without_sorting
from fedloom.model.frozen_products import multiply_frozen

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Memory that logits may take at a time, in float32, by the kind of device: a GPU works best on large products, and
larger pieces than these glibc maps anew for each chunk (docs/log.md)."""
CACHE_BYTES = 2**20
"""Memory of the logits of a few rows in float32 that stay in the cache of a processor's core from one pass over them to
the next."""

CHANGES_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")
"""Settings by which a model scales or caps the product of its head; 0, 1 or none of them changes nothing."""


class LossHead:
    """Losses of a causal language model on the tokens that count.

    If the model's logits are exactly `head(body(tokens))`, it is taken apart into its body and its frozen head, and
    logits are made in chunks. This is tried, not assumed: some models scale or cap their logits, and an adapter may sit
    on the head. For those, all logits are made at once.

    `logits` is for a model that is wrapped in more than `model` shows (a trained prompt): it returns the logits of
    tokens, [B, T, V], under a mask or None, and nothing is taken apart.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Tensor, Tensor | None], Tensor] | None = None) -> None:
        self._model = model
        self._logits = logits or self._own_logits
        self._head = None if logits else self._find_head()

    @property
    def is_apart(self) -> bool:
        """Return whether logits are made of counted rows alone."""
        return self._head is not None

    @property
    def vocabulary_size(self) -> int:
        """Return how many logits a token has."""
        return int(self._model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]

    def losses(
        self, tokens_BT: Tensor, rows_M: Tensor | None, targets_M: Tensor, mask_BT: Tensor | None = None
    ) -> Tensor:
        """Return the negative log-likelihood of each counted row's target, [M], in float32 or wider; differentiable.

        `rows_M` are different ones; without it, every row counts.

        Only the model's body gets gradients, never the weights of the head: a trained head needs the whole logits.
        """
        if self._head is None:
            logits_MV = self._whole_logits(tokens_BT, rows_M, mask_BT)
            return _row_losses(logits_MV, targets_M)
        losses_M: Tensor = _RowLosses.apply(
            self._states(tokens_BT, mask_BT), rows_M, targets_M, self._head.weight, self._head.bias
        )  # type: ignore[no-untyped-call]
        return losses_M

    def score_rows(self, tokens_BT: Tensor, rows_M: Tensor, targets_M: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the loss of each counted row, [M]: `losses` without what gradients need."""
        chunks = self._chunks(tokens_BT, rows_M, targets_M, mask_BT)
        return torch.cat([_row_losses(logits, targets) for logits, targets in chunks])

    def read_rows(
        self, tokens_BT: Tensor, rows_M: Tensor, targets_M: Tensor, mask_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each counted row, [M], and whether its target was the likeliest token, bool [M].

        Both are on the model's device, so that nothing waits for a GPU. Gradients are not supported.
        """
        losses, likeliest = [], []
        for logits, targets in self._chunks(tokens_BT, rows_M, targets_M, mask_BT):
            losses.append(_row_losses(logits, targets))
            likeliest.append(_are_likeliest(logits, targets))
        return torch.cat(losses), torch.cat(likeliest)

    def _chunks(
        self, tokens_BT: Tensor, rows_M: Tensor, targets_M: Tensor, mask_BT: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Make the logits of counted rows, a few rows at a time, each with its targets; nobody else has them."""
        if self._head is None:
            chunks = iter([(self._whole_logits(tokens_BT, rows_M, mask_BT), targets_M)])
        else:
            states_MD = self._states(tokens_BT, mask_BT)[rows_M]
            chunks = _logit_chunks(states_MD, targets_M, self._head.weight, self._head.bias)
        for chunk, chunk_targets in chunks:
            for logits, targets in _few_at_a_time(chunk, chunk_targets):
                # Few enough for a cache, they are widened once for all that is read of them.
                yield logits if logits.is_cuda else logits.to(_widened(logits.dtype)), targets

    def _states(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        states: Tensor = call_model(self._model.base_model, tokens_BT, mask_BT).last_hidden_state
        return states.flatten(0, 1)

    def _whole_logits(self, tokens_BT: Tensor, rows_M: Tensor | None, mask_BT: Tensor | None) -> Tensor:
        return _chosen(self._logits(tokens_BT, mask_BT).flatten(0, 1), rows_M)

    def _own_logits(self, tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        logits: Tensor = call_model(self._model, tokens_BT, mask_BT).logits
        return logits

    @torch.no_grad()
    def _find_head(self) -> nn.Linear | None:
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        # A subclass of nn.Linear (quantized, packed) has weights that are no [V, D]; an adapted head is no nn.Linear;
        # and a model that is its own base has no body to take from it.
        if type(head) is not nn.Linear or self._model.base_model is self._model:
            return None
        # A weight that lies elsewhere is at hand inside its layer's own call alone.
        if head.weight.is_meta and not next(self._model.parameters()).is_meta:
            return None
        # On the meta device there are no values to try it with, so the configuration is asked.
        if head.weight.is_meta:
            text = self._model.config.get_text_config()  # type: ignore[union-attr, operator]
            return None if any(getattr(text, name, None) not in (None, 0, 1) for name in CHANGES_LOGITS) else head
        # A few tokens are enough: scaling and capping change the logits of every token.
        tokens_BT = torch.arange(8, device=head.weight.device)[None] % head.out_features
        try:
            logits_BTV = self._own_logits(tokens_BT)
            return head if torch.equal(logits_BTV.flatten(0, 1), head(self._states(tokens_BT))) else None
        # States of another width (Electra), no states at all: whatever stops it, this model is not taken apart.
        except Exception:
            return None


class _RowLosses(torch.autograd.Function):
    """Row losses whose gradient with respect to the states, [M, D], is computed in the forward pass.

    It has D numbers a row where the logits have V, so it is all that is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        rows_M: Tensor | None,
        targets_M: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        losses, gradients = [], []
        for chunk, chunk_targets in _logit_chunks(_chosen(states_ND, rows_M), targets_M, weight_VD, bias_V):
            for logits, targets in _few_at_a_time(chunk, chunk_targets):
                log_p, targets_M1 = _log_softmax(logits), targets[:, None]
                own_M1 = log_p.gather(1, targets_M1)
                losses.append(-own_M1[:, 0])
                # d loss / d logits = softmax − one-hot. In place, because one more tensor of this
                # size would cost as much memory as the chunk's logits.
                _write_exp(log_p, logits)
                with without_sorting():
                    logits.scatter_(1, targets_M1, (own_M1.exp() - 1).to(logits.dtype))
            chunk[len(chunk_targets) :].zero_()
            gradients.append(multiply_frozen(chunk, weight_VD.mT)[: len(chunk_targets)])
        ctx.num_rows = len(states_ND)
        ctx.save_for_backward(torch.cat(gradients), rows_M)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient_MD, rows_M = ctx.saved_tensors
        gradient_MD = gradient_MD * grad_M[:, None].to(gradient_MD.dtype)
        if rows_M is not None:
            # Written to their places, as no two rows are the same: autograd would sort their numbers and add.
            rows_ND = gradient_MD.new_zeros(ctx.num_rows, gradient_MD.shape[1])
            with without_sorting():
                gradient_MD = rows_ND.index_copy_(0, rows_M, gradient_MD)
        return gradient_MD, None, None, None, None


def _chosen(values_N: Tensor, rows_M: Tensor | None) -> Tensor:
    # To take every row by its number would copy them.
    return values_N if rows_M is None else values_N[rows_M]


def rows_at_a_time(vocabulary_size: int, device: torch.device) -> int:
    """Return how many rows have their logits in memory together, in the model's own dtype."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary_size))


def _logit_chunks(
    states_MD: Tensor, targets_M: Tensor, weight_VD: Tensor, bias_V: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Make logits in chunks, each with its targets, behind whose rows there may be others that mean nothing."""
    multiple = multiple_for(states_MD.device, states_MD.dtype)
    rows = max(1, rows_at_a_time(len(weight_VD), weight_VD.device) // multiple) * multiple
    for states, targets in zip(states_MD.split(rows), targets_M.split(rows), strict=True):
        if lacking := -len(states) % multiple:
            states = functional.pad(states, (0, 0, 0, lacking))
        yield multiply_frozen(states, weight_VD, bias_V), targets


def _few_at_a_time(logits_MV: Tensor, targets_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the logits of a chunk's targets, which stay where they are, into as few rows as the processor's caches hold.

    A row's numbers come out the same in whatever company. A GPU has its chunk whole.
    """
    rows = len(targets_M)
    if logits_MV.device.type == "cpu":
        rows = max(1, CACHE_BYTES // (4 * logits_MV.shape[1])) * torch.get_num_threads()
    return zip(logits_MV[: len(targets_M)].split(rows), targets_M.split(rows), strict=True)


def _row_losses(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    return functional.nll_loss(_log_softmax(logits_MV), targets_M, reduction="none")


def _log_softmax(logits_MV: Tensor) -> Tensor:
    """Return the logarithms of probabilities, in float32 or wider. A GPU widens each logit as it reads it."""
    return functional.log_softmax(logits_MV, dim=-1, dtype=_widened(logits_MV.dtype))


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _write_exp(values_MV: Tensor, rounded_MV: Tensor) -> None:
    """Write e to the power of each value, rounded to the dtype of what it is written to; the values are written over.

    A GPU rounds what it writes. A processor would make a tensor of its own for that.
    """
    if rounded_MV.is_cuda:
        torch.exp(values_MV, out=rounded_MV)
    else:
        rounded_MV.copy_(values_MV.exp_())


def _are_likeliest(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """Return whether each row's target has its highest logit, the first one where several have; logits are written to.

    That is what `argmax` says, which takes a processor ten times as long (docs/log.md).
    """
    # A trace of memory has no values to look at.
    if logits_MV.device.type != "cpu" or isinstance(logits_MV, FakeTensor):
        return logits_MV.argmax(-1) == targets_M
    targets_M1 = targets_M[:, None]
    own_M1 = logits_MV.gather(1, targets_M1)
    others_M1 = logits_MV.scatter_(1, targets_M1, -torch.inf).amax(-1, keepdim=True)
    likeliest_M = (own_M1 > others_M1)[:, 0]
    tied = (own_M1 == others_M1)[:, 0].nonzero()[:, 0]
    if len(tied):
        likeliest_M[tied] = logits_MV[tied].scatter_(1, targets_M1[tied], own_M1[tied]).argmax(-1) == targets_M[tied]
    return likeliest_M
