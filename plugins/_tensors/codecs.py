"""How hidden states and gradients travel between ranks that train.

    f32        4 bytes a value, exact
    f16        2 bytes a value, rounded to nearest, of the tensor over a power of two that its header says
    int8       1 byte a value and an F32 scale a row; the error is at most half the scale
    topk       the n / ratio largest values of the tensor: an int32 index and an F32 value each
    topk-f16   the same with F16 values, undivided; what lies beyond their range becomes the largest they have
    adatopk    topk with a ratio of the link's own (`_codec_sizes.ada_ratios`); f32 where that is smaller

Both ends of a link know codec, ratio and shape beforehand. A header says them again, and a frame of
another size is refused before anything is allocated, so that a peer costs no more memory than was agreed.

What top-k leaves out is kept as a residual and added to the next tensor of the same key and shape (error
feedback: Stich et al. 2018, "Sparsified SGD with memory", algorithm 1); so it is meant for gradients.
AdaTopK: FusionLLM, arXiv 2410.12707.
All numbers travel in little-endian order.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from edged import ConfigError, ProtocolError

from .._codec_sizes import CODECS, kept, payload_bytes

HALF_MAX = 65504.0  # the largest finite F16
LEVELS = 127
VALUES_MOST = 2**31 - 1  # what an int32 index reaches
RESIDUALS_MOST = 256  # each as large as a tensor in F32
HALF_TOP = 15  # the largest magnitude of a tensor is sent from 2^14 to below 2^15, within F16's normal range
HALF_LEAST, HALF_MOST = -164, 113  # exponents that a tensor of F32 can need

Frames = list[memoryview]


class Codec(Protocol):
    """Float tensors (..., d) to frames and back; `ratio` is 1 for what drops nothing.

    `encode` computes in F32 and detaches. Its frames may be the tensor's own memory: send them before it
    changes. `key` names the stream of tensors that error feedback runs along, such as a link, a direction
    and a sample slot; without one nothing is kept.
    `decode` gives F32 on the CPU in memory of its own, or raises ProtocolError.
    """

    name: str
    ratio: float

    def encode(self, x: Tensor, key: str = "") -> tuple[dict[str, Any], Frames]: ...

    def decode(self, header: Mapping[str, Any], frames: Sequence[Any], shape: Sequence[int]) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]:
        """The residuals, for a checkpoint; one codec's names are its own."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def make(name: str, ratio: float = 1.0, residuals: int = RESIDUALS_MOST) -> Codec:
    """The codec of one end of a link, with at most so many residuals. ConfigError for an unknown name or a
    ratio below 1."""
    if name not in CODECS:
        raise ConfigError(f"no codec {name!r}; there are {', '.join(CODECS)}")
    kept(1, ratio)  # checks the ratio
    if name in ("topk", "topk-f16", "adatopk"):
        return TopK(name, ratio, residuals)
    return {"f32": Whole, "f16": Half, "int8": Rows}[name]()


class Whole:
    """Everything as it is, and what the other codecs share."""

    name = "f32"
    ratio = 1.0

    def encode(self, x: Tensor, key: str = "") -> tuple[dict[str, Any], Frames]:
        values = _float32(x)
        return self._header(values.shape), self._pack(values, key)

    def decode(self, header: Mapping[str, Any], frames: Sequence[Any], shape: Sequence[int]) -> Tensor:
        _check_shape(shape)
        if header != self._header(shape):
            raise ProtocolError(
                f"expected a tensor of codec {self.name} and shape {tuple(shape)}, got another"
            )
        views = [memoryview(frame) for frame in frames]
        sizes = self._sizes(shape)
        if [view.nbytes for view in views] != sizes:
            raise ProtocolError(f"codec {self.name}, shape {tuple(shape)}: expected frames of {sizes} bytes")
        return torch.from_numpy(self._unpack(views, shape)).reshape(tuple(shape))

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ConfigError(f"codec {self.name} keeps nothing, got {len(state)} residuals of another")

    def _header(self, shape: Sequence[int]) -> dict[str, Any]:
        return {"codec": self.name, "shape": list(shape)}

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        """Bytes of each frame."""
        return [payload_bytes(self.name, shape)]

    def _pack(self, values: np.ndarray, key: str) -> Frames:
        return [_bytes(values, "<f4")]

    def _unpack(self, frames: Sequence[memoryview], shape: Sequence[int]) -> np.ndarray:
        return np.frombuffer(frames[0], "<f4").astype(np.float32)


