"""How many bytes a tensor takes on the wire: the codecs of `_tensors/codecs.py` in plain numbers.

A planner needs them where there is no torch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from edged import ConfigError

CODECS = ("f32", "f16", "int8", "topk", "topk-f16", "adatopk")
INDEX_BYTES = 4
ADA_FACTOR = 3.0

Link = TypeVar("Link", bound=Hashable)


def payload_bytes(name: str, shape: Sequence[int], ratio: float = 1.0) -> int:
    """Bytes of all frames of a tensor of `shape`, its last dimension the row; headers are not in it.

    `ratio`: how many values there are for one that top-k sends. ConfigError for an unknown codec.
    """
    n = math.prod(shape)
    match name:
        case "f32":
            return 4 * n
        case "f16":
            return 2 * n
        case "int8":
            return n + 4 * (n // shape[-1] if n else 0)
        case "topk":
            return kept(n, ratio) * (INDEX_BYTES + 4)
        case "topk-f16":
            return kept(n, ratio) * (INDEX_BYTES + 2)
        case "adatopk":
            return min(4 * n, kept(n, ratio) * (INDEX_BYTES + 4))
    raise ConfigError(f"no codec {name!r}; there are {', '.join(CODECS)}")


def kept(n: int, ratio: float) -> int:
    """ceil(n / ratio), exactly for the ratio that the float is."""
    if not 1 <= ratio < math.inf:
        raise ConfigError(f"ratio: expected a number of at least 1, got {ratio}")
    return math.ceil(Fraction(n) / Fraction(ratio))


def ada_ratios(times: Mapping[Link, float], r: float, factor: float = ADA_FACTOR) -> dict[Link, float]:
    """The ratio of each link for `adatopk`, from the seconds that its uncompressed tensors take.

    r_ij = max(1, factor r T_ij / max T), where the paper's factor is 3; 1 is lossless. With factor 1 the
    slowest link has r itself, so that r = 1 is lossless everywhere. Every tensor of a link whose ratio would
    make it larger, an index beside each value, travels whole, so that no link's time grows. Source:
    FusionLLM, arXiv 2410.12707, "AdaTopK".
    """
    if not 1 <= r < math.inf:
        raise ConfigError(f"ratio: expected a number of at least 1, got {r}")
    for link, time in times.items():
        if not 0 <= time < math.inf:
            raise ConfigError(f"link {link}: expected its time in seconds, got {time}")
    slowest = max(times.values(), default=0.0)
    return {link: max(1.0, factor * r * (t / slowest)) if slowest else 1.0 for link, t in times.items()}
