"""Clipping and noise on what leaves a client, and the budget of the job (DisLLM, CNS 2024).

`_tensors.privacy` says what an epsilon protects, and what it does not. What is counted are releases of a row:
one an epoch of a row that is trained on, one an evaluation of a row that is held out, and one more for each
time that a step is done again with other hidden states. The same hidden states again get the same noise, bit
for bit, and tell nothing new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edged import PolicyViolation

from .._tensors.privacy import Budget
from .._tensors.smashed import Gaussian
from .._training.secret import secret_of
from ._job import Job

EVALUATIONS = 1 << 32  # numbers of noise from here on are of evaluations, below it of steps
SECRET, FOR, SENT = "noise.secret", "noise.for", "noise.sent"
MATTERS = ("clip", "noise", "epsilon", "delta", "batch_size", "seed")  # what the noise and its count stand on
UNBOUNDED = 1e9  # an epsilon of jobs that have none

Kind = Literal["step", "eval"]


class Noise:
    """Of one client: the identity where the job asks for none.

    The secret of the noise stays in `folder`, which is this rank's own: who resumes draws the same noise, and
    no other node can. With it stays what it was made for, and what was sent. PolicyViolation for a job that
    would spend more than its budget, or that had other settings or rows when it began; `who`: the client's
    name in these.
    """

    def __init__(self, job: Job, folder: str, rows: Any, who: str = "this client") -> None:
        self._job, self._who, self._gaussian, self._budget = job, who, None, None
        if rows is None or not job.clip:
            return
        place = Path(folder)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_same(place / FOR, {key: getattr(job, key) for key in MATTERS} | {"rows": rows.digest}, who)
        self._gaussian = Gaussian(job.clip, job.noise, secret_of(place / SECRET))
        self._sent = Sent(place / SENT)
        if not job.noise:
            return
        self._epoch_steps, self._has_held_out = -(-rows.count // job.batch_size), bool(rows.held_out)
        self._budget = Budget(job.epsilon or UNBOUNDED, job.delta, job.noise, 1, 1)  # a step of it: a release
        if job.epsilon and job.steps > self.steps_allowed:
            raise PolicyViolation(
                f"{job.steps} steps at {who} would spend epsilon {self.spent(job.steps)['epsilon']:.4g} at "
                f"delta {job.delta:g}; the budget is {job.epsilon:g}, enough for {self.steps_allowed} steps",
                remedy="fewer steps, more rows, more noise, or a larger epsilon",
                code="privacy-budget",
            )

    def __call__(self, hidden: Tensor, step: int, first: int = 0) -> Tensor:
        """Hidden states (B, S, d) of the rows from `first` on of a step's batch."""
        if self._gaussian is None:
            return hidden
        self._note("step", step, first, hidden)
        return self._gaussian(hidden, step, range(first, first + len(hidden)))

    def held_out(self, hidden: Tensor, step: int, first: int) -> Tensor:
        """The same of the rows from `first` on that are held out, in the evaluation before `step`."""
        if self._gaussian is None:
            return hidden
        self._note("eval", step, first, hidden)
        return self._gaussian(hidden, EVALUATIONS + step, range(first, first + len(hidden)))

    def allows(self, step: int) -> bool:
        """Does the budget of the rows that are held out allow the evaluation before `step`?"""
        if self._budget is None or not self._job.epsilon or step in self._sent.steps("eval"):
            return True
        return self._evaluated() + 1 <= self._budget.steps_allowed()

    @property
    def steps_allowed(self) -> int:
        """How many steps of this job, from the first on, the budget is enough for."""
        assert self._budget is not None
        again = self._sent.again("step")
        return max(0, self._budget.steps_allowed() - again) * self._epoch_steps

    def spent(self, steps: int) -> dict[str, float]:
        """For the job's document: epsilon of this client's row that cost most, after so many steps and the
        evaluations that were made."""
        if self._budget is None:
            return {}
        releases = max(self._trained(steps), self._evaluated())
        return {"epsilon": self._budget.spent(releases), "delta": self._job.delta}

    def survey(self) -> dict[str, Any]:
        """Before the first step: what the whole job will have spent, with its evaluations."""
        if self._budget is None:
            return {}
        job, evaluated = self._job, 0
        if self._has_held_out:
            every = range(job.eval_every, job.steps, job.eval_every) if job.eval_every else ()
            evaluated = len({0, job.steps, *every} | self._sent.steps("eval")) + self._sent.again("eval")
            if job.epsilon:
                evaluated = max(self._evaluated(), min(evaluated, self._budget.steps_allowed()))
        epsilon = self._budget.spent(max(self._trained(job.steps), evaluated))
        found: dict[str, Any] = {"epsilon": epsilon, "spent": {"epsilon": epsilon, "delta": job.delta}}
        return found | ({"steps_allowed": self.steps_allowed} if job.epsilon else {})

    def _trained(self, steps: int) -> int:
        """Releases of the row that is sent most often in so many steps."""
        return -(-steps // self._epoch_steps) + self._sent.again("step")

    def _evaluated(self) -> int:
        return len(self._sent.steps("eval")) + self._sent.again("eval")

    def _note(self, kind: Kind, step: int, first: int, hidden: Tensor) -> None:
        """Before it is sent. PolicyViolation where the budget has no room for a step that differs now."""
        if self._budget is None:
            return
        values = hidden.detach().to("cpu", torch.float32).contiguous().numpy()
        digest = hashlib.sha256(values).hexdigest()[:32]
        if self._job.epsilon and self._sent.would_be_again(kind, step, first, digest):
            releases = 1 + (self._trained(step + 1) if kind == "step" else self._evaluated())
            if releases > self._budget.steps_allowed():
                raise PolicyViolation(
                    f"{kind} {step} of {self._who} is done again with other hidden states: that would spend "
                    f"epsilon {self._budget.spent(releases):.4g}, and the budget is {self._job.epsilon:g}",
                    remedy="start a new job; look why its steps do not repeat",
                    code="privacy-budget",
                )
        self._sent.add(kind, step, first, digest)


class Sent:
    """What was sent: a line for each batch's part, with a digest of it. A last line that a power cut has cut
    is of something that was not sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, dict[int, dict[int, set[str]]]] = {"step": {}, "eval": {}}
        self._again = {"step": 0, "eval": 0}
        self._is_whole = True
        text = path.read_text() if path.exists() else ""
        for kind, step, first, digest in _lines(text):
            self._see(kind, step, first, digest)
        self._is_whole = not text or text.endswith("\n")

    def steps(self, kind: Kind) -> set[int]:
        """That were sent at all."""
        return set(self._seen[kind])

    def again(self, kind: Kind) -> int:
        """How often more a row may have been sent than there were steps, and with other values."""
        return self._again[kind]

    def would_be_again(self, kind: Kind, step: int, first: int, digest: str) -> bool:
        """Was this part of this step sent, and never with these values?"""
        seen = self._seen[kind].get(step, {}).get(first, set())
        return bool(seen) and digest not in seen

    def add(self, kind: Kind, step: int, first: int, digest: str) -> None:
        if digest in self._seen[kind].get(step, {}).get(first, ()):
            return
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            start = "" if self._is_whole else "\n"
            os.write(file, f"{start}{kind} {step} {first} {digest}\n".encode())
            os.fsync(file)
        finally:
            os.close(file)
        self._is_whole = True
        self._see(kind, step, first, digest)

    def _see(self, kind: str, step: int, first: int, digest: str) -> None:
        parts = self._seen[kind].setdefault(step, defaultdict(set))
        before = max((len(each) for each in parts.values()), default=1)
        parts[first].add(digest)
        self._again[kind] += max(0, max(len(each) for each in parts.values()) - max(1, before))


def _lines(text: str) -> Iterator[tuple[str, int, int, str]]:
    for line in text.splitlines():
        words = line.split(" ")
        if len(words) == 4 and words[0] in ("step", "eval") and words[1].isdigit() and words[2].isdigit():
            yield words[0], int(words[1]), int(words[2]), words[3]


def _check_same(path: Path, now: dict[str, Any], who: str) -> None:
    """What the noise is for, as it was when the job began."""
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        making = path.with_suffix(".making")
        making.write_text(json.dumps(now))
        os.replace(making, path)
        return
    except ValueError:
        before = {}
    changed = sorted(key for key in now if not isinstance(before, dict) or before.get(key) != now[key])
    if changed:
        raise PolicyViolation(
            f"expected what this job's noise at {who} was made for; {', '.join(changed)} changed",
            remedy="go on with the same settings and rows, or start a new job",
            code="privacy-changed",
        )
