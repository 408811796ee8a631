"""What travels between two ranks that train: hidden states and gradients through a codec, and small words.

Every message says its kind, step and place; one that is not the next of the schedule is a ProtocolError.
Waiting looks at `is_stopped` every half second, since a peer may take minutes for a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edged import Channel, ProtocolError

from .._tensors.codecs import Codec

LOOK_S = 0.5


class Stopped(Exception):
    """The worker was told to stop: the trainer returns, and the last checkpoint stands."""


class Link:
    """Our end of the way to rank `other`. `codec`: of tensors; the other end has an equal one."""

    def __init__(self, channel: Channel, other: int, codec: Codec, is_stopped: Callable[[], bool]) -> None:
        self.other, self.codec = other, codec
        self._channel, self._is_stopped = channel, is_stopped

    def send(self, kind: str, place: Sequence[int], words: Mapping[str, Any], frames: Sequence[Any]) -> None:
        """`place`: step, micro-batch and the like, which the other end expects to be these."""
        self._channel.send(self.other, {"k": kind, "at": list(place), **words}, frames)

    def receive(self, kind: str, place: Sequence[int]) -> tuple[dict[str, Any], list[memoryview]]:
        while not self._channel.poll(self.other, LOOK_S):
            if self._is_stopped():
                raise Stopped
        header, frames = self._channel.receive(self.other, LOOK_S)
        if header.get("k") != kind or header.get("at") != list(place):
            got = f"{str(header.get('k'))[:16]} {str(header.get('at'))[:40]}"
            raise ProtocolError(f"expected {kind} {list(place)} of rank {self.other}, got {got}")
        return header, frames

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
    """An int32 frame as int64 (shape), each from -100 to below `high`; ProtocolError otherwise."""
    if frame.nbytes != 4 * int(np.prod(shape)):
        raise ProtocolError(f"expected {tuple(shape)} numbers of 4 bytes, got {frame.nbytes} bytes")
    values = np.frombuffer(frame, "<i4").astype(np.int64).reshape(tuple(shape))
    if values.size and (values.min() < -100 or values.max() >= high):
        raise ProtocolError(f"expected labels below {high}")
    return torch.from_numpy(values)


def int_frame(values: Tensor) -> np.ndarray:
    return values.numpy().astype("<i4")
