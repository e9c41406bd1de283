"""Assumptions of training about a model, tried on the loaded one before anything is trained.

Padding is not masked, clients share a pass, and every random choice comes from the recipe's seed. That is right for a
causal language model whose positions are counted from the left, and silently wrong for an encoder, for attention that
looks both ways, or for a model that draws random numbers of its own.

Letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.peft_config import reason_of
from fedloom.errors import ModelError
from fedloom.model.attention import call_model, without_padding
from fedloom.model.devices import allow_differing_results
from fedloom.model.spreading import at_hand
from fedloom.progress import Say

TOKENS = 16
"""Tokens of the sequence that is tried, where the recipe's are not fewer."""
NOISE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest share of a true change that rounding may make of none, by dtype."""
COARSE_NOISE = 0.05
"""The same in 16 bits."""
LEAST_SPREAD = 0.5
"""Spread of a text's losses, in nats, that is taken for the least: random models have hardly any."""
WHERE = "model.source"
OUT_OF_PLACE = {
    "layerdrop": "leaves out whole layers at random in training",
    "rescale_every": "divides its own weights between training and evaluation, and not the adapter's",
}
"""Settings that a model must not have, with what it does then."""
NOISY = ("router_jitter_noise", "input_jitter_noise")
"""Settings by which a model draws random numbers in training, as far as its configuration says so."""


def check_model(adapted: AdaptedModel, max_length: int) -> None:
    """Refuse a model whose weights are not finite, or that is no causal language model with padding on the right.

    An adapter that the model passes by is refused too. Takes six forward passes of at most 16 tokens, and one of
    `max_length`. Nothing of the model changes.

    Raises:
        ModelError: names what does not hold and what it means.
    """
    for name, value in adapted.model.named_parameters():
        if value.is_floating_point() and not bool(torch.isfinite(at_hand(adapted.model, name, value)).all()):
            own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            raise ModelError(
                f"{own} has a weight that is not finite, before anything was trained",
                where=WHERE,
                mend="get its files again, or use another base model",
            )
    for setting, what in OUT_OF_PLACE.items():
        if getattr(adapted.base.config.get_text_config(), setting, 0):
            raise ModelError(
                f"the model {what} ({setting})", where=WHERE, mend=f'set "{setting}" to 0 in its config.json'
            )
    length = min(TOKENS, max_length)
    if length < 2:
        return
    _check_reached(adapted, length)
    adapted.model.eval()
    drawn_2T = _draw_tokens(adapted, length)
    half = length // 2
    changed_T = torch.cat([drawn_2T[0, :half], (drawn_2T[0, half:] + 1) % adapted.loss_head.vocabulary_size])
    with torch.inference_mode():
        whole_TV, changed_TV = (adapted.logits(tokens_T[None])[0].double() for tokens_T in (drawn_2T[0], changed_T))
        scale = max((changed_TV - whole_TV)[half:].abs().mean(), 1e-3 * whole_TV.abs().mean())

        def moves(logits: Tensor) -> bool:
            return bool((logits - whole_TV[: len(logits)]).abs().mean() > scale * noise_of(adapted))

        if moves(changed_TV[:half]):
            _refuse("earlier tokens see later ones", "an encoder, or attention that looks both ways")
        if moves(adapted.logits(drawn_2T[:1, :half])[0].double()):
            _refuse("a text's logits change with what is padded to its right", "positions that depend on the width")
        if moves(adapted.logits(drawn_2T)[0].double()):
            _refuse("a text's logits change with the texts beside it in a batch", "normalisation over the batch")
        if max_length > length:
            rows_T, targets_T = torch.arange(length - 1, device=adapted.device), drawn_2T[0, 1:]
            # The losses of a few rows, as whole logits would take a lot of memory.
            narrow_T, wide_T = (
                adapted.loss_head.losses(functional.pad(drawn_2T[:1], (0, padding)), rows_T, targets_T)
                for padding in (0, max_length - length)
            )
            if (wide_T - narrow_T).abs().mean() > max(float(narrow_T.std()), LEAST_SPREAD) * noise_of(adapted):
                _refuse(
                    f"a text's loss changes when it is padded to {max_length} tokens",
                    "positions that depend on the width, as dynamic and long RoPE's do beyond a model's first length",
                )


