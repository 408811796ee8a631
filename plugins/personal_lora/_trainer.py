"""The trainer of one rank of a federated job: a member, the server, or who only gets the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edged import Channel, TrainingSpec

from .._training.link import Stopped
from . import _mode
from ._asynchronous import PushedServer, PushingMember
from ._job import read
from ._member import Member
from ._rank import Rank, Report
from ._server import Server, collect


class CollectingMember(Member):
    """A member whose node the job was submitted to."""

    def finish(self, report: Report) -> None:
        super().finish(report)
        collect(self, report)


class CollectingPushingMember(PushingMember):
    """Likewise, of a job whose server waits for nobody."""

    def finish(self, report: Report) -> None:
        super().finish(report)
        collect(self, report)


class Collector(Rank):
    """Its node asked for the job and has no other part in it."""

    neighbours = ()

    def build(self) -> None:
        pass

    def count(self) -> dict[str, Any]:
        return {"keeps": False}

    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        try:
            collect(self, report)
        except Stopped:
            return

    def round(self, number: int, report: Report) -> None:
        raise AssertionError("a collector has no rounds")

    def finish(self, report: Report) -> None:
        raise AssertionError("a collector has no rounds")

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        pass


def load(spec: TrainingSpec, blocks: Any, channel: Channel) -> Rank:
    """A `Trainer`; `blocks` is what the rank's engine made of the model."""
    job = read(spec.settings)
    server, waits = len(job.clients), not _mode.is_asynchronous(job)
    if spec.rank > server:
        return Collector(spec, blocks, channel)
    if spec.rank == server:
        return (Server if waits else PushedServer)(spec, blocks, channel)
    alone, collecting = (Member, CollectingMember) if waits else (PushingMember, CollectingPushingMember)
    return (collecting if spec.rank == spec.collector else alone)(spec, blocks, channel)
