"""From logits to a token, over a vocabulary that may be sliced between ranks.

Every rank of the last stage reduces its slice to what sampling needs (`keep_of`, `best`), rank 0
merges and draws. Ties go to the lowest id. The order is llama.cpp's common chain: top-k, top-p,
temperature. The random number of a position depends on (seed, position) only, so a resumed job
draws the same tokens.
"""

from __future__ import annotations

import numpy as np

from edged import EngineError, Sampling

KEEP_ALL = -1  # all of a slice's logits, not its best few


def keep_of(sampling: Sampling | None, vocab: int) -> int:
    """How many of the best logits `sampling` needs; 0: none, KEEP_ALL: the whole vocabulary."""
    if sampling is None:
        return 0
    if sampling.temperature <= 0:
        return 1
    return sampling.top_k if 0 < sampling.top_k < vocab else KEEP_ALL


def kept(keep: int, vocab: int) -> int:
    """Length of what `best` returns for a slice of `vocab` logits."""
    return vocab if keep == KEEP_ALL else min(keep, vocab)


def best(logits: np.ndarray, keep: int, first_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and values (float32) of the `keep` largest logits, best first, ties by id; all of
    them, in the order of their ids, for KEEP_ALL. `first_id`: the id of logits[0]."""
    if not np.isfinite(logits).all():
        raise EngineError("the model produced logits that are not numbers; its file may be damaged")
    if keep == KEEP_ALL:
        return np.arange(first_id, first_id + len(logits), dtype=np.int32), logits.astype(np.float32)
    if keep == 1:
        ids = np.array([logits.argmax()])
    else:
        ids = np.arange(len(logits))
        if keep < len(logits):
            least = np.partition(logits, -keep)[-keep]
            above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
            ids = np.concatenate([above, equal[: keep - len(above)]])
        ids = ids[np.lexsort((ids, -logits[ids]))]
    return (ids + first_id).astype(np.int32), logits[ids].astype(np.float32)


def choose(ids: np.ndarray, values: np.ndarray, sampling: Sampling, position: int) -> int:
    """The token for `position` from candidates of all slices, which hold at least the best top_k."""
    order = np.lexsort((ids, -values))
    ids, values = ids[order], values[order].astype(np.float64)
    if sampling.temperature <= 0:
        return int(ids[0])
    if sampling.top_k > 0:
        ids, values = ids[: sampling.top_k], values[: sampling.top_k]
    if 0 < sampling.top_p < 1:
        mass = np.cumsum(_softmax(values))
        count = int(np.searchsorted(mass, sampling.top_p)) + 1
        ids, values = ids[:count], values[:count]
    mass = np.cumsum(_softmax(values / sampling.temperature))
    drawn = int(np.searchsorted(mass, uniform(sampling.seed, position) * mass[-1], side="right"))
    return int(ids[min(drawn, len(ids) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else (Philox, Salmon et al. 2011)."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    shares: np.ndarray = raised / raised.sum()
    return shares
