"""The residual is the definition's number, whatever the shapes, ranks and kinds of a download."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from aggregator_rig import (
    SHAPES,
    Run,
    dense_residual,
    loaded,
    made,
    mean_product,
    members_of,
    start_of,
    updates_of,
)
from edged_plugins.personal_lora._factors import Stack
from edged_plugins.personal_lora._residual import BEHIND_MOST, Residual, _target, _Written, residual

from edged import ConfigError, Download, Update

COHORTS = {
    "few": ([4, 4, 4], 2.0),
    "unlike": ([4, 2, 1], [2.0, 1.0, 0.5]),
    "alone": ([3], 1.0),
    "at the limit": ([4] * 3, 1.0),
    "above the smaller matrix's rank": ([4] * 5, 1.0),
    "above both": ([4] * 14, 1.0),
}


def drawn(members, seed=7, merged=0):
    """Downloads of anything at all."""
    rows = updates_of(members, seed)
    more = updates_of(members_of(1, merged), seed + 1)[0].factors if merged else {}
    return [(m, Download(u.factors, more)) for m, u in zip(members, rows, strict=True)]


@pytest.mark.parametrize("merged", [0, 1, 9, 30])
@pytest.mark.parametrize("cohort", COHORTS)
def test_the_residual_is_that_of_matrices_written_out(cohort: str, merged: int) -> None:
    rs, scale = COHORTS[cohort]
    members = members_of(len(rs), rs, scale if isinstance(scale, list) else float(scale))
    updates, downloads = updates_of(members), drawn(members, merged=merged)
    assert residual(updates, downloads) == pytest.approx(dense_residual(updates, downloads), rel=1e-12)


@pytest.mark.parametrize(
    ("count", "is_written"), [(1, False), (3, False), (13, False), (14, True), (60, True)]
)
@pytest.mark.parametrize("merged", [0, 5])
def test_a_sum_in_its_bases_and_one_written_out_have_the_same_residual(
    count: int, is_written: bool, merged: int
) -> None:
    """Of 200 x 240 the bases cost more from rank 55 on."""
    shapes = {"q_proj": (200, 240)}
    members = members_of(count)
    updates = updates_of(members, shapes=shapes)
    stack = Stack(200, 240)
    for update in updates:
        stack.add(update.weight * update.member.scale, *update.factors["q_proj"])
    assert isinstance(_target(stack, 1.0), _Written) == is_written
    more = updates_of(members_of(1, merged), 8, shapes=shapes)[0].factors if merged else {}
    other = updates_of(members[:1], 9, shapes=shapes)[0].factors
    downloads = [(members[0], Download(other, more))]
    assert residual(updates, downloads) == pytest.approx(dense_residual(updates, downloads), rel=1e-12)


def test_a_stack_is_its_sum_whatever_was_added_up_before() -> None:
    """Looked at after each of so many parts that it is added up several times."""
    shapes, stack, total = {"q_proj": (20, 24)}, Stack(20, 24), np.zeros((24, 20))
    for seed, update in enumerate(updates_of(members_of(30), 3, shapes=shapes)):
        A, B = update.factors["q_proj"]
        stack.add(0.5 + seed, A, B)
        total += (0.5 + seed) * B @ A
        np.testing.assert_allclose(stack.dense(), total, rtol=0, atol=1e-12 * np.abs(total).max())
        if seed % 7 == 6:
            A, B = stack.pair(2.0)
            assert A.shape[0] <= 20
            np.testing.assert_allclose(B @ A, 2 * total, rtol=0, atol=1e-12 * np.abs(total).max())


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("cohort", COHORTS)
def test_what_is_the_sum_itself_has_no_residual_and_a_small_error_is_seen_as_it_is(
    cohort: str, dtype: str
) -> None:
    """A distance from squares alone would end at 1e-8."""
    rs, scale = COHORTS[cohort]
    members = members_of(len(rs), rs, scale if isinstance(scale, list) else float(scale))
    updates = updates_of(members, dtype=dtype)
    whole = {n: (np.eye(i), mean_product(updates, n)) for n, (i, _) in SHAPES.items()}
    nothing = start_of(4, dtype="f8")
    assert residual(updates, [(members[0], Download(nothing, whole))]) < 1e-14
    name = min(SHAPES)
    wrong = {**whole, name: (whole[name][0], whole[name][1] * (1 + 1e-11))}
    assert residual(updates, [(members[0], Download(nothing, wrong))]) == pytest.approx(1e-11, rel=1e-2)


def test_of_members_and_matrices_the_worst_counts() -> None:
    members = members_of(3, [4, 2, 1], 1.0)
    updates = updates_of(members)
    run = Run(made("flexlora", start_of(dtype="f8"), members), members)
    run.round(0, updates)
    each = [residual(updates, [pair]) for pair in run.downloads()]
    assert each[0] < each[1] < each[2]
    assert (
        residual(updates, run.downloads())
        == each[2]
        == pytest.approx(dense_residual(updates, run.downloads()))
    )


def test_a_sum_of_nothing_is_met_by_nothing_and_missed_by_anything() -> None:
    members = members_of(2)
    start = start_of(dtype="f8")
    updates = [Update(m, 0, 1.0, start) for m in members]  # B is zero
    assert residual(updates, [(m, Download(start)) for m in members]) == 0.0
    assert residual(updates, drawn(members)) == math.inf


def test_a_residual_of_no_update_or_of_what_is_no_number_is_none() -> None:
    members = members_of(2)
    assert math.isnan(Residual().of(drawn(members)))
    A, B = start_of()[min(SHAPES)]
    downloads = [(members[0], Download({**start_of(), min(SHAPES): (A * np.nan, B + 1)}))]
    assert math.isnan(residual(updates_of(members), downloads))


def test_an_update_without_weight_is_refused() -> None:
    (update,) = updates_of(members_of(1), weights=[0.0])
    with pytest.raises(ConfigError, match="weight above 0 of rank 0"):
        Residual().add(update)


def test_memory_ends_at_that_of_the_matrices() -> None:
    shapes = {"q_proj": (32, 48)}
    (member,) = members_of(1)
    kept = []
    tracemalloc.start()
    try:
        with Residual() as meter:
            for seed in range(200):
                meter.add(updates_of([member], seed, dtype="f4", shapes=shapes)[0])
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    queue = BEHIND_MOST * 2048  # updates whose sums are not made yet, of 1280 bytes each and what holds them
    assert max(kept[100:]) - max(kept[:100]) < queue


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_mean_beside_one_frozen_factor_has_no_residual(frozen: str) -> None:
    members = members_of(3)
    updates = updates_of(members)
    same = updates[0].factors
    pairs = [
        {n: (same[n][0], B) if frozen == "A" else (A, same[n][1]) for n, (A, B) in u.factors.items()}
        for u in updates
    ]
    updates = [Update(m, 0, u.weight, f) for m, u, f in zip(members, updates, pairs, strict=True)]
    run = Run(made("fedavg", start_of(dtype="f8"), members), members)
    run.round(0, updates)
    assert residual(updates, run.downloads()) < 1e-15
    assert np.allclose(loaded(*run.downloads()[0], min(SHAPES)), mean_product(updates, min(SHAPES)))
