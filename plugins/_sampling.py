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
KEEP_TOP_P = -2  # the best TOP_P_KEPT, and one more candidate for the rest
TOP_P_KEPT = 256  # 2 KB a slice instead of the vocabulary; top-p of 0.95 takes fewer but of very flat logits
REST = -1  # the id of what stands for all that a slice left out; its value is their log-sum-exp


def keep_of(sampling: Sampling | None, vocab: int) -> int:
    """How many of the best logits `sampling` needs; 0: none, or KEEP_TOP_P, or KEEP_ALL where neither
    top-k nor top-p bounds what may be drawn."""
    if sampling is None:
        return 0
    if sampling.temperature <= 0:
        return 1
    if 0 < sampling.top_k < vocab:
        return sampling.top_k
    return KEEP_TOP_P if sampling.top_k <= 0 and 0 < sampling.top_p < 1 else KEEP_ALL


def kept(keep: int, vocab: int) -> int:
    """Length of what `best` returns for a slice of `vocab` logits."""
    if keep == KEEP_TOP_P:
        return min(TOP_P_KEPT, vocab) + 1
    return vocab if keep == KEEP_ALL else min(keep, vocab)


def are_of(ids: np.ndarray, keep: int, start: int, end: int) -> bool:
    """Can `ids` be what `best` gives for `keep` of the slice of these rows?"""
    if keep == KEEP_TOP_P:
        if len(ids) < 2 or ids[-1] != REST:
            return False
        ids = ids[:-1]
    return bool(((ids >= start) & (ids < end)).all())


def best(logits: np.ndarray, keep: int, first_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and values (float32) of the `keep` largest logits, best first, ties by id; all of
    them, in the order of their ids, for KEEP_ALL; for KEEP_TOP_P a last one is the REST. `first_id`: the
    id of logits[0]."""
    if not np.isfinite(logits).all():
        raise EngineError("the model produced logits that are not numbers; its file may be damaged")
    if keep == KEEP_ALL:
        return np.arange(first_id, first_id + len(logits), dtype=np.int32), logits.astype(np.float32)
    if keep == KEEP_TOP_P:
        ids, values = best(logits, TOP_P_KEPT, first_id)
        left_out = np.delete(logits, ids - first_id)
        return np.append(ids, np.int32(REST)), np.append(values, np.float32(_log_sum_exp(left_out)))
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
    """The token for `position` from candidates of all slices, which hold what `keep_of` says.

    top-p without top-k looks at the best TOP_P_KEPT tokens of the vocabulary. Where those hold less than
    top_p of the probability, all of them may be drawn and no others.
    """
    is_rest = ids == REST
    left_out = _log_sum_exp(values[is_rest])
    ids, values = ids[~is_rest], values[~is_rest]
    order = np.lexsort((ids, -values))
    ids, values = ids[order], values[order].astype(np.float64)
    if sampling.temperature <= 0:
        return int(ids[0])
    if sampling.top_k > 0:
        ids, values = ids[: sampling.top_k], values[: sampling.top_k]
    elif is_rest.any():  # slices keep as many each: as if one had kept them
        left_out = np.logaddexp(left_out, _log_sum_exp(values[TOP_P_KEPT:]))
        ids, values = ids[:TOP_P_KEPT], values[:TOP_P_KEPT]
    if 0 < sampling.top_p < 1:
        mass = np.cumsum(np.exp(values - np.logaddexp(left_out, _log_sum_exp(values))))
        count = int(np.searchsorted(mass, sampling.top_p)) + 1
        ids, values = ids[:count], values[:count]
    mass = np.cumsum(_softmax(values / sampling.temperature))
    drawn = int(np.searchsorted(mass, uniform(sampling.seed, position) * mass[-1], side="right"))
    return int(ids[min(drawn, len(ids) - 1)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else (Philox, Salmon et al. 2011)."""
    key = np.array([seed % 2**64, position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def _log_sum_exp(values: np.ndarray) -> float:
    """log(sum(exp(values))), -inf of none."""
    values = values[values > -np.inf].astype(np.float64)
    if not len(values):
        return -np.inf
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def _softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    shares: np.ndarray = raised / raised.sum()
    return shares
