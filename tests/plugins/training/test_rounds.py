"""The round loop of federated training, over tiny models: what it makes, what it sends, how it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edged_plugins import personal_lora
from edged_plugins._tensors.adapters import pairs_of, read_peft
from edged_plugins.personal_lora import _messages
from edged_plugins.personal_lora._member import Member
from edged_plugins.personal_lora._rank import job_sha256
from rig import Outcome, Planned, finished, kept_by, raised, run_threads
from rounds_rig import AGGREGATORS, breaks_before, federated

ASYNCHRONOUS = {entry.name for entry in personal_lora.ASYNCHRONOUS}  # in test_pushed_rounds
METHODS = sorted(AGGREGATORS.keys() - ASYNCHRONOUS)
EXACT = ("ffa", "flora")
BLIND = {  # without gradients: more and smaller steps
    "fedkseed": {"learning_rate": 2e-4, "local_steps": 40, "seeds": 64},
    "mezo": {"learning_rate": 2e-4, "local_steps": 40},
}
OWN: dict[str, dict[str, Any]] = {  # of their own in every test: a few steps of tiny models
    "fwdllm": {"variance_most": 1e6, "learning_rate": 0.05},
    "ferret": {"coordinates": 32},
    "flasc": {"server_learning_rate": 0.1},  # until B is as large as A's start, A alone travels
}
MANY = {"krum": 5}  # members that a method asks for; others have two
UNLIKE = ({"r": 2}, {"r": 4}, {"r": 3, "alpha": 9.0})


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    """scale B A by module."""
    config, tensors = read_peft(folder / "adapter")
    return {name: pair.scale * pair.b @ pair.a for name, pair in pairs_of(config, tensors).items()}


def clients_of(method: str) -> list[dict[str, Any]]:
    return [{} for _ in range(MANY.get(method, 2))]


def steps_of(outcome: Outcome) -> list[dict[str, float]]:
    return [values for kind, _, values in outcome.reports if kind == "step"]


def sent_up(outcomes: list[Outcome], round: int) -> list[tuple[int, dict[str, Any], bytes]]:
    """What the server received of each member in a round."""
    server = outcomes[-1]
    return [
        (source, header, b"".join(frames))
        for source, header, frames in server.received
        if header["k"] == "up" and header["at"] == [round]
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_an_adapter_that_has_learned(method: str, tiny: Any, tmp_path: Path) -> None:
    plan = federated(
        tiny("llama")[1],
        tmp_path,
        method=method,
        clients=clients_of(method),
        rounds=3,
        local_steps=6,
        **OWN.get(method, {}),
    )
    outcomes = finished(run_threads(plan))
    server = outcomes[-1]
    assert set(server.evals) == {0, 1, 2, 3}
    # rows of a step are others than those of the first, and held-out ones are few
    assert server.losses[-1] < server.losses[0] or server.evals[3] < server.evals[0]
    made = adapter_of(plan.folders[-1])
    assert len(made) == 8
    assert any(product.any() for product in made.values())  # LoRA-A2 may leave some alone


def test_a_sum_of_one_round_is_that_of_the_updates(tiny: Any, tmp_path: Path) -> None:
    """FLoRA, of unlike ranks and scales: the adapter is sum p_k s_k B_k A_k of what members sent."""
    plan = federated(tiny("llama")[1], tmp_path, method="flora", clients=UNLIKE, rounds=1)
    outcomes = finished(run_threads(plan, keep="messages"))
    job, sums, total = plan.plan.settings, {}, 0
    made = adapter_of(plan.folders[-1])
    for source, header, frame in sent_up(outcomes, 0):
        values, at = np.frombuffer(frame, "<f4").astype(np.float64), 0
        r = job["clients"][source]["r"]
        alpha = job["clients"][source]["alpha"] or job["alpha"] * r / job["r"]
        total += header["weight"]
        for name, product in made.items():
            rows, columns = product.shape
            a = values[at : at + r * columns].reshape(r, columns)
            b = values[at + r * columns : at + r * (rows + columns)].reshape(rows, r)
            at += r * (rows + columns)
            sums[name] = sums.get(name, 0) + header["weight"] * alpha / r * b @ a
        assert at == values.size
    for name, product in made.items():
        np.testing.assert_allclose(product, sums[name] / total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_residual_is_told_and_is_zero_of_exact_methods(method: str, tiny: Any, tmp_path: Path) -> None:
    own = OWN.get(method, {})
    plan = federated(
        tiny("llama")[1], tmp_path, method=method, clients=clients_of(method), local_steps=3, **own
    )
    residuals = [values.get("residual") for values in steps_of(finished(run_threads(plan))[-1])]
    assert len(residuals) == 2
    if method in ("fedkseed", "fwdllm", "ferret"):  # what is sent is no product
        assert residuals == [None, None]
        return
    if method in EXACT:
        assert max(residuals) < 1e-6
    if method == "fedavg":
        assert min(residuals) > 1e-3


def test_a_member_alone_trains_as_if_there_were_no_server(tiny: Any, tmp_path: Path) -> None:
    """FedAvg over one member gives its own factors back, whatever the number of rounds."""
    apart = [
        federated(tiny("llama")[1], tmp_path / str(rounds), clients=({},), rounds=rounds, local_steps=steps)
        for rounds, steps in ((1, 2), (2, 2))
    ]
    first, second = ([*finished(run_threads(plan, keep="messages"))] for plan in apart)
    assert sent_up(first, 0)[0][2] == sent_up(second, 0)[0][2]


@pytest.mark.parametrize("method", ["fedavg", "flora", "fwdllm", "ferret"])
def test_rounds_go_on_from_checkpoints_bit_for_bit(method: str, tiny: Any, tmp_path: Path) -> None:
    path, own = tiny("llama")[1], OWN.get(method, {})
    whole = federated(path, tmp_path / "whole", method=method, rounds=3, **own)
    finished(run_threads(whole))
    broken = federated(path, tmp_path / "broken", method=method, rounds=3, **own)

    outcomes = run_threads(broken, changes={0: breaks_before(2)})
    assert str(raised(outcomes)) == "it breaks here"
    step = max(set.intersection(*(set(steps) for steps in kept_by(broken))))
    assert step >= 1
    finished(run_threads(broken, step))
    one, other = (adapter_of(plan.folders[-1]) for plan in (whole, broken))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("submitter", ["server", "client1", "laptop"])
def test_the_adapter_is_written_where_the_job_was_submitted(
    submitter: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method="flora", submitter=submitter)
    finished(run_threads(plan))
    assert [(folder / "adapter").is_dir() for folder in plan.folders] == [
        rank == plan.plan.collector for rank in range(len(plan.specs))
    ]


@pytest.mark.parametrize("submitter", ["server", "laptop"])
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_a_job_are_predicted(
    method: str, submitter: str, tiny: Any, processes: Any, tmp_path: Path
) -> None:
    plan = federated(
        tiny("llama")[1],
        tmp_path,
        method=method,
        submitter=submitter,
        clients=clients_of(method),
        **OWN.get(method, {}),
    )
    ran = processes.run(plan)
    finished(ran.outcomes)
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.01)


@pytest.mark.parametrize(("method", "submitter"), [("fedbuff", "laptop"), ("delayed-nesterov", "server")])
def test_the_bytes_of_pushes_are_an_expectation(
    method: str, submitter: str, tiny: Any, processes: Any, tmp_path: Path
) -> None:
    """Within one push of each member: who is under way at the end is not known before."""
    plan = federated(tiny("llama")[1], tmp_path, method=method, submitter=submitter, rounds=8)
    ran = processes.run(plan)
    finished(ran.outcomes)
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.15)


@pytest.mark.parametrize("method", ["fedkseed", "mezo", "fwdllm"])
def test_members_without_gradients_build_no_graph(method: str, tiny: Any, tmp_path: Path) -> None:
    plan, seen = federated(tiny("llama")[1], tmp_path, method=method, **OWN.get(method, {})), []

    def watches(trainer: Member) -> None:
        trainer.model.span.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))

    finished(run_threads(plan, changes={0: watches}))
    assert seen
    assert not any(seen)


def test_a_mean_of_slopes_that_is_never_sure_leaves_the_start(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method="fwdllm", variance_most=1e-12)
    server = finished(run_threads(plan))[-1]
    assert len(set(server.evals.values())) == 1
    assert not any(product.any() for product in adapter_of(plan.folders[-1]).values())


def test_members_with_gradients_need_the_memory_of_a_backward_pass(tiny: Any, tmp_path: Path) -> None:
    bytes_of = {
        method: federated(tiny("llama")[1], tmp_path, method=method).specs[0].roles[0].memory_bytes
        for method in ("fedavg", "ferret", "fwdllm", "mezo")
    }
    assert bytes_of["ferret"] == bytes_of["fedavg"] > bytes_of["fwdllm"] == bytes_of["mezo"]


def test_what_a_member_sends_has_no_row_of_its_own(tiny: Any, tmp_path: Path) -> None:
    """Every message of a member: a greeting, factors and figures, in sizes that do not depend on its rows."""
    plan = federated(tiny("llama")[1], tmp_path, rounds=2)
    server = finished(run_threads(plan, keep="messages"))[-1]
    kinds = {header["k"] for _, header, _ in server.received}
    assert kinds == {"hello", "up", "told"}
    for _, header, frames in server.received:
        assert set(header) <= {"k", "at", "model", "job", "weight", "of", "extras", "thin"}
        expected = {"hello": [], "up": [4 * header.get("of", 0)], "told": [64]}
        assert [len(frame) for frame in frames] == expected[header["k"]]


@pytest.mark.parametrize("personal", ["dual", "ditto"])
def test_no_frame_has_a_factor_of_a_personal_adapter(personal: str, tiny: Any, tmp_path: Path) -> None:
    """Not one row of A or column of B; the common adapter's are there, so the search can find something."""
    plan = federated(tiny("llama")[1], tmp_path, personal=personal, personal_steps=3)
    members: dict[int, Any] = {}
    changes = {rank: (lambda trainer, rank=rank: members.__setitem__(rank, trainer)) for rank in (0, 1)}
    outcomes = finished(run_threads(plan, keep="messages", changes=changes))
    frames = b"".join(bytes(frame) for out in outcomes for _, _, found in out.received for frame in found)
    for rank in (0, 1):
        _, made = read_peft(plan.folders[rank] / "kept")
        own = members[rank]._personal
        assert made
        for a, b in own.values():
            for row in (*a[1:], *b):
                assert not row.any() or row.astype("<f4").tobytes() not in frames
    _, common = read_peft(plan.folders[-1] / "adapter")
    [first, *_] = [value for name, value in common.items() if name.endswith("lora_A.weight")]
    assert all(row.astype("<f4").tobytes() in frames for row in first)


