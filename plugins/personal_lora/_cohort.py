"""Who trains in a round of a federated job. Pure, and light: the prediction of bytes asks it, too."""

from __future__ import annotations

import math

from edged import NodeView

from .._rounds.cohort import NEARLY, Entrant, Rules, choose
from ._job import Job


def cohort_of(job: Job, round: int) -> tuple[int, ...]:
    """Ranks, ascending: ceil(fraction n) of the n clients, by the job's seed and the round alone. A job that
    goes on from a checkpoint has the same."""
    ranks = range(len(job.clients))
    if job.fraction == 1:
        return tuple(ranks)
    entrants = [Entrant(rank, NodeView(str(rank), job.clients[rank].node)) for rank in ranks]
    return choose(entrants, round, job.seed, job.fraction, Rules()).chosen


def wanted_of(job: Job) -> int:
    """Members that a round asks for."""
    return math.ceil(job.fraction * len(job.clients) - NEARLY)


def need_of(job: Job) -> int:
    """Updates without which a round does not close."""
    return math.ceil(job.quorum * wanted_of(job) - NEARLY)


def rules_of(job: Job) -> Rules:
    """What a member's device must be like; 0 in the file asks for nothing."""
    return Rules(
        job.only_charging,
        job.battery_least or None,
        job.celsius_most or None,
        throttled=True,  # its node rests by itself where the profile says so
        metered=job.metered,
        idle_s=job.idle_s,
    )
