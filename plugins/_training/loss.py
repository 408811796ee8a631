"""The loss of a batch's rows, from the hidden states that the output head reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100


def tensors_of(batch: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, S) of a batch, int64."""
    ids, labels = batch
    return torch.from_numpy(np.asarray(ids, np.int64)), torch.from_numpy(np.asarray(labels, np.int64))


def targets_of(labels: Tensor) -> int:
    """How many tokens of (B, S) are predicted: all but each row's first, where its label counts."""
    return int((labels[:, 1:] != IGNORED).sum())


def summed(span: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the tokens that count; a scalar.

    hidden (B, S, d) after the final norm; labels (B, S), not shifted. Logits are made at the positions that
    predict a token of the loss, and nowhere else.
    """
    wanted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][wanted]
    logits = span.project(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
