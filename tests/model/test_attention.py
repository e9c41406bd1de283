"""Attention without a mask against transformers' own, for every kind of model that gets it."""

import math
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.model import attention
from fedloom.model.attention import (
    MASKLESS,
    call_model,
    causal_attention,
    choose_attention,
    plain_attention,
    see_window,
    settle_attention,
    without_padding,
)

MODEL_TYPES = (
    *("gpt2", "gpt_neox", "llama", "opt", "qwen2", "qwen3", "mistral", "phi3", "olmo", "olmo2", "granite", "smollm3"),
    *("gemma", "starcoder2"),
)
"""Model types whose attention is plainly causal unless their settings say otherwise."""

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma": {"head_dim": 8},
    "starcoder2": {"sliding_window": None},
}


def build(model_type: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(model_type, **TINY | OTHER_NAMES.get(model_type, {}))
    name = attention or choose_attention(config)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name).eval()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_transformers_own(model_type: str, dtype: torch.dtype) -> None:
    ours, theirs = build(model_type, dtype=dtype), build(model_type, "sdpa", dtype)
    assert ours.config._attn_implementation == MASKLESS
    tokens_BT = torch.randint(0, 99, (3, 20), generator=torch.Generator().manual_seed(1))
    difference = ours(input_ids=tokens_BT).logits - theirs(input_ids=tokens_BT).logits
    assert difference.abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_sees_what_stands_to_its_right(model_type: str, dtype: torch.dtype) -> None:
    model = build(model_type, dtype=dtype)
    tokens_BT = torch.randint(0, 99, (2, 20), generator=torch.Generator().manual_seed(1))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 12:] = 7
    before, after = model(input_ids=tokens_BT).logits, model(input_ids=changed_BT).logits
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_that_share_a_block_do_not_see_each_other(model_type: str, dtype: torch.dtype) -> None:
    model = build(model_type, dtype=dtype)
    tokens_1T = torch.randint(0, 99, (1, 20), generator=torch.Generator().manual_seed(1))
    texts_1T = torch.tensor([[1] * 7 + [2] * 9 + [3] * 2 + [0] * 2])
    together = call_model(model, tokens_1T, texts_1T).logits[0, :18]
    apart = torch.cat([call_model(model, part, None).logits[0] for part in tokens_1T[:, :18].split([7, 9, 2], 1)])
    assert (together - apart).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)
    assert (call_model(model, tokens_1T, None).logits[0, 7:18] - apart[7:]).abs().max() > 0.1


def test_gradients_of_the_plain_kind_are_the_fused_ones() -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours = plain_attention(query, key, value, drop=lambda probabilities: probabilities)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(ours, theirs)
    for our, their in zip(
        torch.autograd.grad(ours.square().sum(), (query, key, value)),
        torch.autograd.grad(theirs.square().sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(our, their)


class Counted(TorchDispatchMode):
    """Counts operations that make a tensor of so many values."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values, self.found = values, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.values and not func.is_view:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_causal_scores_are_scaled_and_hidden_by_their_product(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3))
    with Counted(2 * 3 * 7 * 7) as counted:
        plain_attention(query, key, value, drop=lambda probabilities: probabilities).square().sum().backward()
    # Scores and their softmax, and the same two on the way back.
    assert len(counted.found) == 4, counted.found


def test_the_last_queries_see_all_keys_up_to_themselves() -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    whole = plain_attention(query, key, value, drop=lambda probabilities: probabilities)
    last = plain_attention(query[:, :, 5:], key, value, drop=lambda probabilities: probabilities)
    torch.testing.assert_close(last, whole[:, :, 5:])


def test_a_processor_with_tiles_evaluates_by_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [torch.randn(2, count, 9, 8).to(torch.bfloat16) for count in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    kernels = {}
    for tiles in (False, True):
        monkeypatch.setattr(attention, "has_tiles", lambda tiles=tiles: tiles)
        with torch.profiler.profile() as profile, torch.inference_mode():
            kernels[tiles] = causal_attention(module, *heads, None)[0]
        fused = any("flash" in event.key for event in profile.key_averages())
        assert fused is tiles
    # Once more as in training, where a layer may be computed a second time.
    with torch.profiler.profile() as profile, torch.no_grad():
        trained = causal_attention(module, *heads, None)[0]
    assert not any("flash" in event.key for event in profile.key_averages())
    assert torch.equal(trained, kernels[False])
    torch.testing.assert_close(kernels[True], kernels[False], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["causal", "seen", "added", "window"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (33, 33), (64, 64), (1, 40), (3, 40)])
def test_texts_that_are_filled_up_are_attended_to_as_they_are(
    queries: int, keys: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a processor multiplies lengths that are a multiple; nothing that is filled in changes anything."""
    sizes: set[int] = set()

    def note_sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: Any) -> torch.Tensor:
        sizes.update((query.shape[2], key.shape[2]))
        return plain_attention(query, key, value, **others)

    monkeypatch.setattr(attention, "plain_attention", note_sizes)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    masks = {"seen": seen, "added": torch.zeros(queries, keys).masked_fill(~seen, -math.inf).bfloat16()}
    module, window = torch.nn.Identity(), {"sliding_window": 4} if kind == "window" else {}
    heads = [torch.randn(2, 3, tokens, 8).bfloat16().requires_grad_() for tokens in (queries, keys, keys)]
    wide = [part.detach().double().requires_grad_() for part in heads]
    ours = causal_attention(module, *heads, masks.get(kind), **window)[0]
    mask = seen.triu(keys - queries - 3) if kind == "window" else seen
    theirs = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask).transpose(1, 2)
    assert all(size == 1 or size % attention.EVEN == 0 for size in sizes)
    torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05)
    for our, their in zip(
        torch.autograd.grad(ours.double().square().sum(), heads),
        torch.autograd.grad(theirs.square().sum(), wide),
        strict=True,
    ):
        torch.testing.assert_close(our.double(), their, rtol=0.1, atol=0.1)


