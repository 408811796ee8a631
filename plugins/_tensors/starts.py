"""What a LoRA adapter begins with: the same bits on every device, with torch and without.

A is even over (-b, b), b = 1 / sqrt(in), as PEFT's own start (Kaiming's with a = sqrt(5)), and B is 0. A's
numbers are made of Philox4x64-10's words (`even`), which numpy promises to stay as they are (NEP 19); one
multiplication in F32 rounds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

START = "philox-1"  # whoever draws otherwise begins elsewhere


def start_of(seed: int, name: str, r: int, columns: int) -> np.ndarray:
    """A (r, columns) F32 of the layer `name`; the first ranks are those of any larger r."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return (even(generator.random_raw(r * columns)) * np.float32(columns**-0.5)).reshape(r, columns)


def adapter_start(
    linears: Mapping[str, tuple[int, int]], r: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (r, in) and B (out, r), which is zero, of layers that give and take so many values."""
    return {
        name: (start_of(seed, name, r, columns), np.zeros((rows, r), np.float32))
        for name, (rows, columns) in linears.items()
    }


def even(words: np.ndarray) -> np.ndarray:
    """Of 64-bit words, numbers even over (-1, 1), F32: odd multiples of 2^-24, of each word's upper bits."""
    odd = (words >> np.uint64(40)).astype(np.int32)  # 0 .. 2^24 - 1
    odd += odd + np.int32(1 - (1 << 24))  # 2 x + 1 - 2^24: exact in F32
    return odd.astype(np.float32) * np.float32(2.0**-24)
