"""What members tell of a round beside the loss, where a job asks for it: preferences, and rehearsal. Pure.

All are sums of 0 or more, after `_messages.FIGURES` in the same frame; a server makes means of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ._job import Job

SUMS = ("wins", "margin_up", "margin_down")  # over pairs
PREFERENCE = (*SUMS, *(f"eval_{name}" for name in SUMS))
REHEARSAL = ("rehearsal_loss", "rehearsal_targets")  # of held-out rows that are rehearsed
Told = Mapping[int, Mapping[str, float]]  # figures by rank


def names(job: Job) -> tuple[str, ...]:
    """In the order of the frame."""
    return (*(PREFERENCE if job.objective == "dpo" else ()), *(REHEARSAL if job.rehearsal else ()))


def of_round(told: Told) -> dict[str, float]:
    """ "accuracy" and "margin" of the pairs that were trained on; nothing of other jobs."""
    return _preferred(told, "")


def of_eval(told: Told) -> dict[str, float]:
    """The same of held-out pairs, and "rehearsal_loss" of held-out rows of what is rehearsed."""
    found, targets = _preferred(told, "eval_"), _sum(told, "rehearsal_targets")
    return found | ({"rehearsal_loss": _sum(told, "rehearsal_loss") / targets} if targets else {})


def _preferred(told: Told, when: str) -> dict[str, float]:
    pairs = _sum(told, f"{when}targets")
    if not pairs or not any(f"{when}wins" in figures for figures in told.values()):
        return {}
    margin = _sum(told, f"{when}margin_up") - _sum(told, f"{when}margin_down")
    return {"accuracy": _sum(told, f"{when}wins") / pairs, "margin": margin / pairs}


def _sum(told: Told, name: str) -> float:
    return sum(figures.get(name, 0.0) for figures in told.values())
