"""Hidden states and gradients between two ranks that train, through a codec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edged import Channel, EngineError, ProtocolError

from .._tensors.codecs import Codec
from .link import Link
from .loss import IGNORED


class TensorLink(Link):
    """Our end of the way to rank `other`. `codec`: of tensors; the other end has an equal one."""

    def __init__(self, channel: Channel, other: int, codec: Codec, is_stopped: Callable[[], bool]) -> None:
        super().__init__(channel, other, is_stopped)
        self.codec = codec

    def send_tensor(
        self,
        kind: str,
        place: Sequence[int],
        x: Tensor,
        key: str = "",
        more: Sequence[Any] = (),
        **words: Any,
    ) -> None:
        """A tensor through the codec, then frames of ours. `key`: its stream, for error feedback."""
        header, frames = self.codec.encode(x, key)
        self.send(kind, place, {**words, "tensor": header}, [*frames, *more])

    def receive_tensor(
        self, kind: str, place: Sequence[int], most: Sequence[int], more: int = 0, is_exact: bool = False
    ) -> tuple[Tensor, dict[str, Any], list[memoryview]]:
        """A tensor of at most `most` in each dimension but the last, which is the width, or `is_exact`ly
        of that shape; its header; the `more` frames after it."""
        header, frames = self.receive(kind, place)
        said = header.get("tensor")
        if not isinstance(said, dict):
            raise ProtocolError(f"expected a tensor with {kind} of rank {self.other}")
        own = frames[: len(frames) - more] if more else frames
        tensor = self.codec.decode(said, own, shape_of(said, most, is_exact))
        return tensor, header, frames[len(frames) - more :] if more else []

    def receive_gradient(self, kind: str, place: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A gradient of exactly that shape. EngineError where a value of it is not finite: an adapter that
        took it could not be mended."""
        gradient, _, _ = self.receive_tensor(kind, place, shape, is_exact=True)
        if not bool(torch.isfinite(gradient).all()):
            raise EngineError(
                f"step {place[0]}: expected finite gradients of rank {self.other}, got others ({kind}); "
                "nothing of this step is kept",
                remedy="lower learning_rate, or look at what runs there",
                code="nan-gradient",
            )
        return gradient


def shape_of(said: Mapping[str, Any], most: Sequence[int], is_exact: bool = False) -> tuple[int, ...]:
    """The shape that a header says, if it is `most`, or is so wide and in no other dimension above it."""
    shape = said.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != len(most)
        or not all(type(size) is int and size >= 1 for size in shape)
        or any(size > limit for size, limit in zip(shape, most, strict=True))
        or shape[-1] != most[-1]
        or (is_exact and shape != list(most))
    ):
        what = f"{tuple(most)}" if is_exact else f"at most {tuple(most[:-1])} and width {most[-1]}"
        raise ProtocolError(f"expected a tensor of {what}, got {str(shape)[:60]}")
    return tuple(shape)


def ints(frame: memoryview, shape: Sequence[int], high: int) -> Tensor:
    """An int32 frame as int64 (shape), each -100 or from 0 to below `high`; ProtocolError otherwise."""
    if frame.nbytes != 4 * int(np.prod(shape)):
        raise ProtocolError(f"expected {tuple(shape)} numbers of 4 bytes, got {frame.nbytes} bytes")
    values = np.frombuffer(frame, "<i4").astype(np.int64).reshape(tuple(shape))
    if not (((values >= 0) & (values < high)) | (values == IGNORED)).all():
        raise ProtocolError(f"expected labels from 0 to below {high}, or {IGNORED}")
    return torch.from_numpy(values)


def int_frame(values: Tensor) -> np.ndarray:
    return values.numpy().astype("<i4")