def test_who_sees_nothing_gets_zeros_and_no_gradient() -> None:
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, 4] = False
    ours = plain_attention(query, key, value, drop=lambda probabilities: probabilities, mask=mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, theirs)
    assert not ours[1, :, 4].any()
    for our, their in zip(
        torch.autograd.grad(ours.square().sum(), (query, key, value)),
        torch.autograd.grad(theirs.square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(our, their)


def test_where_a_mask_is_needed_attention_is_transformers_own() -> None:
    assert choose_attention(transformers.OPTConfig(), masked=True) == "sdpa"
    assert choose_attention(transformers.BloomConfig(), masked=True) == "eager"


def test_a_model_that_is_another_one_without_masks_gets_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    settle_attention(model)
    assert model.config._attn_implementation == MASKLESS

    def both_ways(*told: Any, **named: Any) -> Any:
        query, key, value = told[1:4]
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        return causal_attention(told[0], query, key, value, seen, **named)

    def fail(*_: Any, **__: Any) -> Any:
        raise TypeError

    for broken in (both_ways, fail):
        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, MASKLESS, broken)
        model.set_attn_implementation(MASKLESS)
        settle_attention(model)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("padding", [0, 1])
def test_a_model_that_counts_positions_from_its_padding_gets_its_masks(padding: int) -> None:
    names = {"is_decoder": True, "pad_token_id": padding, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.AutoConfig.for_model("roberta", **TINY | names)
    assert choose_attention(config) == MASKLESS
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=MASKLESS).eval()
    settle_attention(model)
    assert model.config._attn_implementation == "sdpa"


WINDOWED: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}
"""Model types some of whose layers see a window; those of Gemma 2 cap their scores, too."""


def build_windowed(model_type: str, window: int = 5, attention: str | None = None) -> Any:
    torch.manual_seed(3)
    names = TINY | WINDOWED[model_type] | {"sliding_window": window}
    config = transformers.AutoConfig.for_model(model_type, **names)
    name = attention or choose_attention(config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=name).eval()
    for value in model.parameters():
        value.data.mul_(4.0 if value.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_window_is_the_models_own(model_type: str) -> None:
    ours, theirs = build_windowed(model_type), build_windowed(model_type, attention="eager")
    settle_attention(ours)
    assert (ours.config._attn_implementation, ours.config.sliding_window) == (MASKLESS, 5)
    tokens_BT = torch.randint(0, 99, (3, 20), generator=torch.Generator().manual_seed(1))
    found, wanted = call_model(ours, tokens_BT, None).logits, theirs(input_ids=tokens_BT).logits
    # Transformers' plainest attention rounds to float32.
    assert (found - wanted).abs().max() < 1e-5 * wanted.std()
    ours.set_attn_implementation(MASKLESS)
    wide = build_windowed(model_type, window=64)
    assert (call_model(wide, tokens_BT, None).logits - wanted)[:, 5:].abs().max() > 1e-2 * wanted.std()
    # Two texts in a block, and two in a row, are what they are alone.
    texts_1T = torch.tensor([[1] * 9 + [2] * 11])
    apart = torch.cat([call_model(ours, part, None).logits[0] for part in tokens_BT[:1].split([9, 11], 1)])
    together = call_model(ours, tokens_BT[:1], texts_1T).logits[0]
    assert (together - apart).abs().max() < 1e-12 * wanted.std()
    grid_BT = torch.nn.functional.pad(tokens_BT[0, 9:][None], (0, 3)).repeat(2, 1)
    grid_BT[0, :9], grid_BT[0, 9:] = tokens_BT[0, :9], 0
    real_M = torch.cat([torch.arange(9), torch.arange(11) + grid_BT.shape[1]])
    with without_padding(real_M, grid_BT.shape):
        in_a_row = call_model(ours, grid_BT, None).logits[0]
    assert (in_a_row - apart).abs().max() < 1e-12 * wanted.std()


def test_the_last_tokens_see_a_window_of_those_kept_from_before() -> None:
    whole_QK = see_window(6, 6, 3, torch.device("cpu"))
    assert whole_QK.sum(1).tolist() == [1, 2, 3, 3, 3, 3]
    assert torch.equal(see_window(2, 6, 3, torch.device("cpu")), whole_QK[4:])


def test_a_window_that_is_not_what_the_call_says_has_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlimited(*told: Any, sliding_window: int | None = None, **named: Any) -> Any:
        return causal_attention(*told, **named)

    model = build_windowed("mistral", window=64)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, MASKLESS, unlimited)
    settle_attention(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    # Neither its masks nor its calls are of this setting: what is, nobody knows.
    llama = build("llama")
    llama.config.sliding_window = 8
    settle_attention(llama)
    assert llama.config._attn_implementation == "sdpa"
    assert llama.config.sliding_window == 8


def test_unknown_models_keep_their_masks() -> None:
    assert choose_attention(transformers.MistralConfig()) == MASKLESS
    assert choose_attention(transformers.Llama4TextConfig()) == "sdpa"
    assert choose_attention(transformers.FalconConfig()) == "sdpa"
    assert choose_attention(transformers.LlamaConfig()) == MASKLESS
