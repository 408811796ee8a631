"""Who trains in a round of a federated job. Pure, and light: the prediction of bytes asks it, too."""

from __future__ import annotations

from edged import NodeView

from .._rounds.cohort import Entrant, Rules, choose
from ._job import Job


def cohort_of(job: Job, round: int) -> tuple[int, ...]:
    """Ranks, ascending: ceil(fraction n) of the n clients, by the job's seed and the round alone. A job that
    goes on from a checkpoint has the same."""
    ranks = range(len(job.clients))
    if job.fraction == 1:
        return tuple(ranks)
    entrants = [Entrant(rank, NodeView(str(rank), job.clients[rank].node)) for rank in ranks]
    return choose(entrants, round, job.seed, job.fraction, Rules()).chosen