def check_packing(adapted: AdaptedModel, max_length: int) -> None:
    """Refuse a model to which a text is another one when it shares a block with a text before it.

    Takes four forward passes of at most 16 tokens.

    Raises:
        ModelError
    """

    def share_a_block(texts: Sequence[Tensor]) -> Tensor:
        numbers = [torch.full_like(text_T, number) for number, text_T in enumerate(texts, 1)]
        return adapted.logits(torch.cat([*texts])[None], torch.cat(numbers)[None])[0]

    if not _keeps_apart(adapted, max_length, share_a_block):
        raise ModelError(
            "to this model a text is another one behind a text that shares its block",
            where="data.window",
            mend='use "truncate", or another base model',
        )


def try_unpadding(adapted: AdaptedModel, max_length: int, say: Say) -> None:
    """Have padding computed, and say so, where a model's real tokens alone, in one row, are other texts to it.

    Takes four forward passes of at most 16 tokens.
    """

    def stand_in_a_row(texts: Sequence[Tensor]) -> Tensor:
        width = max(map(len, texts)) + 1
        grid_NT = torch.stack([functional.pad(text_T, (0, width - len(text_T))) for text_T in texts])
        real_R = torch.cat([torch.arange(len(text_T)) + row * width for row, text_T in enumerate(texts)])
        with without_padding(real_R.to(grid_NT.device), grid_NT.shape):
            logits_TV: Tensor = call_model(adapted.base, grid_NT, None).logits[0]
        return logits_TV

    if adapted.unpads and not _keeps_apart(adapted, max_length, stand_in_a_row):
        adapted.unpads = False
        say("padding", "computed with every text: this model's texts are others without it")


