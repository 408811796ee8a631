"""How partial sums travel between tensor ranks: as they are, in half precision, or in 8-bit blocks.

    f32   4 bytes a value, exact
    f16   2 bytes a value
    q8    34 bytes per 32 values: ggml's Q8_0, an f16 scale and 32 int8

ggml converts; it is faster than numpy and its blocks are what its own matrices use for activations.
Every rank sums decoded frames, its own part's too, so what rounding loses is lost on all alike.
"""

from __future__ import annotations

import time

import numpy as np

from . import _ggml

BLOCK = 32
TIMED = 20
HALF_MAX = 65504.0  # the largest finite f16
ALIGN = BLOCK  # where a frame may be cut for any codec


class Codec:
    """Values to bytes and back. Results stand until the next call; `encode` may give the values' own
    memory."""

    name = "f32"

    def __init__(self, lib: _ggml.Ggml) -> None:
        lib.cpu_init()  # fills the tables that conversions of single values look into
        self._lib = lib
        self._frame = np.empty(0, np.uint8)
        self._values = np.empty(0, np.float32)

    def size(self, count: int) -> int:
        """Bytes of `count` values."""
        return 4 * count

    def encode(self, values: np.ndarray) -> memoryview:
        """`values`: (count) float32, contiguous."""
        return memoryview(values.view(np.uint8))

    def decode(self, frame: memoryview, count: int) -> np.ndarray:
        """(count) float32."""
        return np.frombuffer(frame, np.float32, count)

    def time_s(self, count: int) -> float:
        """The least time of encoding `count` values once and decoding them twice, as two ranks do."""
        values = np.random.default_rng(0).standard_normal(count, np.float32)
        times = []
        for _ in range(TIMED):
            begun = time.perf_counter()
            frame = self.encode(values)
            for _ in range(2):
                self.decode(frame, count)
            times.append(time.perf_counter() - begun)
        return min(times)

    def _room(self, frame_bytes: int, count: int) -> None:
        if len(self._frame) < frame_bytes:
            self._frame = np.empty(frame_bytes, np.uint8)
        if len(self._values) < count:
            self._values = np.zeros(count, np.float32)


class Half(Codec):
    """IEEE half precision, rounded to nearest. What lies beyond its range becomes the largest it has: a
    few values of a hidden state can be that large, and one infinity makes every logit NaN."""

    name = "f16"

    def size(self, count: int) -> int:
        return 2 * count

    def encode(self, values: np.ndarray) -> memoryview:
        self._room(self.size(len(values)), len(values))
        values = np.clip(values, -HALF_MAX, HALF_MAX, out=self._values[: len(values)])
        self._lib.cpu_fp32_to_fp16(values.ctypes.data, self._frame.ctypes.data, len(values))
        return memoryview(self._frame)[: self.size(len(values))]

    def decode(self, frame: memoryview, count: int) -> np.ndarray:
        self._room(0, count)
        source = np.frombuffer(frame, np.uint8)
        self._lib.cpu_fp16_to_fp32(source.ctypes.data, self._values.ctypes.data, count)
        return self._values[:count]


class Blocks(Codec):
    """ggml's Q8_0. A last block that is not full is filled with zeros, which travel."""

    name = "q8"

    def __init__(self, lib: _ggml.Ggml) -> None:
        super().__init__(lib)
        self._to_float = lib.get_type_traits(_ggml.Q8_0).contents.to_float
        self._from_float = lib.get_type_traits_cpu(_ggml.Q8_0).contents.from_float

    def size(self, count: int) -> int:
        return -(-count // BLOCK) * (BLOCK + 2)

    def encode(self, values: np.ndarray) -> memoryview:
        count = -(-len(values) // BLOCK) * BLOCK
        self._room(self.size(count), count)
        if count != len(values):
            values = np.concatenate([values, np.zeros(count - len(values), np.float32)])
        self._from_float(values.ctypes.data, self._frame.ctypes.data, count)
        return memoryview(self._frame)[: self.size(count)]

    def decode(self, frame: memoryview, count: int) -> np.ndarray:
        whole = -(-count // BLOCK) * BLOCK
        self._room(0, whole)
        source = np.frombuffer(frame, np.uint8)
        self._to_float(source.ctypes.data, self._values.ctypes.data, whole)
        return self._values[:count]


CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Codec, Half, Blocks)}
