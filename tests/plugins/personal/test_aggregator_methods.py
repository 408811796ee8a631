"""What each method promises of itself, in F64: the identities of its paper, not its past answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from aggregator_rig import (
    SHAPES,
    Run,
    loaded,
    made,
    mean_product,
    members_of,
    of_adapter,
    start_of,
    updates_of,
)
from edged_plugins.personal_lora import _members, _robust
from edged_plugins.personal_lora._factors import Layout
from edged_plugins.personal_lora._local import Local, allowed
from edged_plugins.personal_lora._residual import residual
from hypothesis import given
from hypothesis import strategies as st

from edged import ConfigError, Download, Factors, Member, Update

UNLIKE = ([8, 4, 2, 1], [2.0, 4.0, 0.5, 16.0])  # r and scale of four members
SQUARE = {"q": (64, 64)}


def close(a: np.ndarray, b: np.ndarray, relative: float = 1e-12) -> bool:
    return bool(np.linalg.norm(a - b) <= relative * np.linalg.norm(b))


def flat(factors: Factors) -> np.ndarray:
    return Layout(factors).flat(factors)


def deltas(run: Run, updates: list[Update]) -> np.ndarray:
    """sum p (P_k - P_loaded), the one-liner."""
    total = sum(u.weight for u in updates)
    base = {m.rank: flat(d.factors) for m, d in run.downloads()}
    return sum(u.weight / total * (flat(u.factors) - base[u.member.rank]) for u in updates)


# --- fedavg, ffa, fedprox -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_plain_averaging_is_the_mean_of_each_factor(name: str) -> None:
    members = members_of(4)
    run = Run(made(name, start_of(dtype="f8"), members), members)
    updates = run.round(0)
    for n in SHAPES:
        for i in (0, 1):
            mean = np.average([u.factors[n][i] for u in updates], axis=0, weights=[u.weight for u in updates])
            assert close(run.downloads()[0][1].factors[n][i], mean, 1e-15)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_plain_averaging_of_unlike_factors_misses_most_of_the_sum(count: int) -> None:
    """Of independent factors and equal weights the expected squares give sqrt(1 - 1 / K): .866 for four. A
    member alone, and members that share a factor, lose nothing."""
    members, shapes = members_of(count, 8, 1.0), {"q": (400, 400)}
    updates = updates_of(members, weights=[1.0] * count, shapes=shapes)
    run = Run(made("fedavg", start_of(8, shapes=shapes, dtype="f8"), members), members)
    run.round(0, updates)
    assert residual(updates, run.downloads()) == pytest.approx(np.sqrt(1 - 1 / count), abs=0.03)


def test_ffa_makes_the_mean_of_products_and_noise_passes_through_it_as_it_is() -> None:
    members = members_of(4)
    run, noisy = (Run(made("ffa", start_of(dtype="f8"), members), members) for _ in range(2))
    updates, drawn = run.updates(0), np.random.default_rng(5)
    noise = {n: drawn.standard_normal(B.shape) for n, (_, B) in updates[0].factors.items()}
    run.round(0, updates)
    assert residual(updates, run.downloads()) < 2e-15
    moved = [
        Update(u.member, 0, u.weight, {n: (A, B + noise[n]) for n, (A, B) in u.factors.items()})
        for u in updates
    ]
    noisy.round(0, moved)
    for n in SHAPES:
        A = start_of(dtype="f8")[n][0]
        assert close(of_adapter(noisy.server, n) - of_adapter(run.server, n), 2.0 * noise[n] @ A, 1e-13)


def test_fedprox_pulls_by_the_gradient_of_its_own_penalty() -> None:
    members = members_of(1)
    server = made("fedprox", start_of(dtype="f8"), members, mu=0.3)
    local = Local(server.download(members[0]), {})
    loaded_row = flat(server.download(members[0]).factors)
    at = loaded_row + np.random.default_rng(0).standard_normal(loaded_row.size)
    layout = Layout(start_of(dtype="f8"))

    def penalty(row: np.ndarray) -> float:
        return 0.15 * float(np.sum((row - loaded_row) ** 2))

    pull = layout.flat(local.correction(layout.factors(at)))
    for i in (0, 7, layout.size - 1):
        step = np.eye(1, layout.size, i)[0] * 1e-5
        assert pull[i] == pytest.approx((penalty(at + step) - penalty(at - step)) / 2e-5, rel=1e-5)
    assert local.corrects
    assert not Local(made("fedavg", start_of(), members).download(members[0]), {}).corrects


# --- flora ----------------------------------------------------------------------------------------


def test_stacking_is_the_sum_itself_for_unlike_ranks_and_alphas() -> None:
    members = members_of(4, *UNLIKE)
    run = Run(made("flora", start_of(8, dtype="f8"), members), members)
    updates = run.round(0)
    assert residual(updates, run.downloads()) < 1e-12
    for n in SHAPES:
        A, B = run.downloads()[0][1].merged[n]
        assert len(A) == B.shape[1] == min(15, *SHAPES[n])
        assert np.linalg.matrix_rank(B @ A) == min(15, *SHAPES[n])


def test_stacking_in_f32_is_off_by_the_rounding_of_f32() -> None:
    members = members_of(4, *UNLIKE)
    run = Run(made("flora", start_of(8), members), members)
    assert residual(run.round(0), run.downloads()) < 2e-7


def test_after_a_merge_adapters_begin_again_and_add_nothing() -> None:
    members, start = members_of(4, *UNLIKE), start_of(8, dtype="f8")
    run = Run(made("flora", start, members), members)
    run.round(0)
    for member, download in run.downloads():
        for n, (A, B) in download.factors.items():
            assert np.array_equal(A, start[n][0][: member.r])
            assert not B.any()


@pytest.mark.parametrize("count", [2, 9], ids=["as a stack", "whose rank is the matrix's"])
def test_all_rounds_stacks_are_the_adapter_and_what_members_have_merged(count: int) -> None:
    members = members_of(count)
    run = Run(made("flora", start_of(dtype="f8"), members), members)
    learned = {n: np.zeros((o, i)) for n, (i, o) in SHAPES.items()}
    merged = {n: np.zeros((o, i)) for n, (i, o) in SHAPES.items()}
    for r in range(4):
        updates = run.round(r)
        assert residual(updates, run.downloads()) < 1e-12
        for n in SHAPES:
            learned[n] += mean_product(updates, n)
            merged[n] += loaded(*run.downloads()[0], n)
            assert close(of_adapter(run.server, n), learned[n])
            assert close(merged[n], learned[n])
            assert len(run.server.adapter()[n][0]) <= min(SHAPES[n])


# --- flexlora -------------------------------------------------------------------------------------


def test_what_a_member_gets_is_off_by_the_tail_of_the_singular_values() -> None:
    members = members_of(4, *UNLIKE)
    run = Run(made("flexlora", start_of(8, dtype="f8"), members), members)
    updates = run.round(0)
    for n in SHAPES:
        whole = mean_product(updates, n)
        values = np.linalg.svd(whole, compute_uv=False)
        for member, download in run.downloads():
            off = np.linalg.norm(loaded(member, download, n) - whole) / np.linalg.norm(whole)
            tail = np.sqrt(np.sum(values[member.r :] ** 2) / np.sum(values**2))
            assert off == pytest.approx(tail, rel=1e-10)


@given(seed=st.integers(0, 1000), size=st.floats(1e-4, 1.0))
def test_no_matrix_of_that_rank_is_closer(seed: int, size: float) -> None:
    members = members_of(3, [2, 2, 2], [1.0, 2.0, 3.0])
    run = Run(made("flexlora", start_of(2, dtype="f8"), members), members)
    (updates, drawn), n = (run.round(0), np.random.default_rng(seed)), min(SHAPES)
    A, B = run.downloads()[0][1].factors[n]
    whole, best = mean_product(updates, n), np.linalg.norm(B @ A - mean_product(updates, n))
    other = (B + size * drawn.standard_normal(B.shape)) @ (A + size * drawn.standard_normal(A.shape))
    assert np.linalg.norm(other - whole) >= best * (1 - 1e-12)


def test_a_rank_that_holds_the_sum_loses_nothing_and_what_is_left_over_can_still_learn() -> None:
    members = members_of(2, [2, 1], [2.0, 4.0])
    start = start_of(6, dtype="f8")
    run = Run(made("flexlora", start, [*members, Member(2, 6, 1.0)]), members)
    updates = run.round(0)
    big = Member(2, 6, 1.0)
    assert residual(updates, [(big, run.server.download(big))]) < 1e-14
    for n in SHAPES:
        A, B = run.server.download(big).factors[n]
        assert np.array_equal(A[3:], start[n][0][3:])
        assert not B[:, 3:].any()


def test_members_of_unlike_rank_load_one_matrix_up_to_truncation() -> None:
    members = members_of(4, *UNLIKE)
    run = Run(made("flexlora", start_of(8, dtype="f8"), members), members)
    run.round(0)
    (biggest, whole), *others = run.downloads()
    for n in SHAPES:
        A, B = whole.factors[n]
        assert np.allclose(A @ A.T, np.eye(8), atol=1e-13)
        for member, download in others:
            cut = biggest.scale * B[:, : member.r] @ A[: member.r]
            assert close(loaded(member, download, n), cut)


def test_signs_do_not_depend_on_the_order_of_members() -> None:
    members = members_of(3)
    run, turned = (Run(made("flexlora", start_of(dtype="f8"), members), members) for _ in range(2))
    turned.round(0, run.round(0)[::-1])
    for n in SHAPES:
        for i in (0, 1):
            assert close(run.downloads()[0][1].factors[n][i], turned.downloads()[0][1].factors[n][i], 1e-9)
        assert (
            np.abs(run.server.adapter()[n][1]).max(axis=0) == run.server.adapter()[n][1].max(axis=0)
        ).all()


def test_a_sum_of_more_ranks_than_its_matrix_is_cut_like_any_other() -> None:
    members = members_of(13)
    run = Run(made("flexlora", start_of(dtype="f8"), members), members)
    updates = run.round(0)
    for n in SHAPES:
        values = np.linalg.svd(mean_product(updates, n), compute_uv=False)
        off = np.linalg.norm(of_adapter(run.server, n) - mean_product(updates, n))
        assert off == pytest.approx(np.sqrt(np.sum(values[4:] ** 2)), rel=1e-10)


# --- server optimisers ----------------------------------------------------------------------------

Step = Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]


def avgm(s: dict[str, np.ndarray], D: np.ndarray) -> np.ndarray:
    s["v"] = 0.8 * s.get("v", 0) + D
    return 0.5 * s["v"]


def outer(s: dict[str, np.ndarray], D: np.ndarray) -> np.ndarray:
    """SGD with Nesterov's momentum as torch writes it, on the gradient -D."""
    g = -D
    s["b"] = 0.8 * s["b"] + g if "b" in s else g
    return -0.5 * (g + 0.8 * s["b"])


