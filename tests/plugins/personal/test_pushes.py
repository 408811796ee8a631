"""Aggregators that wait for nobody, on factors: what they make of pushes, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from aggregator_rig import SHAPES, loader, made, mean_product, members_of, product, same_bits, start_of
from edged_plugins.personal_lora import ASYNCHRONOUS
from edged_plugins.personal_lora._residual import residual

from edged import ConfigError, Factors, Member, ProtocolError, Update

ENTRIES = {entry.name: entry for entry in ASYNCHRONOUS}
NAMES = sorted(ENTRIES)
OUT_OF_BOUNDS: dict[str, list[Any]] = {
    "buffer": [0, 1.5, True],
    "staleness_most": [-1, 0.5],
    "window": [-1, 2.0],
    "spread": [-0.1, 1.1, math.nan],
    "server_learning_rate": [0.0, -1.0, math.inf],
    "server_momentum": [1.0, -0.1],
}


def server_of(name: str, members: int = 3, dtype: Any = "f8", **settings: Any) -> Any:
    return loader(ENTRIES[name])(settings, start_of(dtype=dtype), members_of(members))


def change_of(seed: int) -> Factors:
    drawn = np.random.default_rng(seed)
    return {n: (drawn.standard_normal((4, i)), drawn.standard_normal((o, 4))) for n, (i, o) in SHAPES.items()}


def push(server: Any, member: Member, change: Factors, began: int | None = None, **more: Any) -> Update:
    """The member's next, from the newest revision or the one that it began at."""
    words = {"turn": server.turn(member)} | more
    began = server.revision if began is None else began
    update = Update(member, began, 1.0 + member.rank, change, words)
    server.add(update)
    return update


def state_of(server: Any) -> dict[str, np.ndarray]:
    """But for what was refused."""
    return {k: v for k, v in server.state_dict().items() if k != "refused"}


def plus(factors: Factors, change: Factors) -> Factors:
    return {n: (A + change[n][0], B + change[n][1]) for n, (A, B) in factors.items()}


def test_a_buffer_of_one_fresh_push_each_is_plain_averaging_and_has_its_residual() -> None:
    members, start = members_of(3), start_of(dtype="f8")
    buffered, averaged = server_of("fedbuff", buffer=3), made("fedavg", start, members)
    averaged.begin(0, members)
    updates = []
    for member in members:
        counted = buffered.counted(Update(member, 0, 1.0 + member.rank, change_of(member.rank)))
        updates.append(counted)
        averaged.add(Update(member, 0, 1.0 + member.rank, plus(start, change_of(member.rank))))
        push(buffered, member, change_of(member.rank))
    averaged.finish()
    assert buffered.revision == 1
    for n in SHAPES:
        for one, other in zip(
            buffered.download(members[0]).factors[n], averaged.download(members[0]).factors[n], strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)
    found = residual(updates, [(members[0], buffered.download(members[0]))])
    of_products = max(
        np.linalg.norm(product(buffered.factors, n, 2.0) - mean_product(updates, n))
        / np.linalg.norm(mean_product(updates, n))
        for n in SHAPES
    )
    assert found == pytest.approx(of_products, rel=1e-9)
    assert found > 0.1


def test_a_stale_push_counts_by_the_root_of_its_age_in_the_residual_too() -> None:
    server, members = server_of("fedbuff", buffer=1), members_of(3)
    for t in range(3):
        push(server, members[0], change_of(t))
    counted = server.counted(Update(members[1], 0, 6.0, change_of(9)))
    assert counted.weight == pytest.approx(6.0 / 2)


@pytest.mark.parametrize("N", [1, 3])
def test_so_many_pushes_on_factors_move_as_nesterov_does_on_their_mean(N: int) -> None:
    """Against the server's part of FDLoRA, which is Nesterov on the mean change."""
    members = members_of(N)
    server = server_of("delayed-nesterov", N, server_learning_rate=0.5, server_momentum=0.8)
    whole = made("fdlora", start_of(dtype="f8"), members, server_learning_rate=0.5, server_momentum=0.8)
    for round in range(4):
        whole.begin(round, members)
        loaded = whole.download(members[0]).factors
        for member in members:
            change = change_of(10 * round + member.rank)
            push(server, member, change)
            whole.add(Update(member, round, 1.0, plus(loaded, change)))
        whole.finish()
    assert server.revision == 4 * N
    for n in SHAPES:
        for one, other in zip(
            server.download(members[0]).factors[n], whole.download(members[0]).factors[n], strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_what_must_not_count_is_refused_and_changes_nothing(name: str) -> None:
    server, members = server_of(name, staleness_most=2, buffer=1), members_of(3)
    for t in range(4):
        push(server, members[0], change_of(t))
    before, factors = state_of(server), server.download(members[0]).factors
    broken = {n: (A * math.nan, B) for n, (A, B) in change_of(1).items()}
    wrong = [
        (ProtocolError, members[0], change_of(9), {"turn": 3}),  # it counted before
        (ProtocolError, members[0], change_of(9), {"turn": 5}),
        (ProtocolError, members[1], change_of(9), {"began": 1}),  # three revisions ago
        (ProtocolError, members[1], change_of(9), {"began": 5}),
        ((ConfigError, ProtocolError), members[1], broken, {}),
        (ConfigError, members[1], {min(SHAPES): change_of(9)[min(SHAPES)]}, {}),
        (ConfigError, Member(1, 3, 2.0), change_of(9), {}),
        (ConfigError, Member(1, 4, 1.0), change_of(9), {}),
    ]
    for error, member, change, more in wrong:
        with pytest.raises(error):
            push(server, member, change, **more)
    assert same_bits(before, state_of(server))
    assert server.download(members[0]).factors is factors


@pytest.mark.parametrize("name", NAMES)
def test_a_server_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    members = members_of(3)
    whole, begun, again = (server_of(name) for _ in range(3))
    for t in range(8):
        push(whole, members[t % 3], change_of(t))
    for t in range(5):
        push(begun, members[t % 3], change_of(t))
    again.load_state_dict({k: v.copy() for k, v in begun.state_dict().items()})
    for t in range(5, 8):
        push(again, members[t % 3], change_of(t))
    assert same_bits(again.state_dict(), whole.state_dict())
    for n in SHAPES:
        assert same_bits(dict(enumerate(again.factors[n])), dict(enumerate(whole.factors[n])))
    with pytest.raises(ConfigError, match="state"):
        again.load_state_dict({"something": np.zeros(3)})


@pytest.mark.parametrize("name", NAMES)
def test_a_value_out_of_bounds_is_refused_by_its_key_and_a_default_is_within(name: str) -> None:
    for key in ENTRIES[name].keys:
        assert key.text
        server_of(name, **{key.key: key.default})
        for value in OUT_OF_BOUNDS.get(key.key, []):
            with pytest.raises(ConfigError, match=f"^{key.key}: expected"):
                server_of(name, **{key.key: value})


@pytest.mark.parametrize("name", NAMES)
def test_before_the_first_push_members_load_the_start(name: str) -> None:
    server = server_of(name, dtype="f4")
    download = server.download(members_of(1)[0])
    assert not download.merged
    for n in SHAPES:
        assert same_bits(dict(enumerate(download.factors[n])), dict(enumerate(start_of()[n])))
