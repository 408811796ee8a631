"""Aggregators of members without gradients: what the server makes is what its members' steps say."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from edged_plugins import zeroth_order
from edged_plugins.zeroth_order._aggregators import factors_of, parameters_of, replayed
from edged_plugins.zeroth_order._seeds import direction, step
from edged_plugins.zeroth_order._stream import key
from edged_plugins.zeroth_order._table import SeedTable, draw
from zeroth_rig import start

from edged import Aggregator, ConfigError, Factors, Member, PolicyViolation, Update

MEMBERS = [Member(rank, 4, 2.0) for rank in range(3)]
WEIGHTS = [3.0, 1.0, 8.0]
SETTINGS = {"seeds": 64, "learning_rate": 1e-2, "seed": 5}
FORWARD = SETTINGS | {"local_steps": 5, "candidates": 3, "variance_most": 1e3}
BY_NAME = {entry.name: entry for entry in zeroth_order.AGGREGATORS}
METHODS = {
    "fedkseed": ("fedkseed", SETTINGS),
    "fedkseed by amplitude": ("fedkseed", SETTINGS | {"seed_sampling": "amplitude"}),
    "mezo": ("mezo", SETTINGS),
    "fwdllm": ("fwdllm", FORWARD),
    "fwdllm without choice": ("fwdllm", FORWARD | {"candidates": 1}),
    "fwdllm that collects": ("fwdllm", FORWARD | {"variance_most": 0.02}),
    "ferret": ("ferret", SETTINGS | {"coordinates": 8}),
}


def loaded(name: str, settings: Mapping[str, Any], members: list[Member] = MEMBERS) -> Aggregator:
    module, _, attribute = BY_NAME[name].load.partition(":")
    return getattr(importlib.import_module(module), attribute)(settings, start(), members)


def update(rank: int, round: int, weight: float | None = None) -> Update:
    """Something of every kind that an aggregator here may ask for."""
    drawn = np.random.default_rng([rank, round])
    factors = {
        module: (drawn.standard_normal(a.shape).astype(np.float32), drawn.standard_normal(b.shape))
        for module, (a, b) in start().items()
    }
    extras = {"seeds": drawn.integers(64, size=20), "scalars": drawn.standard_normal(20).astype(np.float32)}
    extras |= {"slopes": drawn.standard_normal(5).astype(np.float32)}
    extras |= {"coordinates": drawn.standard_normal((4, 8)), "counts": np.array([2, 12, 8, 10], np.int32)}
    return Update(MEMBERS[rank], round, WEIGHTS[rank] if weight is None else weight, factors, extras)


def rounds(aggregator: Aggregator, numbers: range, scale: float = 1.0) -> None:
    for number in numbers:
        aggregator.begin(number, MEMBERS)
        for rank in range(3):
            aggregator.add(update(rank, number, scale * WEIGHTS[rank]))
        aggregator.finish()


def made_of(aggregator: Aggregator) -> Factors:
    return {module: (a, b) for module, (a, b, _) in aggregator.adapter().items()}


def bits(aggregator: Aggregator) -> bytes:
    factors = parameters_of(made_of(aggregator))
    return b"".join(factors[name].tobytes() for name in sorted(factors))


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
def test_a_state_goes_on_bit_for_bit(name: str, settings: dict[str, Any]) -> None:
    undisturbed, killed = loaded(name, settings), loaded(name, settings)
    rounds(undisturbed, range(4))
    rounds(killed, range(2))
    again = loaded(name, settings)
    again.load_state_dict(killed.state_dict())
    rounds(again, range(2, 4))
    assert bits(again) == bits(undisturbed)
    for key_, value in undisturbed.state_dict().items():
        assert again.state_dict()[key_].tobytes() == value.tobytes()


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
def test_a_round_without_updates_is_refused_and_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    aggregator = loaded(name, settings)
    rounds(aggregator, range(1))
    before = bits(aggregator)
    aggregator.begin(1, MEMBERS)
    with pytest.raises(PolicyViolation, match="at least one member"):
        aggregator.finish()
    assert bits(aggregator) == before


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
def test_only_the_ratios_of_weights_count(name: str, settings: dict[str, Any]) -> None:
    one, other = loaded(name, settings), loaded(name, settings)
    rounds(one, range(2))
    rounds(other, range(2), scale=4.0)
    assert bits(one) == bits(other), "a power of two changes no bit"


@pytest.mark.parametrize(("name", "settings"), METHODS.values(), ids=METHODS)
def test_before_the_first_round_everybody_loads_the_start(name: str, settings: dict[str, Any]) -> None:
    aggregator = loaded(name, settings)
    expected = parameters_of(start())
    made = parameters_of(made_of(aggregator))
    assert {n: a.tobytes() for n, a in made.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert aggregator.frozen(0) == ("AB" if name in ("fwdllm", "ferret") else "")
    assert [scale for _, _, scale in aggregator.adapter().values()] == [2.0, 2.0]


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("other", [Member(1, 8, 2.0), Member(1, 4, 1.0)], ids=["r", "scale"])
def test_unlike_members_are_refused_by_name(name: str, other: Member) -> None:
    assert not BY_NAME[name].unlike_ranks
    with pytest.raises(ConfigError, match="one r and scale"):
        loaded(name, SETTINGS, [MEMBERS[0], other])


@pytest.mark.parametrize(
    ("key_", "value"),
    [("seeds", 0), ("seeds", True), ("learning_rate", -1.0), ("learning_rate", math.nan), ("seed", -1),
     ("seed_sampling", "greedy")],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name(key_: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key_}: expected"):
        loaded("fedkseed", SETTINGS | {key_: value})


# --- seeds ----------------------------------------------------------------------------------------


def test_the_table_is_the_weighted_sum_per_seed() -> None:
    aggregator = loaded("fedkseed", SETTINGS)
    rounds(aggregator, range(3))
    expected = np.zeros(64)
    for number in range(3):
        for rank in range(3):
            extras = update(rank, number).extras
            for index, scalar in zip(extras["seeds"], extras["scalars"], strict=True):
                expected[index] += WEIGHTS[rank] / 12 * float(scalar)
    table = aggregator.download(MEMBERS[0]).extras["table"]
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=1e-12, atol=abs(expected).max() * 2.0**-24)


def test_a_member_with_the_start_makes_the_servers_bits_of_the_table_alone() -> None:
    """A member that joins late needs nothing else."""
    aggregator = loaded("fedkseed", SETTINGS)
    rounds(aggregator, range(3))
    table = aggregator.download(MEMBERS[0]).extras["table"]
    made = parameters_of(replayed(start(), table, 5, 1e-2))
    assert b"".join(made[name].tobytes() for name in sorted(made)) == bits(aggregator)


def test_sums_of_members_that_mask_are_the_same_as_their_steps() -> None:
    stepwise, summed = loaded("fedkseed", SETTINGS), loaded("fedkseed", SETTINGS)
    rounds(stepwise, range(1))
    summed.begin(0, MEMBERS)
    for rank in range(3):
        table, given = SeedTable(64), update(rank, 0)
        table.add(given.extras["seeds"], given.extras["scalars"])
        summed.add(Update(given.member, 0, given.weight, {}, {"sums": table.sums}))
    summed.finish()
    np.testing.assert_allclose(
        summed.download(MEMBERS[0]).extras["table"],
        stepwise.download(MEMBERS[0]).extras["table"],
        rtol=1e-6,
        atol=1e-7,
    )


BAD_EXTRAS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "expected seeds and scalars"),
    "scalars alone": ({"scalars": np.ones(2)}, "expected seeds and scalars"),
    "a seed of no direction": ({"seeds": np.array([64]), "scalars": np.ones(1)}, "seeds from 0 to 63"),
    "NaN": ({"seeds": np.array([1]), "scalars": np.array([math.nan])}, "finite scalars"),
    "too few sums": ({"sums": np.ones(63)}, "a scalar for each seed"),
}


@pytest.mark.parametrize(("extras", "said"), BAD_EXTRAS.values(), ids=BAD_EXTRAS)
def test_an_update_that_cannot_be_used_is_refused_and_the_round_goes_on(
    extras: dict[str, Any], said: str
) -> None:
    aggregator, expected = loaded("fedkseed", SETTINGS), loaded("fedkseed", SETTINGS)
    for one in (aggregator, expected):
        one.begin(0, MEMBERS)
        one.add(update(0, 0))
    with pytest.raises(ConfigError, match=said):
        aggregator.add(Update(MEMBERS[1], 0, 1.0, {}, extras))
    for one in (aggregator, expected):
        one.finish()
    assert bits(aggregator) == bits(expected)


def test_seeds_of_steep_slopes_are_offered_more_often() -> None:
    aggregator = loaded("fedkseed", SETTINGS | {"seed_sampling": "amplitude"})
    aggregator.begin(0, MEMBERS)
    aggregator.add(
        Update(MEMBERS[0], 0, 1.0, {}, {"seeds": np.array([3, 9]), "scalars": np.array([-8.0, 4])})
    )
    aggregator.finish()
    p = aggregator.download(MEMBERS[0]).extras["probabilities"]
    assert p.argmax() == 3
    assert p[3] / p[9] == pytest.approx(math.exp(0.5), rel=1e-6)
    assert p[9] / p[0] == pytest.approx(math.exp(0.5), rel=1e-6)
    with pytest.raises(ConfigError, match="seeds and scalars"):
        aggregator.add(Update(MEMBERS[0], 1, 1.0, {}, {"sums": np.ones(64)}))


# --- training -------------------------------------------------------------------------------------


def distance(factors: Factors, member: int) -> float:
    """A loss of the member's own: how far its factors are from what it would like, and what all share."""
    flat = np.concatenate([part.ravel() for _, part in sorted(parameters_of(factors).items())])
    wish = np.random.default_rng(100).standard_normal(flat.size)
    wish = wish + 0.3 * np.random.default_rng(member).standard_normal(flat.size)
    return float(((flat - wish) ** 2).sum() / 2)


