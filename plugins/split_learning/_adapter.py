"""The adapter that a job made, written where the collector's node will find it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edged import TrainingSpec

from .._tensors import adapters
from ._job import Job


def write(folder: Path, tensors: Mapping[str, np.ndarray], job: Job, blocks: Any, spec: TrainingSpec) -> None:
    """A PEFT folder; beside it adapter.gguf, where the model is a GGUF."""
    adapters.write_peft(
        folder, tensors, r=job.r, alpha=job.alpha, targets=job.target_modules, base_name=spec.model_name
    )
