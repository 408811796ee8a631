"""Aggregators that wait for nobody: `fedbuff` and `delayed-nesterov` on factors.

An update is a push: its factors are what the member's local steps added to A and B, its `round` the revision
that they began at, and its extra "turn" the number of the member's pushes that counted before. `add` takes
one at a time, and there is a new `revision` when there are enough. Both are linear in A and in B apart, so a
revision is no more the mean of products than a mean of factors is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import Download, Factors, Member, Update

from .._rounds.asynchronous import Buffered, DelayedNesterov
from ._factors import Array, Layout, check_alike, check_update, kept, weight_of
from ._mode import FEDBUFF, NESTEROV, window_of
from ._settings import (
    BUFFER,
    MOMENTUM,
    OUTER_RATE,
    PLAIN_RATE,
    SPREAD,
    STALENESS_MOST,
    WINDOW,
    number,
    server_learning_rate,
)


class Pushed:
    """An `Aggregator` whose rounds are revisions. `core`: of all values in one row (n,) F64."""

    def __init__(
        self, method: str, core: Buffered | DelayedNesterov, layout: Layout, members: Sequence[Member]
    ) -> None:
        self.method, self.core, self.layout = method, core, layout
        self.scale = members[0].scale if members else 1.0
        self.r = layout.shapes[layout.names[0]][0][0]
        check_alike(method, members, self.r)
        self._use()

    @property
    def revision(self) -> int:
        """Of what `download` gives."""
        return self.core.revision

    def turn(self, member: Member) -> int:
        """Of its next push."""
        return self.core.fence.turn(member.rank)

    def frozen(self, round: int) -> str:
        return ""

    def begin(self, round: int, members: Sequence[Member]) -> None:
        check_alike(self.method, members, self.r)

    def add(self, update: Update) -> None:
        """One push. ProtocolError (update-...) where the fence refuses it; nothing has changed then."""
        check_alike(self.method, [Member(-1, self.r, self.scale), update.member], self.r)
        check_update(update, self.factors)
        turn, row = int(update.extras["turn"]), self.layout.flat(update.factors)
        if self.core.push(update.member.rank, turn, update.round, row, weight_of(update)):
            self._use()

    def counted(self, update: Update) -> Update:
        """The push as factors that it would make of the newest, with the weight that it has: what a residual
        looks at."""
        factors = self.layout.factors(self.core.theta + self.layout.flat(update.factors))
        stale = max(0, self.revision - update.round)
        return Update(update.member, update.round, update.weight / math.sqrt(1 + stale), factors)

    def finish(self) -> None:
        """Nothing is left to do: pushes make revisions by themselves."""

    def download(self, member: Member) -> Download:
        return Download(self.factors)

    def adapter(self) -> dict[str, tuple[Array, Array, float]]:
        return {name: (A, B, self.scale) for name, (A, B) in self.factors.items()}

    def state_dict(self) -> dict[str, np.ndarray]:
        return self.core.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kept(state, "theta")
        self.core.load_state_dict(state)
        self._use()

    def _use(self) -> None:
        self.factors = self.layout.factors(self.core.theta)


def load_fedbuff(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Pushed:
    layout = Layout(start)
    core = Buffered(
        layout.flat(start),
        int(number(settings, BUFFER)),
        number(settings, server_learning_rate(PLAIN_RATE)),
        int(number(settings, STALENESS_MOST)),
    )
    return Pushed(FEDBUFF, core, layout, members)


def load_delayed_nesterov(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Pushed:
    layout = Layout(start)
    core = DelayedNesterov(
        layout.flat(start),
        window_of({"window": number(settings, WINDOW)}, len(members)),
        lr=number(settings, server_learning_rate(OUTER_RATE)),
        beta=number(settings, MOMENTUM),
        c=number(settings, SPREAD),
        staleness_most=int(number(settings, STALENESS_MOST)),
    )
    return Pushed(NESTEROV, core, layout, members)