def _keeps_apart(adapted: AdaptedModel, max_length: int, compute: Callable[[Sequence[Tensor]], Tensor]) -> bool:
    """Return whether the logits of two texts, [T, V], that a computation gives of both are those of each alone."""
    length = min(TOKENS, max_length)
    if length < 2:
        return True
    tokens_T = _draw_tokens(adapted, length)[0]
    texts = tokens_T.split(-(-length // 2))
    adapted.model.eval()
    with torch.inference_mode():
        together_TV = compute(texts).double()
        joined_TV = adapted.logits(tokens_T[None])[0].double()
        apart_TV = torch.cat([adapted.logits(text_T[None])[0].double() for text_T in texts])
    scale = max((joined_TV - apart_TV)[len(texts[0]) :].abs().mean(), 1e-3 * apart_TV.abs().mean())
    return bool((together_TV - apart_TV).abs().mean() <= scale * noise_of(adapted))


def check_repeatable(adapted: AdaptedModel, max_length: int) -> None:
    """Refuse a model that a pass in training mode changes, or whose pass with the same seed is not the same again.

    Takes two forward and backward passes of at most 16 tokens. Nothing of the model changes, but for what it is refused
    for.

    Raises:
        ModelError: names what does not hold.
    """
    tokens_2T = _draw_tokens(adapted, min(TOKENS, max_length))
    kept = {name: value.clone() for name, value in adapted.model.named_buffers() if value.is_floating_point()}

    def run_once() -> Tensor:
        torch.manual_seed(0)
        adapted.gradient_P.zero_()
        loss = adapted.logits(tokens_2T).double().square().mean()
        if not loss.requires_grad:
            raise ModelError(
                "the adapter has no effect in training: nothing of it would be trained",
                where="adapter",
                mend="leave out what switches it off, as a dropout of 1 does",
            )
        loss.backward()
        gradient_P = adapted.gradient_P
        return torch.stack([loss.detach(), gradient_P.norm().double(), gradient_P.sum().double()])

    try:
        with _in_training(adapted):
            first_3, second_3 = run_once(), run_once()
    finally:
        adapted.gradient_P.zero_()
    if (first_3 - second_3).abs().max() > noise_of(adapted) * first_3.abs().max():
        _refuse_to_train("two passes with the same seed differ", "randomness that no seed governs, or a memory")
    for name, value in adapted.model.named_buffers():
        if name in kept and not torch.equal(value, kept[name]):
            _refuse_to_train(f"a pass changes {name}", "statistics over batches, which are no part of an adapter")


def let_results_differ_if_need_be(adapted: AdaptedModel, max_length: int, say: Say) -> None:
    """Have a model train on a GPU that has operations whose results differ from time to time, and say so."""
    try:
        _pass_in_training(adapted, min(TOKENS, max_length)).float().square().mean().backward()
    except RuntimeError as error:
        if "deterministic" in str(error):
            allow_differing_results()
            say("repeated", f"runs will differ by rounding: {reason_of(error)}")
    finally:
        adapted.gradient_P.zero_()


def check_own_randomness(adapted: AdaptedModel, max_length: int) -> None:
    """Refuse a model that draws random numbers in training beside dropout: clients that share a pass share them too.

    Raises:
        ModelError: names the operation that draws.
    """
    if found := find_own_randomness(adapted, max_length):
        raise ModelError(
            f"the model draws random numbers of its own in training ({found}), which are not each client's",
            where="training.engine",
            mend='use "reference", or switch its noise off in its config.json (of a router, say)',
        )


def _draw_tokens(adapted: AdaptedModel, length: int) -> Tensor:
    shape, generator = (2, length), torch.Generator().manual_seed(0)
    return torch.randint(adapted.loss_head.vocabulary_size, shape, generator=generator).to(adapted.device)


def draws_by_its_settings(adapted: AdaptedModel) -> str:
    """Return the setting by which a model draws random numbers in training; empty if it has none."""
    text = adapted.base.config.get_text_config()
    return next((setting for setting in NOISY if getattr(text, setting, 0)), "")


def find_own_randomness(adapted: AdaptedModel, max_length: int) -> str:
    """Return the operation by which a model draws random numbers in training beside dropout; empty if it draws none."""
    draws = _Draws()  # type: ignore[no-untyped-call]
    with draws, _WithoutDropout():
        _pass_in_training(adapted, min(TOKENS, max_length))
    return draws.found


def _check_reached(adapted: AdaptedModel, length: int) -> None:
    """Refuse a model that can't compute so many tokens, and adapters that training does not reach.

    Raises:
        ModelError: names the error of the model's own code, or the layers.
    """
    try:
        reached = _find_reached(adapted, length)
    # The model's own code may stop at anything: a length that it can't compute, a dtype that it does not have.
    except Exception as error:
        raise ModelError(
            f"the model can't compute {length} tokens: {reason_of(error)}",
            where=WHERE,
            mend='try model.dtype = "float32", or another model',
        ) from error
    # An expert that no token is sent to has others of its name, so layers are told apart by their last name.
    if passed_by := sorted({name for name, _ in _adapted_layers(adapted)} - reached):
        raise ModelError(
            f"training does not reach the model's layers {passed_by[0]}: an adapter on them would learn nothing",
            where="adapter.targets",
            mend="leave them out",
        )


def _adapted_layers(adapted: AdaptedModel) -> Iterator[tuple[str, nn.Module]]:
    for path, layer in adapted.base.named_modules():
        if isinstance(layer, LoraLayer):
            yield path.rpartition(".")[2], layer


def _find_reached(adapted: AdaptedModel, length: int) -> set[str]:
    """Return the names of adapted layers that a pass in training calls, none if it leaves no way back for gradients.

    Some models only read a layer's weights, which are the frozen ones.
    """
    reached: set[str] = set()

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_hook(lambda *_: reached.add(name))

    hooks = [watch(name, layer) for name, layer in _adapted_layers(adapted)]
    try:
        logits = _pass_in_training(adapted, length)
    finally:
        for hook in hooks:
            hook.remove()
    return reached if logits.requires_grad else set()


def _pass_in_training(adapted: AdaptedModel, length: int) -> Tensor:
    """Return logits as in training."""
    with _in_training(adapted):
        return adapted.logits(torch.zeros(1, length, dtype=torch.int64, device=adapted.device))


@contextmanager
def _in_training(adapted: AdaptedModel) -> Iterator[None]:
    """Have a model in training mode inside; leave it, and everybody's random numbers, as they were."""
    devices = [adapted.device] if adapted.device.type == "cuda" else []
    adapted.model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        adapted.model.eval()


def noise_of(adapted: AdaptedModel) -> float:
    """Return the largest share of a true change that rounding in the model's dtype may make of none."""
    return NOISE.get(next(adapted.base.parameters()).dtype, COARSE_NOISE)


def _refuse(what: str, means: str) -> None:
    raise ModelError(
        f"this is no causal language model with padding on the right: {what} ({means})",
        where=WHERE,
        mend="use a model that was made to continue text",
    )


def _refuse_to_train(what: str, means: str) -> None:
    raise ModelError(
        f"a round of this model would not be its clients' alone: in training {what} ({means})",
        where=WHERE,
        mend="use a model without such layers",
    )


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
