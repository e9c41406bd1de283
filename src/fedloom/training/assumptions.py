"""Assumptions of training about a model, tried on the loaded one before anything is trained.

Padding is not masked, clients share a pass, and every random choice comes from the recipe's seed. That is right for a
causal language model whose positions are counted from the left, and silently wrong for an encoder, for attention that
looks both ways, or for a model that draws random numbers of its own.

Letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
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
"""The same in 16 bits, and of a base in 4: for few rows, some of bitsandbytes' products are of 16 whatever is asked."""
COARSEST_NOISE = 0.5
"""The same of a base in 8 bits beside 16: what these round otherwise moves inputs, which have 8 as well, by whole
levels. A fifth of a true change was seen (docs/log.md)."""
LEAST_SPREAD = 0.5
"""Spread of a text's losses, in nats, that is taken for the least: random models have hardly any."""
WHERE = "model.source"
OUT_OF_PLACE = {
    "layerdrop": "leaves out whole layers at random in training",
    "rescale_every": "divides its own weights between training and evaluation, and not the adapter's",
}
"""Settings that a model must not have, with what it does then."""


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
    drawn_2T = draw_tokens(adapted, length)
    half = length // 2
    changed_T = torch.cat([drawn_2T[0, :half], (drawn_2T[0, half:] + 1) % adapted.loss_head.vocabulary_size])
    with torch.inference_mode():
        whole_TV, changed_TV = (adapted.logits(tokens_T[None])[0].double() for tokens_T in (drawn_2T[0], changed_T))
        scale = max((changed_TV - whole_TV)[half:].abs().mean(), 1e-3 * whole_TV.abs().mean())

        def moves(logits: Tensor, noise: float = noise_of(adapted)) -> bool:
            return bool((logits - whole_TV[: len(logits)]).abs().mean() > scale * noise)

        # Of the same shape: nothing is rounded otherwise.
        if moves(changed_TV[:half], min(noise_of(adapted), COARSE_NOISE)):
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
    tokens_T = draw_tokens(adapted, length)[0]
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
    tokens_2T = draw_tokens(adapted, min(TOKENS, max_length))
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
        with in_training(adapted):
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
        pass_in_training(adapted, min(TOKENS, max_length)).float().square().mean().backward()
    except RuntimeError as error:
        if "deterministic" in str(error):
            allow_differing_results()
            say("repeated", f"runs will differ by rounding: {reason_of(error)}")
    finally:
        adapted.gradient_P.zero_()


def draw_tokens(adapted: AdaptedModel, length: int) -> Tensor:
    shape, generator = (2, length), torch.Generator().manual_seed(0)
    return torch.randint(adapted.loss_head.vocabulary_size, shape, generator=generator).to(adapted.device)


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
        logits = pass_in_training(adapted, length)
    finally:
        for hook in hooks:
            hook.remove()
    return reached if logits.requires_grad else set()


def pass_in_training(adapted: AdaptedModel, length: int) -> Tensor:
    """Return logits as in training."""
    with in_training(adapted):
        return adapted.logits(torch.zeros(1, length, dtype=torch.int64, device=adapted.device))


@contextmanager
def in_training(adapted: AdaptedModel) -> Iterator[None]:
    """Have a model in training mode inside; leave it, and everybody's random numbers, as they were."""
    devices = [adapted.device] if adapted.device.type == "cuda" else []
    adapted.model.train()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        adapted.model.eval()


def noise_of(adapted: AdaptedModel) -> float:
    """Return the largest share of a true change that rounding may make of none, where shapes differ."""
    base = adapted.base
    dtype = next(value for value in base.parameters() if value.is_floating_point()).dtype
    in_dtype = NOISE.get(dtype, COARSE_NOISE)
    if getattr(base, "is_loaded_in_4bit", False):
        return max(in_dtype, COARSE_NOISE)
    return COARSEST_NOISE if getattr(base, "is_loaded_in_8bit", False) and dtype not in NOISE else in_dtype


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
