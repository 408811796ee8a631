"""A client's rows as it trains on them: batches of a step, and what it holds out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .._tensors.rows import Batches, Encoded, Tokenizer, encode, read_rows
from .pairs import batches_of
from .rehearsal import Mixed, divided, split

Batch = tuple[np.ndarray, np.ndarray]  # ids and labels (B, S)


class Reading(Protocol):
    """What of a job says how its rows are read."""

    batch_size: int
    max_length: int
    loss_on: str
    seed: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A client's data: what it trains on, and what it holds out."""

    batches: Batches | Mixed
    held_out: list[Encoded]
    count: int
    dropped: int  # whose answers begin after `max_length`
    digest: str  # of all of them, as they are encoded
    job: Any
    rehearsed: Sequence[Encoded] = ()  # held out, and of what is rehearsed

    @classmethod
    def read(
        cls,
        path: str,
        tokenizer: Tokenizer,
        job: Reading,
        held_out: int,
        *,
        objective: str = "sft",
        rehearsal: float = 0.0,
    ) -> Rows:
        """Of the file at `path`; of rows with split "test" the first `held_out`. ConfigError as of
        `read_rows`; rows are pairs with objective "dpo", and part `rehearsal` of a batch are marked ones."""
        read = read_rows(path, pairs=objective == "dpo")
        found = encode(read, tokenizer, job.max_length, job.loss_on)  # type: ignore[arg-type]
        test, train = ([row for row in found if row.split == name] for name in ("test", "train"))
        dropped = len(read) - len(found)
        if not rehearsal:
            kept = test[:held_out]
            batches = batches_of(train, job.batch_size, job.seed, job.max_length)
            return cls(batches, kept, len(train), dropped, _digest([*train, *kept]), job)
        new, old = split(train)
        kept = [row for row in test if not row.is_rehearsal][:held_out]
        rehearsed = [row for row in test if row.is_rehearsal][:held_out]
        both = batches_of([*new, *old], job.batch_size, job.seed, job.max_length)
        mixed = Mixed(both, (len(new), len(old)), divided(job.batch_size, rehearsal), job.seed)
        digest = _digest([*new, *old, *kept, *rehearsed])
        return cls(mixed, kept, len(new), dropped, digest, job, rehearsed)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a step, (B, S) int32."""
        return self.batches.batch(step)

    def eval_batches(self, rows: Sequence[Encoded] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Held-out rows in batches, in order: ids and labels (B, S). `rows`: others than `held_out`."""
        rows = self.held_out if rows is None else rows
        if not rows:
            return []
        size = self.job.batch_size
        batches = batches_of(rows, size, 0, self.job.max_length)
        firsts = range(0, len(rows), size)
        return [batches.of(range(first, min(first + size, len(rows)))) for first in firsts]

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


def _digest(rows: Sequence[Encoded]) -> str:
    found = hashlib.sha256()
    for row in rows:
        other = row.rejected
        for values in (row.ids, row.labels, *((other.ids, other.labels) if other is not None else ())):
            found.update(len(values).to_bytes(8, "little") + np.asarray(values, "<i4").tobytes())
        found.update(row.split.encode())
    return found.hexdigest()
