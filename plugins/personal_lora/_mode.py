"""Asynchronous methods: which they are, what a job of theirs cannot have, and how often members push. Pure.

The other methods wait in each round for all updates of it. With one of these the server waits for nobody, and
the file's `rounds` counts its revisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._training.file import Rule

FEDBUFF, NESTEROV = "fedbuff", "delayed-nesterov"
ASYNCHRONOUS = (FEDBUFF, NESTEROV)
STEPS_MOST = 100_000  # of a turn, as of a round


def is_asynchronous(job: Any) -> bool:
    return job.method in ASYNCHRONOUS


def pushes_of(job: Any) -> int:
    """Pushes that make one revision."""
    return int(job.options["buffer"]) if job.method == FEDBUFF else 1


def window_of(options: Mapping[str, Any], members: int) -> int:
    """Of delayed Nesterov: pushes between two steps of its momentum; 0 in the file: as many as members."""
    return int(options["window"]) or members


def waited_s(job: Any, seconds: Sequence[float]) -> float:
    """Between two revisions: members push side by side, each in its own seconds."""
    return pushes_of(job) / sum(1 / each for each in seconds)


def rules(job: Any) -> list[Rule]:
    """What a job of such a method must have besides; none of another."""
    if not is_asynchronous(job):
        return []
    method = job.method
    found: list[Rule] = [
        (job.keeps == "none", f"personal = none with {method}: personal steps are of rounds"),
        (not job.is_semi, f"mode = synchronous with {method}, whose server waits for nobody anyway"),
        (job.objective == "sft", f"objective = sft with {method}: it tells one loss of each push"),
        (not job.rehearsal, f"rehearsal = 0 with {method}: it tells one loss of each push"),
        (job.fraction == 1, f"fraction = 1 with {method}: nobody is drawn where nobody is waited for"),
        (
            not any(job.joins(rank) for rank in range(len(job.clients))),
            f"the job's method of every client with {method}: a push is a change of factors",
        ),
    ]
    if method == NESTEROV:
        window = window_of(job.options, len(job.clients))
        found += [
            (
                not any(client.weight for client in job.clients) and not job.weight_most,
                f"no weight with {method}: every push counts alike; {FEDBUFF} has weights",
            ),
            (
                not window or 0 <= job.options["spread"] <= 1 / window,
                f"spread from 0 to 1 / window, here 1 / {window}; {job.options['spread']!r} came",
            ),
        ]
    return found
