"""Masks of dropout by counter: whether a value stays follows from where it stands; no generator draws it.

The numbers are SplitMix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): number i of
a seed is a mix of seed + (i + 1) γ, so any of them can be had by itself, and each can be the seed of others. Philox
4x32-10 is what others count by; in operations of torch it takes five times as long (docs/log.md).

A mask is the same on every device, in whatever batch and at whatever padding, and it is computed again where it is
needed again: in the backward pass, and where a layer is.

Letters: K clients, B sequences of a client, N sequences of all, T tokens, R rows, D features, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

GAMMA = 0x9E3779B97F4A7C15
"""γ, the odd number next to 2⁶⁴ over the golden ratio."""
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shifts and factors of the mix: x becomes (x ^ x >> shift) · factor, one after the other; Stafford's thirteenth."""
PIECES = 4
"""Decisions that a word of 64 bits is good for: 16 bits each, so a probability is rounded to 1/65,536."""
WORDS_AT_ONCE = {"cpu": 2**16, "cuda": 2**23}
"""Words that are made together, by the kind of device: a processor's stay in the cache of its cores."""


def sequence_keys(seeds: Sequence[int], steps: Sequence[int], firsts: Sequence[int], sequences: int) -> Tensor:
    """Return the keys of clients' sequences in a step, [K, B], each client with as many.

    `firsts` has the number of each client's first one among all that it has in the step: where these are several
    micro-batches, the masks are those of a single batch.
    """
    seeds_K, steps_K, firsts_K = (torch.tensor(values, dtype=torch.int64) for values in (seeds, steps, firsts))
    return split(split(seeds_K, steps_K)[:, None], firsts_K[:, None] + torch.arange(sequences))


def split(keys: Tensor, numbers: Tensor) -> Tensor:
    """Return a key for each number of each key, all int64 and broadcast: the number's value in the key's stream."""
    words = torch.add(keys, numbers + 1, alpha=_signed(GAMMA))
    return _mix(words, torch.empty_like(words))


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask of dropout, of values [N, H, T, D] with H = `heads`, or [R, D] with one; it holds keys, no decisions.

    `places` has the key of each token in its sequence, [N, T] or [R]. A head counts as a call of its own.
    """

    places: Tensor
    call: int
    heads: int
    dropped: int
    """Number of 65,536 values that are dropped on average."""

    @property
    def scale(self) -> float:
        """Return the factor of values that stay, which keeps the mean."""
        return 65536 / (65536 - self.dropped)

    @cached_property
    def _keys(self) -> Tensor:
        """Each row's key, [R], which stays for the gradient: 8 bytes where a mask has as many as features, or more."""
        calls = torch.arange(self.call, self.call + self.heads, device=self.places.device)
        return split(self.places.view(-1, 1, self.places.shape[-1]), calls[:, None]).flatten()

    def compute(self, values: Tensor) -> Tensor:
        """Return the values, of which some are 0 and the others scaled, by operations that every device has."""
        out = torch.empty_like(values, memory_format=torch.contiguous_format)
        features = values.shape[-1]
        values_RD, out_RD = values.reshape(-1, features), out.view(-1, features)
        keys_R = self._keys
        words_W = torch.arange(1, -(-features // PIECES) + 1, device=values.device) * _signed(GAMMA)
        at_once = max(1, WORDS_AT_ONCE.get(values.device.type, WORDS_AT_ONCE["cpu"]) // len(words_W))
        rooms = [keys_R.new_empty(min(at_once, len(keys_R)), len(words_W)) for _ in range(2)]
        # In a trace of memory the first piece tells what each of them takes, of which there are thousands.
        end = min(at_once, len(keys_R)) if isinstance(values, FakeTensor) else len(keys_R)
        for first in range(0, end, at_once):
            part = slice(first, first + at_once)
            words, room = (given[: len(keys_R) - first] for given in rooms)
            torch.add(keys_R[part, None], words_W, out=words)
            pieces_RD = _mix(words, room).view(torch.int16)[:, :features]
            # Signed, so the least that stays is lower by half of them all. As numbers, since bools are compared and
            # multiplied one by one, ten times slower.
            stays_RD = pieces_RD.ge_(self.dropped - 32768)
            torch.mul(values_RD[part], stays_RD, out=out_RD[part]).mul_(self.scale)
        return out


def _mix(words: Tensor, room: Tensor) -> Tensor:
    """Mix words in place, with room for as many; a product keeps its lower 64 bits."""
    for shift, factor in MIX:
        torch.bitwise_right_shift(words, shift, out=room)
        # The words are signed to torch, which fills up with the sign.
        words.bitwise_xor_(room.bitwise_and_((1 << 64 - shift) - 1))
        if factor != 1:
            words.mul_(_signed(factor))
    return words


def _signed(word: int) -> int:
    """Return the signed number that has the bits of an unsigned one of 64 bits."""
    return word - 2**64 if word >= 2**63 else word
