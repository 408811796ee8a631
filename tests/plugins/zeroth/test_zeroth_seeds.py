"""Weights are their start and a sum per seed: cards B18 and B19, on problems whose answers are known."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
from edged_plugins.zeroth_order import _seeds
from edged_plugins.zeroth_order._seeds import (
    direction,
    estimate,
    perturb,
    pieces,
    positions,
    replay,
    snap,
)
from edged_plugins.zeroth_order._stream import key, normals
from edged_plugins.zeroth_order._table import Amplitudes, Rebuilt, SeedTable, draw

from edged import ConfigError, EngineError

Arrays = dict[str, np.ndarray]
SHAPES = {"b": (3, 5), "a": (7,), "c.10": (2, 2, 2), "c.2": (), "empty": (0, 4)}


def made(
    dtype: type = np.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES, spread: float = 1
) -> Arrays:
    drawn = np.random.default_rng(0)
    return {n: np.array(spread * drawn.standard_normal(s), dtype, order="C") for n, s in shapes.items()}


def copied(parameters: Arrays) -> Arrays:
    return {name: array.copy() for name, array in parameters.items()}


def flat(parameters: Arrays) -> np.ndarray:
    return np.concatenate([parameters[name].ravel() for name in sorted(parameters)])


def same_bits(left: Arrays, right: Arrays) -> bool:
    return flat(left).tobytes() == flat(right).tobytes()


# --- positions ------------------------------------------------------------------------------------


def test_a_value_has_its_place_in_the_order_of_names() -> None:
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert positions(sizes) == {"a": 0, "b": 7, "c.10": 22, "c.2": 30, "empty": 31}


@pytest.mark.parametrize("chunk", [1, 4, 7, 22, 1000])
def test_pieces_hold_every_value_once_and_no_more_than_a_chunk(chunk: int) -> None:
    parameters, seen = made(), []
    for first, views in pieces(parameters, chunk=chunk):
        assert first == sum(map(len, seen))
        assert 0 < sum(map(len, views)) <= chunk
        seen += views
    assert np.concatenate(seen).tobytes() == flat(parameters).tobytes()


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_a_perturbation_is_the_flat_direction_whatever_the_chunk(chunk: int) -> None:
    parameters = made()
    expected = flat(parameters) + np.float32(0.3) * normals(4, 0, 31)
    perturb(parameters, 4, 0.3, chunk=chunk)
    assert flat(parameters).tobytes() == expected.tobytes()


def test_a_shard_agrees_with_the_whole() -> None:
    whole = made()
    shard = {"b rows": whole["b"][1:].copy(), "c.10": whole["c.10"].copy()}
    at = positions(_seeds.sizes(whole))
    sums = np.random.default_rng(1).standard_normal(8)
    for move in (
        lambda w, at=None: perturb(w, direction(0, 3), 0.5, at=at),
        lambda w, at=None: replay(w, sums, 0, 0.1, at=at),
    ):
        move(whole)
        move(shard, at={"b rows": at["b"] + 5, "c.10": at["c.10"]})
    assert shard["b rows"].tobytes() == whole["b"][1:].tobytes()
    assert shard["c.10"].tobytes() == whole["c.10"].tobytes()


def test_one_seed_gives_the_same_direction_twice() -> None:
    once, twice = made(), made()
    perturb(once, direction(0, 5), 0.1)
    perturb(twice, direction(0, 5), 0.1)
    assert same_bits(once, twice)
    other = made()
    perturb(other, direction(0, 6), 0.1)
    assert not same_bits(once, other)


def test_an_array_that_would_be_copied_is_not_taken() -> None:
    with pytest.raises(AssertionError, match="w: expected a writable F32 array in C order"):
        perturb({"w": made()["b"].T}, 0, 1.0)


# --- a step ---------------------------------------------------------------------------------------


def quartic(w: Arrays) -> float:
    return float((flat(w).astype(np.float64) ** 4).sum())


def test_weights_return_after_a_slope_was_measured() -> None:
    """B19: after +1, -2, +1 within 1e-6 |w|."""
    w = made()
    before = copied(w)
    estimate(lambda: quartic(w), lambda scale: perturb(w, 1, scale), 1e-3)
    assert abs(flat(w) - flat(before)).max() <= 1e-6 * abs(flat(before)).max()


@pytest.mark.parametrize("spread", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("epsilon", [2.0**-11, 2.0**-6])
def test_weights_return_to_the_bit_after_snap(spread: float, epsilon: float) -> None:
    w = made(shapes={"w": (100, 100)}, spread=spread)
    start = copied(w)
    snap(w, epsilon)
    largest = abs(start["w"]).max() + 8 * epsilon
    assert abs(w["w"] - start["w"]).max() <= largest * 2.0**-24
    before = copied(w)
    for s in range(50):
        estimate(lambda: 0.0, lambda scale, s=s: perturb(w, direction(0, s), scale), epsilon)
    assert same_bits(w, before)
    snap(w, epsilon)
    assert same_bits(w, before), "what is snapped stays"


@pytest.mark.parametrize(
    ("epsilon", "spread", "said"), [(1e-3, 1, "power of two"), (2.0**-20, 1000, "of at least")]
)
def test_snap_refuses_an_epsilon_that_would_round(epsilon: float, spread: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        snap(made(spread=spread), epsilon)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_weights_return_where_the_loss_fails(fails_at: int) -> None:
    w = made()
    snap(w, 2.0**-10)
    before, calls = copied(w), []

    def loss() -> float:
        calls.append(1)
        if len(calls) == fails_at:
            raise EngineError("out of memory")
        return 1.0

    with pytest.raises(EngineError, match="out of memory"):
        estimate(loss, lambda scale: perturb(w, 1, scale), 2.0**-10)
    assert same_bits(w, before)


def test_a_loss_that_is_not_finite_is_refused_with_the_weights_back() -> None:
    w = made()
    snap(w, 2.0**-10)
    before = copied(w)
    with pytest.raises(EngineError, match="expected finite losses"):
        estimate(lambda: math.inf, lambda scale: perturb(w, 1, scale), 2.0**-10)
    assert same_bits(w, before)


def test_a_slope_is_the_directional_derivative_but_for_epsilon_squared() -> None:
    """B19: |g - <grad, z>| = O(eps^2): a half of epsilon leaves a quarter of the error."""
    w, stream = made(np.float64), direction(0, 2)
    exact = float(4 * flat(w) ** 3 @ normals(stream, 0, 31).astype(np.float64))
    errors = [
        abs(estimate(lambda: quartic(w), lambda scale: perturb(w, stream, scale), epsilon) - exact)
        for epsilon in (2.0**-4, 2.0**-5, 2.0**-6)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.01)


# --- replay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 2e-15), (np.float32, 1e-6)])
def test_step_by_step_is_the_sum_per_seed(dtype: type, bound: float) -> None:
    """B18: 200 steps one by one against their sums per seed, to rounding."""
    w = made(dtype)
    start, drawn, table = copied(w), np.random.default_rng(2), SeedTable(64)
    for _ in range(200):
        index, slope = int(drawn.integers(64)), float(drawn.standard_normal())
        perturb(w, direction(9, index), -1e-3 * slope)
        table.add([index], [slope])
    replay(start, table.sums, 9, 1e-3)
    assert abs(flat(w) - flat(start)).max() <= bound * abs(flat(w)).max()


def test_replay_is_the_numpy_one_liner() -> None:
    w, sums = made(np.float64), np.random.default_rng(3).standard_normal(16)
    z = np.stack([normals(direction(1, s), 0, 31) for s in range(16)]).astype(np.float64)
    expected = flat(w) - 0.01 * sums @ z
    replay(w, sums, 1, 0.01)
    np.testing.assert_allclose(flat(w), expected, rtol=0, atol=1e-15 * abs(expected).max())


@pytest.mark.parametrize("chunk", [1, 6, 31, 4096])
def test_replay_gives_the_same_bits_whatever_the_chunk(chunk: int) -> None:
    sums = np.random.default_rng(3).standard_normal(32)
    one, other = made(), made()
    replay(one, sums, 1, 0.01)
    replay(other, sums, 1, 0.01, chunk=chunk)
    assert same_bits(one, other)


def test_no_more_of_a_direction_than_a_chunk_exists() -> None:
    w = {"w": np.zeros(1 << 20, np.float32)}
    tracemalloc.start()
    try:
        perturb(w, 1, 0.1, chunk=1 << 12)
        replay(w, np.ones(2), 0, 0.1, chunk=1 << 12)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * (1 << 12), "a sixteenth of the weights"


def test_loss_falls_on_a_quadratic_and_the_table_has_the_weights() -> None:
    """B18: K seeds are enough, and start and table are the whole state."""
    target, w = made(shapes={"w": (64,)})["w"], {"w": np.zeros(64, np.float32)}

    def loss() -> float:
        return float(((w["w"] - target) ** 2).sum(dtype=np.float64) / 2)

    table, losses, rate = SeedTable(128), [loss()], 5e-3
    chances = np.ones(128)
    for step, index in enumerate(draw(key(7, "steps"), 500, chances).tolist()):
        slope = _seeds.step(loss, w, direction(7, index), rate, 2.0**-8)
        table.add([index], [slope])
        if step % 100 == 99:
            losses.append(loss())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]
    again = {"w": np.zeros(64, np.float32)}
    replay(again, table.sums, 7, rate)
    np.testing.assert_allclose(again["w"], w["w"], rtol=0, atol=1e-5)


def tables(seeds: int = 64, rounds: int = 6) -> list[SeedTable]:
    """Of a job's rounds, in which some seeds are drawn and slopes differ by magnitudes."""
    drawn, table, made = np.random.default_rng(8), SeedTable(seeds), []
    for round_ in range(rounds):
        for _ in range(10):
            table.add([int(drawn.integers(seeds))], [float(drawn.standard_normal()) * 10.0**round_], 1 / 3)
        made.append(SeedTable(seeds))
        made[-1].sums = table.sums.copy()
    return made


