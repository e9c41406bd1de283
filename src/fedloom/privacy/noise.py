"""Secret random numbers of a client's training: which units a step draws, and the noise that covers them.

The numbers come from AES-256 in counter mode under a key that is derived (HKDF-SHA256: RFC 5869) from a secret which
never leaves its owner, and from everything that the answer depends on. So the same task gives the same bytes when it is
done again, and another task never meets the same noise: the difference of two answers would be the documents' own.
Torch's generators would not do: LoRA's A has no gradient in the first step, so its noise is seen as it is, and their
state could be solved for.

Letters: P adapter parameters.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from fedloom.errors import RecipeError

SECRET_BYTES = 32
LABEL = b"fedloom privacy v1"
MANTISSA = 53
"""Bits of a uniform number."""


def check_cipher() -> None:
    """Refuse a private run where the package that has the cipher is missing.

    Raises:
        RecipeError
    """
    if find_spec("cryptography") is None:
        raise RecipeError(
            "cryptography is not installed, which makes the noise",
            where="[privacy]",
            mend="pip install 'fedloom[privacy]'",
        )


def derive_key(secret: bytes, *facts: str) -> bytes:
    """Return a key of 32 bytes for one task, from a secret and all that the answer depends on, in order."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    # Each with its length, so that no two lists of facts are the same bytes.
    told = b"".join(len(fact.encode()).to_bytes(8, "big") + fact.encode() for fact in facts)
    return HKDF(algorithm=SHA256(), length=32, salt=LABEL, info=told).derive(secret)


def draw_units(key: bytes, step: int, rate: float, units: int) -> Tensor:
    """Return the numbers of the units that a step draws, rising: each by itself with probability `rate`."""
    return (_uniform(key, f"units {step}", units) < rate).nonzero()[:, 0]


def draw_places(key: bytes, step: int, sizes_U: Tensor) -> Tensor:
    """Return a place below each size, [U], each as likely as the others: of a unit's rows, the one that it gives."""
    return (_uniform(key, f"rows {step}", len(sizes_U)) * sizes_U).long()


def draw_noise(key: bytes, step: int, size: int) -> Tensor:
    """Return independent standard normal numbers for a step, [P], in float64 (Box and Muller 1958)."""
    pairs = (size + 1) // 2
    first, second = _uniform(key, f"noise {step}", 2 * pairs).view(2, pairs)
    # From (0, 1], whose logarithm is finite.
    radius = (-2 * (first + 2.0**-MANTISSA).log()).sqrt()
    angle = 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:size]


def _uniform(key: bytes, purpose: str, size: int) -> Tensor:
    """Return uniform numbers from [0, 1), in float64, of one purpose of a key."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES256
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    stream = Cipher(AES256(derive_key(key, purpose)), CTR(bytes(16))).encryptor()
    words = torch.frombuffer(bytearray(stream.update(bytes(8 * size))), dtype=torch.int64) if size else torch.zeros(0)
    kept = (words.long() >> (64 - MANTISSA)) & (2**MANTISSA - 1)
    uniform: Tensor = kept.double() * 2.0**-MANTISSA
    return uniform
