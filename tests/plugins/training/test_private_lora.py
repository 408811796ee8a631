"""PrivateLoRA: B M A beside each layer, whose M is the client's; the server keeps nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from edged_plugins._training.sizes import WORKER_BYTES
from edged_plugins.split_learning._job import check_split, read
from edged_plugins.split_learning._layout import plan_split
from edged_plugins.split_learning._middle import drawn
from edged_plugins.split_learning._places import shared_inputs
from rig import (
    Outcome,
    Planned,
    client_batch,
    described,
    finished,
    largest_difference,
    last_common,
    planned,
    raised,
    run_threads,
    stopping_at,
)
from torch import nn

from edged import ConfigError, EngineSpeed, NodeView, ProtocolError
from edged.types import LinkState

# peft asks transformers for what transformers calls by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
Tiny = Callable[[str], tuple[Any, Path]]
EXACT = 1e-6
PRIVATE: dict[str, Any] = {"topology": "private-lora"}
TARGETS = {  # every kind of layer that a family has
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],  # attention beside the FFN
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def with_middles(fill: Callable[[int], torch.Tensor]) -> Callable[[Any], None]:
    """A client that starts with other M than zero, `fill` of each one's number."""

    def change(trainer: Any) -> None:
        with torch.no_grad():
            for number, middle in enumerate(trainer.parameters):
                middle.copy_(fill(number))

    return change


def random_middle(number: int) -> torch.Tensor:
    return 0.2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(number))