def locally(factors: Factors, member: Member, round: int, directions: int | None) -> Update:
    """Steps of a member; `directions`: of so many candidates, or, as MeZO, always new ones."""
    own = {name: array.copy() for name, array in parameters_of(factors).items()}
    chance = key(5, f"steps {round} {member.rank}")
    indices = draw(chance, 40, np.ones(directions or 1 << 16))
    slopes = [
        step(lambda: distance(factors_of(own), member.rank), own, direction(5, index), 5e-3, 2.0**-11)
        for index in indices.tolist()
    ]
    extras = {"seeds": indices, "scalars": np.array(slopes, np.float32)}
    return Update(member, round, WEIGHTS[member.rank], factors_of(own), extras)


@pytest.mark.parametrize(("name", "directions"), [("fedkseed", 256), ("mezo", None)])
def test_the_loss_of_unlike_members_falls_in_rounds(name: str, directions: int | None) -> None:
    aggregator = loaded(name, {"seeds": 256, "learning_rate": 5e-3, "seed": 5})
    losses = []
    for number in range(8):
        factors = made_of(aggregator)
        losses.append(sum(w * distance(factors, m.rank) for w, m in zip(WEIGHTS, MEMBERS, strict=True)))
        aggregator.begin(number, MEMBERS)
        for member in MEMBERS:
            aggregator.add(locally(factors, member, number, directions))
        aggregator.finish()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.4 * losses[0]


