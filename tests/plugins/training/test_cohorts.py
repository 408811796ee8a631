"""Rounds that only a part of the clients trains in, over tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins._tensors.adapters import pairs_of, read_peft
from edged_plugins.personal_lora._cohort import cohort_of
from edged_plugins.personal_lora._job import Client, Job, read
from edged_plugins.personal_lora._messages import values_of
from edged_plugins.personal_lora._packing import Packing
from rig import Outcome, Planned, finished, kept_by, raised, run_threads
from rounds_rig import breaks_before, federated

from edged import ConfigError, Download

FOUR = ({}, {}, {}, {})


def job_of(count: int, **keys: Any) -> Job:
    return Job(clients=tuple(Client(f"client{i}", "rows") for i in range(count)), server="server", **keys)


def steps_of(outcome: Outcome) -> list[dict[str, float]]:
    return [values for kind, _, values in outcome.reports if kind == "step"]


def trained(outcomes: list[Outcome]) -> list[tuple[int, ...]]:
    """Ranks of each round whose updates counted."""
    return [
        tuple(int(key.removeprefix("up_")) for key in row if key.startswith("up_"))
        for row in steps_of(outcomes[-1])
    ]


def drawn(plan: Planned) -> list[tuple[int, ...]]:
    job = read(plan.plan.settings)
    return [cohort_of(job, round) for round in range(job.rounds)]


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    """scale B A by module."""
    config, tensors = read_peft(folder)
    return {name: pair.scale * pair.b @ pair.a for name, pair in pairs_of(config, tensors).items()}


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (4, 0.5), (5, 0.5), (10, 0.8), (1000, 0.8)])
def test_a_cohort_is_the_part_of_the_clients_rounded_up(count: int, fraction: float) -> None:
    job = job_of(count, fraction=fraction)
    for number in range(3):
        found = cohort_of(job, number)
        assert len(found) == math.ceil(round(fraction * count, 6))
        assert list(found) == sorted(set(found))
        assert set(found) <= set(range(count))


def test_all_train_where_the_file_says_nothing() -> None:
    assert cohort_of(job_of(7), 3) == tuple(range(7))


def test_a_draw_is_of_the_seed_and_the_round_alone() -> None:
    first, again, other = (job_of(20, fraction=0.5, seed=seed) for seed in (1, 1, 2))
    rounds = range(4)
    assert [cohort_of(first, n) for n in rounds] == [cohort_of(again, n) for n in rounds]
    assert [cohort_of(first, n) for n in rounds] != [cohort_of(other, n) for n in rounds]
    assert len({cohort_of(first, n) for n in rounds}) > 1


def test_each_client_is_drawn_about_as_often_as_the_fraction_says() -> None:
    """1000 draws of 8 of 10: within five standard deviations of a binomial."""
    counts = np.zeros(10)
    for round in range(1000):
        counts[list(cohort_of(job_of(10, fraction=0.8), round))] += 1
    assert np.abs(counts - 800).max() < 5 * math.sqrt(1000 * 0.8 * 0.2)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, math.nan])
def test_a_fraction_that_is_none_is_refused_by_name(fraction: float, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        federated(tiny("llama")[1], tmp_path, fraction=fraction)


# --- in the loop ----------------------------------------------------------------------------------


def test_those_who_are_drawn_train_and_the_others_say_nothing(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, clients=FOUR, rounds=3, fraction=0.5, seed=1)
    outcomes = finished(run_threads(plan, keep="messages"))
    assert trained(outcomes) == drawn(plan)
    assert len(set(drawn(plan))) > 1
    ups = [(header["at"][0], source) for source, header, _ in outcomes[-1].received if header["k"] == "up"]
    assert sorted(ups) == [(round, rank) for round, ranks in enumerate(drawn(plan)) for rank in ranks]
    for rank, outcome in enumerate(outcomes[:-1]):
        downs = [header for _, header, _ in outcome.received if header["k"] == "down"]
        came = [(header.get("rests", 0), header.get("of", 0)) for header in downs]
        assert [rests for rests, _ in came[:-1]] == [int(rank not in ranks) for ranks in drawn(plan)]
        assert all(of == 0 for rests, of in came if rests)  # of means nothing is merged
        assert came[-1][0] == 0  # at the end all load what was made


def test_a_member_that_rested_has_merged_every_rounds_stack(tiny: Any, tmp_path: Path) -> None:
    """FLoRA: every member's frozen weights, with its own start B = 0 on top, are the server's adapter."""
    plan = federated(tiny("llama")[1], tmp_path, method="flora", clients=FOUR, rounds=3, fraction=0.5, seed=1)
    members: dict[int, Any] = {}
    changes = {rank: (lambda t, rank=rank: members.__setitem__(rank, t)) for rank in range(4)}
    outcomes = finished(run_threads(plan, changes=changes))
    made = adapter_of(plan.folders[-1] / "adapter")
    for member in members.values():
        assert [stack for stack, _ in member._merged] == [8, 8, 8]  # two of r = 4 each
        stacks = [member.unflat(values, "AB", stack) for stack, values in member._merged]
        for name, product in zip(member.layers, made.values(), strict=True):
            total = sum(stack[name]["B"].astype(np.float64) @ stack[name]["A"] for stack in stacks)
            np.testing.assert_allclose(total, product, rtol=0, atol=1e-6)
    assert max(row["residual"] for row in steps_of(outcomes[-1])) < 1e-6


@pytest.mark.parametrize("method", ["fedavg", "flora", "scaffold"])
def test_rounds_of_cohorts_go_on_from_checkpoints_bit_for_bit(method: str, tiny: Any, tmp_path: Path) -> None:
    path, keys = tiny("llama")[1], {"clients": FOUR[:3], "rounds": 3, "fraction": 0.6, "local_steps": 1}
    whole = federated(path, tmp_path / "whole", method=method, **keys)
    first = finished(run_threads(whole))
    broken = federated(path, tmp_path / "broken", method=method, **keys)
    last = drawn(broken)[2][0]

    assert str(raised(run_threads(broken, changes={last: breaks_before(2)}))) == "it breaks here"
    step = max(set.intersection(*(set(steps) for steps in kept_by(broken))))
    assert step >= 1
    second = finished(run_threads(broken, step))
    assert trained(second) == trained(first)[step:]
    one, other = (adapter_of(plan.folders[-1] / "adapter") for plan in (whole, broken))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("method", ["fedavg", "flora", "flasc", "fedkseed", "fwdllm", "ferret"])
def test_the_bytes_of_cohorts_are_predicted(method: str, tiny: Any, processes: Any, tmp_path: Path) -> None:
    """FLoRA of unlike ranks: how high a stack is depends on who was drawn."""
    clients = ({"r": 2}, {"r": 4}, {"r": 3}) if method == "flora" else FOUR[:3]
    own = {
        "fedkseed": {"seeds": 64, "learning_rate": 2e-4},
        "fwdllm": {"variance_most": 1e6},
        "ferret": {"coordinates": 32},
    }.get(method, {})
    plan = federated(
        tiny("llama")[1], tmp_path, method=method, clients=clients, fraction=0.6, rounds=3, seed=2, **own
    )
    ran = processes.run(plan)
    finished(ran.outcomes)
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.01)


@pytest.mark.parametrize("personal", ["dual", "ditto"])
def test_a_client_that_was_never_drawn_has_an_adapter_of_its_own_at_the_end(
    personal: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, rounds=1, fraction=0.5, personal=personal, personal_steps=1)
    [[rank]] = drawn(plan)
    outcomes = finished(run_threads(plan))
    kept = [[values for kind, _, values in outcome.reports if kind == "kept"] for outcome in outcomes[:2]]
    assert all(len(rows) == 1 and rows[0]["own_loss"] > 0 for rows in kept)
    products = adapter_of(plan.folders[1 - rank] / "kept")
    assert products.keys() == adapter_of(plan.folders[rank] / "kept").keys()
    if personal == "ditto":  # it is trained in the rounds that its client is drawn for: in none
        assert not any(product.any() for product in products.values())


def test_a_rest_that_is_none_is_an_error_by_name(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, rounds=1)

    def lies(trainer: Any) -> None:
        channel = trainer.channel

        class Lying:
            def __getattr__(self, name: str) -> Any:
                return getattr(channel, name)

            def send(self, to: int, header: dict[str, Any], frames: Any = ()) -> None:
                channel.send(to, header | ({"rests": "no"} if header["k"] == "down" else {}), frames)

        trainer.channel = Lying()

    assert "expected whether to rest" in str(raised(run_threads(plan, changes={2: lies})))


# --- what is packed once --------------------------------------------------------------------------


def factors_of(value: float, r: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {"q": (np.full((r, 3), value, "<f4"), np.full((4, r), value, "<f4"))}


def packing() -> Packing:
    return Packing(
        factors_of(0.5),
        lambda factors, sides: np.concatenate(
            [np.zeros(0, "<f4")]
            + [
                pair[side].ravel()
                for pair in factors.values()
                for side, letter in enumerate("AB")
                if letter in sides
            ]
        ),
    )


def test_members_that_get_the_same_share_its_values_and_others_do_not() -> None:
    made, factors = packing(), factors_of(1.0)
    first = made.whole(Download(factors), 2)
    assert made.whole(Download(factors), 2).values is first.values
    assert first.values.size == values_of("AB", 2, [(4, 3)])
    other = made.whole(Download(factors_of(2.0)), 2)
    assert (other.values == 2).all()
    thin = made.whole(Download(factors, extras={"upload_density": np.array(0.5)}), 2)
    assert thin.mask is not None
    stacked = made.whole(Download(factors, factors_of(3.0, r=1)), 2)
    assert stacked.stack == 1
    assert stacked.values.size == first.values.size + values_of("AB", 1, [(4, 3)])


def test_what_was_packed_is_forgotten_at_the_end_of_a_round() -> None:
    made, factors = packing(), factors_of(1.0)
    first = made.whole(Download(factors), 2)
    made.forget()
    factors["q"][0][:] = 7
    again = made.whole(Download(factors), 2)
    assert again.values is not first.values
    assert (again.values == 7).any()
