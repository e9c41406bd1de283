"""Randomness of a model's own in training, and its dropout: tried before clients share a pass.

Letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.errors import ModelError
from fedloom.training.assumptions import TOKENS, draw_tokens, in_training, noise_of, pass_in_training
from fedloom.training.client_dropout import ClientDropout

NOISY = ("router_jitter_noise", "input_jitter_noise")
"""Settings by which a model draws random numbers in training, as far as its configuration says so."""


def check_own_randomness(adapted: AdaptedModel, max_length: int) -> None:
    """Refuse a model that draws random numbers in training beside dropout: clients that share a pass share them too.

    Raises:
        ModelError: names the operation that draws.
    """
    if found := _find_own_randomness(adapted, max_length):
        raise ModelError(
            f"the model draws random numbers of its own in training ({found}), which are not each client's",
            where="training.engine",
            mend='use "reference", or switch its noise off in its config.json (of a router, say)',
        )


def check_own_dropout(adapted: AdaptedModel, max_length: int) -> None:
    """Refuse a model whose masks of dropout depend on the texts beside one: clients that share a pass would.

    Takes three forward passes of at most 16 tokens.

    Raises:
        ModelError
    """
    half = min(TOKENS, max_length) // 2
    if not half:
        return
    drawn_2T, keys_2 = draw_tokens(adapted, 2 * half), torch.arange(2, device=adapted.device)

    def compute(tokens_BT: Tensor, keys_B: Tensor) -> Tensor:
        with _StrongDropout(keys_B):
            return adapted.logits(tokens_BT)[0, :half].double()

    with torch.no_grad(), in_training(adapted):
        beside_TV = compute(drawn_2T, keys_2)
        alone_TV, others_TV = (compute(drawn_2T[:1, :half], key_1) for key_1 in keys_2.split(1))
    scale = (others_TV - alone_TV).abs().mean()
    # A wider text rounds otherwise. Other masks of attention alone are a fifth of the scale.
    if scale and (beside_TV - alone_TV).abs().mean() > 3 * noise_of(adapted) * scale:
        raise ModelError(
            "the model's dropout takes another mask for a text that stands beside a longer one",
            where="training.engine",
            mend='use "reference", or set its dropouts to 0 in its config.json',
        )


def draws_by_its_settings(adapted: AdaptedModel) -> str:
    """Return the setting by which a model draws random numbers in training; empty if it has none."""
    text = adapted.base.config.get_text_config()
    return next((setting for setting in NOISY if getattr(text, setting, 0)), "")


def _find_own_randomness(adapted: AdaptedModel, max_length: int) -> str:
    """Return the operation by which a model draws random numbers in training beside dropout; empty if it draws none."""
    draws = _Draws()  # type: ignore[no-untyped-call]
    with draws, _WithoutDropout():
        pass_in_training(adapted, min(TOKENS, max_length))
    return draws.found


class _WithoutDropout(TorchFunctionMode):
    """Leaves dropout out, which the engines draw for each client."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return args[0]
        if func is functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


class _Draws(TorchDispatchMode):
    """Notices operations that draw random numbers."""

    found = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Fused attention has the tag for the dropout that it can have.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            self.found = self.found or str(func)
        return func(*args, **(kwargs or {}))


class _StrongDropout(ClientDropout):
    """Dropout that is seen, wherever there is any."""

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return super()._dropout(x, 0.5 * (p > 0), training)
