"""A rank without a part of the model: its node asked for the job, and gets the adapter."""

from __future__ import annotations

from collections.abc import Callable

from .._training.link import Stopped
from ._rank import Rank, Report


class Collector(Rank):
    def run(self, step: int, report: Report, is_stopped: Callable[[], bool]) -> None:
        """Wait for the parts of the adapter."""
        self._is_stopped = is_stopped
        try:
            self.finish(report)
        except Stopped:
            return

    def build(self) -> None:
        pass

    def step(self, step: int, report: Report) -> None:
        raise AssertionError("a collector has no steps")

    def evaluate(self, step: int, report: Report) -> None:
        raise AssertionError("a collector has nothing to evaluate")
