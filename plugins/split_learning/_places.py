"""Who holds what: each rank's part of the model, whom it talks to, and who gives the adapter. Pure.

Ranks: the clients in the order of the file, the stages of a pipeline, the server, and last the node that the
job was submitted to, where it has no other part: it collects the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edged import Role

from ._job import Job

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # that take the same x


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks first to last - 1 of the model, with its embedding or its norm and head; `tuned`: an adapter."""

    first: int
    last: int
    embed: bool = False
    head: bool = False
    tuned: bool = True


class Places:
    """Of a job whose cut is decided, over `layers` blocks."""

    def __init__(
        self, job: Job, roles: Sequence[Role], layers: int, collector: int = 0, names: Sequence[str] = ()
    ) -> None:
        self.job, self.layers = job, layers
        self._names = names or [role.node_id[:8] for role in roles]
        self.is_local = not job.server
        self.clients = range(len(job.clients))
        self.server = 0 if self.is_local else len(job.clients) + len(job.stages)
        self.size = max(self.server + 1, len(roles))
        self.collector = collector

    @property
    def chain(self) -> list[int]:
        """The way of a batch, from the first client to the server."""
        return [0, *range(len(self.clients), self.server + 1)] if not self.is_local else [0]

    def name(self, rank: int) -> str:
        return self._names[rank] if rank < len(self._names) else f"rank {rank}"

    def parts(self, rank: int) -> list[Part]:
        """What a rank holds; nothing of a rank that collects."""
        job, layers = self.job, self.layers
        is_client, is_server = rank in self.clients, rank == self.server
        if self.is_local:
            return [Part(0, layers, embed=True, head=True, tuned=job.topology != "parallel-adapters")]
        if not (is_client or rank <= self.server):
            return []
        cut = job.cut if isinstance(job.cut, int) else 0
        match job.topology:
            case "label-sharing" | "pipeline":
                return [self._stage(rank)]
            case "u-shape":
                tail = layers - job.tail
                mine = [Part(0, cut, embed=True), Part(tail, layers, head=True)]
                return [Part(cut, tail)] if is_server else mine
            case "remote-blocks":
                tuned = job.tune == "adapter"
                mine = [Part(0, cut, embed=True, tuned=tuned), Part(layers, layers, head=True, tuned=False)]
                return [Part(cut, layers, tuned=False)] if is_server else mine
            case "parallel-adapters":  # the side network is the client's own
                return [Part(0, layers, tuned=False)] if is_server else [Part(0, 0, True, True, tuned=False)]
            case _:  # private-lora: what is tuned is of its own
                ends = [Part(0, 0, embed=True, tuned=False), Part(layers, layers, head=True, tuned=False)]
                return [Part(0, layers, tuned=False)] if is_server else ends

    def _stage(self, rank: int) -> Part:
        cuts = self.job.cut if isinstance(self.job.cut, tuple) else (self.job.cut,)
        edges = [0, *(int(cut) for cut in cuts), self.layers]
        place = 0 if rank in self.clients else self.chain.index(rank)
        first, last = edges[place], edges[place + 1]
        return Part(first, last, embed=place == 0, head=rank == self.server)

    def neighbours(self, rank: int) -> list[int]:
        """Ranks whose tensors it sends or takes."""
        if self.is_local or rank > self.server:
            return []
        if rank == self.server and not self.job.stages:
            return list(self.clients)
        if rank in self.clients:
            return [self.chain[1]]
        place = self.chain.index(rank)
        near = self.chain[max(0, place - 1) : place + 2]
        return [other for other in near if other != rank]

    def window(self, rank: int) -> int:
        """How many micro-batches it has under way at most (1F1B): as many as there are stages from it to the
        end. Where there is no chain of stages it is one batch."""
        if self.is_local or self.job.topology not in ("label-sharing", "pipeline") or rank > self.server:
            return 1
        place = 0 if rank in self.clients else self.chain.index(rank)
        return len(self.chain) - place

    def givers(self) -> list[int]:
        """Ranks that give a part of the adapter: of several clients, which have the same, the first."""
        if self.is_local:
            return [0]
        givers = [
            rank for rank in self.chain if any(part.tuned and _holds(part) for part in self.parts(rank))
        ]
        if self.job.topology in ("parallel-adapters", "private-lora") or self.job.prompts:
            givers = [0]  # what is tuned is in no part
        return givers

    def ratio(self, rank: int, other: int) -> float:
        """Of top-k between two ranks."""
        pair = f"{min(rank, other)}-{max(rank, other)}"
        return dict(self.job.link_ratios).get(pair, self.job.ratio)


def shared_inputs(names: Iterable[str]) -> list[list[str]]:
    """Linear layers, by full name or by their own: those of a block that take the same x together."""
    found: dict[str, list[str]] = {}
    for name in names:
        stem, _, own = name.rpartition(".")
        first = next((group[0] for group in SHARED if own in group), own)
        found.setdefault(f"{stem}.{first}", []).append(name)
    return list(found.values())


def _holds(part: Part) -> bool:
    return part.last > part.first
