"""Preference tuning: direct preference optimisation (DPO, Rafailov et al., arXiv:2305.18290, equation 7).

    -log sigmoid(beta ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r))))

for a prompt with a chosen answer c and a rejected one r, log-probabilities summed over the answer's tokens.
The reference is the model with its adapter switched off; it is computed with each batch and never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .loss import IGNORED, summed, targets_of


class Answers:
    """Instruction tuning: cross entropy of the tokens that count."""

    def summed(self, span: Any, ids: Tensor, labels: Tensor) -> Tensor:
        """A scalar: the loss summed over what `targets` counts; ids, labels (B, S)."""
        return summed(span, span(ids), labels)

    def targets(self, labels: Tensor) -> int:
        return targets_of(labels)

    def take(self) -> dict[str, float]:
        """What was seen beside the loss since this was last called."""
        return {}


class Preference:
    """DPO of pairs: ids and labels (2 P, S), the chosen rows of all pairs first, then the rejected ones.

    `take` gives sums over pairs: "wins" (the margin is above 0), and what margins above and below 0 add up
    to, as "margin_up" and "margin_down", both 0 or more. A margin is beta times the difference of
    log-ratios.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._margins: list[Tensor] = []

    def summed(self, span: Any, ids: Tensor, labels: Tensor) -> Tensor:
        """A scalar: the loss summed over pairs."""
        with torch.no_grad(), span.bare():
            reference = log_probabilities(span, span(ids), labels)
        ratios = log_probabilities(span, span(ids), labels) - reference
        chosen, rejected = ratios.chunk(2)
        margins = self._beta * (chosen - rejected)
        self._margins.append(margins.detach().double().cpu())
        return -torch.nn.functional.logsigmoid(margins).sum()

    def targets(self, labels: Tensor) -> int:
        """Pairs."""
        return len(labels) // 2

    def take(self) -> dict[str, float]:
        margins = torch.cat(self._margins) if self._margins else torch.zeros(0)
        self._margins = []
        return {
            "wins": float((margins > 0).sum()),
            "margin_up": float(margins.clamp(min=0).sum()),
            "margin_down": float(-margins.clamp(max=0).sum()),
        }


def objective_of(name: str, beta: float) -> Answers | Preference:
    """By a job's word, "sft" or "dpo"."""
    return Preference(beta) if name == "dpo" else Answers()


def log_probabilities(span: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """(B,): each row's log-probabilities summed over the tokens that count, from hidden states (B, S, d)
    after the final norm; labels (B, S), not shifted."""
    wanted = labels[:, 1:] != IGNORED
    targets, rows = labels[:, 1:][wanted], wanted.nonzero()[:, 0]
    logits = span.project(hidden[:, :-1][wanted])
    each = -torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return torch.zeros(len(labels), device=each.device).index_add(0, rows.to(each.device), each)
