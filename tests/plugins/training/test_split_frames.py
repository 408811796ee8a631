"""What travels: nothing but hidden states to a U-shaped server, and nothing hostile gets in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edged_plugins._tensors.rows import encode, read_rows
from edged_plugins._training import sizes
from edged_plugins.split_learning import _cost
from edged_plugins.split_learning._job import check_split, read
from edged_plugins.split_learning._places import Places
from edged_plugins.torch_blocks._engine import open_blocks
from rig import (
    Outcome,
    Planned,
    Processes,
    QueueChannel,
    assert_same_bits,
    client_batch,
    finished,
    kept_by,
    lora_of,
    planned,
    run_threads,
    write_rows,
)

from edged import ConfigError, EngineError, ProtocolError

Tiny = Callable[[str], tuple[Any, Path]]
PATIENCE_S = 20.0
HIDDEN, VOCAB = 32, 128  # of the tiny models
KINDS = {"hello", "evals", "eval", "up", "back gradient", "mine", "part"}
WORDS = {"k", "at", "model", "tokenizer", "job", "of", "shape", "tensor"}


# --- what a U-shaped server gets ------------------------------------------------------------------


def spelled(plan: Planned, client: int) -> list[bytes]:
    """A client's ids and labels as bytes that somebody might send: integers of each width, and floats."""
    rows = encode(read_rows(plan.specs[client].data_path), open_blocks(str(plan.path)).tokenizer, 32)
    found = []
    for row in rows:
        for values in (row.ids, row.labels):
            counted = values[values >= 0]
            assert len(counted) >= 2
            found += [counted.astype(kind).tobytes() for kind in ("<i2", "<i4", "<i8", "<f4", ">i4", "i1")]
    return found


def holds_any(outcome: Outcome, parts: list[bytes]) -> bool:
    frames = [frame for _, _, frames in outcome.received for frame in frames]
    heads = [json.dumps(header).encode() for _, header, _ in outcome.received]
    return any(part in frame for part in parts for frame in (*frames, *heads))


@pytest.mark.parametrize("clients", [1, 2])
def test_a_u_shaped_server_gets_no_id_label_or_logit(
    clients: int, tiny: Tiny, processes: Processes, tmp_path: Path
) -> None:
    rows = [write_rows(tmp_path / f"rows{i}", 6, 3, seed=i) for i in range(clients)]
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, topology="u-shape", average_every=2)
    server = finished(processes.run(plan, keep="messages").outcomes)[-1]
    kinds = set()
    for _, header, frames in server.received:
        kinds.add(header["k"])
        assert set(header) <= WORDS
        assert all(isinstance(number, int) for number in header["at"])
        if header["k"] in ("hello", "evals"):
            assert not frames
        elif header["k"] == "mine":
            assert [len(frame) for frame in frames] == [4 * server_sees(plan, server)]
        else:
            said = header.get("tensor", header)
            assert set(said) <= {"codec", "shape", "k", "at"}
            *shape, width = [*said["shape"], HIDDEN][:3]
            assert width == HIDDEN
            assert [len(frame) for frame in frames] == [4 * int(np.prod(shape)) * HIDDEN]  # not one integer
    assert kinds <= KINDS
    assert {"up", "back gradient", "eval"} <= kinds
    for client in range(clients):
        assert not holds_any(server, spelled(plan, client))


