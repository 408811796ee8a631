"""Sampling reduces slices of a vocabulary and draws by (seed, position) only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from edged_plugins._sampling import (
    KEEP_ALL,
    KEEP_TOP_P,
    REST,
    TOP_P_KEPT,
    are_of,
    best,
    choose,
    keep_of,
    kept,
    uniform,
)

from edged import EngineError, Sampling

VOCAB = 997
CUTS = (0, 64, 640, VOCAB)


def logits_of(seed: int) -> np.ndarray:
    """Coarse values, so that ties abound."""
    return np.round(np.random.default_rng(seed).standard_normal(VOCAB) * 4).astype(np.float32) / 2


def sliced(logits: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [best(logits[a:b], keep, a) for a, b in itertools.pairwise(CUTS)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 2000])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_slices_draw_what_the_whole_vocabulary_draws(top_k: int, temperature: float) -> None:
    for seed in range(20):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=0.9, seed=seed)
        logits, keep = logits_of(seed), keep_of(sampling, VOCAB)
        whole = choose(*best(logits, keep if keep == KEEP_TOP_P else KEEP_ALL), sampling, 10)
        assert choose(*sliced(logits, keep), sampling, 10) == whole
        assert choose(*best(logits, keep), sampling, 10) == whole


def test_top_p_alone_is_exact_within_what_is_kept_and_cut_there() -> None:
    """Against the whole vocabulary, of steep logits; of flat ones, the same as the best of one list."""
    for seed in range(40):
        sampling = Sampling(temperature=1.2, top_k=0, top_p=0.9, seed=seed)
        assert keep_of(sampling, VOCAB) == KEEP_TOP_P
        steep = logits_of(seed) * 2
        mass = np.sort(np.exp(steep.astype(np.float64)))[::-1]
        assert mass[:TOP_P_KEPT].sum() > 0.9 * mass.sum()
        assert choose(*sliced(steep, KEEP_TOP_P), sampling, 3) == choose(*best(steep, KEEP_ALL), sampling, 3)
        flat = logits_of(seed) / 100
        drawn = choose(*sliced(flat, KEEP_TOP_P), sampling, 3)
        assert drawn == choose(*best(flat, KEEP_TOP_P), sampling, 3)
        expected = choose(*best(flat, TOP_P_KEPT), Sampling(1.2, 0, 1.0, seed), 3)
        assert drawn == expected  # all that are kept, and no others


def test_what_a_slice_leaves_out_is_one_candidate_more() -> None:
    logits = logits_of(2)
    ids, values = best(logits, KEEP_TOP_P, 100)
    assert len(ids) == len(values) == kept(KEEP_TOP_P, VOCAB) == TOP_P_KEPT + 1
    assert ids[-1] == REST
    rest = np.setdiff1d(np.arange(VOCAB), ids[:-1] - 100)
    assert values[-1] == pytest.approx(np.log(np.exp(logits[rest].astype(np.float64)).sum()), rel=1e-6)
    few = best(logits[:5], KEEP_TOP_P)
    assert len(few[0]) == kept(KEEP_TOP_P, 5) == 6
    assert few[1][-1] == -np.inf
    assert are_of(ids, KEEP_TOP_P, 100, 100 + VOCAB)
    for stranger in (-2, 99, 100 + VOCAB):
        assert not are_of(np.insert(ids, 0, stranger), KEEP_TOP_P, 100, 100 + VOCAB)


@pytest.mark.parametrize("keep", [1, 7, KEEP_ALL, KEEP_TOP_P])
def test_the_rest_stands_last_and_only_where_it_was_asked_for(keep: int) -> None:
    ids, _ = best(logits_of(0), keep)
    assert are_of(ids, keep, 0, VOCAB)
    assert not are_of(np.full_like(ids, REST), keep, 0, VOCAB)
    assert not are_of(np.array([REST]), keep, 0, VOCAB)
    if keep == KEEP_TOP_P:
        assert not are_of(ids[:-1], keep, 0, VOCAB)
        assert not are_of(ids[::-1], keep, 0, VOCAB)
    else:
        assert not are_of(np.append(ids[:-1], REST), keep, 0, VOCAB)


@pytest.mark.parametrize(
    ("sampling", "keep"),
    [
        (None, 0),
        (Sampling(temperature=0, top_k=0), 1),
        (Sampling(top_k=40), 40),
        (Sampling(top_k=0, top_p=0.9), KEEP_TOP_P),
        (Sampling(top_k=0, top_p=1.0), KEEP_ALL),
        (Sampling(top_k=5000, top_p=0.9), KEEP_ALL),
    ],
)
def test_what_a_sampling_needs(sampling: Sampling | None, keep: int) -> None:
    assert keep_of(sampling, VOCAB) == keep


@pytest.mark.parametrize("keep", [1, 5, 63, 64, 996, 997, 5000, KEEP_ALL])
def test_the_best_are_those_of_a_full_sort(keep: int) -> None:
    logits = logits_of(1)
    ids, values = best(logits, keep, 100)
    assert len(ids) == len(values) == kept(keep, VOCAB)
    assert np.array_equal(values, logits[ids - 100])
    if keep != KEEP_ALL:
        order = sorted(range(VOCAB), key=lambda i: (-logits[i], i))[:keep]
        assert ids.tolist() == [100 + i for i in order]


def test_ties_go_to_the_lowest_id() -> None:
    sampling = Sampling(temperature=0)
    assert choose(np.array([9, 4, 7]), np.array([1.0, 1.0, 0.5]), sampling, 0) == 4
    assert best(np.zeros(5, np.float32), 1)[0].tolist() == [0]


def test_the_random_number_depends_on_seed_and_position_only() -> None:
    numbers = [uniform(seed, position) for seed in range(30) for position in range(30)]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [uniform(seed, position) for seed in range(30) for position in range(30)]
    assert all(0 <= n < 1 for n in numbers)
    assert abs(np.mean(numbers) - 0.5) < 0.05
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


def test_draws_follow_the_probabilities_left_by_top_k_top_p_and_temperature() -> None:
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    ids = np.arange(4)

    def share(sampling: dict[str, float], count: int = 4000) -> np.ndarray:
        drawn = [choose(ids, values, Sampling(**sampling, seed=1), p) for p in range(count)]
        return np.bincount(drawn, minlength=4) / count

    plain = share({"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    assert np.abs(plain - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert np.abs(share({"temperature": 1.0, "top_k": 2, "top_p": 1.0}) - [0.625, 0.375, 0, 0]).max() < 0.03
    # top-p looks at temperature 1, whatever the temperature: 0.5 + 0.3 reaches 0.75
    assert share({"temperature": 5.0, "top_k": 0, "top_p": 0.75})[2:].tolist() == [0, 0]
    cold = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    assert np.abs(share({"temperature": 0.5, "top_k": 0, "top_p": 1.0}) - cold).max() < 0.03


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(EngineError, match="not numbers"):
        best(np.array([1.0, np.nan], np.float32), 1)