def test_a_personal_adapter_is_no_worse_than_either_on_the_rows_that_weighed_them(
    tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path, method="fdlora", personal_steps=8, fusion_tries=8)
    outcomes = finished(run_threads(plan))
    for rank in (0, 1):
        [kept] = [values for kind, _, values in outcomes[rank].reports if kind == "kept"]
        assert kept["fusion_loss"] <= min(kept["common_alone"], kept["personal_alone"]) + 1e-6
        assert kept["own_loss"] > 0


def test_dropout_is_of_local_steps_alone(tiny: Any, tmp_path: Path) -> None:
    """Two evaluations of one adapter are one: the first of a job and that of another seed's."""
    plans = [
        federated(tiny("llama")[1], tmp_path / str(dropout), dropout=dropout, rounds=1)
        for dropout in (0.0, 0.5)
    ]
    plain, dropped = (finished(run_threads(plan))[-1] for plan in plans)
    assert plain.evals[0] == dropped.evals[0]
    assert plain.losses != dropped.losses


@pytest.mark.parametrize("submitter", ["server", "laptop", "client1"])
def test_a_rank_above_a_layers_smaller_side_travels_too(submitter: str, tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path, r=20, rounds=1, submitter=submitter)
    finished(run_threads(plan))
    assert adapter_of(plan.folders[plan.plan.collector])


