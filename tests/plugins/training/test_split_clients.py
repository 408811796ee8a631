"""Several clients, pipelines, and what a client does to its hidden states: each by its own identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rig import (
    Outcome,
    Planned,
    assert_same_bits,
    described,
    finished,
    gradients_of,
    largest_difference,
    lora_of,
    plain_loop,
    planned,
    raised,
    random_start,
    run_threads,
    write_rows,
)
from safetensors.numpy import load_file

from edged import NodeView, PolicyViolation
from edged.types import LinkState

Tiny = Callable[[str], tuple[Any, Path]]
EXACT = 1e-6


def rows_of(folder: Path, clients: int) -> list[Path]:
    """Of each client, other ones of other lengths."""
    return [write_rows(folder / f"rows{i}", 6 + i, 1, seed=10 + i) for i in range(clients)]


def from_random_start(plan: Planned, **kept: Any) -> Sequence[Outcome]:
    ranks = range(len(plan.specs))
    return finished(run_threads(plan, changes=dict.fromkeys(ranks, random_start), **kept))


# --- several clients ------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_the_servers_gradient_of_all_clients_is_the_mean_of_theirs(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    model, path = tiny("llama")
    rows = rows_of(tmp_path, 3)
    plan = planned(path, tmp_path, rows=rows, topology=topology, schedule="client-batch", cut=1, steps=1)
    *clients, server = from_random_start(plan)
    start = {**clients[0].start, **server.start}
    plain = [plain_loop(model, plan, start, client).gradients[0] for client in range(3)]
    assert len(server.gradients) == 1
    for name, gradient in server.gradients[0].items():
        assert gradient == pytest.approx(np.mean([each[name] for each in plain], axis=0), abs=EXACT)
    for client, each in zip(clients, plain, strict=True):  # each client's is of its own batch's mean loss
        assert client.gradients[0]
        for name, gradient in client.gradients[0].items():
            assert gradient == pytest.approx(each[name], abs=EXACT)


@pytest.mark.parametrize("clients", [2, 3])
def test_the_mean_of_identical_adapters_is_themselves(clients: int, tiny: Tiny, tmp_path: Path) -> None:
    rows = [write_rows(tmp_path / "rows", 6, 1)] * clients
    settings = {"rows": rows, "schedule": "client-batch", "steps": 3}
    path = tiny("llama")[1]
    often = finished(run_threads(planned(path, tmp_path / "often", average_every=1, **settings)))
    never = finished(
        run_threads(planned(path, tmp_path / "never", average_every=99, **settings), keep="history")
    )
    assert_same_bits(often[0].lora, never[0].history[-1])  # before its one mean, at the end
    for outcome in often[1:-1]:
        assert_same_bits(outcome.lora, often[0].lora)


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_clients_have_one_adapter_every_so_many_steps_and_their_own_between(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    rows = rows_of(tmp_path, 3)
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, topology=topology, average_every=2, steps=5)
    outcomes = finished(run_threads(plan, keep="history"))[:3]

    def after(step: int) -> list[dict[str, np.ndarray]]:
        states = [load_file(folder / f"step-{step}.safetensors") for folder in plan.folders[:3]]
        return [{k: v for k, v in state.items() if k.startswith("parameter.")} for state in states]

    assert largest_difference(*after(3)[:2]) > 1e-4
    for step in (4, 5):  # the last one, too
        for other in after(step)[1:]:
            assert_same_bits(other, after(step)[0])
    for place, name in enumerate(outcomes[0].lora):
        mean = np.mean([outcome.history[3][name].astype(np.float64) for outcome in outcomes], axis=0)
        assert_same_bits({"": after(4)[0][f"parameter.{place}"]}, {"": mean.astype(np.float32)})


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_with_an_adapter_for_each_client_each_trains_as_if_it_were_alone(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    path, rows = tiny("llama")[1], rows_of(tmp_path, 2)
    settings = {"topology": topology, "average_every": 99, "steps": 4}
    together = planned(path, tmp_path, rows=rows, schedule="server-hierarchical", **settings)
    *clients, server = finished(run_threads(together, keep="history"))
    for number, client in enumerate(clients):
        plan = planned(path, tmp_path / f"alone{number}", rows=[rows[number]], **settings)
        alone, its_server = finished(run_threads(plan, keep="history"))
        for step in range(4):
            assert_same_bits(client.history[step], alone.history[step])
            assert_same_bits(server.history[2 * step + number], its_server.history[step])
    for name, value in server.lora.items():  # at the end all are their mean
        ends = [server.history[-2][name], server.history[-1][name]]
        assert value == pytest.approx(np.mean(ends, axis=0), abs=1e-7)


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_a_client_without_rows_that_are_held_out_silences_no_other(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    rows = [write_rows(tmp_path / f"rows{i}", 4, 2 * i, seed=i) for i in range(2)]
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, topology=topology, steps=2)
    outcomes = finished(run_threads(plan))
    told = [[v["targets"] for kind, _, v in o.reports if kind == "eval"] for o in outcomes]
    tellers = [each for each in told if each]
    assert tuple(rank for rank, each in enumerate(told) if each) == plan.plan.reporters
    assert {len(each) for each in tellers} == {2}  # at the start and the end, from all who are waited for
    assert tellers[-1][0] > 0
    assert topology == "label-sharing" or tellers[0] == [0.0, 0.0]


# --- pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [2, 3, 5])
def test_micro_batches_have_the_gradient_of_the_whole_batch(micro: int, tiny: Tiny, tmp_path: Path) -> None:
    settings = {"topology": "pipeline", "stages": 1, "batch_size": 5, "steps": 1}
    plans = [planned(tiny("llama")[1], tmp_path / str(m), micro_batches=m, **settings) for m in (1, micro)]
    whole, parts = (gradients_of(from_random_start(plan)) for plan in plans)
    assert largest_difference(whole, parts) <= EXACT


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_a_stage_alternates_after_as_many_forwards_as_there_are_stages_to_the_end(
    stages: int, tiny: Tiny, tmp_path: Path
) -> None:
    """1F1B: with M micro-batches over P stages, stage p has at most P - p under way."""
    M, P = 6, stages + 2
    cut = {} if stages else {"cut": [2]}
    settings: dict[str, Any] = {"topology": "pipeline", "stages": stages, "batch_size": M, **cut}
    rows = [write_rows(tmp_path / "rows", M)]
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, micro_batches=M, steps=1, **settings)
    outcomes = finished(run_threads(plan, keep="messages"))
    for p, outcome in enumerate(outcomes):
        is_last = p == P - 1
        forward = ("received" if is_last else "sent", "forward")
        backward = ("sent" if is_last else "received", "backward")
        order = "".join("FB"[event == backward] for event in outcome.log if event in (forward, backward))
        w = P - p
        assert order == "F" * w + "BF" * (M - w) + "B" * w


# --- privacy --------------------------------------------------------------------------------------


def test_a_clip_that_reaches_nothing_and_no_noise_change_no_bit(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("llama")[1]
    plain = finished(run_threads(planned(path, tmp_path / "plain")))
    clipped = finished(run_threads(planned(path, tmp_path / "clipped", clip=1e9)))
    assert_same_bits(lora_of(clipped), lora_of(plain))
    assert clipped[1].losses == plain[1].losses


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_the_server_sees_no_row_longer_than_the_clip(topology: str, tiny: Tiny, tmp_path: Path) -> None:
    clip = 2.5
    plan = planned(tiny("llama")[1], tmp_path, topology=topology, clip=clip)
    _, server = finished(run_threads(plan, keep="messages"))
    norms = []
    for _, header, frames in server.received:
        if header["k"] in ("forward", "up", "eval"):  # those that are held out, too
            shape = header.get("tensor", header)["shape"]
            values = np.frombuffer(frames[0], "<f4").reshape(shape[0], -1)
            norms += [math.sqrt(float(value @ value)) for value in values.astype(np.float64)]
    assert max(norms) == pytest.approx(clip)
    assert max(norms) <= clip


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape", "remote-blocks", "private-lora"])
def test_a_job_that_would_pass_its_budget_is_refused_before_anything_is_sent(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("opacus", reason="a privacy budget needs opacus")
    from edged_plugins._tensors.privacy import Budget

    sigma, rows = 2.0, [write_rows(tmp_path / "rows", 6, 0)]
    spent = Budget(1e9, 1e-5, sigma, 3, 6).spent
    budget = (spent(4) + spent(5)) / 2
    settings = {"rows": rows, "topology": topology, "clip": 3.0, "noise": sigma, "epsilon": budget}
    outcomes = run_threads(planned(tiny("llama")[1], tmp_path, steps=5, **settings), keep="messages")
    error = raised(outcomes)
    assert isinstance(error, PolicyViolation)
    assert error.code == "privacy-budget"
    said = f"5 steps at client0 would spend epsilon {spent(5):.4g} at delta 1e-05; the budget is {budget:g}"
    assert f"{said}, enough for 4 steps" in str(error)
    assert not [header for _, header, _ in outcomes[1].received if header["k"] in ("forward", "up", "eval")]
    client, _ = finished(run_threads(planned(tiny("llama")[1], tmp_path / "fits", steps=4, **settings)))
    assert client.survey["steps_allowed"] == 4
    assert client.survey["spent"] == {"epsilon": pytest.approx(spent(4)), "delta": 1e-5}


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_rows_that_are_held_out_are_sent_as_often_as_the_budget_allows(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("opacus", reason="a privacy budget needs opacus")
    from edged_plugins._tensors.privacy import Budget

    sigma, rows = 2.0, [write_rows(tmp_path / "rows", 6, 2)]
    spent = Budget(1e9, 1e-5, sigma, 1, 1).spent
    epsilon = (spent(1) + spent(2)) / 2
    settings = {"rows": rows, "topology": topology, "clip": 3.0, "noise": sigma, "steps": 2, "eval_every": 1}
    plan = planned(tiny("llama")[1], tmp_path, epsilon=epsilon, **settings)
    client, server = finished(run_threads(plan, keep="messages"))
    assert [header["at"] for _, header, _ in server.received if header["k"] == "eval"] == [[0, 0]]
    [done] = [values for kind, _, values in client.reports if kind == "done"]
    assert done["epsilon"] == pytest.approx(spent(1))
    assert client.survey["epsilon"] == pytest.approx(spent(1))


def test_an_evaluation_at_a_former_end_counts_when_a_job_goes_on_with_more_steps(
    tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("opacus", reason="a privacy budget needs opacus")
    from edged_plugins._tensors.privacy import Budget

    spent = Budget(1e9, 1e-5, 2.0, 1, 1).spent
    rows = [write_rows(tmp_path / "rows", 60, 2)]
    settings = {"rows": rows, "clip": 3.0, "noise": 2.0, "eval_every": 0}
    path = tiny("llama")[1]
    for step, steps, evaluations in ((0, 2, 2), (2, 3, 3), (3, 4, 4)):  # 0 and 2; then 3, too; then 4
        client, _ = finished(run_threads(planned(path, tmp_path, steps=steps, **settings), step))
        assert client.survey["epsilon"] == pytest.approx(spent(evaluations))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"noise": 0.01}, "noise"),
        ({"clip": 9.0}, "clip"),
        ({"delta": 1e-3}, "delta"),
        ({"epsilon": 1e6}, "epsilon"),
        ({"rows": True}, "rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_goes_on_with_the_privacy_and_the_rows_it_began_with(
    changes: dict[str, Any], named: str, tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("opacus", reason="a privacy budget needs opacus")
    rows = [write_rows(tmp_path / f"rows{i}", 6, 1, seed=i) for i in range(2)]
    settings = {"clip": 3.0, "noise": 2.0, "steps": 1, "topology": "u-shape"}
    finished(run_threads(planned(tiny("llama")[1], tmp_path, rows=rows[:1], **settings)))
    changed = settings | changes | {"steps": 2, "rows": rows[1:] if "rows" in changes else rows[:1]}
    error = raised(run_threads(planned(tiny("llama")[1], tmp_path, **changed), 1))
    assert isinstance(error, PolicyViolation)
    assert error.code == "privacy-changed"
    assert f"client0 was made for; {named} changed" in str(error)


def test_a_step_that_is_done_again_costs_where_it_sends_other_values(tmp_path: Path) -> None:
    """The same values: the same bits, and no epsilon. Others: another release, as far as the budget goes."""
    pytest.importorskip("opacus", reason="a privacy budget needs opacus")
    from edged_plugins._tensors.privacy import Budget
    from edged_plugins.split_learning._job import read
    from edged_plugins.split_learning._noise import Noise

    spent = Budget(1e9, 1e-5, 2.0, 1, 1).spent
    table = {"clip": 3.0, "noise": 2.0, "epsilon": (spent(3) + spent(4)) / 2, "steps": 4, "batch_size": 2}
    rows = SimpleNamespace(count=4, held_out=[1], digest="rows")  # 2 steps an epoch

    def again() -> Noise:
        return Noise(read(table), str(tmp_path), rows)

    x, y, z = (torch.full((2, 3, 4), number) for number in (0.1, 0.2, 0.3))
    noise = again()
    first = [noise(x, step) for step in range(4)]
    assert noise.spent(4)["epsilon"] == spent(2)
    for repeated in (noise, again()):  # in this process, and in the next one
        assert all((repeated(x, step) == first[step]).all() for step in range(4))
        assert repeated.spent(4)["epsilon"] == spent(2)
    assert (again()(y, 3) - first[3]).std() > 3.0  # noise of its own, not 0.1 everywhere
    assert again().spent(4)["epsilon"] == spent(3)
    for kind in (again(), again()):
        with pytest.raises(PolicyViolation, match="step 3 of this client is done again"):
            kind(z, 3)
    sent = (tmp_path / "noise.sent").read_bytes()
    (tmp_path / "noise.sent").write_bytes(sent[:-9])  # a power cut; y was not sent, as far as is known
    assert again().spent(4)["epsilon"] == spent(3)
    for step in (0, 1, 2):
        assert again().allows(step)
        again().held_out(x, step, 0)
    assert not again().allows(3)
    assert again().allows(2)
    with pytest.raises(PolicyViolation, match="eval 2 of this client is done again"):
        again().held_out(y, 2, 0)


# --- what codecs leave out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("label-sharing", [set(), {"backward 0"}]),
        ("pipeline", [set(), {"backward 0", "backward 1"}, {"backward 0", "backward 1"}]),
        ("u-shape", [{"back gradient"}, {"up gradient"}]),
        ("remote-blocks", [{"back gradient"}, None]),
        ("private-lora", [{"back gradient", *(f"outer gradient back {i}" for i in range(8))}, None]),
    ],
)
def test_what_is_left_out_of_gradients_is_kept_and_of_hidden_states_is_not(
    topology: str, expected: list[set[str] | None], tiny: Tiny, tmp_path: Path
) -> None:
    more = {"stages": 1, "micro_batches": 2} if topology == "pipeline" else {}
    more |= {"target_modules": ["q_proj", "o_proj"]} if topology == "private-lora" else {}
    plan = planned(tiny("llama")[1], tmp_path, topology=topology, codec="topk", ratio=4.0, **more)
    finished(run_threads(plan))
    for folder, keys in zip(plan.folders, expected, strict=True):
        path = folder / "step-3.safetensors"
        assert path.exists() == (keys is not None)
        names = load_file(path) if keys is not None else {}
        kept = {name.split(" ", 1)[1] for name in names if name.startswith("residual.")}
        assert kept == (keys or set())


@pytest.mark.parametrize("ratio", [1.0, 2.0, 12.0])
def test_the_slowest_link_has_the_files_own_ratio_and_others_less(ratio: float, tiny: Tiny) -> None:
    from edged_plugins.split_learning._job import check_split, read
    from edged_plugins.split_learning._layout import plan_split

    names = ["client0", "client1", "client2"]
    links = [
        LinkState(name, latency_s=0.0, bandwidth_bytes_s=speed)
        for name, speed in zip(names, (1e6, 2e6, 1e8), strict=True)
    ]
    nodes = [*(NodeView(name, name) for name in names), NodeView("server", "server", links=tuple(links))]
    clients = [{"node": name, "data": "rows"} for name in names]
    table = {"codec": "adatopk", "ratio": ratio, "cut": 2, "clients": clients, "server": "server"}
    plan = plan_split(check_split(table), described(tiny("llama")[1]), nodes)
    found = dict(read(plan.settings).link_ratios)
    assert found == {
        "0-3": ratio,
        "1-3": pytest.approx(max(1, ratio / 2)),
        "2-3": pytest.approx(max(1, ratio / 100)),
    }


# --- sparse tuning --------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["local", "label-sharing", "u-shape"])
def test_values_that_were_not_chosen_never_change_again(topology: str, tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(
        tiny("llama")[1],
        tmp_path,
        topology=topology,
        sparse=0.3,
        weight_decay=0.1,
        steps=9,
        checkpoint_every=9,
    )
    for outcome, folder in zip(finished(run_threads(plan, keep="history")), plan.folders, strict=True):
        state = load_file(folder / "step-9.safetensors")
        masks = [value for name, value in sorted(state.items()) if name.startswith("mask.")]
        before, after = outcome.history[2], outcome.history[8]  # 4 steps choose; the 4th keeps to the choice
        changed = total = 0
        for mask, name in zip(masks, after, strict=True):
            assert before[name][~mask].tobytes() == after[name][~mask].tobytes()
            changed += int((before[name] != after[name]).sum())
            total += mask.size
        assert 0.25 * total < changed <= 0.3 * total + 1
