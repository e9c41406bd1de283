"""Masks by counter: the published numbers, as good as random ones, and the same whatever a sequence stands beside."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.errors import ModelError
from fedloom.model.unpadding import EvenRow, RealRow, in_a_row
from fedloom.training import dropout_masks, dropping
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.dropout_masks import Mask, sequence_keys, split
from fedloom.training.dropping import OF_KERNEL, kernel_of, why_no_kernel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def keys_of(clients: int, sequences: int, step: int = 0) -> Tensor:
    """Return the keys of so many clients' sequences in a step, [N]."""
    seeds = [1000 + client for client in range(clients)]
    return sequence_keys(seeds, [step] * clients, [0] * clients, sequences).flatten()


def drop(values: Tensor, keys_N: Tensor, p: float = 0.5, calls: int = 1, alone: bool = False) -> Tensor:
    """Return what the last of so many calls of dropout makes of values."""
    with ClientDropout(keys_N, alone=alone):
        for _ in range(calls):
            dropped = functional.dropout(values, p, training=True)
    return dropped


def test_the_numbers_are_those_that_are_published() -> None:
    # As Rosetta Code and the C of Vigna have them for this seed.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = split(torch.tensor(1234567), torch.arange(5)).tolist()
    assert [number % 2**64 for number in found] == published


