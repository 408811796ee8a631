"""Noise on a federated job's sum hides one client: bounds, the account, and what a resumed job spends."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins._tensors.privacy import Budget, sigma_of_one_release
from edged_plugins.personal_lora import _client_privacy as privacy
from edged_plugins.personal_lora._client_noise import RELEASED, SECRET, Account, Private, cut_factors
from edged_plugins.personal_lora._cohort import cohort_of
from edged_plugins.personal_lora._job import read
from edged_plugins.personal_lora._mean import Mean
from rig import finished, kept_by, raised, run_threads
from rounds_rig import TRAINING, breaks_before, federated
from test_rounds import adapter_of, steps_of, stranger

from edged import ConfigError, Member, PolicyViolation, Update

CLIP = 0.5
SHAPES = {"q": ((4, 30), (20, 4)), "v": ((4, 30), (10, 4))}
START = {
    name: (np.full(a, 0.25, "<f8"), np.zeros(b, "<f8")) for name, (a, b) in SHAPES.items()
}  # F64: identities to rounding
VALUES = sum(math.prod(shape) for pair in SHAPES.values() for shape in pair)
NOISY = {"client_clip": CLIP, "client_noise": 4.0}


def job_of(members: int = 4, **changes: Any) -> Any:
    clients = [{"node": f"n{i}", "data": "rows"} for i in range(members)]
    table = {"method": "fedavg", "clients": clients, "server": {"node": "s"}, "client_clip": CLIP}
    return read(TRAINING.check(table | changes))


def server_of(folder: Path, start: Any = START, **changes: Any) -> tuple[Private, list[Member]]:
    job = job_of(**changes)
    members = [Member(rank, 4, 2.0) for rank in range(len(job.clients))]
    inner = Mean("fedavg", start, members)
    return Private(inner, start, job, Account(job, str(folder))), members


def update(member: Member, by: float, round: int = 0, seed: int = 0, weight: float = 1.0) -> Update:
    """A change of norm `by` in a direction of its own."""
    rng = np.random.default_rng([seed, member.rank])
    row = rng.standard_normal(VALUES)
    row *= by / np.linalg.norm(row)
    factors, at = {}, 0
    for name, pair in START.items():
        made = []
        for one in pair:
            made.append(one + row[at : at + one.size].reshape(one.shape))
            at += one.size
        factors[name] = (made[0], made[1])
    return Update(member, round, weight, factors)


def mean_of(server: Private, members: list[Member], updates: list[Update], round: int = 0) -> np.ndarray:
    server.begin(round, members)
    for each in updates:
        server.add(each)
    server.finish()
    factors = server.download(members[0]).factors
    return np.concatenate([one.ravel() for name in sorted(factors) for one in factors[name]])


@pytest.mark.parametrize("by", [0.0, 0.1, 3.0, 1e12])
def test_one_client_moves_the_mean_by_no_more_than_its_clip(by: float, tmp_path: Path) -> None:
    """Against the job in which it changes nothing, whatever it sends and whatever weight it says."""
    means = []
    for name, own, weight in (("a", 0.0, 1.0), ("b", by, 1e12)):
        server, members = server_of(tmp_path / name)
        others = [update(member, 0.3) for member in members[1:]]
        means.append(mean_of(server, members, [update(members[0], own, weight=weight), *others]))
    assert np.linalg.norm(means[1] - means[0]) <= CLIP / 4 * (1 + 1e-12)


def test_a_client_that_does_not_answer_changes_nothing_and_no_divisor(tmp_path: Path) -> None:
    first, members = server_of(tmp_path / "a")
    second, _ = server_of(tmp_path / "b")
    others = [update(member, 0.3) for member in members[1:]]
    silent = mean_of(first, members, others)
    still = mean_of(second, members, [update(members[0], 0.0), *others])
    np.testing.assert_allclose(silent, still, rtol=0, atol=1e-15)


def test_without_noise_the_mean_is_that_of_the_changes(tmp_path: Path) -> None:
    server, members = server_of(tmp_path)
    plain = Mean("fedavg", START, members)
    updates = [update(member, 0.9 * CLIP) for member in members]
    found = mean_of(server, members, updates)
    np.testing.assert_allclose(found, mean_of(plain, members, updates), rtol=0, atol=1e-15)
    assert not (tmp_path / RELEASED).exists()


def test_noise_has_the_standard_deviation_of_the_clip_over_the_clients(tmp_path: Path) -> None:
    wide = {"q": (np.zeros((4, 20000)), np.zeros((20000, 4)))}
    server, members = server_of(tmp_path, wide, client_noise=4.0)
    found = mean_of(server, members, [Update(member, 0, 1.0, wide) for member in members])
    assert found.std() == pytest.approx(4.0 * CLIP / 4, rel=0.01)
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(found.size)


def test_a_frozen_factor_gets_no_noise(tmp_path: Path) -> None:
    server, members = server_of(tmp_path, client_noise=1.0)
    server._inner.frozen = lambda round: "A"
    server.begin(0, members)
    server.add(update(members[0], 0.2))
    server.finish()
    for name, (a, b) in server.download(members[0]).factors.items():
        np.testing.assert_array_equal(a, START[name][0])
        assert b.any()


def test_the_noise_is_of_a_secret_the_round_and_the_sum(tmp_path: Path) -> None:
    def noisy(folder: str, round: int = 0, by: float = 0.2) -> np.ndarray:
        server, members = server_of(tmp_path / folder, client_noise=1.0)
        return mean_of(server, members, [update(member, by) for member in members], round)

    once = noisy("a")
    np.testing.assert_array_equal(noisy("a"), once)
    for other in (noisy("b"), noisy("a", 1), noisy("a", 0, 0.2 + 1e-9)):
        assert np.linalg.norm(other - once) > 1.0
    assert (tmp_path / "a" / SECRET).stat().st_mode & 0o777 == 0o600


def test_a_member_cuts_its_own_change() -> None:
    member = Member(0, 4, 2.0)
    sent = cut_factors(update(member, 7.0).factors, START, "B", CLIP)
    changes = [sent[name][side] - START[name][side] for name in START for side in (0, 1)]
    assert not any(change.any() for change in changes[::2])
    norm = math.sqrt(sum(float((change**2).sum()) for change in changes))
    assert CLIP * 0.999 < norm <= CLIP


# --- the account ----------------------------------------------------------------------------------


def test_the_account_agrees_with_published_values() -> None:
    """Gaussian differential privacy with mu = 1 is (1, 0.1269)-private (Dong, Roth and Su 2019), and the
    textbook's sigma is more than one release needs (Dwork and Roth 2014, theorem A.1)."""
    assert privacy.delta_of(1.0, 1.0) == pytest.approx(0.12693674, abs=1e-8)
    for epsilon, delta in ((0.1, 1e-5), (0.5, 1e-6), (0.9, 1e-9)):
        assert 0.5 * epsilon < privacy.epsilon_of(sigma_of_one_release(epsilon, delta), 1, delta) <= epsilon