class Half(Whole):
    """Loss scaling, by tensor: gradients are as small as 1e-8, where F16 alone has a bit or none
    (Micikevicius et al. 2018, "Mixed precision training", section 3.2). The header's "e" is the exponent of
    the power of two, by which multiplication is exact. Infinities and NaN stay what they are."""

    name = "f16"

    def encode(self, x: Tensor, key: str = "") -> tuple[dict[str, Any], Frames]:
        values = _float32(x)
        exponent = _exponent(values)
        return self._header(values.shape) | {"e": exponent}, self._pack(np.ldexp(values, -exponent), key)

    def decode(self, header: Mapping[str, Any], frames: Sequence[Any], shape: Sequence[int]) -> Tensor:
        exponent = header.get("e")
        if type(exponent) is not int or not HALF_LEAST <= exponent <= HALF_MOST:
            raise ProtocolError(f"codec {self.name}: expected an exponent from {HALF_LEAST} to {HALF_MOST}")
        plain = {word: said for word, said in header.items() if word != "e"}
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.ldexp(super().decode(plain, frames, shape).numpy(), exponent))

    def _pack(self, values: np.ndarray, key: str) -> Frames:
        return [_bytes(values.astype(np.float16), "<f2")]

    def _unpack(self, frames: Sequence[memoryview], shape: Sequence[int]) -> np.ndarray:
        return np.frombuffer(frames[0], "<f2").astype(np.float32)


