"""What a LoRA adapter begins with: the same bits on every device, with torch and without.

A is even over (-b, b), b = 1 / sqrt(in), as PEFT's own start (Kaiming's with a = sqrt(5)), and B is 0. A's
numbers are odd multiples of 2^-24 of b, made of the upper bits of Philox4x64-10's words, which numpy promises
to stay as they are (NEP 19); one multiplication in F32 rounds them.
"""

from __future__ import annotations

import hashlib

import numpy as np

START = "philox-1"  # whoever draws otherwise begins elsewhere


def start_of(seed: int, name: str, r: int, columns: int) -> np.ndarray:
    """A (r, columns) F32 of the layer `name`; the first ranks are those of any larger r."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    odd = (generator.random_raw(r * columns) >> np.uint64(40)).astype(np.int32)  # 0 .. 2^24 - 1
    odd += odd + np.int32(1 - (1 << 24))
    bound = np.float32(columns**-0.5 * 2.0**-24)
    return (odd.astype(np.float32) * bound).reshape(r, columns)
