"""The loss of token ids under a lone rank's model: nothing is kept for a backward pass.

Each row is one graph, up to the last token that counts, whose head makes logits at the positions that predict
one and nowhere else.
"""

from __future__ import annotations

import numpy as np

from edged import EngineError

from .._tensors.rows import IGNORED
from ._cache import BUCKET, Cache, round_up
from ._graph import Graph
from ._layers import Shard, Span

AT_ONCE = 1 << 20  # logits that are looked at in F64 together


class Loss:
    """Of rows of at most `tokens_max` tokens. Its cache holds one row and is of its own."""

    def __init__(self, shard: Shard, tokens_max: int) -> None:
        """EngineError where the rank has not the whole model."""
        place, model = shard.place, shard.model
        if place.size != 1:
            raise EngineError(f"expected a rank that is alone; it is one of {place.size}")
        if "position_embd" in model.architecture.embedding and tokens_max > model.context_tokens:
            raise EngineError(
                f"expected max_length of at most {model.context_tokens}, for which this model learned "
                f"positions; got {tokens_max}",
                remedy="lower max_length",
            )
        row = shard.kv_heads * model.head_dim
        self._shard, self._vocab, self._most = shard, model.vocab, tokens_max
        self._cache = Cache(shard.lib, model.layers, row, 1, tokens_max, shard.cache_type)

    def __call__(self, ids: np.ndarray, labels: np.ndarray) -> float:
        """Cross-entropy in nats, summed in F64 over `labels` (rows, tokens) that are not `IGNORED`: the
        logits at position t are scored by the label at t + 1. EngineError where ids or labels are no
        tokens."""
        if ids.ndim != 2 or ids.shape != labels.shape or not 0 < ids.shape[1] <= self._most:
            raise EngineError(
                f"expected ids and labels of one shape, up to {self._most} tokens a row; "
                f"got {ids.shape} and {labels.shape}"
            )
        scored = labels[labels != IGNORED]
        if any(each.size and not 0 <= each.min() <= each.max() < self._vocab for each in (ids, scored)):
            raise EngineError(f"expected token ids below {self._vocab}")
        return sum(self._of_row(*pair) for pair in zip(ids, labels, strict=True))

    def close(self) -> None:
        self._cache.close()

    def _of_row(self, ids: np.ndarray, labels: np.ndarray) -> float:
        kept = np.flatnonzero(labels[1:] != IGNORED)
        if not kept.size:
            return 0.0
        count = int(kept[-1]) + 1
        span = Span(0, count, min(round_up(count, BUCKET), self._cache.capacity), True)
        graph = Graph(self._shard, self._cache, (span,), kept=kept.tolist())
        try:
            graph.run([0], ids[:count].astype(np.int32))
            assert graph.logits is not None
            return _summed(graph.logits, labels[1:][kept])
        finally:
            graph.close()


def _summed(logits: np.ndarray, labels: np.ndarray) -> float:
    """Of logits (positions, vocabulary), each scored by its label."""
    total, step = 0.0, max(1, AT_ONCE // logits.shape[1])
    for first in range(0, len(labels), step):
        some, wanted = logits[first : first + step].astype(np.float64), labels[first : first + step]
        picked = some[np.arange(len(wanted)), wanted]
        top = some.max(1)
        some -= top[:, None]
        np.exp(some, out=some)
        total += float((top + np.log(some.sum(1)) - picked).sum())
    return total