class Rows(Whole):
    """Symmetric, one scale a row: max |x| / 127, to nearest, ties to even."""

    name = "int8"

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        n = math.prod(shape)
        return [4 * (n // shape[-1]), n]

    def _pack(self, values: np.ndarray, key: str) -> Frames:
        rows = values.reshape(-1, values.shape[-1])
        # The least normal number: a row of zeros, or one too small to divide, is within half of it too.
        least = np.finfo(np.float32).tiny
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / np.float32(LEVELS), least)
        with np.errstate(invalid="ignore"):  # a row with NaN or infinity has a scale that says so
            levels = np.rint(rows / scales)
            np.clip(levels, -LEVELS, LEVELS, out=levels)
            return [_bytes(scales, "<f4"), _bytes(np.nan_to_num(levels).astype(np.int8), "i1")]

    def _unpack(self, frames: Sequence[memoryview], shape: Sequence[int]) -> np.ndarray:
        scales = np.frombuffer(frames[0], "<f4").astype(np.float32)
        levels = np.frombuffer(frames[1], "i1").reshape(-1, shape[-1])
        with np.errstate(invalid="ignore", over="ignore"):
            return levels.astype(np.float32) * scales[:, None]


class TopK(Whole):
    """The largest magnitudes, the earlier of equal ones first, in the order of the tensor.

    At most `residuals` of them are kept; the one unused for longest is dropped.
    """

    def __init__(self, name: str, ratio: float, residuals: int) -> None:
        self.name = name
        self.ratio = ratio
        self._most = residuals
        self._type = "<f2" if name == "topk-f16" else "<f4"
        self._value_bytes = np.dtype(self._type).itemsize
        self._residuals: OrderedDict[tuple[str, tuple[int, ...]], np.ndarray] = OrderedDict()

    def state_dict(self) -> dict[str, Tensor]:
        # numbered: safetensors orders by its own rules, and which is dropped next must stay the same
        return {
            f"{place:06d} {key}": torch.from_numpy(kept_back.copy())
            for place, ((key, _), kept_back) in enumerate(self._residuals.items())
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._residuals.clear()
        for name in sorted(state):
            residual = _float32(state[name]).copy()
            self._residuals[name.partition(" ")[2], residual.shape] = residual

    def _header(self, shape: Sequence[int]) -> dict[str, Any]:
        return {**super()._header(shape), "k": self._count(shape)}

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        if self._is_whole(shape):
            return [4 * math.prod(shape)]
        count = self._count(shape)
        return [4 * count, self._value_bytes * count]

    def _count(self, shape: Sequence[int]) -> int:
        return kept(math.prod(shape), self.ratio)

    def _is_whole(self, shape: Sequence[int]) -> bool:
        n = math.prod(shape)
        return self.name == "adatopk" and self._count(shape) * (4 + self._value_bytes) >= 4 * n

    def _pack(self, values: np.ndarray, key: str) -> Frames:
        if self._is_whole(values.shape):
            return super()._pack(values, key)
        flat = values.reshape(-1)
        kept_back = self._residuals.get((key, values.shape)) if key else None
        if kept_back is not None:
            flat = flat + kept_back.reshape(-1)
        chosen = _largest(flat, self._count(values.shape))
        sent = _half(flat[chosen]) if self._type == "<f2" else flat[chosen]
        if key:
            self._keep(key, values.shape, flat, chosen, sent)
        return [_bytes(chosen, "<i4"), _bytes(sent, self._type)]

    def _keep(
        self, key: str, shape: tuple[int, ...], flat: np.ndarray, chosen: np.ndarray, sent: np.ndarray
    ) -> None:
        residual = flat.copy()
        with np.errstate(invalid="ignore"):  # of infinities, which end the run elsewhere
            residual[chosen] -= sent.astype(np.float32)
        self._residuals[key, shape] = residual.reshape(shape)
        self._residuals.move_to_end((key, shape))
        if len(self._residuals) > self._most:
            self._residuals.popitem(last=False)

    def _unpack(self, frames: Sequence[memoryview], shape: Sequence[int]) -> np.ndarray:
        if self._is_whole(shape):
            return super()._unpack(frames, shape)
        n = math.prod(shape)
        chosen = np.frombuffer(frames[0], "<i4").astype(np.int64)
        if chosen[0] < 0 or chosen[-1] >= n or (np.diff(chosen) <= 0).any():
            raise ProtocolError(
                f"codec {self.name}: expected indices that rise, from 0 to {n - 1}, got others"
            )
        values = np.zeros(n, np.float32)
        values[chosen] = np.frombuffer(frames[1], self._type)
        return values


def _largest(flat: np.ndarray, count: int) -> np.ndarray:
    """The sorted indices of the `count` largest magnitudes; NaN is larger than all."""
    sizes = np.nan_to_num(np.abs(flat), copy=False, nan=np.inf, posinf=np.inf)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    above = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _float32(x: Tensor) -> np.ndarray:
    if not x.is_floating_point() or x.dim() == 0 or not 0 < x.numel() <= VALUES_MOST:
        raise ConfigError(
            f"expected a float tensor of 1 to {VALUES_MOST} values in rows, got {x.dtype}, {tuple(x.shape)}"
        )
    values: np.ndarray = x.detach().to("cpu", torch.float32).contiguous().numpy()
    return values


def _exponent(values: np.ndarray) -> int:
    """Of the power of two that brings the largest finite magnitude below 2^HALF_TOP, and no further; 0 for
    zeros."""
    sizes = np.abs(values)
    largest = np.max(sizes, where=np.isfinite(sizes), initial=np.float32(0))
    return math.frexp(largest)[1] - HALF_TOP if largest else 0


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16)


def _bytes(values: np.ndarray, kind: str) -> memoryview:
    return memoryview(np.ascontiguousarray(values, kind).reshape(-1).view(np.uint8))


def _check_shape(shape: Sequence[int]) -> None:
    is_one = len(shape) > 0 and all(type(size) is int and size > 0 for size in shape)
    if not is_one or math.prod(shape) > VALUES_MOST:
        raise ProtocolError(f"expected a shape of 1 to {VALUES_MOST} values, got {tuple(shape)!r}")