class Beside(nn.Module):
    """W x + s B M A x, all in one place."""

    def __init__(self, base: nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.scale = base, down, up, scale
        self.middle = nn.Parameter(torch.zeros(len(down), len(down)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.down.T @ self.middle.T @ self.up.T)


def unsplit(model: Any, plan: Planned, shapes: dict[str, tuple[int, int]]) -> tuple[Any, list[nn.Parameter]]:
    """The model with B M A in its layers, and their M in order."""
    job, found = read(plan.plan.settings), copy.deepcopy(model)
    middles = []
    for name, (rows, columns) in shapes.items():
        stem, _, attribute = name.rpartition(".")
        parent = found.get_submodule(stem)
        down, up = drawn(job.seed, name, job.r, rows, columns)
        layer = Beside(getattr(parent, attribute), down, up, job.alpha / job.r)
        setattr(parent, attribute, layer)
        middles.append(layer.middle)
    return found, middles


def looking(found: dict[str, Any], change: Callable[[Any], None] | None = None) -> Callable[[Any], None]:
    def change_and_look(trainer: Any) -> None:
        found["shapes"] = trainer.shapes
        if change is not None:
            change(trainer)

    return change_and_look


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def lora_model(model: Any, plan: Planned, tensors: dict[str, np.ndarray]) -> Any:
    """PEFT's LoRA with these tensors."""
    job = read(plan.plan.settings)
    config = peft.LoraConfig(
        r=job.r,
        lora_alpha=job.alpha,
        target_modules=list(job.target_modules),
    )
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    named = {name.replace(".default.", "."): p for name, p in tuned.named_parameters() if p.requires_grad}
    assert set(named) == set(tensors)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(tensors[name].copy()))
    return tuned


def run(plan: Planned, **more: Any) -> tuple[Outcome, Outcome]:
    client, server = finished(run_threads(plan, **more))
    return client, server


@pytest.mark.parametrize("family", TARGETS)
def test_the_gradient_of_m_is_that_of_the_unsplit_model(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny(family)
    plan = planned(path, tmp_path, steps=2, target_modules=TARGETS[family], **PRIVATE)
    found: dict[str, Any] = {}
    client, _ = run(plan, changes={0: looking(found, with_middles(random_middle))})
    whole, middles = unsplit(model, plan, found["shapes"])
    assert len(middles) == 4 * (len(TARGETS[family]) + (family == "gpt2"))  # GPT-2 has two c_proj a block
    for number, middle in enumerate(middles):
        middle.data = random_middle(number)
    loss = loss_of(whole, *client_batch(plan, 0))
    loss.backward()
    assert client.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    for number, middle in enumerate(middles):
        assert middle.grad is not None
        assert np.abs(client.gradients[0][f"own.{number}"] - middle.grad.numpy()).max() <= EXACT
        assert middle.grad.abs().max() > 1e-5


def test_m_of_zero_is_the_base_model(tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny("llama")
    plan = planned(path, tmp_path, steps=1, **PRIVATE)
    client, _ = run(plan)
    assert all(not value.any() for value in client.start.values())
    assert client.losses[0] == pytest.approx(loss_of(model, *client_batch(plan, 0)).item(), abs=1e-5)


def test_m_of_one_is_lora(tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny("llama")
    plan = planned(path, tmp_path, steps=1, **PRIVATE)
    found: dict[str, Any] = {}
    client, _ = run(plan, changes={0: looking(found, with_middles(lambda _: torch.eye(4)))})
    tensors = {}
    for name, (rows, columns) in found["shapes"].items():
        down, up = drawn(0, name, 4, rows, columns)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.numpy()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.numpy()
    lora = lora_model(model, plan, tensors)
    assert client.losses[0] == pytest.approx(loss_of(lora, *client_batch(plan, 0)).item(), abs=1e-5)
    assert client.losses[0] != pytest.approx(loss_of(model, *client_batch(plan, 0)).item(), abs=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_what_the_client_writes_and_computes_the_same(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    model, path = tiny(family)
    plan = planned(path, tmp_path, target_modules=TARGETS[family], **PRIVATE)
    found: dict[str, Any] = {}
    client, _ = run(plan, changes={0: looking(found)})
    whole, middles = unsplit(model, plan, found["shapes"])
    for middle, value in zip(middles, client.lora.values(), strict=True):
        middle.data = torch.from_numpy(value)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "rank-0" / "adapter")
    ids = torch.arange(2, 14)[None]
    assert (loaded(input_ids=ids).logits - whole(input_ids=ids).logits).abs().max() <= 1e-5
    assert (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["v_proj", "q_proj", "o_proj"]])
def test_r_values_of_each_target_travel_for_each_token_and_block(
    targets: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, steps=1, eval_every=0, target_modules=targets, **PRIVATE)
    outcomes = run(plan, keep="messages")
    rows, length = client_batch(plan, 0)[0].shape
    for outcome, kinds in zip(
        outcomes, (("inner", "outer gradient"), ("inner back", "outer gradient back")), strict=True
    ):
        for kind in kinds:
            values = sum(
                len(frame) // 4
                for _, header, frames in outcome.received
                for frame in frames
                if header["k"] == kind
            )
            assert values == rows * length * 4 * len(targets) * 4  # blocks, targets, r
    kinds = {header["k"] for _, header, _ in outcomes[1].received}
    wanted = {"hello", "up", "inner back", "back gradient", "outer gradient back"}
    assert kinds - {"evals", "eval", "eval inner back"} == wanted  # no ids, labels or logits


def test_the_server_can_work_out_words_and_m_from_what_it_sees(tiny: Tiny, tmp_path: Path) -> None:
    """As the documents say: PrivateLoRA hides labels and logits, and neither of these."""
    model, path = tiny("llama")
    plan = planned(path, tmp_path, steps=1, eval_every=0, target_modules=["o_proj"], **PRIVATE)
    client, server = run(plan, keep="messages", changes={0: with_middles(random_middle)})

    def sent(outcome: Outcome, kind: str) -> torch.Tensor:
        header, frames = next((h, f) for _, h, f in outcome.received if h["k"] == kind)
        return torch.frombuffer(bytearray(frames[0]), dtype=torch.float32).reshape(header["tensor"]["shape"])

    near = torch.cdist(sent(server, "up"), model.get_input_embeddings().weight[None]).argmin(-1)
    assert torch.equal(near, client_batch(plan, 0)[0])
    inner, outer = sent(client, "inner").flatten(0, 1), sent(server, "inner back").flatten(0, 1)
    assert torch.allclose(torch.linalg.lstsq(inner, outer).solution.T, random_middle(0), atol=1e-4)


def test_a_client_leaves_the_server_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    held: list[dict[str, torch.Tensor]] = []
    servers: list[Any] = []

    def state(trainer: Any) -> dict[str, torch.Tensor]:
        found = dict(trainer.span.state_dict())
        for name, module in trainer.span.named_modules():
            if hasattr(module, "_group"):
                found |= {f"{name} A": module._group._down, f"{name} B": module._up}
        return found

    def look(trainer: Any) -> None:
        servers.append(trainer)
        trainer.close = lambda: None
        held.append({name: value.clone() for name, value in state(trainer).items()})

    plan = planned(tiny("llama")[1], tmp_path, **PRIVATE)
    client, server = run(plan, changes={1: look})
    assert client.losses
    assert server.survey["keeps"] is False
    assert not plan.folders[1].exists()
    after = state(servers[0])
    assert after.keys() == held[0].keys()
    assert all(torch.equal(after[name], value) for name, value in held[0].items())
    assert any(name.endswith(" B") for name in after)


def test_a_and_b_are_functions_of_seed_and_name(tiny: Tiny) -> None:
    one, same, other, named = (
        drawn(seed, name, 64, 300, 400) for seed, name in ((1, "x"), (1, "x"), (2, "x"), (1, "y"))
    )
    for side in (0, 1):
        assert torch.equal(one[side], same[side])
        assert not torch.equal(one[side], other[side])
        assert not torch.equal(one[side], named[side])
    z = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    assert (z @ one[1].T).std() == pytest.approx(1.0, abs=0.05)  # B keeps the size of what it is given
    assert one[0].abs().max() <= 1 / 20


def test_a_job_goes_on_from_the_clients_checkpoint_alone(tiny: Tiny, tmp_path: Path) -> None:
    _, path = tiny("llama")
    table = {"steps": 5, "codec": "topk", "ratio": 3.0, **PRIVATE}
    whole = run(planned(path, tmp_path / "whole", **table))
    plan = planned(path, tmp_path / "parts", **table)
    step = last_common(finished(run_threads(plan, changes={0: stopping_at(3)})))
    assert step == 3
    again = finished(run_threads(plan, step))
    assert again[0].losses == whole[0].losses[3:]
    assert largest_difference(again[0].lora, whole[0].lora) == 0


def test_an_exchange_out_of_turn_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    def skip(trainer: Any) -> None:
        link = trainer.link(0)
        real = link.send_tensor

        def send(kind: str, place: Any, *more: Any, **words: Any) -> None:
            real(kind, [place[0], 1] if kind == "inner" else place, *more, **words)

        link.send_tensor = send

    plan = planned(tiny("llama")[1], tmp_path, eval_rows=0, **PRIVATE)
    error = raised(run_threads(plan, changes={1: skip})[:1])
    assert isinstance(error, ProtocolError)
    assert "expected inner [0, 0]" in str(error)


def test_a_gradient_of_another_shape_is_refused_within_the_backward_pass(tiny: Tiny, tmp_path: Path) -> None:
    def widen(trainer: Any) -> None:
        link = trainer.link(1)
        real = link.send_tensor

        def send(kind: str, place: Any, x: torch.Tensor, *more: Any, **words: Any) -> None:
            real(kind, place, x.repeat(1, 1, 2) if kind == "outer gradient back" else x, *more, **words)

        link.send_tensor = send

    plan = planned(tiny("llama")[1], tmp_path, eval_rows=0, **PRIVATE)
    error = raised(run_threads(plan, changes={0: widen})[1:])
    assert isinstance(error, ProtocolError)
    assert "got [3," in str(error)


# --- plans ----------------------------------------------------------------------------------------

FILE = {"clients": [{"node": "a", "data": "d"}], "server": {"node": "b"}, **PRIVATE}


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"dropout": 0.1}, "dropout = 0"),
        ({"gradient_checkpointing": True}, "no gradient_checkpointing"),
        ({"clients": [*FILE["clients"], {"node": "c", "data": "d"}]}, "one client"),
        ({"tune": "prompts"}, "remote-blocks only"),
    ],
)
def test_a_job_that_cannot_be_is_refused(table: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_split({**FILE, **table})


def test_layers_of_one_input_go_together() -> None:
    names = ["h.0.q_proj", "h.0.v_proj", "h.0.o_proj", "h.0.up_proj", "h.1.q_proj", "h.1.v_proj"]
    assert shared_inputs(names) == [names[:2], [names[2]], [names[3]], names[4:]]
    assert shared_inputs(["c_attn", "c_proj"]) == [["c_attn"], ["c_proj"]]


def test_a_step_waits_for_two_round_trips_a_block(tiny: Tiny) -> None:
    speed = EngineSpeed("torch_blocks", "f32", 1e30, 1e30)
    there = LinkState("b", bandwidth_bytes_s=1e30, latency_s=1.0)
    nodes = [NodeView("a", "a", speeds=(speed,), links=(there,)), NodeView("b", "b", speeds=(speed,))]
    model = described(tiny("llama")[1])
    for targets, groups in ((["q_proj", "k_proj", "v_proj"], 1), (["q_proj", "o_proj"], 2)):
        plan = plan_split(check_split({**FILE, "cut": "auto", "target_modules": targets}), model, nodes)
        assert plan.step_s == pytest.approx(3 + 4 * groups * model.layers)
        assert [role.share for role in plan.roles] == [0, 1]


def test_the_server_pays_for_a_and_b_and_the_client_for_m(tiny: Tiny) -> None:
    model = described(tiny("llama")[1])
    sizes = []
    for r in (8, 16):
        plan = plan_split(
            check_split({**FILE, "r": r, "batch_size": 1, "max_length": 8}),
            model,
            [NodeView("a", "a"), NodeView("b", "b")],
        )
        sizes.append([role.memory_bytes - WORKER_BYTES for role in plan.roles])
    through = (
        4 * 2 * 8 * model.layers * 2 * 8
    )  # what passes: eight positions, both ways, two targets, 8 more r
    (client, server), (wider_client, wider_server) = sizes
    assert wider_client - client - through == 4 * 4 * model.layers * 2 * (16**2 - 8**2)
    assert wider_server - server - through == 4 * model.layers * 2 * 8 * 2 * model.hidden
