"""Forward gradients and projections on seeds: cards B20 and B21, on problems whose answers are known."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from edged_plugins.zeroth_order import _ferret
from edged_plugins.zeroth_order._ferret import cut_normals, project, reconstruct, round_seed, shares
from edged_plugins.zeroth_order._forward import ForwardGradient, select
from edged_plugins.zeroth_order._seeds import direction, estimate, perturb
from edged_plugins.zeroth_order._stream import key, normals

from edged import ConfigError


def slope_of(gradient: np.ndarray, index: int, seed: int = 0) -> float:
    """Along a candidate, of a linear loss."""
    return float(gradient @ normals(direction(seed, index), 0, len(gradient)).astype(np.float64))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left.ravel(), right.ravel()
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


# --- forward gradients ----------------------------------------------------------------------------


def test_slope_times_direction_is_the_gradient_in_the_mean() -> None:
    """B20: E[jvp v] = grad, by central difference on a quadratic, within 5 standard errors."""
    d, n = 16, 4000
    w, target = {"w": np.zeros(d)}, np.random.default_rng(0).standard_normal(d)

    def loss() -> float:
        return float(((w["w"] - target) ** 2).sum() / 2)

    collected = ForwardGradient(0, (0, d), 0.1)
    for index in range(n):
        stream = direction(0, index)
        collected.add(index, estimate(loss, lambda s, stream=stream: perturb(w, stream, s), 0.01))
    error = collected.gradient({"w": (d,)})["w"] + target  # the gradient at 0 is -target
    assert abs(error).max() < 5 * math.sqrt(2 * (target @ target) / n)
    assert cosine(collected.gradient({"w": (d,)})["w"], -target) > 0.99


def test_variance_falls_as_the_number_of_directions() -> None:
    d = 1024
    gradient = np.random.default_rng(1).standard_normal(d)
    collected, seen = ForwardGradient(0, (0, d), 1e-9), {}
    for index in range(1600):
        collected.add(index, slope_of(gradient, index))
        seen[index + 1] = collected.variance
    assert seen[1] == math.inf
    for n in (100, 400):
        assert seen[n] / seen[4 * n] == pytest.approx(4, rel=0.2)
    # each value of jvp v has the variance |grad|^2 + grad_i^2, and a half n/2 of them
    assert seen[1600] == pytest.approx(2 / 1600 * (gradient @ gradient), rel=0.2)


def test_the_variance_is_that_of_the_means_of_two_halves() -> None:
    collected, terms = ForwardGradient(3, (5, 8), 1.0), []
    for index, slope in enumerate([0.5, -2.0, 1.0, 3.0, 0.25]):
        collected.add(index, slope)
        terms.append(slope * normals(direction(3, index), 5, 8).astype(np.float64))
    halves = [np.mean(terms[0::2], axis=0), np.mean(terms[1::2], axis=0)]
    assert collected.variance == pytest.approx(np.var(halves, axis=0, ddof=1).mean(), rel=1e-12)


def test_a_slope_counts_by_its_weight() -> None:
    """As often as whole copies of it would in both the mean and the variance."""
    weighted, copied = (ForwardGradient(3, (0, 8), 1.0) for _ in range(2))
    for index, slope, weight in ((0, 1.0, 2.0), (1, -2.0, 1.0)):
        weighted.add(index, slope, weight)
    for index, slope in ((0, 1.0), (1, -2.0), (0, 1.0)):
        copied.add(index, slope)
    np.testing.assert_allclose(
        weighted.gradient({"w": (8,)})["w"], copied.gradient({"w": (8,)})["w"], rtol=1e-6, atol=1e-7
    )
    assert weighted.variance == pytest.approx(copied.variance, rel=1e-12)


def test_no_step_is_made_while_the_variance_is_above_the_threshold() -> None:
    d = 64
    gradient = np.random.default_rng(2).standard_normal(d)
    collected, w = ForwardGradient(0, (0, d), 0.5), {"w": np.zeros(d, np.float32)}
    refused = 0
    for index in range(5000):
        collected.add(index, slope_of(gradient, index))
        is_sure = collected.variance <= 0.5
        mean = collected.gradient({"w": (d,)})["w"]
        stepped = collected.step(w, 0.1)
        assert (stepped is not None) == is_sure
        if stepped is not None:
            break
        assert not w["w"].any()
        refused += 1
    assert refused > 100
    np.testing.assert_allclose(w["w"], -0.1 * mean, rtol=1e-6, atol=1e-9)
    assert stepped is not None
    np.testing.assert_array_equal(stepped["w"], mean)
    assert collected.step(w, 0.1) is None, "what made a step is used up"
    assert collected.slopes == []


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_nothing_can_pass_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold above 0"):
        ForwardGradient(0, (0, 1), threshold)


def test_a_slope_that_is_not_finite_is_refused() -> None:
    collected = ForwardGradient(0, (0, 4), 1.0)
    with pytest.raises(ConfigError, match="finite slope"):
        collected.add(0, math.nan)
    assert collected.slopes == []


def test_candidates_are_chosen_by_cosine_with_the_former_gradient() -> None:
    drawn = np.random.default_rng(4)
    former = {name: drawn.standard_normal(n).astype(np.float32) for name, n in (("a", 30), ("b", 70))}
    flat = np.concatenate([former["a"], former["b"]]).astype(np.float64)
    all_of_them = [cosine(normals(direction(8, s), 0, 100).astype(np.float64), flat) for s in range(40)]
    indices, cosines = select(8, range(40), former, 4)
    assert indices == sorted(range(40), key=lambda s: -all_of_them[s])[:4]
    np.testing.assert_allclose(cosines, sorted(all_of_them)[:-5:-1], rtol=1e-12)


def test_without_a_former_gradient_the_first_candidates_are_taken() -> None:
    assert select(8, [5, 3, 9], {"w": np.zeros(10, np.float32)}, 2) == ([5, 3], [0.0, 0.0])


def test_chosen_directions_lean_to_the_former_gradient_and_the_cosines_say_so() -> None:
    """B20's trap: the mean is no longer the gradient. Without selection the same measure is 1."""
    d = 32
    former = np.random.default_rng(5).standard_normal(d).astype(np.float32)
    along = (former / np.sqrt(former @ former)).astype(np.float64)
    taken: dict[str, list[float]] = {"all": [], "chosen": []}
    logged = []
    for group in range(60):
        candidates = range(10 * group, 10 * group + 10)
        chosen, cosines = select(1, candidates, {"w": former}, 1)
        logged += cosines
        for kind, indices in (("all", candidates), ("chosen", chosen)):
            taken[kind] += [slope_of(along, index, 1) ** 2 for index in indices]  # <jvp v, along>
    assert statistics.fmean(taken["all"]) == pytest.approx(1, abs=5 * math.sqrt(2 / 600))
    assert statistics.fmean(taken["chosen"]) > 1.5
    assert statistics.fmean(logged) > 0.15


