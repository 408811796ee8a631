"""Clipping of clients' changes, noise on their sum, and the account of what was released (`_client_privacy`).

The noise is a function of a secret, the round, and the sum that it is added to. The secret is random bytes in
the server's own folder of this job, never sent, never of the job's seed. So a round that is done again after
a loss gives the same bits where its updates are the same, and says nothing new; with other updates it is
another release. What was released is written down before anybody can see it, and every release counts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edged import Download, Factors, Member, PolicyViolation, Update

from .._tensors.privacy import SHRINK, normal
from .._training.secret import secret_of
from ._client_privacy import epsilon_of, over_budget
from ._cohort import cohort_of
from ._factors import Array, Layout, check_update
from ._job import Job

log = logging.getLogger(__name__)
SECRET, RELEASED = "client-noise.secret", "client-noise.released"
LINE = re.compile(r"(\d{1,9}) ([0-9a-f]{64})")
ROUNDING = 1.01  # times the clip; a longer change was not cut by its member


def cut(change: Array, clip: float) -> tuple[Array, float]:
    """change (v,) F64, scaled to a norm of at most `clip`; and the norm that it had."""
    norm = float(np.linalg.norm(change))
    return (change * (SHRINK * clip / norm) if norm > clip else change), norm


def cut_factors(factors: Factors, loaded: Factors, sides: str, clip: float) -> dict[str, tuple[Array, Array]]:
    """A member's factors, whose change of the named sides is no longer than `clip`."""
    layout = Layout(loaded)
    base = layout.flat(loaded)
    change = np.where(_trained(layout, sides), layout.flat(factors) - base, 0.0)
    return layout.factors(base + cut(change, clip)[0])


class Account:
    """What a job's rounds released, by client. PolicyViolation, code privacy-budget, where all rounds of the
    job would pass its budget. `folder`: the server's own."""

    def __init__(self, job: Job, folder: str) -> None:
        self._job, place = job, Path(folder)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.secret, self._path = secret_of(place / SECRET), place / RELEASED
        self._planned = Counter(rank for number in range(job.rounds) for rank in cohort_of(job, number))
        self._again: Counter[int] = Counter()  # releases of a round after its first one, by client
        self._seen: dict[int, set[str]] = {}
        text = self._path.read_text() if self._path.exists() else ""
        self._is_whole = not text or text.endswith("\n")
        for line in text.splitlines():
            match = LINE.fullmatch(line)
            if match:
                self._see(int(match[1]), match[2])
        self._need(self.most)

    @property
    def most(self) -> int:
        """Releases of the client that has most, when all rounds are done."""
        return max((self._planned + self._again).values(), default=0)

    def spent(self) -> dict[str, float]:
        """By the client that was drawn most, when all rounds are done; empty without noise."""
        job = self._job
        if not job.client_noise:
            return {}
        return {
            "epsilon": epsilon_of(job.client_noise, self.most, job.client_delta),
            "delta": job.client_delta,
        }

    def note(self, number: int, total: Array) -> None:
        """Before a sum is released. PolicyViolation where that would pass the budget."""
        digest = hashlib.sha256(np.ascontiguousarray(total, "<f8").tobytes()).hexdigest()
        seen = self._seen.get(number, set())
        if digest in seen:
            return
        if seen:
            again = self._again + Counter(cohort_of(self._job, number))
            self._need(max((self._planned + again).values()))
            log.warning("round released again with other updates", extra={"round": number})
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, f"{'' if self._is_whole else chr(10)}{number} {digest}\n".encode())
            os.fsync(file)
        finally:
            os.close(file)
        self._is_whole = True
        self._see(number, digest)

    def _see(self, number: int, digest: str) -> None:
        seen = self._seen.setdefault(number, set())
        if seen and digest not in seen:
            self._again.update(cohort_of(self._job, number))
        seen.add(digest)

    def _need(self, rounds: int) -> None:
        why = over_budget(self._job, rounds)
        if why:
            raise PolicyViolation(
                why, remedy="fewer rounds, more noise, or a larger client_epsilon", code="privacy-budget"
            )


class Private:
    """An `Aggregator` that is given one update a round: what the members loaded, and the noisy mean of their
    changes."""

    def __init__(self, inner: Any, start: Factors, job: Job, account: Account) -> None:
        self._inner, self._job, self._account = inner, job, account
        self._layout = Layout(start)
        self._round, self._members, self._count = 0, 1, 0
        self._total = np.zeros(self._layout.size)
        self._any: Member | None = None

    def frozen(self, round: int) -> str:
        return str(self._inner.frozen(round))

    def begin(self, round: int, members: Sequence[Member]) -> None:
        self._inner.begin(round, members)
        self._round, self._members, self._count = round, len(members), 0
        self._total = np.zeros(self._layout.size)

    def add(self, update: Update) -> None:
        """One member's, whatever weight it says. ConfigError where its shapes are others."""
        loaded, frozen = self._inner.download(update.member).factors, self.frozen(self._round)
        check_update(update, loaded, frozen)
        sides = "AB".replace(frozen, "") if frozen else "AB"
        sent = {
            name: (loaded[name][0] if frozen == "A" else a, loaded[name][1] if frozen == "B" else b)
            for name, (a, b) in update.factors.items()
        }
        change = self._layout.flat(sent) - self._layout.flat(loaded)
        change, norm = cut(np.where(_trained(self._layout, sides), change, 0.0), self._job.client_clip)
        if norm > ROUNDING * self._job.client_clip:
            log.warning(
                "update longer than client_clip; cut",
                extra={"round": self._round, "member": update.member.rank, "norm": norm},
            )
        self._total += change
        self._count, self._any = self._count + 1, update.member

    def finish(self) -> None:
        if self._count:
            assert self._any is not None
            loaded = self._inner.download(self._any).factors
            row = self._layout.flat(loaded) + self._noisy() / self._members
            self._inner.add(Update(self._any, self._round, 1.0, self._layout.factors(row)))
        self._inner.finish()

    def _noisy(self) -> Array:
        """The sum, with noise on what is trained."""
        sigma = self._job.client_noise * self._job.client_clip
        if not sigma:
            return self._total
        self._account.note(self._round, self._total)
        frozen = self.frozen(self._round)
        said = self._round.to_bytes(8, "little") + np.ascontiguousarray(self._total, "<f8").tobytes()
        noise = sigma * normal(self._account.secret, said, self._total.size)
        return self._total + np.where(_trained(self._layout, "AB".replace(frozen or " ", "")), noise, 0.0)

    def download(self, member: Member) -> Download:
        found: Download = self._inner.download(member)
        return found

    def adapter(self) -> Any:
        return self._inner.adapter()

    def state_dict(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._inner.state_dict()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state)


def _trained(layout: Layout, sides: str) -> Any:
    """Bool: which values are of the named sides."""
    return True if sides == "AB" else layout.is_of(sides)
