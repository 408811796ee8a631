"""A client's rows as it trains on them: batches of a step, and what it holds out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._tensors.rows import Batches, Encoded, Tokenizer, encode, read_rows


class Reading(Protocol):
    """What of a job says how its rows are read."""

    batch_size: int
    max_length: int
    loss_on: str
    seed: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A client's data: what it trains on, and what it holds out."""

    batches: Batches
    held_out: list[Encoded]
    count: int
    dropped: int  # whose answers begin after `max_length`
    digest: str  # of all of them, as they are encoded
    job: Any

    @classmethod
    def read(cls, path: str, tokenizer: Tokenizer, job: Reading, held_out: int) -> Rows:
        """Of the file at `path`; of rows with split "test" the first `held_out`. ConfigError as of
        `read_rows`."""
        read = read_rows(path)
        found = encode(read, tokenizer, job.max_length, job.loss_on)  # type: ignore[arg-type]
        kept = [row for row in found if row.split == "test"][:held_out]
        train = [row for row in found if row.split == "train"]
        batches = Batches(train, job.batch_size, job.seed, job.max_length)
        return cls(batches, kept, len(train), len(read) - len(found), _digest([*train, *kept]), job)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of a step, (B, S) int64."""
        return _tensors(self.batches.batch(step))

    def eval_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Held-out rows in batches, in order: ids and labels (B, S)."""
        if not self.held_out:
            return []
        size = self.job.batch_size
        batches = Batches(self.held_out, size, 0, self.job.max_length)
        firsts = range(0, len(self.held_out), size)
        return [_tensors(batches.of(range(first, min(first + size, len(self.held_out))))) for first in firsts]

    def shapes(self, steps: int) -> list[list[int]]:
        """[rows, length, how many] of the first batches."""
        each = Counter()
        for step, positions in enumerate(self.batches.positions(steps)):
            rows = len(self.batches.indices(step))
            each[rows, positions // rows] += 1
        return [[*shape, count] for shape, count in sorted(each.items())]


def seed_of(seed: int, step: int, rank: int) -> int:
    """A number of its own for each step of each rank."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _tensors(pair: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    ids, labels = pair
    return torch.from_numpy(np.asarray(ids, np.int64)), torch.from_numpy(np.asarray(labels, np.int64))


def _digest(rows: Sequence[Encoded]) -> str:
    found = hashlib.sha256()
    for row in rows:
        for values in (row.ids, row.labels):
            found.update(len(values).to_bytes(8, "little") + np.asarray(values, "<i4").tobytes())
        found.update(row.split.encode())
    return found.hexdigest()