def test_gpt2s_transposed_layers_take_a_stack_too(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("gpt2")[1], tmp_path, method="flora", rounds=3, local_steps=8)
    server = finished(run_threads(plan))[-1]
    assert server.evals[3] < server.evals[0]


def test_a_loss_that_is_no_number_ends_the_job_by_name(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path)

    def breaks(trainer: Member) -> None:
        real = trainer.model.span.vectors
        trainer.model.span.vectors = lambda ids: real(ids) * float("nan")

    assert "round 0, step 0: the loss is nan" in str(raised(run_threads(plan, changes={1: breaks})))


def test_a_round_of_seeds_is_below_18_kilobytes_on_the_wire(
    tiny: Any, processes: Any, tmp_path: Path
) -> None:
    """FedKSeed's own size: 4096 seeds and 200 steps; a member's part of a round, both ways."""
    settings = {"method": "fedkseed", "seeds": 4096, "local_steps": 200, "rounds": 2, "learning_rate": 1e-5}
    plan = federated(tiny("llama")[1], tmp_path, clients=({},), batch_size=1, eval_rows=0, **settings)
    ran = processes.run(plan)
    rows = steps_of(finished(ran.outcomes)[-1])
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.01)
    told = _messages.told_bytes(1)
    assert all(17_984 < row["down_0"] + row["up_0"] + told < 18 * 1024 for row in rows)