@pytest.mark.parametrize(("sigma", "rounds"), [(0.8, 1), (1.0, 10), (4.0, 100), (30.0, 1000)])
def test_the_account_is_below_the_renyi_bound_and_near_it(sigma: float, rounds: int) -> None:
    bound = Budget(1e9, 1e-5, sigma, 1, 1).spent(rounds)
    assert 0.8 * bound < privacy.epsilon_of(sigma, rounds, 1e-5) <= bound


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 8.0), (4.0, 2.0), (20.0, 1.0), (0.02, 5e4)])
def test_one_round_more_than_is_allowed_passes_the_budget(sigma: float, epsilon: float) -> None:
    allowed = privacy.rounds_allowed(sigma, epsilon, 1e-5)
    assert privacy.epsilon_of(sigma, allowed, 1e-5) <= epsilon < privacy.epsilon_of(sigma, allowed + 1, 1e-5)
    if allowed:
        assert privacy.sigma_for(epsilon, 1e-5, allowed) <= sigma


def test_the_client_that_is_drawn_most_is_counted(tmp_path: Path) -> None:
    job = job_of(5, rounds=7, fraction=0.4, client_noise=4.0)
    drawn = Counter(rank for number in range(7) for rank in cohort_of(job, number))
    account = Account(job, str(tmp_path))
    assert account.most == max(drawn.values()) < 7
    assert account.spent()["epsilon"] == privacy.epsilon_of(4.0, account.most, 1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many rounds": ({"rounds": 9, "client_epsilon": 2.0}, "allows 4 rounds of one client"),
    "a budget without noise": ({"client_noise": 0.0, "client_epsilon": 2.0}, "client_noise above 0"),
    "noise without a clip": ({"client_clip": 0.0}, "client_clip above 0 with client_noise"),
    "no delta": ({"client_delta": 0.0}, "client_delta from 1e-15"),
    "a clip that is no number": ({"client_clip": float("nan")}, "client_clip from 0"),
    "a stack": ({"method": "flora"}, "flora does"),
    "a median": ({"method": "median"}, "median does"),
    "seeds": ({"method": "fedkseed"}, "fedkseed does"),
    "control variates": ({"method": "scaffold"}, "scaffold does"),
    "a masked sum": ({"masked": True}, "masked = false with client_clip"),
    "a weight": (
        {"clients": [{"node": "a", "data": "rows", "weight": 3}, {"node": "b", "data": "rows"}]},
        "no weight of a client",
    ),
    "a member by seeds": (
        {"clients": [{"node": "a", "data": "rows", "method": "fedkseed"}, {"node": "b", "data": "rows"}]},
        "the job's method of every client",
    ),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_a_job_that_cannot_be_private_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        job_of(**(NOISY | changes))


def test_rounds_that_draw_one_client_too_often_are_refused_before_the_first(tmp_path: Path) -> None:
    """By the draw itself; the file alone does not show it."""
    few = privacy.epsilon_of(4.0, 3, 1e-5)
    job = job_of(5, rounds=7, fraction=0.4, client_noise=4.0, client_epsilon=few)
    with pytest.raises(PolicyViolation, match="allows 3 rounds") as caught:
        Account(job, str(tmp_path))
    assert caught.value.code == "privacy-budget"


def test_a_round_done_again_with_other_updates_is_counted_again(tmp_path: Path) -> None:
    """Also by a later run of the job; the same updates count once, and none beyond the budget."""
    two = {"client_noise": 4.0, "rounds": 1, "client_epsilon": privacy.epsilon_of(4.0, 2, 1e-5)}
    for seed in (0, 0, 1, 1):
        server, members = server_of(tmp_path, **two)
        mean_of(server, members, [update(member, 0.2, seed=seed) for member in members])
    assert Account(job_of(**two), str(tmp_path)).most == 2
    server, members = server_of(tmp_path, **two)
    with pytest.raises(PolicyViolation, match="allows 2 rounds of one client"):
        mean_of(server, members, [update(member, 0.2, seed=2) for member in members])
    with open(tmp_path / RELEASED, "a") as file:
        file.write("0 cut")  # by a power cut, before anything was released
    with pytest.raises(PolicyViolation):
        Account(job_of(**(two | {"rounds": 2})), str(tmp_path))


# --- whole jobs -------------------------------------------------------------------------------------


def test_a_private_job_goes_on_bit_for_bit_and_spends_no_more(tiny: Any, tmp_path: Path) -> None:
    path = tiny("llama")[1]
    whole, broken = (
        federated(path, tmp_path / name, rounds=3, client_clip=0.1, client_noise=1.0, submitter="laptop")
        for name in ("whole", "broken")
    )
    folder = tmp_path / "broken" / "rank-2"
    folder.mkdir(parents=True)
    secret = bytes(range(32))
    for name in ("whole", "broken"):
        (tmp_path / name / "rank-2").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "rank-2" / SECRET).write_bytes(secret)
    done = finished(run_threads(whole))
    spent = {"epsilon": privacy.epsilon_of(1.0, 3, 1e-5), "delta": 1e-5}
    assert done[-1].reports[-1] == ("done", 3, spent)
    assert all("residual" not in row for row in steps_of(done[2]))

    raised(run_threads(broken, changes={0: breaks_before(2)}))
    step = max(set.intersection(*(set(steps) for steps in kept_by(broken)[:3])))
    again = finished(run_threads(broken, step))
    assert again[-1].reports[-1] == ("done", 3, spent)
    one, other = (adapter_of(plan.folders[-1]) for plan in (whole, broken))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_member_that_does_not_cut_its_change_is_cut_by_the_server(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, client_clip=0.01)
    with caplog.at_level(logging.WARNING):
        server = finished(run_threads(plan, ranks={0: stranger(plan, lambda number, said, values: None)}))[-1]
    found = [record for record in caplog.records if "longer than client_clip" in record.message]
    assert {(record.round, record.member) for record in found} == {(0, 0), (1, 0)}
    assert all("refused" not in row for row in steps_of(server))
