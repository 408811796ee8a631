"""Parallel adapters (PAC, arXiv:2408.10746): a side network reads frozen blocks, whose states are kept.

The client has the embedding, the side network (`_side.py`), the norm, the head and the labels. The blocks run
forward only: on the same node (`edged finetune local`), or on the server, which gets the embeddings of a row
and sends back what every block gave at the positions that predict a token of the loss. The client keeps that
on its disk (`_kept.py`); after the first epoch nothing is computed by blocks or sent, and whoever has them
lets go of their memory until a row is asked for again. The server can read the ids off the embeddings, and
learns which positions are answers; labels it never gets.

Rows go through the blocks one at a time, padded to their own length rounded up to 8: with two threads a
row's states differ in their last bits by what else is in its batch (measured), and kept states must be those
that would be computed again. With codec f16 states are rounded in the first epoch as in all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edged import ProtocolError

from .._tensors.rows import Batches
from .._training.link import Stopped
from .._training.loss import IGNORED
from .._training.tensor_link import int_frame, ints, shape_of
from ._chain import report_eval
from ._cost import divided, evaluations
from ._kept import Kept
from ._rank import Rank, Report
from ._side import Side

WINDOW = 2  # rows under way to the server: one that it computes, one that it has when it is done
FOLDER = "states"


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """`ids` (1, S). `wanted` (P): the positions that predict a token of the loss; `targets` (P): which."""

    key: str
    ids: Tensor
    wanted: Tensor
    targets: Tensor


class Backbone(Protocol):
    """Whoever runs the blocks."""

    def states(self, rows: Sequence[Row], embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        """For each row, with its embedding (1, S, d), what every block gave at the wanted positions:
        (L, P, d)."""
        ...

    def rest(self) -> None:
        """Nothing more will be asked for, unless something kept is damaged."""
        ...

    def end(self) -> None: ...


class Client(Rank):
    """Everything but the blocks; these too, where the job has no server."""

    def build(self) -> None:
        job, blocks = self.job, self.blocks
        self.ends = blocks.span(0, 0, embed=True, head=True, dtype=job.weights)
        self.side = Side(blocks.layers, blocks.hidden, job.width, job.seed)
        self.backbone: Backbone = Here(self) if self.places.is_local else There(self)
        folder = Path(self.spec.state_folder).parent / FOLDER
        self.kept = Kept(folder, job.cache, is_half=job.codec == "f16")
        assert self.rows is not None
        held_out = self.rows.held_out
        self._training = self._rows_of(self.rows.batches, self.rows.count)
        batches = Batches(held_out, job.batch_size, 0, job.max_length) if held_out else None
        self._held_out = self._rows_of(batches, len(held_out)) if batches is not None else []
        self.computed_rows = 0
        self._is_resting = False
        self._has_told = False
        self._room = torch.empty(0)

    def _rows_of(self, batches: Batches, count: int) -> list[Row]:
        return [self._row(*batches.of([index])) for index in range(count)]

    def _row(self, ids: np.ndarray, labels: np.ndarray) -> Row:
        wanted = np.flatnonzero(labels[0, 1:] != IGNORED)
        job, model, tokenizer = self.job, self.spec.model_sha256, self.blocks.tokenizer.sha256
        words = f"{model} {tokenizer} {job.max_length} {job.codec} {job.weights}"
        digest = hashlib.sha256(words.encode())
        for array in (ids, wanted):
            digest.update(len(array.ravel()).to_bytes(8, "little") + array.astype("<i8").tobytes())
        targets = torch.from_numpy(labels[0, 1:][wanted].astype(np.int64))
        return Row(
            digest.hexdigest(), torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(wanted), targets
        )

    def own_parameters(self) -> list[nn.Parameter]:
        return list(self.side.parameters())

    # --- a step ---------------------------------------------------------------------------------

    def step(self, step: int, report: Report) -> None:
        began, before = time.monotonic(), self.computed_rows
        assert self.rows is not None
        rows = [self._training[index] for index in self.rows.batches.indices(step)]
        targets, total, first = sum(len(row.targets) for row in rows), 0.0, 0
        for size in divided(len(rows), self.job.micro_batches):
            loss = self._summed(rows[first : first + size]) / max(1, targets)
            loss.backward()
            total, first = total + loss.item(), first + size
        self.check_loss(step, total)
        self.update(step)
        if self.computed_rows == before:  # a step that found all it needs
            self._rest_if_complete()
        said = {
            "loss": total,
            "tokens": float(sum(row.ids.numel() for row in rows)),
            "targets": float(targets),
            "computed_rows": float(self.computed_rows - before),  # by the blocks; the others were kept
        }
        if self.kept.has_failed and not self._has_told:
            self._has_told = True
            said["cache_failed"] = 1.0
        report("step", step, said | {"seconds": time.monotonic() - began})

    def _summed(self, rows: Sequence[Row]) -> Tensor:
        """Cross entropy summed over the tokens of the rows' loss."""
        logits = self.ends.project(self.ends.normed(self.side(self._states(rows))))
        targets = torch.cat([row.targets for row in rows])
        return nn.functional.cross_entropy(logits, targets, reduction="sum")

    def _states(self, rows: Sequence[Row]) -> Tensor:
        """Of the wanted positions of all rows, one row after the other: (L + 1, T, d). They stand until the
        next call."""
        layers, hidden = self.blocks.layers + 1, self.blocks.hidden
        found = self._empty((layers, sum(len(row.wanted) for row in rows), hidden))
        planes = torch.split(found, [len(row.wanted) for row in rows], dim=1)
        missing: dict[str, list[int]] = {}  # equal rows are one
        for i, row in enumerate(rows):
            if not self.kept.read(row.key, planes[i]):
                missing.setdefault(row.key, []).append(i)
        computed = self._compute([rows[places[0]] for places in missing.values()])
        for (key, places), values in zip(missing.items(), computed, strict=True):
            for i in places:
                planes[i].copy_(torch.from_numpy(values))
            self.kept.write(key, values)
        return found

    def _empty(self, shape: tuple[int, int, int]) -> Tensor:
        """The same memory for every batch: fresh pages cost as much as reading into them."""
        count = shape[0] * shape[1] * shape[2]
        if self._room.numel() < count:
            self._room = torch.empty(count)
        return self._room[:count].view(shape)

    @torch.no_grad()
    def _compute(self, rows: Sequence[Row]) -> Iterator[np.ndarray]:
        if not rows:
            return
        embedded = [self.ends.states(row.ids)[0] for row in rows]
        self._is_resting = False
        for row, mine, states in zip(rows, embedded, self.backbone.states(rows, embedded), strict=True):
            self.computed_rows += 1
            yield self.kept.rounded(torch.cat([mine[:, row.wanted], states]).numpy())

    def _rest_if_complete(self) -> None:
        if self._is_resting or not all(row.key in self.kept for row in (*self._training, *self._held_out)):
            return
        self._is_resting = True
        self.backbone.rest()

    # --- evaluation and the end -----------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, step: int, report: Report) -> None:
        size, sums = self.job.batch_size, []
        for first in range(0, len(self._held_out), size):
            rows = self._held_out[first : first + size]
            sums.append((self._summed(rows).item(), sum(len(row.targets) for row in rows)))
        report_eval(step, sums, report)

    def adapter(self) -> dict[str, np.ndarray]:
        return self.side.tensors()

    def finish(self, report: Report) -> None:
        """Kept states are of this job's rows: they go when it is done."""
        self.backbone.end()
        super().finish(report)
        self.kept.remove()

    def close(self) -> None:
        super().close()
        self.backbone = Nowhere()

    # --- what it will ask for -------------------------------------------------------------------

    def count(self) -> dict[str, Any]:
        """`asks`: [length, wanted positions, how often] of the rows that blocks will compute, from the start
        of the job or from what is kept of it."""
        found, asks, used = super().count(), dict[tuple[int, int], int](), self.kept.bytes
        seen = set[str]()
        for row, times in self._visits():
            if row.key in self.kept or row.key in seen:
                continue
            size = self.kept.size_of((self.blocks.layers + 1, len(row.wanted), self.blocks.hidden))
            if used + size <= self.job.cache:
                used, times = used + size, 1
                seen.add(row.key)
            shape = (row.ids.shape[1], len(row.wanted))
            asks[shape] = asks.get(shape, 0) + times
        found["asks"] = [[*shape, count] for shape, count in sorted(asks.items())]
        return found

    def _visits(self) -> Iterator[tuple[Row, int]]:
        """Every row in the order of its first use, and how often it is used."""
        assert self.rows is not None
        batches, steps = self.rows.batches, self.job.steps
        for row in self._held_out:
            yield row, evaluations(self.job)
        epochs, rest = divmod(steps, batches.epoch_steps)
        last = {i for step in range(steps - rest, steps) for i in batches.indices(step)}
        for step in range(min(steps, batches.epoch_steps)):
            for index in batches.indices(step):
                yield self._training[index], epochs + (index in last)


