"""What the ranks of one plan say to each other. This docstring is the specification.

A message is a map with its kind under `k`, and raw little-endian frames:

    step     rank 0 -> every rank     e: list of [sequence, position, tokens, keep]
                                      frame: int32 token ids of all entries (first stage only)
    release  rank 0 -> every rank     s: sequence
    links    rank -> first of group   l: list of [rank, other, latency in s, bytes/s]  } at load, see
    terms    first of group -> rank   w: codec; a: list of [size, way, hub]            } `_reduce`
    hidden   stage -> next stage      frame: (rows, hidden) float32
    result   last stage -> rank 0     frames: int32 ids, float32 logits, of all entries that keep

An entry runs `tokens` token ids of `sequence` from `position`, in batches of BATCH_TOKENS, and keeps
the best `keep` logits of its last token (0: none; -1, -2: as `_sampling.keep_of` says). All that comes
from the channel is checked here before it reaches ggml, which would abort the process on bad input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edged import Channel, ProtocolError

from .._sampling import KEEP_ALL, KEEP_TOP_P

BATCH_TOKENS = 512  # llama.cpp's n_ubatch
ENTRIES_MAX = 4096
# Generous, since the supervisor ends a group on loss: this only bounds a stall nobody reports.
SECONDS_PER_TOKEN = 1.0
BYTES_PER_SECOND = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """`count` tokens of `sequence` from `position`; `keep` as in `_sampling.keep_of`."""

    sequence: int
    position: int
    count: int
    keep: int

    def batches(self) -> list[tuple[int, int, bool]]:
        """(offset, tokens, whether the logits are kept) of each batch."""
        starts = range(0, self.count, BATCH_TOKENS)
        ends = [min(at + BATCH_TOKENS, self.count) for at in starts]
        return [(s, e - s, self.keep != 0 and e == self.count) for s, e in zip(starts, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Work:
    """One step: its entries, and the token ids (empty beyond the first stage)."""

    entries: tuple[Entry, ...]
    tokens: np.ndarray

    @property
    def count(self) -> int:
        return sum(entry.count for entry in self.entries)


def send_work(channel: Channel, work: Work, first_stage: Sequence[int]) -> None:
    """Tell every other rank what this step runs; token ids only where they are embedded."""
    entries = [[e.sequence, e.position, e.count, e.keep] for e in work.entries]
    header = {"k": "step", "e": entries}
    ids = work.tokens.astype("<i4").tobytes()
    for rank in range(channel.size):
        if rank != channel.rank:
            channel.send(rank, header, [ids] if rank in first_stage else [])


def read_work(header: Mapping[str, Any], frames: Sequence[Any], embeds: bool, vocab: int) -> Work:
    """The step of a message from rank 0; `embeds`: this rank is to get token ids."""
    rows = header.get("e")
    if not isinstance(rows, list) or not 0 < len(rows) <= ENTRIES_MAX:
        raise ProtocolError("expected a step with entries")
    entries = tuple(_read_entry(row, vocab) for row in rows)
    count = sum(entry.count for entry in entries)
    if not embeds:
        return Work(entries, np.empty(0, np.int32))
    tokens = read_frames(frames, (("<i4", (count,)),))[0]
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ProtocolError(f"expected token ids below {vocab}")
    return Work(entries, tokens)


def _read_entry(row: Any, vocab: int) -> Entry:
    if not isinstance(row, (list, tuple)) or len(row) != 4 or any(type(n) is not int for n in row):
        raise ProtocolError("expected an entry of four numbers")
    sequence, position, count, keep = row
    if not 0 <= sequence < 2**63 or not 0 <= position < 2**31 or not 0 < count < 2**31:
        raise ProtocolError("expected an entry with a sequence, a position and tokens")
    if keep not in (KEEP_ALL, KEEP_TOP_P) and not 0 <= keep <= vocab:
        raise ProtocolError(f"expected at most {vocab} logits to keep, got {keep}")
    return Entry(sequence, position, count, keep)


def read_frames(frames: Sequence[Any], shapes: Sequence[tuple[str, tuple[int, ...]]]) -> list[np.ndarray]:
    """Frames as arrays of exactly these types and shapes, uncopied."""
    if len(frames) != len(shapes):
        raise ProtocolError(f"expected {len(shapes)} frames, got {len(frames)}")
    arrays = []
    for frame, (kind, shape) in zip(frames, shapes, strict=True):
        expected = np.dtype(kind).itemsize * int(np.prod(shape))
        size = memoryview(frame).nbytes
        if size != expected:
            raise ProtocolError(f"expected a frame of {expected} bytes, got {size}")
        arrays.append(np.frombuffer(frame, dtype=kind).reshape(shape))
    return arrays


def patience_s(base_s: float, tokens: int, size: int) -> float:
    """How long to wait for `size` bytes of a rank that may have to compute `tokens` first."""
    return base_s + tokens * SECONDS_PER_TOKEN + size / BYTES_PER_SECOND


class Mailbox:
    """A channel that knows which message it waits for, and how long that may take."""

    def __init__(self, channel: Channel, base_s: float) -> None:
        self.channel, self._base_s = channel, base_s

    def expect(
        self, source: int, kind: str, shapes: Sequence[tuple[str, tuple[int, ...]]], tokens: int
    ) -> list[np.ndarray]:
        """The frames of the next message of `source`, which must be a `kind`. `tokens`: how many
        the sender may have to compute first."""
        size = sum(np.dtype(k).itemsize * int(np.prod(s)) for k, s in shapes)
        header, frames = self.channel.receive(source, patience_s(self._base_s, tokens, size))
        if header.get("k") != kind:
            raise ProtocolError(f"expected {kind} of rank {source}, got {str(header.get('k'))[:32]!r}")
        return read_frames(frames, shapes)