def test_one_members_round_is_its_own_local_training() -> None:
    """Step by step on the member and summed on the server: the same weights but for F32 rounding."""
    aggregator = loaded("fedkseed", {"seeds": 64, "learning_rate": 5e-3, "seed": 5})
    given = locally(start(), MEMBERS[0], 0, 64)
    aggregator.begin(0, MEMBERS)
    aggregator.add(given)
    aggregator.finish()
    made, own = parameters_of(made_of(aggregator)), parameters_of(given.factors)
    for name in own:
        np.testing.assert_allclose(made[name], own[name], rtol=0, atol=4e-6)


# --- means of factors -----------------------------------------------------------------------------


def test_mezo_averages_each_factor_and_not_their_product() -> None:
    """B19: the weighted mean of A and of B; the product of means is another one than the mean of products."""
    aggregator = loaded("mezo", SETTINGS)
    rounds(aggregator, range(1))
    given = [update(rank, 0) for rank in range(3)]
    for module, (a, b) in made_of(aggregator).items():
        for made, i in ((a, 0), (b, 1)):
            mean = sum(
                w / 12 * u.factors[module][i].astype(np.float64) for w, u in zip(WEIGHTS, given, strict=True)
            )
            np.testing.assert_allclose(made, mean, rtol=1e-6, atol=1e-7)
        exact = sum(
            w / 12 * u.factors[module][1] @ u.factors[module][0] for w, u in zip(WEIGHTS, given, strict=True)
        )
        assert np.linalg.norm(b @ a - exact) > 0.1 * np.linalg.norm(exact)


def test_mezo_refuses_factors_of_another_shape_by_name() -> None:
    aggregator = loaded("mezo", SETTINGS)
    given = update(0, 0)
    factors = dict(given.factors) | {"layers.2.q_proj": (np.ones((8, 6)), np.ones((5, 4)))}
    with pytest.raises(ConfigError, match=r"layers\.2\.q_proj\.A: expected \(4, 6\), got \(8, 6\)"):
        aggregator.add(Update(MEMBERS[0], 0, 1.0, factors))


def test_the_plugin_has_no_settings_and_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no setting plugin\.zeroth_order\.speed"):
        zeroth_order.edged_aggregators({"speed": 1})
    assert [entry.name for entry in zeroth_order.edged_aggregators({})] == [
        "fedkseed",
        "mezo",
        "fwdllm",
        "ferret",
    ]