class Here:
    """The blocks in this process, loaded when they are needed."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._load()

    def _load(self) -> None:
        blocks, job = self._rank.blocks, self._rank.job
        self._rank.spans = [blocks.span(0, blocks.layers, dtype=job.weights)]

    def states(self, rows: Sequence[Row], embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        for row, hidden in zip(rows, embedded, strict=True):
            yield self.of(hidden, row.wanted)

    @torch.no_grad()
    def of(self, embedded: Tensor, wanted: Tensor) -> Tensor:
        if not self._rank.spans:
            self._load()
        (span,) = self._rank.spans
        return torch.stack([states[0, wanted] for states in span.states(embedded)[1:]])

    def rest(self) -> None:
        self._rank.spans.clear()
        _return_freed()

    def end(self) -> None:
        self.rest()


class There:
    """The blocks at the server. Every message but an answer's is `ask`, in one count."""

    def __init__(self, rank: Client) -> None:
        self._rank, self._asked = rank, 0

    def states(self, rows: Sequence[Row], embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        under_way: deque[tuple[int, Row]] = deque()
        for row, hidden in zip(rows, embedded, strict=True):
            under_way.append((self._ask("row", hidden, row.wanted), row))
            if len(under_way) == WINDOW:
                yield self._take(*under_way.popleft())
        while under_way:
            yield self._take(*under_way.popleft())

    def _ask(self, what: str, hidden: Tensor | None = None, wanted: Tensor | None = None) -> int:
        link, number = self._link(), self._asked
        self._asked += 1
        if hidden is None or wanted is None:
            link.send("ask", [number], {"do": what}, [])
        else:
            link.send_tensor("ask", [number], hidden, "", [int_frame(wanted)], do=what)
        return number

    def _take(self, number: int, row: Row) -> Tensor:
        shape = (len(row.wanted), self._rank.blocks.hidden)
        found = torch.empty(self._rank.blocks.layers, *shape)
        for layer, plane in enumerate(found):
            states, _, _ = self._link().receive_tensor("states", [number, layer], shape, is_exact=True)
            plane.copy_(states)
        return found

    def rest(self) -> None:
        self._ask("rest")

    def end(self) -> None:
        self._ask("end")

    def _link(self) -> Any:
        return self._rank.link(self._rank.places.server)


def _return_freed() -> None:
    """Give the system what was freed. glibc keeps it for later otherwise: of SmolLM2's blocks all of it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Nowhere:
    """Of a rank that is closed."""

    def states(self, rows: Sequence[Row], embedded: Sequence[Tensor]) -> Iterator[Tensor]:
        raise AssertionError("a closed rank computes nothing")

    def rest(self) -> None:
        pass

    def end(self) -> None:
        pass


class Server(Rank):
    """Runs the frozen blocks for whatever the client asks, until it says that this is the end."""

    def build(self) -> None:
        self.here = Here(self)

    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        try:
            self._shake_hands()
            number = 0
            while self._answer(number):
                number += 1
            self.finish(report)
        except Stopped:
            return

    def _answer(self, number: int) -> bool:
        (client,) = self.places.clients
        link, job = self.link(client), self.job
        header, frames = link.receive("ask", [number])
        if header.get("do") in ("rest", "end"):
            self.here.rest()
            return header["do"] == "rest"
        said = header.get("tensor")
        if not isinstance(said, dict) or not frames:
            raise ProtocolError(f"expected a row of rank {client}")
        shape = shape_of(said, [1, job.max_length, self.blocks.hidden])
        embedded = link.codec.decode(said, frames[:-1], shape)
        count = frames[-1].nbytes // 4
        wanted = ints(frames[-1], [count], shape[1])
        if not 1 <= count <= shape[1] or bool((wanted < 0).any()):
            raise ProtocolError(f"expected 1 to {shape[1]} positions of a row of that length")
        for layer, states in enumerate(self.here.of(embedded, wanted)):
            link.send_tensor("states", [number, layer], states)
        return True

    def step(self, step: int, report: Report) -> None:
        raise AssertionError("the client says what is computed")

    def evaluate(self, step: int, report: Report) -> None:
        raise AssertionError("the client has the loss")