# --- projections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 16, 400])
def test_cut_normals_have_the_distribution_of_normals_cut_at_one_over_root_size(size: int) -> None:
    """The oracle is the normal distribution function itself, at the draws' own uniform numbers."""
    n, cut, normal = 20_000, 1 / math.sqrt(size), statistics.NormalDist()
    v = cut_normals(key(0, "cut"), 0, n, size).astype(np.float64)
    assert abs(v).max() <= cut
    variance = 1 - 2 * cut * normal.pdf(cut) / (2 * normal.cdf(cut) - 1)
    assert abs(v.mean()) < 5 * math.sqrt(variance / n)
    assert (v**2).mean() == pytest.approx(variance, rel=5 * math.sqrt(0.8 / n))
    assert variance == pytest.approx(1 / (3 * size), rel=0.2 / size)
    whole = normal.cdf(cut) - normal.cdf(-cut)
    reached = np.array([(normal.cdf(x) - normal.cdf(-cut)) / whole for x in np.sort(v)])
    assert abs(reached - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)  # Kolmogorov, 0.1 %


def test_what_is_sent_gives_the_change_in_the_mean_and_the_more_alike_the_more_directions() -> None:
    """B21: the factor 3 d/n gives delta; d/n gives a third. The cosine is 1 / sqrt(1 + d/n)."""
    d = 200
    delta = {"w": np.random.default_rng(6).standard_normal(d).astype(np.float32)}
    flat, cosines = delta["w"].astype(np.float64), []
    for n in (200, 1000, 8000):
        made = reconstruct(project(delta, "3", n), {"w": (d,)}, "3")["w"]
        cosines.append(cosine(made, flat))
        assert cosines[-1] == pytest.approx(1 / math.sqrt(1 + d / n), abs=0.06)
        length = (made @ flat) / (flat @ flat)
        assert length == pytest.approx(1, abs=5 * math.sqrt(2 / n))
        assert length / 3 == pytest.approx(1 / 3, abs=2 / math.sqrt(n)), "with the authors' factor"
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.98


