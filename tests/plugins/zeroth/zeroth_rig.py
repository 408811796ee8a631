"""What tests of methods without gradients share."""

from __future__ import annotations

import numpy as np

from edged import Factors


def start() -> Factors:
    """Two layers, at r = 4."""
    drawn = np.random.default_rng(0)
    return {
        f"layers.{i}.q_proj": (
            drawn.standard_normal((4, 6)).astype(np.float32),
            np.zeros((5, 4), np.float32),
        )
        for i in (2, 10)
    }