# --- unlike members -----------------------------------------------------------------------------------

SEEDS = {"method": "fedkseed", "learning_rate": 2e-4}


@pytest.mark.parametrize("method", ["fedavg", "flora"])
def test_a_member_that_sends_seeds_takes_part_in_a_job_of_factors(
    method: str, tiny: Any, processes: Any, tmp_path: Path
) -> None:
    """What the server replays of its seeds is what it trained, to F32 rounding; its updates are small."""
    plan = federated(tiny("llama")[1], tmp_path / "a", method=method, clients=({}, SEEDS), seeds=64)
    ran = processes.run(plan)
    server = finished(ran.outcomes)[-1]
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.01)
    assert all(row["up_1"] < row["up_0"] / 10 for row in steps_of(server))
    alone = federated(tiny("llama")[1], tmp_path / "b", clients=(SEEDS,), seeds=64, rounds=1)
    trained: dict[str, Any] = {}

    def keeps(trainer: Member) -> None:
        real = trainer._send
        trainer._send = lambda number, factors, *more: (trained.update(factors), real(number, factors, *more))

    finished(run_threads(alone, changes={0: keeps}))
    made = adapter_of(alone.folders[-1])
    assert trained.keys() == made.keys()
    for name, (a, b) in trained.items():
        np.testing.assert_allclose(made[name], 2.0 * b @ a, rtol=0, atol=1e-6)
        assert b.any()


def test_a_stated_weight_counts_in_place_of_rows(tiny: Any, tmp_path: Path) -> None:
    """All the weight with one member: its own product is the adapter, but for a hundred-millionth."""
    heavy = ({"weight": 10**8}, {"weight": 1})
    plan = federated(tiny("llama")[1], tmp_path / "a", method="flora", clients=heavy, rounds=1)
    rows = tmp_path / "a" / "rows0.jsonl"
    finished(run_threads(plan))
    alone = federated(tiny("llama")[1], tmp_path / "b", method="flora", clients=({},), rows=[rows], rounds=1)
    finished(run_threads(alone))
    one, other = adapter_of(plan.folders[-1]), adapter_of(alone.folders[-1])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-7)


# --- members that are none ------------------------------------------------------------------------


