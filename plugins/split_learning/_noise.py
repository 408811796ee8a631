"""Clipping and noise on what leaves a client, and the budget that ends the job (DisLLM, CNS 2024).

`_tensors.privacy` says what an epsilon protects, and what it does not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .._tensors.privacy import Budget, Gaussian
from ._job import Job

SECRET_BYTES = 32
SECRET = "noise.secret"


class Noise:
    """Of one client: the identity where the job asks for none.

    The secret of the noise stays in `folder`, which is this rank's own: who resumes draws the same noise, and
    no other node can.
    """

    def __init__(self, job: Job, folder: str, rows: Any) -> None:
        self._job, self._gaussian, self._budget = job, None, None
        if rows is None or not job.clip:
            return
        self._gaussian = Gaussian(job.clip, job.noise, _secret(Path(folder)))
        if job.epsilon or job.noise:
            most = job.epsilon or 1e9
            self._budget = Budget(most, job.delta, job.noise, job.batch_size, rows.count)

    def __call__(self, hidden: Tensor, step: int, first: int = 0) -> Tensor:
        """Hidden states (B, S, d) of the rows from `first` on of a step's batch. PolicyViolation where the
        step would spend more than the budget."""
        if self._budget is not None and self._job.epsilon:
            self._budget.check_before(step)
        if self._gaussian is None:
            return hidden
        return self._gaussian(hidden, step, range(first, first + len(hidden)))

    def spent(self, steps: int) -> dict[str, float]:
        """For the job's document."""
        if self._budget is None:
            return {}
        return {"epsilon": self._budget.spent(steps), "delta": self._job.delta}


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
