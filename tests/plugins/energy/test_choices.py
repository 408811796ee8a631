"""Who gets a job: weights and the bandit; worked examples and invariants."""

from __future__ import annotations

import random

import pytest
from edged_plugins import energy
from edged_plugins.energy import _bandit, _weights
from hypothesis import given
from hypothesis import strategies as st

from edged import (
    Battery,
    Candidate,
    ConfigError,
    DeviceState,
    NodeView,
    PlanRequest,
    Role,
    Situation,
)


def node(name, bearable=None, mode=None, percent=None, plugged=False):
    battery = None if percent is None else Battery(percent, False, plugged)
    return NodeView(name, name, device=DeviceState(battery=battery), bearable=bearable, power_mode=mode)


RATES = st.lists(st.tuples(st.floats(0.01, 1), st.sampled_from([1, 2, 3])), min_size=1, max_size=8).map(
    lambda rows: [node(str(i), rate, mode) for i, (rate, mode) in enumerate(rows)]
)


@given(RATES)
def test_weights_are_a_distribution(nodes):
    for weigh in (_weights.uniform, _weights.long_term, _weights.adaptive):
        weights = weigh(nodes)
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= 0


@given(RATES)
def test_adaptive_never_gives_the_weakest_more(nodes):
    before, after = _weights.long_term(nodes), _weights.adaptive(nodes)
    for one, old, new in zip(nodes, before, after, strict=True):
        if one.power_mode == 1:
            assert new <= old * (1 + 1e-9)
    if all(one.power_mode != 1 for one in nodes):
        assert after == pytest.approx(before)


def test_long_term_weights_follow_what_batteries_bear():
    nodes = [node("a", 0.3), node("b", 0.1), node("c")]
    assert _weights.long_term(nodes) == pytest.approx([0.5, 1 / 6, 1 / 3])


@pytest.mark.parametrize(("draw", "index"), [(0.0, 0), (0.24, 0), (0.26, 2), (0.999999999999, 2)])
def test_a_draw_falls_on_its_weight(draw, index):
    assert _weights.drawn([1, 0, 3], draw) == index


@pytest.mark.parametrize(
    ("battery", "factor"),
    [
        (None, 1.0),
        (Battery(None, False, False), 1.0),
        (Battery(10.0, True, True), 1.0),
        (Battery(60.0, False, False), 0.5),
        (Battery(100.0, False, False), 1.0),
        (Battery(20.0, False, False), _weights.LEAST_WEIGHT),
        (Battery(5.0, False, False), _weights.LEAST_WEIGHT),
    ],
)
def test_a_battery_gives_by_what_it_has_above_its_reserve(battery, factor):
    assert _weights.battery_factor(battery, 0.2) == pytest.approx(factor)


# --- the bandit ---


@pytest.mark.parametrize(
    ("explore", "scores", "best"),
    [(1.0, (1.094, 1.339, 1.020), 1), (0.1, (0.559, 0.494, 0.642), 2), (0.0, (0.50, 0.40, 0.60), 2)],
)
def test_the_bandit_weighs_means_and_doubt(explore, scores, best):
    bandit = _bandit.Bandit(explore, rounds=34)
    for arm, (times, mean) in enumerate([(10, 0.5), (4, 0.4), (20, 0.6)]):
        bandit.arms[arm] = _bandit.Tried(times, mean)
    assert [bandit.score(arm) for arm in range(3)] == pytest.approx(scores, abs=6e-4)
    assert bandit.choose([0, 1, 2]) == best


def test_the_bandit_keeps_to_what_is_feasible():
    bandit = _bandit.Bandit()
    assert bandit.choose([]) is None
    chance = random.Random(1)
    for _ in range(300):
        feasible = [arm for arm in "abc" if chance.random() < 0.6]
        arm = bandit.choose(feasible)
        assert (arm is None) == (not feasible)
        if arm is not None:
            assert arm in feasible
            bandit.learn(arm, chance.random())
    assert sum(tried.times for tried in bandit.arms.values()) == bandit.rounds


# --- the plugin ---


def situation(nodes, draw=0.0, **changes):
    """Each node could do the job alone."""
    roles = [Role(0, each.node_id, 0, (0, 1), (0, 1), (0, 1), (0, 1), 1.0) for each in nodes]
    candidates = [Candidate("local", (role,)) for role in roles]
    by_id = {each.node_id: each for each in nodes}
    return Situation(candidates, by_id, PlanRequest(), draw, 0.0)


POLICIES = {policy.name: policy for policy in energy.edged_policies({})}
FIELD = [node("mains", 1.0), node("sunny", 0.5, 1), node("silent"), node("shaded", 0.0, 3)]


@pytest.mark.parametrize(
    ("policy", "weights"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("long-term", [0.5, 0.25, 0.25, 0.0]),
        ("adaptive", [0.5 / 0.8125, 0.0625 / 0.8125, 0.25 / 0.8125, 0.0]),
    ],
)
def test_each_node_is_drawn_as_often_as_it_weighs(policy, weights):
    drawn = [POLICIES[policy].choose(situation(FIELD, (i + 0.5) / 1000)) for i in range(1000)]
    assert [drawn.count(i) / 1000 for i in range(4)] == pytest.approx(weights, abs=2e-3)


def test_the_weights_are_told_and_who_says_no_harvest():
    assert POLICIES["adaptive"].note(situation(FIELD)) == (
        "Drawn by what batteries bear: mains 61.5%, sunny 7.7%, silent 30.8%, shaded 0.0%. "
        "No harvest is known of silent: each counts as the others' mean."
    )


def test_edged_policies():
    names = [policy.name for policy in energy.edged_policies({})]
    assert names == [
        "uniform",
        "long-term",
        "adaptive",
        "battery-balance",
        "bandit",
        "round-robin",
        "carbon",
    ]


@pytest.mark.parametrize(
    "settings", [{"explore": -1}, {"reserve": 1.0}, {"explore": "much"}, {"x": 1}, {"carbon_file": 3}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="energy"):
        energy.edged_policies(settings)