def test_what_is_sent_of_a_table_is_the_sums_but_for_the_spacing_at_the_largest() -> None:
    for table in tables():
        sent = table.sent()
        assert sent.dtype == np.float32
        assert abs(sent - table.sums).max() <= abs(table.sums).max() * 2.0**-24
        multiples = sent.astype(np.float64) / np.spacing(abs(sent).max())
        assert (multiples == np.rint(multiples)).all()
    assert SeedTable(4).sent().tolist() == [0, 0, 0, 0]


def test_a_sum_over_seeds_is_exact_in_any_order() -> None:
    """The oracle is `math.fsum` and whole numbers: no order, device or library can change a bit."""
    table = SeedTable(4096)
    table.sums = np.random.default_rng(9).standard_normal(4096) ** 5
    sums = table.sent().astype(np.float64)
    z = np.stack([normals(direction(0, s), 0, 20) for s in range(4096)]).astype(np.float64)
    terms = sums[:, None] * z
    exact = [math.fsum(column) for column in terms.T]
    assert terms.sum(0).tolist() == exact == terms[::-1].cumsum(0)[-1].tolist() == (sums @ z).tolist()


def test_weights_are_built_anew_where_sums_grow_beyond_what_adds_exactly() -> None:
    """The tiny sums of the first table would be lost in the totals of the second."""
    start, rebuilt = made(), Rebuilt(made(), 2, 1e6)
    drawn, small, large = np.random.default_rng(3), SeedTable(64), SeedTable(64)
    small.sums, large.sums = 1e-9 * drawn.standard_normal(64), 1e9 * drawn.standard_normal(64)
    for table in (small, large, small):
        built, alone = rebuilt.load(table.sent()), copied(start)
        replay(alone, table.sent(), 2, 1e6)
        assert same_bits(built, alone)


