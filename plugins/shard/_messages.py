"""What the ranks of one plan say to each other. This docstring is the specification.

A message is a map with its kind under `k`, and raw little-endian frames:

    step     rank 0 -> every rank     e: list of [sequence, position, tokens, keep]; b: rows of a batch
                                      frame: int32 token ids of all entries (first stage only)
    fork     rank 0 -> every rank     s: a new sequence; f: one that is held; n: leading positions to copy
    release  rank 0 -> every rank     s: sequence
    adapt    rank 0 -> every rank     s: a new sequence; a: the number of the adapter that it runs with
    forget   rank 0 -> every rank     a: the number of an adapter that nothing runs with any more
    links    rank -> first of group   l: list of [rank, other, latency in s, bytes/s]  } at load, see
    terms    first of group -> rank   w: codec; a: list of [size, way, hub]            } `_reduce`
    hidden   stage -> next stage      frame: (rows, hidden) float32
    result   last stage -> rank 0     frames: int32 ids, float32 logits, of all entries that keep

An entry runs `tokens` token ids of `sequence` from `position` and keeps the best `keep` logits of its
last token (0: none; -1, -2: as `_sampling.keep_of` says). Entries of one token and one adapter run together
as one batch, longer ones in batches of `b` rows; `hidden` comes once a batch, in this order. All that comes
from the channel is checked here before it reaches ggml, which would abort the process on bad input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edged import Channel, ProtocolError

from .._sampling import KEEP_ALL, KEEP_TOP_P

BATCH_TOKENS = 512  # llama.cpp's n_ubatch
BLOCK = 64  # batches of this many rows and more give every row the same numbers, however they are cut
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


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens of an entry in one batch. `offset`: of the first of them among the step's tokens."""

    entry: int
    sequence: int
    position: int
    count: int
    offset: int
    keeps: bool  # the logits of its last token are wanted


Batch = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """One step: its entries, the token ids (empty beyond the first stage), and how many rows of a long
    entry run at once."""

    entries: tuple[Entry, ...]
    tokens: np.ndarray
    batch_tokens: int = BATCH_TOKENS

    @property
    def count(self) -> int:
        return sum(entry.count for entry in self.entries)

    def batches(self, adapter_of: Callable[[int], int] = lambda sequence: 0) -> list[Batch]:
        """All single tokens of an adapter together, then each longer entry by itself, cut as `cut` says."""
        singles: dict[int, list[Piece]] = {}
        batches: list[Batch] = []
        offset = 0
        for index, e in enumerate(self.entries):
            at = 0
            for count in cut(e.count, self.batch_tokens):
                keeps = e.keep != 0 and at + count == e.count
                piece = Piece(index, e.sequence, e.position + at, count, offset + at, keeps)
                if e.count == 1:
                    singles.setdefault(adapter_of(e.sequence), []).append(piece)
                else:
                    batches.append((piece,))
                at += count
            offset += e.count
        return [*(tuple(pieces) for pieces in singles.values()), *batches]


def cut(count: int, batch_tokens: int) -> list[int]:
    """`count` rows as batches of `batch_tokens`; a rest of less than BLOCK joins the batch before it."""
    sizes = [batch_tokens] * (count // batch_tokens)
    rest = count - sum(sizes)
    if sizes and rest < BLOCK:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def send_work(channel: Channel, work: Work, first_stage: Sequence[int]) -> None:
    """Tell every other rank what this step runs; token ids only where they are embedded."""
    entries = [[e.sequence, e.position, e.count, e.keep] for e in work.entries]
    header = {"k": "step", "e": entries, "b": work.batch_tokens}
    ids = work.tokens.astype("<i4").tobytes()
    for rank in range(channel.size):
        if rank != channel.rank:
            channel.send(rank, header, [ids] if rank in first_stage else [])


def read_work(header: Mapping[str, Any], frames: Sequence[Any], embeds: bool, vocab: int) -> Work:
    """The step of a message from rank 0; `embeds`: this rank is to get token ids."""
    rows, batch_tokens = header.get("e"), header.get("b")
    if not isinstance(rows, list) or not 0 < len(rows) <= ENTRIES_MAX:
        raise ProtocolError("expected a step with entries")
    if type(batch_tokens) is not int or not BLOCK <= batch_tokens <= BATCH_TOKENS:
        raise ProtocolError(f"expected batches of {BLOCK} to {BATCH_TOKENS} rows")
    entries = tuple(_read_entry(row, vocab) for row in rows)
    count = sum(entry.count for entry in entries)
    if not embeds:
        return Work(entries, np.empty(0, np.int32), batch_tokens)
    tokens = read_frames(frames, (("<i4", (count,)),))[0]
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ProtocolError(f"expected token ids below {vocab}")
    return Work(entries, tokens, batch_tokens)


def read_fork(header: Mapping[str, Any]) -> tuple[int, int, int]:
    """(source, new sequence, positions) of a fork message."""
    source, sequence, positions = numbers = [header.get(key, -1) for key in ("f", "s", "n")]
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ProtocolError("expected a fork with two sequences and a number of positions")
    return source, sequence, positions


def read_release(header: Mapping[str, Any]) -> int:
    sequence = header.get("s")
    if type(sequence) is not int:
        raise ProtocolError("expected a release with a sequence")
    return sequence


def read_adapt(header: Mapping[str, Any]) -> tuple[int, int]:
    """(sequence, number) of an adapt message."""
    sequence, number = numbers = [header.get(key, -1) for key in ("s", "a")]
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise ProtocolError("expected a sequence and the number of its adapter")
    return sequence, number


def read_forget(header: Mapping[str, Any]) -> int:
    number = header.get("a")
    if type(number) is not int or number < 1:
        raise ProtocolError("expected the number of an adapter")
    return number


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
