"""Every registered aggregator keeps the contract of `Aggregator`: a new one is one row of ROWS."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from aggregator_rig import (
    ENTRIES,
    SHAPES,
    Run,
    bits,
    made,
    mean_product,
    members_of,
    of_adapter,
    product,
    reweighted,
    same_bits,
    start_of,
    updates_of,
)
from edged_plugins import personal_lora
from edged_plugins.personal_lora import _settings

from edged import ConfigError, Member, PolicyViolation, Update


@dataclass(frozen=True)
class Row:
    """`alone`: does a round of one member end with that member's own product? `cohort`: members of a round
    in the checks; `least`: those without whom there is none."""

    alone: bool = False
    least: int = 1
    cohort: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)


ROWS = {
    "fedavg": Row(alone=True),
    "ffa": Row(alone=True),
    "flora": Row(alone=True),
    "flexlora": Row(alone=True),
    "fedprox": Row(alone=True),
    "fedavgm": Row(alone=True),  # the first round's momentum is its own change
    "fedadagrad": Row(),
    "fedadam": Row(),
    "fedyogi": Row(),
    "fdlora": Row(),
    "lora-a2": Row(alone=True),
    "flasc": Row(),
    "median": Row(alone=True),
    "trimmed-mean": Row(alone=True),
    "krum": Row(least=5, cohort=6),
    "scaffold": Row(alone=True),
    "mira": Row(alone=True),
}
NAMES = sorted(ROWS)


def run_of(name: str, dtype: Any = "f4", seed: int = 0, **settings: Any) -> Run:
    members = members_of(ROWS[name].cohort)
    return Run(
        made(name, start_of(dtype=dtype), members, **{**ROWS[name].settings, **settings}), members, seed
    )


def state_of(run: Run) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in run.server.state_dict().items()}


def all_bits(run: Run) -> dict[str, np.ndarray]:
    """All that members would load."""
    return {f"{m.rank}.{k}": v for m, d in run.downloads() for k, v in bits(d).items()}


def test_every_registered_aggregator_has_its_row() -> None:
    pushed = {entry.name for entry in personal_lora.ASYNCHRONOUS}  # in test_pushes: they have no rounds
    assert set(ROWS) | pushed == {entry.name for entry in personal_lora.edged_aggregators({})}
    assert len(ROWS) == len(personal_lora.AGGREGATORS)
    with pytest.raises(ConfigError, match=r"no setting plugin\.personal_lora\.rank"):
        personal_lora.edged_aggregators({"rank": 3})


# --- what a job begins with, and goes on from -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_round_members_load_the_start(name: str) -> None:
    settings = {"download_density": 1.0} if name == "flasc" else {}
    run = run_of(name, **settings)
    for _, download in run.downloads():
        assert not download.merged
        assert all(
            same_bits(dict(enumerate(download.factors[n])), dict(enumerate(start_of()[n]))) for n in SHAPES
        )
    assert not any(of_adapter(run.server, n).any() for n in SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_an_aggregator_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    run, other = run_of(name), run_of(name)
    for r in (0, 1, 2):
        run.round(r)
    state = state_of(run)
    other.server.load_state_dict(state)
    other.own = {rank: {k: np.array(v) for k, v in own.items()} for rank, own in run.own.items()}
    for r in (3, 4):
        assert same_bits(all_bits(run), all_bits(other))
        run.round(r)
        other.round(r)
    assert same_bits(run.server.state_dict(), other.server.state_dict())
    assert all(
        same_bits(dict(enumerate(a)), dict(enumerate(b)))
        for a, b in zip(*([r.server.adapter()[n] for n in sorted(SHAPES)] for r in (run, other)), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_arrays_that_later_rounds_leave_alone(name: str) -> None:
    run = run_of(name)
    empty, fresh = state_of(run), run_of(name)
    run.round(0)
    kept = run.server.state_dict()
    copy = {k: np.array(v) for k, v in kept.items()}
    assert all(isinstance(v, np.ndarray) for v in kept.values())
    run.round(1)
    assert same_bits(kept, copy)
    run.server.load_state_dict(empty)
    assert same_bits(all_bits(run), all_bits(fresh))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rounds_make_the_same_bits(name: str) -> None:
    first, second = run_of(name), run_of(name)
    for r in (0, 1):
        first.round(r)
        second.round(r)
    assert same_bits(all_bits(first), all_bits(second))


@pytest.mark.parametrize("name", NAMES)
def test_what_members_load_is_f32_of_their_shapes_and_read_only(name: str) -> None:
    run = run_of(name)
    for r in (0, 1):
        run.round(r)
        for member, download in run.downloads():
            for n, (inputs, outputs) in SHAPES.items():
                A, B = download.factors[n]
                assert (A.shape, B.shape) == ((member.r, inputs), (outputs, member.r))
                for one in (A, B, *download.merged.get(n, ())):
                    assert one.dtype == np.float32
                    assert not one.flags.writeable


# --- what a round does with updates ---------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if ROWS[n].alone])
def test_one_member_alone_gets_its_own_product_back(name: str) -> None:
    (member,) = members = members_of(1)
    run = Run(made(name, start_of(dtype="f8"), members), members)
    (update,) = run.round(0)
    for n in SHAPES:
        assert np.allclose(of_adapter(run.server, n), product(update.factors, n, member.scale), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_ratio_of_weights_counts(name: str) -> None:
    run, fourfold, other = run_of(name), run_of(name), run_of(name, dtype="f8")
    updates = run.round(0)
    fourfold.round(0, reweighted(updates, 4.0))
    assert same_bits(all_bits(run), all_bits(fourfold))
    finer = other.updates(0)
    other.round(0, finer)
    third = run_of(name, dtype="f8")
    third.round(0, reweighted(finer, 1 / 3))
    for n in SHAPES:
        assert np.allclose(of_adapter(other.server, n), of_adapter(third.server, n), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_members_changes_nothing_but_rounding(name: str) -> None:
    run, turned = run_of(name, dtype="f8"), run_of(name, dtype="f8")
    updates = run.round(0)
    turned.round(0, updates[::-1])
    for n in SHAPES:
        assert np.allclose(of_adapter(run.server, n), of_adapter(turned.server, n), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_updates_end_a_round_and_leave_the_state_as_it_was(name: str) -> None:
    run, undisturbed = run_of(name), run_of(name)
    for r in (0, 1):
        run.round(r)
        undisturbed.round(r)
    before, loads = state_of(run), all_bits(run)
    run.server.begin(2, run.members)
    for update in Run(run.server, run.members[: ROWS[name].least - 1], 9, dict(run.own)).updates(2):
        run.server.add(update)
    with pytest.raises(PolicyViolation, match=f"{name}: expected {ROWS[name].least} update.* in round 2"):
        run.server.finish()
    assert same_bits(before, run.server.state_dict())
    assert same_bits(loads, all_bits(run))
    run.round(2)
    undisturbed.round(2)
    assert same_bits(all_bits(run), all_bits(undisturbed))


@pytest.mark.parametrize("name", NAMES)
def test_a_round_that_was_given_up_leaves_no_trace(name: str) -> None:
    run, undisturbed = run_of(name), run_of(name)
    before = state_of(run)
    stray = Run(run.server, run.members, 9).updates(0)
    run.server.begin(0, run.members)
    for update in stray:
        run.server.add(update)
    assert same_bits(before, run.server.state_dict())
    run.round(0)
    undisturbed.round(0)
    assert same_bits(all_bits(run), all_bits(undisturbed))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_factor_keeps_every_bit_and_is_not_read_from_updates(name: str, dtype: str) -> None:
    run = run_of(name, dtype)
    for r in (0, 1, 2, 3):
        frozen, before = run.server.frozen(r), all_bits(run)
        updates = run.updates(r)
        if frozen:
            at = "AB".index(frozen)
            blind = [
                {n: tuple(f * np.nan if i == at else f for i, f in enumerate(u.factors[n])) for n in SHAPES}
                for u in updates
            ]
            updates = [replace(u, factors=f) for u, f in zip(updates, blind, strict=True)]
        run.round(r, updates)
        after = all_bits(run)
        kept = {k: v for k, v in before.items() if ".factors." in k and k.endswith(f".{frozen}")}
        assert bool(kept) == bool(frozen)
        assert all(v.tobytes() == after[k].tobytes() for k, v in kept.items())


def broken(update: Update, how: str) -> Update:
    name = min(SHAPES)
    A, B = update.factors[name]
    factors = {
        "a module too few": {n: f for n, f in update.factors.items() if n != name},
        "a strange module": {**update.factors, "lm_head": (A, B)},
        "A of another width": {**update.factors, name: (A[:, 1:], B)},
        "B of another rank": {**update.factors, name: (A, B[:, 1:])},
        "A and B exchanged": {**update.factors, name: (B, A)},
    }
    weight = {"no weight": 0.0, "a weight below 0": -1.0, "no number": math.nan, "too much": math.inf}
    return replace(update, factors=factors.get(how, update.factors), weight=weight.get(how, update.weight))


WRONG = [
    *("a module too few", "a strange module", "A of another width", "B of another rank", "A and B exchanged"),
    *("no weight", "a weight below 0", "no number", "too much"),
]


@pytest.mark.parametrize("name", NAMES)
def test_updates_that_do_not_fit_are_refused_and_the_round_goes_on(name: str) -> None:
    run, undisturbed = run_of(name), run_of(name)
    for r in (0, 1):  # whichever factor is frozen, what came in the other's place is looked at
        updates = run.updates(r)
        undisturbed.round(r, updates)
        run.server.begin(r, run.members)
        frozen = run.server.frozen(r)
        for update in updates:
            for how in WRONG:
                if not frozen or not how.startswith(f"{frozen} of"):
                    with pytest.raises(ConfigError, match="rank 0"):
                        run.server.add(broken(updates[0], how))
            run.server.add(update)
        run.server.finish()
    assert same_bits(all_bits(run), all_bits(undisturbed))


@pytest.mark.parametrize("name", NAMES)
def test_members_of_unlike_ranks_are_taken_where_the_entry_says_so_and_else_refused_by_name(
    name: str,
) -> None:
    members, start = members_of(3, [4, 2, 1], [2.0, 2.0, 0.5]), start_of()
    if not ENTRIES[name].unlike_ranks:
        with pytest.raises(ConfigError, match=f"^{name} .* r 2 .* rank 1"):
            made(name, start, members)
        server = made(name, start, members_of(5))
        with pytest.raises(ConfigError, match=f"^{name} .* scale 0.5 of rank 2"):
            server.begin(0, [*members_of(2), Member(2, 4, 0.5)])
        server.begin(0, members_of(5))
        with pytest.raises(ConfigError, match=f"^{name} .* r 2 .* rank 1"):
            server.add(Run(server, members).update(members[1], 0))
        return
    run = Run(made(name, start, members), members)
    for r in (0, 1):
        updates = run.round(r)
        for member, download in run.downloads():
            A, B = download.factors[min(SHAPES)]
            assert A.shape[0] == B.shape[1] == member.r
    assert len(updates) == 3
    with pytest.raises(ConfigError, match=f"^{name}: expected r of 1 to 4 of rank 7, got 5"):
        run.server.begin(2, [Member(7, 5, 1.0)])


# --- memory ---------------------------------------------------------------------------------------

WIDE = {f"{block}.q_proj": (400, 380) for block in range(12)}


@pytest.mark.parametrize("name", NAMES)
def test_memory_grows_with_the_cohort_as_the_entry_says_and_not_at_all_where_it_says_nothing(
    name: str,
) -> None:
    cohort, start = 30, start_of(1, shapes=WIDE)
    members = members_of(cohort, 1)
    values = sum(A.size + B.size for A, B in start.values())
    run = Run(made(name, start, members), members)
    updates = run.update(members[0], 0)
    run.round(0, [replace(updates, member=m) for m in members])  # tables that are made once are there
    run.own.clear()
    tracemalloc.start()
    try:
        run.server.begin(1, members)
        run.server.add(run.update(members[0], 1))
        first = tracemalloc.get_traced_memory()[0]
        for member in members[1:]:
            run.server.add(run.update(member, 1))
            run.own.clear()
        grown = tracemalloc.get_traced_memory()[0] - first
        tracemalloc.reset_peak()
        run.server.finish()
        peak = tracemalloc.get_traced_memory()[1] - first
    finally:
        tracemalloc.stop()
    declared = ENTRIES[name].bytes_kept
    says = declared(cohort, values) if declared else 0
    assert grown <= says + 16 * values  # four updates' worth
    assert peak <= says + 60 * values + (2 << 20)  # a state's own work, and that on one block


# --- settings -------------------------------------------------------------------------------------

OUT_OF_BOUNDS: dict[str, list[Any]] = {
    "mu": [-0.1, "1", math.nan],
    "server_learning_rate": [0.0, -1.0, math.inf],
    "server_momentum": [1.0, -0.1],
    "beta1": [1.0, True],
    "beta2": [1.5],
    "tau": [0.0],
    "ranks_sent": [0.0, 1.1],
    "download_density": [0, 2],
    "upload_density": [0.0, None],
    "trim": [0.5, -0.1],
    "liars": [-1, 0.5],
    "pull": [2.0, -1.0],
    "graph": ["star", 3],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_value_out_of_bounds_is_refused_by_its_key_and_a_default_is_within(name: str) -> None:
    members = members_of(4)
    for key in ENTRIES[name].keys:
        assert key.text
        made(name, start_of(), members, **{key.key: key.default})
        for value in OUT_OF_BOUNDS[key.key]:
            with pytest.raises(ConfigError, match=f"^{key.key}: expected"):
                made(name, start_of(), members, **{key.key: value})


def test_every_key_is_some_aggregators_and_has_bounds() -> None:
    keys = {key.key for entry in ENTRIES.values() for key in entry.keys}
    pushed = {key.key for entry in personal_lora.ASYNCHRONOUS for key in entry.keys}
    assert keys == set(OUT_OF_BOUNDS)
    assert keys | pushed == set(_settings.LIMITS) | {"graph", "dynamic_steps"}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_aggregator_is_refused(name: str) -> None:
    run = run_of(name)
    run.round(0)
    if not run.server.state_dict():
        pytest.skip("it keeps nothing")
    with pytest.raises(ConfigError, match="state"):
        run.server.load_state_dict({"something": np.zeros(3)})


@pytest.mark.parametrize("name", [n for n in NAMES if ENTRIES[n].is_sum])
def test_what_is_said_to_be_a_sum_needs_no_more_than_the_sum(name: str) -> None:
    """So members may mask their updates: only their weighted mean is ever seen."""
    run, masked = run_of(name, dtype="f8"), run_of(name, dtype="f8")
    updates = run.updates(0)
    run.round(0, updates)
    total = sum(u.weight for u in updates)
    mean = {
        n: tuple(sum(u.weight / total * u.factors[n][i] for u in updates) for i in (0, 1)) for n in SHAPES
    }
    masked.round(0, [Update(run.members[0], 0, total, mean)])
    for n in SHAPES:
        assert np.allclose(of_adapter(run.server, n), of_adapter(masked.server, n), rtol=1e-9, atol=1e-13)


def test_a_start_that_is_none_is_refused() -> None:
    A, B = start_of()[min(SHAPES)]
    for name in NAMES:
        for start in ({}, {"q": (A, B[:, 1:])}, {"q": (A[0], B)}, {"q": (A, B), "v": (A[1:], B[:, 1:])}):
            with pytest.raises(ConfigError, match="expected"):
                made(name, start, members_of(4))


def test_a_mean_of_products_is_the_mean_of_the_rig_itself() -> None:
    """The oracle of all these tests, by hand."""
    members = members_of(2, [1, 1], [2.0, 0.5])
    updates = updates_of(members, weights=[3.0, 1.0])
    name = min(SHAPES)
    (A, B), (A2, B2) = (u.factors[name] for u in updates)
    by_hand = 0.75 * 2.0 * np.outer(B, A) + 0.25 * 0.5 * np.outer(B2, A2)
    assert np.allclose(mean_product(updates, name), by_hand)
