"""How a model turns positions into rotations. The rules are llama.cpp's: of its hyperparameter
loading, and of its context creation where a scaling changes what the keys say."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edged import EngineError

from ._architectures import Architecture
from ._keys import Keys


@dataclass(frozen=True, slots=True)
class Rope:
    """The arguments of ggml_rope_ext."""

    dimensions: int
    kind: int
    base: float
    scale: float
    extrapolation: float
    attention: float
    beta_fast: float
    beta_slow: float
    original_context: int


def read_rope(keys: Keys, head_dim: int, architecture: Architecture) -> Rope:
    kind = keys.text("rope.scaling.type", "linear")
    known = ("none", "linear", "yarn") + (("longrope",) if architecture.rope_factors else ())
    if kind not in known:
        raise EngineError(f"{keys.head.path}: rope scaling {kind!r} is not supported; {', '.join(known)} are")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0))
    scale = 1.0 if kind == "none" or factor <= 0 else 1.0 / factor
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        # llama.cpp takes the magnitude ggml will apply out again and puts its own in: both are
        # 1 + 0.1 ln(1 / scale), so what is left is one but for rounding.
        magnitude = 1.0 + 0.1 * math.log(1.0 / scale)
        attention *= (magnitude if 1.0 / scale > 1.0 else 1.0) / magnitude
    dimensions = keys.whole("rope.dimension_count", head_dim)
    if dimensions > head_dim or dimensions % 2:
        raise EngineError(
            f"{keys.head.path}: rope over {dimensions} of {head_dim} dimensions is not supported"
        )
    assert architecture.rope is not None
    return Rope(
        dimensions=dimensions,
        kind=architecture.rope,
        base=keys.real("rope.freq_base", 10000.0),
        scale=scale,
        extrapolation=1.0 if kind == "yarn" else 0.0,
        attention=attention,
        beta_fast=32.0,
        beta_slow=1.0,
        original_context=keys.whole("rope.scaling.original_context_length", keys.whole("context_length")),
    )
