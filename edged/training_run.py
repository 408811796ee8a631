"""A training that is not over: what is known of it, and what those who follow it are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import figures, wire
from .errors import EdgedError
from .groups import Group
from .patience import Patience
from .requests import FinetuneRequest
from .types import Training, TrainingCost, TrainingPlan

TOLD_MAX = 20_000  # events that a client can still be sent


@dataclass(slots=True)
class TrainingRun:
    """A training that is not over."""

    job_id: str
    request: FinetuneRequest
    training: Training
    settings: Mapping[str, Any]
    since: float  # monotonic
    plan: TrainingPlan | None = None
    model_sha256: str = ""  # of the first epoch: its name may be another model's by now
    cost: TrainingCost = field(default_factory=TrainingCost)
    epoch: int = 0
    group: Group | None = None
    told: list[dict[str, Any]] = field(default_factory=list)  # events, in order; watchers read on from theirs
    told_before: int = 0  # events that are not kept any more
    losses: dict[int, float] = field(default_factory=dict)
    evals: dict[int, dict[str, float]] = field(default_factory=dict)
    reports: dict[tuple[int, str], dict[int, Mapping[str, float]]] = field(default_factory=dict)
    patience: Patience = field(default_factory=lambda: Patience(time.monotonic()))
    step: int = 0
    furthest: int = 0  # the most steps that were ever done
    failures: int = 0  # losses since then
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    bytes_before: int = 0  # that earlier epochs sent
    egress_before: figures.Egress = field(default_factory=dict)  # the same by sender, receiver and kind
    joules_before: float | None = 0.0
    used: tuple[wire.Used | None, ...] = ()
    silent: tuple[str, ...] = ()  # nodes that did not answer the last time
    news: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Future[dict[str, float]] = field(default_factory=asyncio.Future)
    is_cancelled: bool = False
    back_since: dict[int, float] = field(default_factory=dict)  # ranks that left, whose nodes are there again
    returning: tuple[int, ...] = ()  # of these, who is there for long enough
    failed_ranks: set[int] = field(default_factory=set)  # optional ones, by an error of their own
    has_begun: bool = False  # every node took its role once: what refuses now may not for long
    waits_for: str = ""
    task: asyncio.Task[dict[str, Any]] | None = None

    @property
    def bytes_sent(self) -> int:
        return self.bytes_before + sum(used.bytes_sent for used in self.used if used is not None)

    @property
    def egress(self) -> figures.Egress:
        nodes = [role.node_id for role in self.plan.roles] if self.plan is not None else []
        return figures.egress_with(self.egress_before, self.used, nodes)

    @property
    def patience_s(self) -> float:
        """How long a node that is lost, or that refuses for now, is waited for."""
        return float(self.settings["patience_s"])

    def tell(self, event: dict[str, Any]) -> None:
        self.told.append(event)
        if len(self.told) > TOLD_MAX:  # who follows from afar has the rest in the document
            self.told_before += len(self.told) - TOLD_MAX // 2
            del self.told[: -TOLD_MAX // 2]
        news, self.news = self.news, asyncio.Event()  # each watcher holds the one it waits for
        news.set()

    def fail(self, error: EdgedError) -> None:
        """End this epoch; the first error counts."""
        if not self.finished.done():
            self.finished.set_exception(error)
            self.finished.exception()  # it may have failed while it loads, where nobody waits for this

    def waits(self, because: str) -> None:
        """Say what for, when that changes; "" for nothing any more."""
        if because and because != self.waits_for:
            self.tell({"event": "waiting", "until": None, "because": because})
        self.waits_for = because

    def forget_from(self, step: int) -> None:
        """What was told of this step and later ones will be told again."""
        self.losses = {known: loss for known, loss in self.losses.items() if known < step}
        self.evals = {known: values for known, values in self.evals.items() if known < step}