def test_both_ends_build_the_same_bits_of_what_travelled() -> None:
    drawn = np.random.default_rng(7)
    shapes = {"b": (6, 5), "a": (40,)}
    delta = {name: drawn.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    sent = project(delta, "11", 64)
    travelled = {name: np.frombuffer(values.tobytes(), np.float32) for name, values in sent.items()}
    ends = [{"a": np.ones(40, np.float32), "b": np.ones((6, 5), np.float32)} for _ in range(2)]
    for end, coordinates in zip(ends, (sent, travelled), strict=True):
        _ferret.step(end, reconstruct(coordinates, shapes, "11"))
    assert all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in shapes)
    other = reconstruct(sent, shapes, "12")
    assert (
        abs(cosine(other["a"], delta["a"])) < 0.5 < cosine(reconstruct(sent, shapes, "11")["a"], delta["a"])
    )


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ({"a": 4.0, "b": 2.0, "c": 0.001}, {"a": 198, "b": 100, "c": 2}),
        ({"a": 0.0, "b": 0.0}, {"a": 100, "b": 100}),
        ({"a": 1.0}, {"a": 100}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 100, "b": 100, "c": 100}),
        ({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 296, "b": 2, "c": 2}),
        ({}, {}),
    ],
)
def test_a_block_gets_directions_by_how_much_it_changed(
    norms: dict[str, float], expected: dict[str, int]
) -> None:
    found = shares(norms, 100)
    assert found == expected
    assert sum(found.values()) == 100 * len(norms), "so that what an update takes is known"


def test_a_change_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match="finite changes"):
        project({"w": np.array([1.0, math.nan], np.float32)}, "0", 8)


def test_blocks_alike_in_size_have_directions_of_their_own() -> None:
    alike = np.random.default_rng(8).standard_normal(20).astype(np.float32)
    sent = project({"v": alike, "w": alike}, "0", 16)
    assert len(sent["v"]) == len(sent["w"]) == 16, "all of them"
    assert not set(sent["v"].tolist()) & set(sent["w"].tolist())


def test_members_errors_are_not_alike_and_cancel_in_the_mean() -> None:
    """One change, projected on the directions of 16 members: the mean's error is a quarter of one's."""
    d, members = 256, 16
    delta = {"w": np.random.default_rng(9).standard_normal(d).astype(np.float32)}
    made = []
    for rank in range(members):
        seed = round_seed(0, 3, rank)
        made.append(reconstruct(project(delta, seed, 64), {"w": (d,)}, seed)["w"] - delta["w"])
    alone = statistics.fmean(float(np.linalg.norm(error)) for error in made)
    together = float(np.linalg.norm(np.mean(made, axis=0)))
    assert together / alone == pytest.approx(1 / math.sqrt(members), rel=0.2)


def test_a_change_too_long_is_made_as_long_as_the_limit() -> None:
    w = {"long": np.zeros(4, np.float32), "short": np.zeros(2, np.float32)}
    change = {"long": np.full(4, 30.0), "short": np.array([3.0, 4.0])}
    _ferret.step(w, change, rate=0.5, limit=10.0)
    np.testing.assert_allclose(w["long"], -0.5 * 5 * np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(w["short"], [-1.5, -2.0], rtol=1e-6)
