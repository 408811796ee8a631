"""Normal numbers that every device draws alike, by position, from integers alone.

Words are Philox4x64-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"): a
bijection of a 256-bit counter under a 128-bit key, ten rounds of integer multiplications. Word i of a stream
is word i mod 4 of the block whose counter is i div 4, so any part can be drawn without the rest. numpy's
Philox makes these words, in C, and promises that they stay as they are (NEP 19); a test holds them against
the vectors that the authors published.

A normal number is the sum of the 64 bits of one word, less its mean 32, over its standard deviation 4. Why:

- It needs no logarithm, sine or table, whose last bits differ between math libraries; z = (bits - 32) / 4 is
  exact in F32 (and in F16), so a phone, a GPU and this code have the same bits.
- Zeroth-order methods need E[z] = 0 and E[z z^T] = I, which hold exactly, and a kurtosis near 3, which sets
  their variance: it is 3 - 2/64 = 2.97. |z| <= 8, so no draw is far out.
- z is a multiple of 1/4: with a step that is a power of two a perturbation can be undone to the bit
  (`snap`), and sums over many seeds are exact (`SeedTable.sent`).

The price is one word for each number; what it costs is drawing the words, not counting their bits.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from .._tensors.starts import even

Key = int  # 128 bits, the lower 64 are Philox's first key word
Array = Any  # of numpy

COUNTERS = 1 << 256
LARGEST = 8.0  # |z| of a normal number is at most so much


def key(seed: int, name: str) -> Key:
    """The stream of `seed` for what `name` says; others are unrelated to it (SHA-256)."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")


def words(key: Key, first: int, count: int) -> Array:
    """Words `first` to `first + count - 1` of a stream, (count,) uint64."""
    block, skipped = divmod(first, 4)
    # numpy counts before it draws
    generator = np.random.Philox(key=key, counter=(block - 1) % COUNTERS)
    return generator.random_raw(skipped + count)[skipped:]


def normals(key: Key, first: int, count: int) -> Array:
    """Normal numbers at `first` to `first + count - 1` of a stream, (count,) F32, writable."""
    z = ones(words(key, first, count)).astype(np.float32)
    z -= np.float32(32)
    z *= np.float32(0.25)
    return z


def uniforms(key: Key, first: int, count: int) -> Array:
    """Numbers even over (-1, 1), (count,) F32, one of each word."""
    found: Array = even(words(key, first, count))
    return found


def _ones_by_halves(words: Array) -> Array:
    """How many bits of each word are set, without numpy 2: Warren, "Hacker's Delight", section 5-1."""
    x = words - ((words >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    x = (x & pairs) + ((x >> np.uint64(2)) & pairs)
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


ones = getattr(np, "bitwise_count", _ones_by_halves)