def server_sees(plan: Planned, server: Outcome) -> int:
    """Values of a client's adapter, which it sends to be averaged: two blocks and the tail, r = 4."""
    blocks = 2 + 1
    return blocks * 4 * ((HIDDEN + HIDDEN) + (HIDDEN + HIDDEN // 2))  # q_proj; v_proj, of half the heads


def test_the_same_search_finds_the_labels_that_label_sharing_sends(tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny("llama")[1], tmp_path, rows=[write_rows(tmp_path / "rows", 6, 3)])
    _, server = finished(run_threads(plan, keep="messages"))
    assert holds_any(server, spelled(plan, 0))


# --- hostile frames -------------------------------------------------------------------------------


def greet(channel: QueueChannel, plan: Planned, other: int) -> None:
    settings = dict(plan.plan.settings)
    job = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    channel.send(other, {"k": "hello", "at": [], "model": "0" * 64, "tokenizer": "", "job": job})


def take(channel: QueueChannel, source: int, kind: str) -> dict[str, Any]:
    """The next message of that kind."""
    while channel.poll(source, PATIENCE_S):
        header, _ = channel.receive(source, PATIENCE_S)
        if header["k"] == kind:
            return header
        if header["k"] == "eval":
            channel.send(source, {"k": "eval done", "at": header["at"]})
    raise AssertionError(f"expected {kind} of rank {source}")


SHAPE = [2, 8, HIDDEN]
TENSOR = {"codec": "f32", "shape": SHAPE}
FORWARD = {"k": "forward", "at": [0, 0], "of": 1, "targets": 3, "tensor": TENSOR}
HIDDEN_STATES = bytes(4 * 2 * 8 * HIDDEN)
LABELS = bytes(4 * 2 * 8)

NAN = np.full(1, np.nan, "<f4").tobytes()

HOSTILE_FORWARDS: dict[str, tuple[dict[str, Any], list[bytes]]] = {
    "another kind": ({"k": "backward"}, [HIDDEN_STATES, LABELS]),
    "another step": ({"at": [1, 0]}, [HIDDEN_STATES, LABELS]),
    "no place": ({"at": None}, [HIDDEN_STATES, LABELS]),
    "no tensor": ({"tensor": None}, [HIDDEN_STATES, LABELS]),
    "too many rows": ({"tensor": {"codec": "f32", "shape": [99, 8, HIDDEN]}}, [HIDDEN_STATES, LABELS]),
    "a huge shape": ({"tensor": {"codec": "f32", "shape": [2**40, 2**40, HIDDEN]}}, [HIDDEN_STATES, LABELS]),
    "a shape below zero": ({"tensor": {"codec": "f32", "shape": [-2, -8, HIDDEN]}}, [HIDDEN_STATES, LABELS]),
    "another width": ({"tensor": {"codec": "f32", "shape": [2, 8, 16]}}, [HIDDEN_STATES[::2], LABELS]),
    "another codec": ({"tensor": {"codec": "f16", "shape": SHAPE}}, [HIDDEN_STATES[::2], LABELS]),
    "fewer bytes": ({}, [HIDDEN_STATES[:-4], LABELS]),
    "many more bytes": ({}, [HIDDEN_STATES * 1000, LABELS]),
    "no frames": ({}, []),
    "no labels": ({}, [HIDDEN_STATES]),
    "a frame more": ({}, [HIDDEN_STATES, HIDDEN_STATES, LABELS]),
    "fewer labels": ({}, [HIDDEN_STATES, LABELS[:-4]]),
    "half a label": ({}, [HIDDEN_STATES, LABELS[:-3]]),
    "a label above the vocabulary": ({}, [HIDDEN_STATES, np.full(16, VOCAB, "<i4").tobytes()]),
    "a label below all": ({}, [HIDDEN_STATES, np.full(16, -101, "<i4").tobytes()]),
    "a label that is neither": ({}, [HIDDEN_STATES, np.full(16, -1, "<i4").tobytes()]),
    "no micro-batch": ({"of": 0}, [HIDDEN_STATES, LABELS]),
    "endless micro-batches": ({"of": 2**40}, [HIDDEN_STATES, LABELS]),
    "true micro-batches": ({"of": True}, [HIDDEN_STATES, LABELS]),
    "targets below zero": ({"targets": -1}, [HIDDEN_STATES, LABELS]),
    "targets in words": ({"targets": "3"}, [HIDDEN_STATES, LABELS]),
}


@pytest.mark.parametrize("case", HOSTILE_FORWARDS)
def test_a_hostile_batch_costs_a_protocol_error(case: str, tiny: Tiny, tmp_path: Path) -> None:
    words, frames = HOSTILE_FORWARDS[case]
    plan = planned(tiny("llama")[1], tmp_path, topology="label-sharing")

    def client(channel: QueueChannel) -> None:
        greet(channel, plan, 1)
        channel.send(1, {"k": "evals", "at": [0], "of": 0})
        channel.send(1, FORWARD | words, frames)

    assert isinstance(run_threads(plan, ranks={0: client})[1].error, ProtocolError)


def a_client_of_a_u_shape(words: Mapping[str, Any], frames: list[bytes]) -> Callable[..., None]:
    def client(channel: QueueChannel, plan: Planned) -> None:
        greet(channel, plan, 1)
        channel.send(1, {"k": "evals", "at": [0], "of": 0})
        channel.send(1, {"k": "up", "at": [0], "tensor": TENSOR}, [HIDDEN_STATES])
        take(channel, 1, "back")
        channel.send(1, {"k": "back gradient", "at": [0], "tensor": TENSOR} | words, frames)

    return client


def a_server(words: Mapping[str, Any], frames: list[bytes]) -> Callable[..., None]:
    def server(channel: QueueChannel, plan: Planned) -> None:
        greet(channel, plan, 0)
        shape = take(channel, 0, "forward")["tensor"]["shape"]
        said = {"k": "backward", "at": [0, 0], "tensor": {"codec": "f32", "shape": shape}}
        channel.send(0, said | words, frames or [bytes(4 * int(np.prod(shape)))])

    return server


def an_evaluation(
    header: Mapping[str, Any], *more: tuple[dict[str, Any], list[bytes]]
) -> Callable[..., None]:
    def client(channel: QueueChannel, plan: Planned) -> None:
        greet(channel, plan, 1)
        channel.send(1, {"k": "evals", "at": [0]} | dict(header))
        for words, frames in more:
            channel.send(1, {"k": "eval", "at": [0, 0]} | words, frames)

    return client


SHORTER = {"tensor": {**TENSOR, "shape": [1, 8, HIDDEN]}}, [HIDDEN_STATES[: 4 * 8 * HIDDEN]]
EVAL, TWO = {"of": 1}, {"shape": [2, 8]}
STRANGERS: dict[str, tuple[str, int, Callable[..., None]]] = {
    "a gradient of fewer rows": ("u-shape", 0, a_client_of_a_u_shape(*SHORTER)),
    "a gradient in pieces": ("u-shape", 0, a_client_of_a_u_shape({}, [HIDDEN_STATES] * 2)),
    "a gradient back of fewer rows": ("label-sharing", 1, a_server(*SHORTER)),
    "a gradient back of another step": ("label-sharing", 1, a_server({"at": [9, 0]}, [])),
    "endless evaluations": ("label-sharing", 0, an_evaluation({"of": 2**31})),
    "evaluations below zero": ("u-shape", 0, an_evaluation({"of": -1})),
    "an evaluation without a shape": ("label-sharing", 0, an_evaluation(EVAL, ({}, [HIDDEN_STATES, LABELS]))),
    "an evaluation of others": ("u-shape", 0, an_evaluation(EVAL, ({"shape": [1, 8]}, [HIDDEN_STATES]))),
    "a huge evaluation": ("u-shape", 0, an_evaluation(EVAL, ({"shape": [2**30, 8]}, [HIDDEN_STATES]))),
    "an evaluation's labels": ("label-sharing", 0, an_evaluation(EVAL, (TWO, [HIDDEN_STATES, b"\x7f" * 64]))),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_stranger_in_a_ranks_place_costs_a_protocol_error(case: str, tiny: Tiny, tmp_path: Path) -> None:
    topology, rank, stranger = STRANGERS[case]
    plan = planned(tiny("llama")[1], tmp_path, topology=topology)
    outcomes = run_threads(plan, ranks={rank: lambda channel: stranger(channel, plan)})
    assert isinstance(outcomes[1 - rank].error, ProtocolError)


@pytest.mark.parametrize(
    ("words", "frames"),
    [
        ({}, [bytes(8)]),
        ({"tensors": [["a", [2]]]}, [bytes(12)]),
        ({"tensors": [["a", [-1, -2]]]}, [bytes(8)]),
        ({"tensors": [["a", [2]]]}, [bytes(4), bytes(4)]),
        ({"tensors": [["a", "b"]]}, [bytes(4)]),
        ({"tensors": 5}, [bytes(4)]),
        ({"tensors": []}, [b""]),
        ({"tensors": [["a", [math.inf]]]}, [bytes(4)]),
        ({"tensors": [["a", [math.nan]]]}, [bytes(4)]),
        ({"tensors": [["a", [0, 2**62]]]}, [b""]),
        ({"tensors": [["a", [2**40]]]}, [bytes(4)]),
        ({"tensors": [["a", [2]]]}, [NAN + bytes(4)]),
    ],
)
def test_a_part_of_an_adapter_that_is_none_costs_a_protocol_error(
    words: dict[str, Any], frames: list[bytes], tiny: Tiny, tmp_path: Path
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, steps=1, eval_rows=0)

    def server(channel: QueueChannel) -> None:
        greet(channel, plan, 0)
        shape = take(channel, 0, "forward")["tensor"]["shape"]
        tensor = {"codec": "f32", "shape": shape}
        channel.send(0, {"k": "backward", "at": [0, 0], "tensor": tensor}, [bytes(4 * int(np.prod(shape)))])
        channel.send(0, {"k": "part", "at": [1], **words}, frames)

    error = run_threads(plan, ranks={1: server})[0].error
    assert isinstance(error, ProtocolError)
    assert "part of server" in str(error)


@pytest.mark.parametrize("frames", [[], [bytes(7)], [bytes(8)], [bytes(8), bytes(8)], [NAN * 896]], ids=len)
def test_a_mean_that_is_none_costs_a_protocol_error(frames: list[bytes], tiny: Tiny, tmp_path: Path) -> None:
    rows = [write_rows(tmp_path / f"rows{i}", 4, 0) for i in range(2)]
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, steps=1, eval_rows=0)

    def server(channel: QueueChannel) -> None:
        for client in (0, 1):
            greet(channel, plan, client)
        for client in (0, 1):
            shape = take(channel, client, "forward")["tensor"]["shape"]
            tensor = {"codec": "f32", "shape": shape}
            zeros = [bytes(4 * int(np.prod(shape)))]
            channel.send(client, {"k": "backward", "at": [0, 0], "tensor": tensor}, zeros)
        for client in (0, 1):
            channel.send(client, {"k": "mean", "at": [0]}, frames)

    assert isinstance(run_threads(plan, ranks={2: server})[0].error, ProtocolError)


INF = np.full(16 * HIDDEN, np.inf, "<f4").tobytes()


@pytest.mark.parametrize(
    ("topology", "rank", "stranger"),
    [
        ("label-sharing", 1, lambda shape: a_server({}, [NAN * int(np.prod(shape))])),
        ("u-shape", 0, lambda shape: a_client_of_a_u_shape({}, [INF])),
    ],
)
def test_a_gradient_that_is_no_number_ends_the_job_and_names_its_rank(
    topology: str, rank: int, stranger: Callable[..., Any], tiny: Tiny, tmp_path: Path
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, topology=topology)
    shape = [*client_batch(plan, 0)[0].shape, HIDDEN]
    outcomes = run_threads(plan, ranks={rank: lambda channel: stranger(shape)(channel, plan)})
    error = outcomes[1 - rank].error
    assert isinstance(error, EngineError)
    assert error.code == "nan-gradient"
    assert f"of rank {rank}" in str(error)
    assert not kept_by(plan)[1 - rank]


def poisoned_average(trainer: Any) -> None:
    """A client whose adapter has a NaN when it is sent."""
    real = trainer.average

    def average(step: int) -> None:
        with torch.no_grad():
            trainer.parameters[0].fill_(math.nan)
        real(step)

    trainer.average = average


def one_value_less(trainer: Any) -> None:
    trainer.average = lambda step: trainer.link(2).send_values(
        "mine", [step], {"of": 895}, np.zeros(895, np.float32)
    )


@pytest.mark.parametrize("change", [poisoned_average, one_value_less])
def test_an_adapter_that_no_mean_can_be_made_of_is_named(
    change: Callable[[Any], None], tiny: Tiny, tmp_path: Path
) -> None:
    rows = [write_rows(tmp_path / f"rows{i}", 4, 0) for i in range(2)]
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, steps=1, eval_rows=0)
    error = run_threads(plan, changes={1: change})[2].error
    assert isinstance(error, ProtocolError)
    assert "client1" in str(error)


# --- how much is under way, and how large it is -------------------------------------------------


@pytest.mark.parametrize(("clients", "stages"), [(3, 0), (1, 1)])
def test_two_batches_of_an_evaluation_are_ahead_of_the_answers(
    clients: int, stages: int, tiny: Tiny, tmp_path: Path
) -> None:
    rows = [write_rows(tmp_path / f"rows{i}", 4, 15, seed=i) for i in range(clients)]
    more = {"topology": "pipeline", "stages": stages, "micro_batches": 1} if stages else {}
    plan = planned(tiny("llama")[1], tmp_path, rows=rows, eval_rows=64, steps=1, **more)
    *senders, _ = finished(run_threads(plan, keep="messages"))
    for outcome in senders:
        ahead, most = 0, 0
        for event in outcome.log:
            ahead += (event == ("sent", "eval")) - (event == ("received", "eval done"))
            most = max(most, ahead)
        assert (ahead, most) == (0, 2)


def test_adapters_travel_in_pieces_that_are_counted(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as in one piece, of messages whose bytes the prediction has."""
    rows = [write_rows(tmp_path / f"rows{i}", 4, 0, seed=i) for i in range(2)]
    settings = {"rows": rows, "steps": 2, "average_every": 1, "eval_rows": 0, "is_apart": True}
    path, kinds = tiny("llama")[1], ("mine", "mean", "part")
    plan = planned(path, tmp_path / "whole", **settings)
    whole = finished(run_threads(plan))
    monkeypatch.setattr(sizes, "PIECE_BYTES", 1000)
    plan = planned(path, tmp_path / "pieces", **settings)
    outcomes = finished(run_threads(plan, keep="messages"))
    assert_same_bits(lora_of(outcomes), lora_of(whole))
    files = [
        next(Path(folder).rglob("adapter_model.safetensors")) for folder in (tmp_path / "whole", tmp_path)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    sent = [
        (header, [len(frame) for frame in frames])
        for outcome in outcomes
        for _, header, frames in outcome.received
        if header["k"] in kinds
    ]
    assert len(sent) > 2 * 2 * 2 + 2
    assert max(size for _, sizes in sent for size in sizes) == 1000
    job, surveys = read(plan.plan.settings), [outcome.survey for outcome in outcomes]
    places = Places(job, plan.plan.roles, plan.model.layers, plan.plan.collector)
    predicted = _cost._averaging_bytes(job, places, surveys) + _cost._end_bytes(job, places, surveys)
    assert predicted == pytest.approx(sum(sizes.message_bytes(*each) for each in sent), abs=len(sent))


@pytest.mark.parametrize(
    "table",
    [
        {"batch_size": 4096, "max_length": 1 << 10},
        {"batch_size": 4096, "max_length": 1 << 10, "topology": "u-shape"},
        {"batch_size": 64, "max_length": 1 << 10, "topology": "private-lora", "r": 1024},
        {"max_length": 1 << 22, "topology": "parallel-adapters", "width": 8},
    ],
)
def test_tensors_that_no_link_takes_are_refused_with_figures(
    table: dict[str, Any], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")[1]
    if table["max_length"] > 1 << 17:  # one row of this model's cannot be so long
        monkeypatch.setattr(sizes, "FRAME_BYTES_MAX", 1 << 20)
        table = table | {"max_length": 1 << 14}
    with pytest.raises(
        ConfigError, match=r"at most \d+ MiB between nodes; .* rows .* makes \d+ MiB"
    ) as caught:
        planned(path, tmp_path, **table)
    assert "lower batch_size or max_length" in str(caught.value.remedy)


@pytest.mark.parametrize(("key", "most"), [("r", 4096), ("width", 65536)])
def test_an_adapter_has_a_greatest_width(key: str, most: int) -> None:
    table = {"clients": [{"node": "a", "data": "rows"}], "server": {"node": "b"}}
    assert check_split({**table, key: most})[key] == most
    with pytest.raises(ConfigError, match=f"{key} of 1 to"):
        check_split({**table, key: most + 1})