def look_random(share: float) -> None:
    """Look whether masks of 8 calls, 6 sequences, 32 tokens and 512 features are as good as independent draws.

    Each sum of independent draws, over its deviation, is about normal: none of so many is far out, and their mean
    square is 1.
    """
    steps_N = torch.cat([keys_of(2, 2), keys_of(2, 1, step=1)])
    dropped = round(share * 65536)
    places_NT = split(steps_N[:, None], torch.arange(32))
    kept = torch.stack(
        [Mask(places_NT, call, 1, dropped).compute(torch.ones(6, 32, 512)) > 0 for call in range(8)]
    ).double()
    deviation = (dropped / 65536 * (1 - dropped / 65536)) ** 0.5
    found = (kept - (1 - dropped / 65536)) / deviation
    scores: list[Tensor] = []
    for axis in range(4):
        others = tuple(other for other in range(4) if other != axis)
        scores.append(found.sum(others) / (found.numel() / found.shape[axis]) ** 0.5)
        # Of two that stand near each other: sequences of a client, heads, pieces of a word, and words.
        for apart in {1, 2, 3, 4, 5, 8} - set(range(found.shape[axis], 9)):
            products = found.narrow(axis, apart, found.shape[axis] - apart) * found.narrow(
                axis, 0, found.shape[axis] - apart
            )
            scores.append(products.sum()[None] / products.numel() ** 0.5)
        # Of any two, whatever is between them.
        rows = found.movedim(axis, 0).flatten(1)
        pairs = rows @ rows.T / rows.shape[1] ** 0.5
        scores.append(pairs[*torch.triu_indices(len(pairs), len(pairs), 1)])
    # Of any two rows of any sequence and call.
    rows = found.flatten(0, 2)
    pairs = (rows @ rows.T / rows.shape[1] ** 0.5)[*torch.triu_indices(len(rows), len(rows), 1)]
    everything = torch.cat([*scores, pairs])
    # Of 1.3 million, one is beyond 5 by chance; beyond 7, where sums of few that are dropped are skewed.
    assert everything.abs().max() < (6 if share == 0.5 else 8)
    assert float(torch.cat(scores).abs().max()) < 5
    assert float(pairs.square().mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_masks_are_as_good_as_independent_draws(share: float) -> None:
    look_random(share)


def look_for_avalanche() -> None:
    """Look whether each bit of a key changes each bit of its numbers half the time, and so each bit of a number."""
    keys_N = split(torch.tensor(1), torch.arange(2**14))
    for changed in (lambda bit: split(keys_N ^ bit, torch.tensor(3)), lambda bit: split(keys_N, torch.tensor(3) ^ bit)):
        for place in range(63):
            bits_64N = (changed(1 << place) ^ split(keys_N, torch.tensor(3))) >> torch.arange(64)[:, None] & 1
            scores = (bits_64N.double().mean(1) - 0.5) * 2 * 2**7
            assert scores.abs().max() < 5, f"bit {place}"


def test_every_bit_of_a_key_and_of_a_number_counts() -> None:
    look_for_avalanche()


WEAK = [((30, 0xBF58476D1CE4E5B9),), ((30, 0xBF58476D1CE4E5B9), (27, 1)), ((30, 1), (27, 1), (31, 1))]


@pytest.mark.parametrize("mix", WEAK)
def test_a_weaker_mix_would_be_noticed(mix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_masks, "MIX", mix)
    with pytest.raises(AssertionError):
        look_for_avalanche()
    if mix == WEAK[-1]:
        with pytest.raises(AssertionError):
            look_random(0.5)


def test_every_value_of_a_piece_comes_as_often_as_any_other() -> None:
    words = split(torch.arange(2**10)[:, None], torch.arange(2**10)).view(torch.int16).long() + 32768
    for piece in range(4):
        for bits in (words[:, piece::4] >> 8, words[:, piece::4] & 255):
            seen = torch.bincount(bits.flatten(), minlength=256).double()
            chi = float(((seen - 4096) ** 2 / 4096).sum())
            assert abs(chi - 255) < 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("p", [0.075, 0.1, 0.3, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_keeps_its_expectation(p: float, dtype: torch.dtype) -> None:
    dropped = drop(torch.ones(4, 50, 4000, dtype=dtype), keys_of(2, 2), p).double()
    kept = float((dropped > 0).double().mean())
    assert kept == pytest.approx(1 - p, abs=max(5 * (p * (1 - p) / dropped.numel()) ** 0.5, 2**-16))
    scale = 65536 / (65536 - round(p * 65536))
    assert dropped.unique().tolist() == pytest.approx([0.0, scale], rel=0.004 if dtype == torch.bfloat16 else 1e-6)


def test_nothing_is_dropped_where_nothing_is_to_be_and_all_where_all_is() -> None:
    values, keys_N = torch.ones(4, 5, 10), keys_of(2, 2)
    with ClientDropout(keys_N):
        assert torch.equal(functional.dropout(values, 0.3, training=False), values)
    assert torch.equal(drop(values, keys_N, 0.0), values)
    assert torch.equal(drop(values, keys_N, 1.0), 0 * values)


def test_a_mask_is_its_sequences_alone() -> None:
    keys_N, values = keys_of(3, 2), torch.randn(6, 9, 30)
    whole = drop(values, keys_N)
    assert torch.equal(drop(values.view(3, 18, 30), keys_N), whole.view(3, 18, 30)), "a client's rows together"
    assert torch.equal(drop(values.flatten(0, 1), keys_N), whole.flatten(0, 1)), "all rows together"
    assert torch.equal(drop(values[[4, 1]], keys_N[[4, 1]]), whole[[4, 1]]), "beside others"
    assert torch.equal(drop(values[:, :5].contiguous(), keys_N), whole[:, :5]), "less padding"
    assert torch.equal(drop(values[:, :, :7], keys_N), whole[:, :, :7]), "fewer features"
    places_M = torch.tensor([0, 1, 4, 9, 10, 53])
    for row in (RealRow(places_M, (6, 9)), EvenRow(places_M.view(3, 2), (6, 9))):
        with in_a_row(row):
            real = drop(values.flatten(0, 1)[places_M], keys_N)
            assert torch.equal(drop(values, keys_N), whole), "a whole batch beside a row"
        assert torch.equal(real, whole.flatten(0, 1)[places_M]), "real tokens alone"
    assert len({drop(values[:1], key).ne(0).numpy().tobytes() for key in keys_N.view(6, 1)}) == 6


def test_attentions_mask_is_its_sequences_alone() -> None:
    keys_N, values = keys_of(3, 2), torch.ones(6, 4, 9, 9)
    whole = drop(values, keys_N)
    assert torch.equal(drop(values[2:4, :3, :5, :5], keys_N[2:4]), whole[2:4, :3, :5, :5])
    folded = drop(values.flatten(0, 1), keys_N)
    assert torch.equal(folded.view_as(whole), whole), "heads that are no dimension of their own"
    assert len({head.numpy().tobytes() for head in whole.flatten(0, 1)}) == 24
    with ClientDropout(keys_N):
        functional.dropout(values, 0.5)
        after = functional.dropout(torch.ones(6, 9, 9), 0.5)
    assert torch.equal(after, drop(torch.ones(6, 9, 9), keys_N, calls=5)), "each head counts as a call"


def test_each_call_step_sequence_and_client_has_masks_of_its_own() -> None:
    values = torch.ones(1, 4, 200)
    keys = [keys_of(2, 2, step).view(4, 1) for step in range(2)]
    found = [drop(values, key, calls=calls) for calls in (1, 2) for both in keys for key in both]
    assert len({mask.numpy().tobytes() for mask in found}) == 16


def test_sequences_of_micro_batches_go_on_counting() -> None:
    whole = sequence_keys([5], [3], [0], 6)
    assert torch.equal(torch.cat([sequence_keys([5], [3], [first], 2) for first in (0, 2, 4)], 1), whole)


@pytest.mark.parametrize("words", [3, 2**10, 2**20])
def test_in_however_large_pieces_a_mask_is_made(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, keys_N = torch.randn(6, 11, 30), keys_of(3, 2)
    whole = drop(values, keys_N)
    monkeypatch.setitem(dropout_masks.WORDS_AT_ONCE, "cpu", words)
    assert torch.equal(drop(values, keys_N), whole)


def test_the_gradient_is_under_the_same_mask_and_nothing_is_kept_for_it() -> None:
    values, kept = torch.rand(4, 7, 30, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dropped = drop(values, keys_of(2, 2), 0.3)
    assert not kept
    weights = torch.rand_like(values)
    (gradient,) = torch.autograd.grad((weights * dropped).sum(), values)
    assert torch.allclose(gradient, weights * dropped.detach() / values.detach())
    transposed = torch.rand(4, 30, 7, dtype=torch.float64).mT
    (gradient,) = torch.autograd.grad(drop(values, keys_of(2, 2), 0.3), values, transposed)
    assert torch.allclose(gradient, transposed * dropped.detach() / values.detach())


def test_what_is_no_sequences_is_dropped_for_one_client_and_refused_for_several() -> None:
    values = torch.ones(7, 5, 40)
    found = drop(values, keys_of(1, 2), alone=True)
    assert 0.3 < float((found > 0).float().mean()) < 0.7
    assert torch.equal(found, drop(values, keys_of(1, 2), alone=True))
    heads = drop(torch.ones(7, 3, 5, 40), keys_of(1, 2), alone=True)
    assert torch.equal(heads[:, 0], found)
    for odd in (values, torch.ones(3, 2, 5, 40)):
        with pytest.raises(ModelError, match=r"values of shape \[.*which are no sequences'"):
            drop(odd, keys_of(2, 1))


@contextmanager
def fresh_kernels() -> Iterator[None]:
    kernel_of.cache_clear()
    try:
        yield
    finally:
        kernel_of.cache_clear()
        dropping._reasons.clear()


def test_a_gpu_without_a_kernel_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    # The choice is the same wherever the numbers are.
    device = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fedloom.training.dropout_kernel", raising=False)
    with fresh_kernels():
        assert why_no_kernel(device) == ""
        assert kernel_of(device) is None
        assert "triton" in why_no_kernel(device)


@pytest.mark.parametrize("right", [True, False])
def test_a_kernel_is_tried_before_it_is_used(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(values: Tensor, mask: Mask) -> Tensor:
        found = mask.compute(values)
        return found if right or values.dtype != torch.float16 else found.roll(1)

    module = type(sys)("fedloom.training.dropout_kernel")
    module.drop = given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with fresh_kernels():
        assert (kernel_of(torch.device("cpu")) is given) == right
        assert why_no_kernel(torch.device("cpu")) == ("" if right else "it gives other masks")


def test_a_kernel_is_tried_again_where_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shortages = [torch.OutOfMemoryError("CUDA out of memory")]

    def given(values: Tensor, mask: Mask) -> Tensor:
        if shortages:
            raise shortages.pop()
        return mask.compute(values)

    module = type(sys)("fedloom.training.dropout_kernel")
    module.drop = given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with fresh_kernels():
        with pytest.raises(torch.OutOfMemoryError):
            kernel_of(torch.device("cpu"))
        assert kernel_of(torch.device("cpu")) is given
        assert why_no_kernel(torch.device("cpu")) == ""


INTERPRETED = """
import torch
from fedloom.training.dropout_kernel import drop
from fedloom.training.dropout_masks import Mask, split

for shape, heads in (((2, 3, 70), 1), ((2, 2, 3, 5), 2), ((4, 1500), 1)):
    places = split(torch.tensor(5), torch.arange(shape[0] * (shape[-2] if len(shape) > 2 else 1)))
    places = places.view(shape[0], -1) if len(shape) > 2 else places
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for call, dropped in ((0, 6554), (16, 32768), (1, 65535)):
            mask, values = Mask(places, call, heads, dropped), torch.randn(shape).to(dtype)
            found, expected = drop(values, mask), mask.compute(values)
            # What is interpreted cuts a bfloat16 off where a GPU rounds it.
            rounding = 2**-7 if dtype == torch.bfloat16 else 0
            assert torch.allclose(found, expected, rtol=rounding, atol=0), (shape, dtype)
            assert torch.equal(found == 0, expected == 0), (shape, dtype)
"""


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fedloom.training.dropout_kernel import _drop

NUMBERS = {name: "i32" for name in ("call", "dropped", "heads", "length", "features")}
for values in ("*fp32", "*bf16", "*fp16"):
    told = {"values": values, "out": values, "places": "*i64", **NUMBERS, "scale": "fp32", "block": "constexpr"}
    signature = {name: told[name] for name in _drop.arg_names}
    block = (_drop.arg_names.index("block"),)
    source = ASTSource(fn=_drop, signature=signature, constexprs={block: 1024})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.parametrize(("program", "told"), [(INTERPRETED, {"TRITON_INTERPRET": "1"}), (COMPILED, {})])
def test_the_kernel_gives_the_same_bits_interpreted_and_compiles_for_an_h100(
    program: str, told: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="comes with torch for CUDA; by hand: pip install triton==3.7.1")
    environment = {**os.environ, **told, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trace_takes_no_longer_for_more_tokens() -> None:
    def count(tokens: int) -> int:
        with FakeTensorMode(), Operations() as seen:
            mask = Mask(torch.zeros(2, tokens, dtype=torch.int64), call=0, heads=1, dropped=6554)
            assert mask.compute(torch.zeros(2, tokens, 4096)).shape == (2, tokens, 4096)
        return seen.count

    assert count(20_000) == count(200)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@needs_gpu
@pytest.mark.parametrize("dtype", OF_KERNEL)
def test_a_gpu_has_a_kernel_and_the_processors_masks(dtype: torch.dtype) -> None:
    keys_N, values = keys_of(3, 2), torch.randn(6, 100, 1030)
    assert kernel_of(torch.device("cuda", torch.cuda.current_device())), why_no_kernel(torch.device("cuda", 0))
    for given in (values.to(dtype), torch.ones(6, 3, 70, 70, dtype=dtype), values.double()):
        assert torch.equal(drop(given.cuda(), keys_N.cuda(), 0.1).cpu(), drop(given, keys_N, 0.1))
