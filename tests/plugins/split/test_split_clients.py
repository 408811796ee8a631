"""Several clients, pipelines, and what a client does to its hidden states: each by its own identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import (
    Outcome,
    Planned,
    assert_same_bits,
    finished,
    gradients_of,
    kept_by,
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

from edged import PolicyViolation

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
    tellers = [told[i] for i in range(3) if told[i]]
    assert len(tellers) == plan.plan.reporters
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


@pytest.mark.parametrize("topology", ["label-sharing", "u-shape"])
def test_the_budget_ends_the_job_before_the_step_that_would_pass_it(
    topology: str, tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("opacus", reason="a privacy budget needs opacus")
    from edged_plugins._tensors.privacy import Budget

    sigma, rows = 2.0, [write_rows(tmp_path / "rows", 6, 0)]
    spent = Budget(1e9, 1e-5, sigma, 3, 6).spent
    settings = {"rows": rows, "topology": topology, "clip": 3.0, "noise": sigma, "steps": 8}
    plan = planned(tiny("llama")[1], tmp_path, epsilon=(spent(4) + spent(5)) / 2, **settings)
    outcomes = run_threads(plan, keep="messages")
    error = raised(outcomes)
    assert isinstance(error, PolicyViolation)
    assert "step 4 would spend" in str(error)
    sent = [header["at"][0] for _, header, _ in outcomes[1].received if header["k"] in ("forward", "up")]
    assert sent == [0, 1, 2, 3]
    assert kept_by(plan)[0][-1] == 4


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