@pytest.mark.parametrize("skipped", [0, 3], ids=["every round", "a member that was away"])
def test_weights_built_round_by_round_are_those_of_the_last_table_alone(skipped: int) -> None:
    start = made()
    rebuilt = Rebuilt(copied(start), 2, 1e-3)
    for table in tables()[skipped:]:
        built, alone = rebuilt.load(table.sent()), copied(start)
        replay(alone, table.sent(), 2, 1e-3)
        assert same_bits(built, alone)


# --- which seed -----------------------------------------------------------------------------------


def test_pro_draws_by_softmax_of_scaled_mean_slopes() -> None:
    history = {0: [1.0, -3.0], 1: [5000.0, -2000.0], 3: [0.5]}
    amplitudes = Amplitudes(4)
    for index, slopes in history.items():
        amplitudes.add([index] * len(slopes), slopes)
    means = np.array([np.abs(np.clip(history.get(s, [0.0]), -1000, 1000)).mean() for s in range(4)])
    scaled = (means - means.min()) / (means.max() - means.min())
    expected = np.exp(scaled) / np.exp(scaled).sum()
    np.testing.assert_allclose(amplitudes.probabilities(), expected, rtol=1e-14)
    again = Amplitudes(4)
    again.load_state_dict(amplitudes.state_dict())
    assert again.probabilities().tobytes() == amplitudes.probabilities().tobytes()


def test_before_any_slope_every_seed_is_alike() -> None:
    assert Amplitudes(8).probabilities().tolist() == [1 / 8] * 8


def test_seeds_are_drawn_as_often_as_their_probability_says() -> None:
    p = np.array([0.5, 0.0, 0.2, 0.3])
    counts = np.bincount(draw(key(0, "often"), 40_000, p), minlength=4)
    assert counts[1] == 0
    assert (abs(counts - 40_000 * p) <= 5 * np.sqrt(40_000 * p * (1 - p))).all()
    assert draw(5, 10, p).tolist() == draw(5, 20, p)[:10].tolist()


# --- the state, and what travels ------------------------------------------------------------------


def test_a_table_goes_on_from_its_state_bit_for_bit() -> None:
    table, again = SeedTable(8), SeedTable(8)
    table.add([1, 1, 7], [0.1, 0.2, 0.3], 1 / 3)
    again.load_state_dict(table.state_dict())
    for one in (table, again):
        one.add([1], [1e-9])
    assert table.sums.tobytes() == again.sums.tobytes()
    with pytest.raises(ConfigError, match="expected"):
        SeedTable(9).load_state_dict(table.state_dict())


BAD_STEPS = {
    "an index too high": ([8], [1.0], "expected seeds from 0 to 7"),
    "a negative index": ([-1], [1.0], "expected seeds from 0 to 7"),
    "an index that is none": ([1.5], [1.0], "expected seeds from 0 to 7"),
    "NaN": ([1], [math.nan], "expected finite scalars"),
    "infinity": ([1], [math.inf], "expected finite scalars"),
    "fewer scalars": ([1, 2], [1.0], "expected a scalar for each seed"),
}


@pytest.mark.parametrize(("indices", "scalars", "said"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_steps_that_cannot_be_are_refused_and_change_nothing(
    indices: list[float], scalars: list[float], said: str
) -> None:
    table = SeedTable(8)
    with pytest.raises(ConfigError, match=said):
        table.add(indices, scalars)
    assert not table.sums.any()