def stranger(plan: Planned, wrong: Callable[[int, dict[str, Any], bytearray], None]) -> Callable[[Any], None]:
    """Rank 0's part of two rounds, by hand; `wrong(round, header, values)` spoils an update."""
    job = plan.plan.settings

    def speak(channel: Any) -> None:
        server = len(job["clients"])
        words = _messages.hello(
            job_sha256(plan.specs[0].settings),
            plan.specs[0].model_sha256,
        )
        channel.send(server, words)
        for number in range(job["rounds"] + 1):
            header: dict[str, Any] = {}
            while header.get("k") != "down":
                assert channel.poll(server, 60.0)
                header, _ = channel.receive(server, 60.0)
            if number < job["rounds"]:
                said = _messages.up(number, 5, VALUES, 0)
                values = bytearray(np.full(VALUES, 0.01, "<f4").tobytes())
                wrong(number, said, values)
                channel.send(server, said, [bytes(values)])
            channel.send(server, {"k": "told", "at": [number]}, [np.ones(8, "<f8").tobytes()])

    return speak


VALUES = 4 * 4 * (32 + 32) + 4 * 4 * (32 + 16)  # of the tiny Llama's q and v, r = 4


def spoil(values: bytearray, value: float) -> None:
    values[:4] = np.float32(value).tobytes()


def long(number: int, said: dict[str, Any], values: bytearray) -> None:
    values.extend(bytes(2 << 20))


WRONG: dict[str, Callable[[int, dict[str, Any], bytearray], None]] = {
    "not a number": lambda number, said, values: spoil(values, float("nan")),
    "infinite": lambda number, said, values: spoil(values, float("inf")),
    "too short": lambda number, said, values: values.__delitem__(slice(0, 8)),
    "another count": lambda number, said, values: said.update(of=7),
    "no weight": lambda number, said, values: said.update(weight=0),
    "a weight of text": lambda number, said, values: said.update(weight="many"),
    "extras that never come": lambda number, said, values: said.update(extras=2),
    "too large": long,
    "another kind": lambda number, said, values: said.update(k="upp"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_update_that_is_none_costs_itself_and_the_round_goes_on(
    case: str, tiny: Any, tmp_path: Path
) -> None:
    plan = federated(tiny("llama")[1], tmp_path)
    outcomes = run_threads(plan, ranks={0: stranger(plan, WRONG[case])})
    server = finished(outcomes)[-1]
    rows = steps_of(server)
    assert [row["refused"] for row in rows] == [1.0, 2.0]
    assert all("up_0" not in row and "up_1" in row for row in rows)
    assert adapter_of(plan.folders[-1])


def test_a_sound_stranger_counts_and_what_is_of_an_earlier_round_does_not(tiny: Any, tmp_path: Path) -> None:
    """A replay of the round before comes with the second update, and is refused; the update itself counts."""
    plan = federated(tiny("llama")[1], tmp_path)
    made = stranger(plan, lambda number, said, values: None)

    class Twice:
        def __init__(self, channel: Any) -> None:
            self._channel, self._former = channel, None
            self.poll, self.receive = channel.poll, channel.receive

        def send(self, to: int, header: dict[str, Any], frames: Any = ()) -> None:
            if header["k"] == "up" and self._former is not None:
                self._channel.send(to, *self._former)
            self._former = (header, frames) if header["k"] == "up" else self._former
            self._channel.send(to, header, frames)

    server = finished(run_threads(plan, ranks={0: lambda channel: made(Twice(channel))}))[-1]
    rows = steps_of(server)
    assert [row.get("refused", 0.0) for row in rows] == [0.0, 1.0]
    assert all("up_0" in row for row in rows)


def test_a_weight_is_bounded_by_the_job(tiny: Any, tmp_path: Path) -> None:
    """A member that says it has a million rows counts as one with three."""
    lies = stranger(
        plan := federated(tiny("llama")[1], tmp_path / "lies", weight_most=3),
        lambda number, said, values: said.update(weight=10**6),
    )
    honest = federated(tiny("llama")[1], tmp_path / "honest", weight_most=3)
    finished(run_threads(plan, ranks={0: lies}))
    finished(
        run_threads(honest, ranks={0: stranger(honest, lambda number, said, values: said.update(weight=3))})
    )
    one, other = adapter_of(plan.folders[-1]), adapter_of(honest.folders[-1])
    assert all(np.array_equal(one[name], other[name]) for name in one)