def adaptive(second: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Step:
    def step(s: dict[str, np.ndarray], D: np.ndarray) -> np.ndarray:
        s["m"] = 0.7 * s.get("m", 0) + 0.3 * D
        s["v"] = second(s.get("v", np.full(len(D), 0.01**2)), D**2)
        return 0.5 * s["m"] / (np.sqrt(s["v"]) + 0.01)

    return step


ORACLES: dict[str, Step] = {
    "fedavgm": avgm,
    "fdlora": outer,
    "fedadagrad": adaptive(lambda v, d: v + d),
    "fedadam": adaptive(lambda v, d: 0.9 * v + 0.1 * d),
    "fedyogi": adaptive(lambda v, d: v - 0.1 * d * np.sign(v - d)),
}
KNOBS = {"server_learning_rate": 0.5, "server_momentum": 0.8, "beta1": 0.7, "beta2": 0.9, "tau": 0.01}


@pytest.mark.parametrize("name", ORACLES)
def test_a_server_optimiser_moves_as_its_paper_writes_it(name: str) -> None:
    members, state = members_of(3), {}
    run = Run(made(name, start_of(dtype="f8"), members, **KNOBS), members)
    at = flat(run.downloads()[0][1].factors)
    for r in range(4):
        updates = run.updates(r)
        at = at + ORACLES[name](state, deltas(run, updates))
        run.round(r, updates)
        assert np.allclose(flat(run.downloads()[0][1].factors), at, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["fedavgm", "fdlora"])
def test_a_rate_of_one_without_momentum_is_the_mean(name: str) -> None:
    members = members_of(3)
    run = Run(
        made(name, start_of(dtype="f8"), members, server_learning_rate=1.0, server_momentum=0.0), members
    )
    plain = Run(made("fedavg", start_of(dtype="f8"), members), members)
    for r in range(3):
        plain.round(r, run.round(r))
        assert np.allclose(
            flat(run.downloads()[0][1].factors), flat(plain.downloads()[0][1].factors), rtol=1e-12, atol=1e-14
        )


# --- lora-a2 --------------------------------------------------------------------------------------


def test_alternating_rounds_are_exact_send_their_budget_and_move_both_factors_in_two() -> None:
    members, start = members_of(4), start_of(dtype="f8")
    run = Run(made("lora-a2", start, members, ranks_sent=0.25), members)
    for r in range(4):
        before = run.downloads()[0][1].factors
        updates = run.round(r)
        assert residual(updates, run.downloads()) < 1e-14
        free = 1 if run.server.frozen(r) == "A" else 0
        for update in updates:
            moved = {n: (update.factors[n][free] != before[n][free]).any(axis=1 - free) for n in SHAPES}
            assert np.array_equal(np.stack([moved[n] for n in sorted(SHAPES)]), update.extras["ranks"])
            sizes = {n: np.size(update.factors[n][free]) // 4 for n in SHAPES}
            sent, most = sum(int(moved[n].sum()) * sizes[n] for n in SHAPES), sum(sizes.values())
            assert most - min(sizes.values()) <= sent <= most  # a quarter of four ranks
    assert [run.server.frozen(r) for r in range(4)] == ["A", "B", "A", "B"]
    for n in SHAPES:
        A, B = run.downloads()[0][1].factors[n]
        assert not np.array_equal(A, start[n][0])
        assert B.any()


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_the_ranks_that_are_sent_are_those_whose_change_of_the_product_is_largest(frozen: str) -> None:
    (before,) = updates_of(members_of(1))
    (after,) = updates_of(members_of(1), seed=1)
    trained = {
        n: (A if frozen == "A" else after.factors[n][0], B if frozen == "B" else after.factors[n][1])
        for n, (A, B) in before.factors.items()
    }
    part, sizes = 0.4, [np.size(before.factors[n][frozen == "A"]) // 4 for n in SHAPES]
    most = max(int(part * 4 * sum(sizes)), *sizes)
    local = Local(Download(before.factors, extras={"ranks_sent": np.array(part)}), {}, frozen)
    _, extras, _ = local.finish(trained, 1, 0.1)
    worth = np.array(
        [
            [
                np.linalg.norm(
                    np.outer(trained[n][1][:, j], trained[n][0][j])
                    - np.outer(before.factors[n][1][:, j], before.factors[n][0][j])
                )
                for j in range(4)
            ]
            for n in sorted(SHAPES)
        ]
    )
    left, wanted = most, np.zeros_like(extras["ranks"])
    for module, j in sorted(np.ndindex(worth.shape), key=lambda at: -worth[at]):
        size = np.size(before.factors[sorted(SHAPES)[module]][frozen == "A"]) // 4
        if size <= left:
            wanted[module, j], left = True, left - size
    assert np.array_equal(extras["ranks"], wanted)
    assert 1 <= wanted.sum() < wanted.size


def test_a_change_in_ranks_that_were_not_chosen_and_a_wrong_budget_are_refused() -> None:
    members = members_of(2)
    run = Run(made("lora-a2", start_of(), members, ranks_sent=0.25), members)
    good, other = run.updates(0)
    ranks = good.extras["ranks"]
    run.server.begin(0, members)
    for extras in ({}, {"ranks": ~ranks}, {"ranks": ranks.astype("f4")}, {"ranks": ranks[:1]}):
        with pytest.raises(ConfigError, match="lora-a2: expected which of"):
            run.server.add(Update(good.member, 0, 1.0, good.factors, extras))
    with pytest.raises(ConfigError, match="did not choose"):
        run.server.add(Update(good.member, 0, 1.0, good.factors, {"ranks": np.roll(ranks, 1)}))
    run.server.add(good)
    run.server.add(other)
    run.server.finish()


# --- flasc ----------------------------------------------------------------------------------------


def test_a_density_of_one_is_dense_fedadam() -> None:
    members, knobs = members_of(3), {"beta1": 0.7, "beta2": 0.9, "tau": 0.01}
    dense = Run(made("fedadam", start_of(dtype="f8"), members, **knobs), members)
    full = {"download_density": 1.0, "upload_density": 1.0}
    run = Run(made("flasc", start_of(dtype="f8"), members, **knobs, **full), members)
    for r in range(3):
        dense.round(r)
        run.round(r)
        assert np.array_equal(flat(run.downloads()[0][1].factors), flat(dense.downloads()[0][1].factors))


@given(down=st.floats(0.01, 1.0), up=st.floats(0.01, 1.0))
def test_as_many_values_travel_as_the_densities_say_and_they_are_the_largest(down: float, up: float) -> None:
    members = members_of(2)
    run = Run(made("flasc", start_of(dtype="f8"), members, download_density=down, upload_density=up), members)
    run.round(0)
    size = flat(start_of()).size
    base = flat(run.downloads()[0][1].factors)
    dense = np.abs(flat({n: (A, B) for n, (A, B, _) in run.server.adapter().items()}))
    assert np.count_nonzero(base) <= allowed(size, down)
    assert np.count_nonzero(base) == min(allowed(size, down), np.count_nonzero(dense))
    assert dense[base != 0].min() >= dense[base == 0].max(initial=0.0)
    for update in run.updates(1):
        moved = flat(update.factors) != base
        assert moved.sum() == allowed(size, up)  # outside the mask nothing moves at all


def test_the_server_steps_by_the_mean_change_from_what_members_loaded() -> None:
    """Its own factors stay dense: what no member loaded or changed is still there."""
    members, state = members_of(3), {}
    knobs = {**KNOBS, "download_density": 0.3, "upload_density": 0.2}
    run = Run(made("flasc", start_of(dtype="f8"), members, **knobs), members)
    dense = flat(start_of(dtype="f8"))
    for r in range(3):
        updates = run.updates(r)
        dense = dense + ORACLES["fedadam"](state, deltas(run, updates))
        run.round(r, updates)
        now = flat({n: (A, B) for n, (A, B, _) in run.server.adapter().items()})
        assert np.allclose(now, dense, rtol=1e-11, atol=1e-12)


def test_the_first_download_lies_in_A_since_B_is_zero() -> None:
    members = members_of(2)
    run = Run(made("flasc", start_of(), members, download_density=0.25), members)
    first = run.downloads()[0][1].factors
    assert not any(B.any() for _, B in first.values())
    assert sum(np.count_nonzero(A) for A, _ in first.values()) == allowed(flat(start_of()).size, 0.25)


def test_more_changes_than_the_density_are_refused() -> None:
    members = members_of(2)
    run = Run(made("flasc", start_of(), members, upload_density=0.25), members)
    run.server.begin(0, members)
    (dense, _) = updates_of(members, dtype="f4")
    with pytest.raises(ConfigError, match=r"flasc: expected at most .* rank 0"):
        run.server.add(dense)


# --- median, trimmed mean, krum -------------------------------------------------------------------


@given(n=st.integers(1, 9), seed=st.integers(0, 99))
def test_median_and_trimmed_mean_are_those_of_each_value_sorted(n: int, seed: int) -> None:
    rows = [row.astype("f4") for row in np.random.default_rng(seed).standard_normal((n, 7))]
    columns = [sorted(float(row[i]) for row in rows) for i in range(7)]
    middle = [(c[(n - 1) // 2] + c[n // 2]) / 2 for c in columns]
    assert np.allclose(_robust.median(rows), middle, atol=1e-12)
    cut = int(0.3 * n)
    trimmed = [sum(c[cut : n - cut]) / (n - 2 * cut) for c in columns]
    assert np.allclose(_robust.trimmed(rows, 0.3), trimmed, atol=1e-12)
    assert np.allclose(_robust.trimmed(rows, 0.0), np.mean(rows, axis=0, dtype="f8"), atol=1e-12)


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "krum"])
@pytest.mark.parametrize("lie", [1e6, -1e6, 3.0])
def test_two_liars_of_seven_do_not_move_a_robust_aggregate_beyond_the_honest(name: str, lie: float) -> None:
    members, settings = members_of(7), {"trimmed-mean": {"trim": 0.3}, "krum": {"liars": 2}}
    run = Run(made(name, start_of(dtype="f8"), members, **settings.get(name, {})), members)
    drawn = np.random.default_rng(3)
    honest = [1.0 + 0.1 * drawn.standard_normal(flat(start_of()).size) for _ in range(5)]
    layout = Layout(start_of(dtype="f8"))
    rows = [*honest[:2], np.full(layout.size, lie), *honest[2:], np.full(layout.size, lie)]
    weights = [1.0, 1.0, 1e9, 1.0, 1.0, 1.0, 1e9]
    run.round(
        0, [Update(m, 0, w, layout.factors(row)) for m, w, row in zip(members, weights, rows, strict=True)]
    )
    got = flat(run.downloads()[0][1].factors)
    assert (got >= np.min(honest, axis=0)).all()
    assert (got <= np.max(honest, axis=0)).all()
    if name == "krum":
        assert any(np.array_equal(got, row) for row in honest)


@given(seed=st.integers(0, 200))
def test_krum_takes_the_row_that_is_nearest_to_its_nearest_by_brute_force(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    n, liars = int(drawn.integers(5, 10)), 1
    rows = list(drawn.standard_normal((n, 6)))
    scores = []
    for i in range(n):
        apart = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(apart[: n - liars - 2]))
    assert np.array_equal(_robust.krum(rows, liars), rows[scores.index(min(scores))])


# --- scaffold -------------------------------------------------------------------------------------


def drift(name: str, rounds: int = 60, absent: int = 0) -> float:
    """How far a server ends from the optimum of members' mean loss, a quadratic each, of unlike curvature."""
    members, layout = members_of(3), Layout(start_of(dtype="f8"))
    drawn = np.random.default_rng(0)
    best, curve = drawn.standard_normal((3, layout.size)), np.array([[0.2], [1.0], [3.0]])
    optimum = (curve * best).sum(axis=0) / curve.sum()
    server, own = made(name, start_of(dtype="f8"), members), {0: {}, 1: {}, 2: {}}
    for r in range(rounds):
        updates = []
        for member in [m for m in members if not absent or (m.rank + r) % 3 >= absent]:
            download, k = server.download(member), member.rank
            local, row = Local(download, own[k]), layout.flat(download.factors)
            for _ in range(10):
                gradient = curve[k] * (row - best[k])
                if local.corrects:
                    gradient = gradient + layout.flat(local.correction(layout.factors(row)))
                row = row - 0.1 * gradient
            factors, extras, own[k] = local.finish(layout.factors(row), 10, 0.1)
            updates.append(Update(member, r, 1.0, factors, extras))
        server.begin(r, members)
        for update in updates:
            server.add(update)
        server.finish()
    return float(
        np.linalg.norm(flat(server.download(members[0]).factors) - optimum) / np.linalg.norm(optimum)
    )


def test_control_variates_end_at_the_optimum_from_which_plain_averaging_drifts() -> None:
    assert drift("fedavg") > 0.1
    assert drift("scaffold") < 1e-5
    assert drift("scaffold", rounds=400, absent=1) < 1e-5  # with a third away in each round


def test_the_servers_control_is_the_mean_of_its_members_own() -> None:
    members = members_of(4)
    run = Run(made("scaffold", start_of(dtype="f8"), members), members)
    for r in range(4):  # in each round but the first one member is away, whose own stays as it is
        run.round(r, [run.update(m, r) for m in members if not r or m.rank != r])
        mean = np.mean([run.own[m.rank]["control"] for m in members], axis=0)
        assert np.allclose(run.downloads()[0][1].extras["control"], mean, rtol=1e-12, atol=1e-12)


def test_an_update_without_its_control_is_refused() -> None:
    members = members_of(2)
    run = Run(made("scaffold", start_of(), members), members)
    run.server.begin(0, members)
    update = run.update(members[0], 0)
    with pytest.raises(ConfigError, match=r"scaffold: expected the change of .* controls of rank 0"):
        run.server.add(Update(update.member, 0, 1.0, update.factors))


# --- mira -----------------------------------------------------------------------------------------


def pulled(pull: float, graph: str, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Rows of members before and after the server's pull."""
    members = members_of(count)
    run = Run(made("mira", start_of(dtype="f8"), members, pull=pull, graph=graph), members)
    updates = run.round(0)
    after = np.stack([flat(d.factors) for _, d in run.downloads()])
    return np.stack([flat(u.factors) for u in updates]), after


@pytest.mark.parametrize("graph", ["complete", "ring"])
@pytest.mark.parametrize("pull", [0.0, 0.5, 1.0, 1.9])
def test_a_pull_is_that_of_all_pairs_keeps_the_mean_and_brings_members_nearer(
    pull: float, graph: str
) -> None:
    W, after = pulled(pull, graph)
    L = _members.laplacian(graph, len(W))
    a = np.diag(np.diag(L)) - L
    eta = pull / np.linalg.eigvalsh(L)[-1]
    pairs = np.stack(
        [W[k] - eta * sum(a[k, j] * (W[k] - W[j]) for j in range(len(W))) for k in range(len(W))]
    )
    assert np.allclose(after, pairs, atol=1e-13)
    assert np.allclose(after.mean(axis=0), W.mean(axis=0), atol=1e-14)
    before, now = np.trace(W.T @ L @ W), np.trace(after.T @ L @ after)
    assert now < before if pull else np.array_equal(W, after)


def test_a_pull_of_one_on_a_complete_graph_is_the_mean_and_of_none_is_nobodys() -> None:
    W, after = pulled(1.0, "complete")
    assert np.allclose(after, W.mean(axis=0), atol=1e-14)
    W, after = pulled(0.0, "ring")
    assert np.array_equal(W, after)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_ring_has_each_member_between_two_others(count: int) -> None:
    L = _members.laplacian("ring", count)
    assert np.array_equal(L, L.T)
    assert not L.sum(axis=0).any()
    assert (np.diag(L) == min(2, count - 1)).all()


def test_the_adapter_for_everybody_is_the_mean_of_members_own() -> None:
    members = members_of(4)
    run = Run(made("mira", start_of(dtype="f8"), members), members)
    run.round(0)
    mean = np.mean([flat(d.factors) for _, d in run.downloads()], axis=0)
    assert np.allclose(flat({n: (A, B) for n, (A, B, _) in run.server.adapter().items()}), mean, atol=1e-14)
    assert all(scale == 2.0 for _, _, scale in run.server.adapter().values())


def test_who_is_not_in_a_round_keeps_its_adapter() -> None:
    members = members_of(4)
    run = Run(made("mira", start_of(), members), members)
    run.round(0, run.updates(0)[:3])
    kept = [flat(d.factors) for _, d in run.downloads()]
    assert np.array_equal(kept[3], flat(start_of()))
    run.round(1, run.updates(1)[2:])
    after = [flat(d.factors) for _, d in run.downloads()]
    assert [np.array_equal(a, b) for a, b in zip(kept, after, strict=True)] == [True, True, False, False]
