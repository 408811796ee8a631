"""Clipping and noise on what leaves a client, and the budget that ends the job (DisLLM, CNS 2024).

`_tensors.privacy` says what an epsilon protects, and what it does not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .._tensors.privacy import Budget, Gaussian
from ._cost import evaluations
from ._job import Job

SECRET_BYTES = 32
EVALUATIONS = 1 << 32  # numbers of noise from here on are of evaluations, below it of steps
SECRET = "noise.secret"


class Noise:
    """Of one client: the identity where the job asks for none.

    The secret of the noise stays in `folder`, which is this rank's own: who resumes draws the same noise, and
    no other node can.
    """

    def __init__(self, job: Job, folder: str, rows: Any) -> None:
        self._job, self._gaussian, self._budget = job, None, None
        self._held_out: Budget | None = None
        if rows is None or not job.clip:
            return
        self._gaussian = Gaussian(job.clip, job.noise, _secret(Path(folder)))
        if job.epsilon or job.noise:
            most = job.epsilon or 1e9
            self._budget = Budget(most, job.delta, job.noise, job.batch_size, rows.count)
            if rows.held_out:  # each is sent once an evaluation
                self._held_out = Budget(most, job.delta, job.noise, 1, 1)

    def __call__(self, hidden: Tensor, step: int, first: int = 0) -> Tensor:
        """Hidden states (B, S, d) of the rows from `first` on of a step's batch. PolicyViolation where the
        step would spend more than the budget."""
        if self._budget is not None and self._job.epsilon:
            self._budget.check_before(step)
        if self._gaussian is None:
            return hidden
        return self._gaussian(hidden, step, range(first, first + len(hidden)))

    def allows(self, step: int) -> bool:
        """Does the budget of the rows that are held out allow the evaluation before `step`?"""
        if self._held_out is None or not self._job.epsilon:
            return True
        return self._number(step) < self._held_out.steps_allowed()

    def held_out(self, hidden: Tensor, step: int, first: int) -> Tensor:
        """The same of the rows from `first` on that are held out, in the evaluation before `step`."""
        if self._gaussian is None:
            return hidden
        return self._gaussian(hidden, EVALUATIONS + self._number(step), range(first, first + len(hidden)))

    def _number(self, step: int) -> int:
        """How many evaluations come before the one before `step`."""
        if step == self._job.steps:
            return evaluations(self._job) - 1
        return step // self._job.eval_every if self._job.eval_every else 0

    def spent(self, steps: int) -> dict[str, float]:
        """For the job's document: epsilon of the row that cost most, of this client's."""
        if self._budget is None:
            return {}
        spent = self._budget.spent(steps)
        if self._held_out is not None:
            count = evaluations(self._job)
            if self._job.epsilon:
                count = min(count, self._held_out.steps_allowed())
            spent = max(spent, self._held_out.spent(count))
        return {"epsilon": spent, "delta": self._job.delta}


def _secret(folder: Path) -> bytes:
    """Made once for a job, 0600."""
    path = folder / SECRET
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    try:
        made = os.urandom(SECRET_BYTES)
        os.write(file, made)
        os.fsync(file)
    finally:
        os.close(file)
    return made
