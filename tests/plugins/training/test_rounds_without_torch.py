"""Members of federated rounds that have an engine for losses alone, beside others that have PyTorch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install edged[llama])")

from edged_plugins.personal_lora import _rank
from edged_plugins.personal_lora._trainer import load
from edged_plugins.shard import _blocks
from edged_plugins.shard._random import Shape, write_model
from rig import Planned, described, finished, raised, run_threads
from rounds_rig import TRAINING, breaks_before, federated
from test_rounds import adapter_of

from edged import ConfigError, EngineSpec, NodeView, PolicyViolation, TensorEntry

SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=160)
WITHOUT = {"engine": "shard"}


class Words:
    """Of a model without a vocabulary: a word wN is id N."""

    vocab, end, sha256 = SHAPE.vocab, 1, "0" * 64

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in re.findall(r"w(\d+)", text)]

    def chat(self, messages: Sequence[Mapping[str, str]], *, answers: bool) -> list[int]:
        found = self.encode(" ".join(message["content"] for message in messages))
        return [*found, self.end] if answers else found

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_model(str(path), SHAPE, "F32", seed=2)
    return path


def planned(model: Path, folder: Path, clients: Sequence[Mapping[str, Any]], **table: Any) -> Planned:
    """A job of clients whose `engine` says what opens the model for them."""
    plan = federated(model, folder, clients=clients, **table)

    def opens(spec: Any, blocks: Any, channel: Any) -> Any:
        clients = spec.settings["clients"]
        if spec.rank < len(clients) and clients[spec.rank]["engine"] == "shard":
            role = dataclasses.replace(plan.plan.roles[0], rank=spec.rank)
            blocks = _blocks.load(EngineSpec(str(model), described(model), (role,), 0, 32), channel)
        blocks.__dict__["tokenizer"] = Words()
        return load(spec, blocks, channel)

    return dataclasses.replace(plan, load=opens)


SETTINGS: dict[str, dict[str, Any]] = {
    "fedkseed": {"seeds": 64, "learning_rate": 1e-2},
    "mezo": {"learning_rate": 1e-2},
    "fwdllm": {"variance_most": 1e6, "learning_rate": 0.05},
}


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_losses_alone_make_what_pytorch_makes_without_gradients(
    method: str, model: Path, tmp_path: Path
) -> None:
    """But for the rounding of slopes, which are of two losses that are near each other."""
    plans = [
        planned(model, tmp_path / str(n), each, method=method, rounds=3, local_steps=4, **SETTINGS[method])
        for n, each in enumerate([({}, {}), ({}, WITHOUT)])
    ]
    plain, mixed = (finished(run_threads(plan))[-1] for plan in plans)
    assert mixed.evals[0] == pytest.approx(plain.evals[0], rel=1e-6)
    assert mixed.losses == pytest.approx(plain.losses, rel=1e-3)
    made, other = (adapter_of(plan.folders[-1]) for plan in plans)
    assert made.keys() == other.keys()
    assert any(product.any() for product in other.values())
    for name, product in made.items():
        np.testing.assert_allclose(other[name], product, atol=0.05 * np.abs(product).max())


def test_it_sends_seeds_to_a_job_of_factors(model: Path, tmp_path: Path) -> None:
    made = []
    for number, engine in enumerate(({}, WITHOUT)):
        joining = {"method": "fedkseed", "learning_rate": 1e-3} | engine
        plan = planned(model, tmp_path / str(number), ({}, joining), method="fedavg", rounds=2, local_steps=4)
        server = finished(run_threads(plan, keep="messages"))[-1]
        said = {source: header for source, header, _ in server.received if header["k"] == "up"}
        assert said[0]["of"] > 0
        assert said[1].get("of", 0) == 0
        made.append((adapter_of(plan.folders[-1]), server.evals))
    assert made[1][1] == pytest.approx(made[0][1], rel=1e-4)
    for name, product in made[0][0].items():
        np.testing.assert_allclose(made[1][0][name], product, atol=0.05 * np.abs(product).max())


def test_masked_sums_of_slopes_are_the_same_rounds(model: Path, tmp_path: Path) -> None:
    clients, table = (
        ({}, WITHOUT, WITHOUT),
        {"method": "fedkseed", "rounds": 2, "mask_clip": 1e3} | SETTINGS["fedkseed"],
    )
    plain, masked = (
        finished(run_threads(planned(model, tmp_path / str(is_masked), clients, masked=is_masked, **table)))
        for is_masked in (False, True)
    )
    assert masked[-1].evals == pytest.approx(plain[-1].evals, rel=1e-4)


def test_it_goes_on_from_a_checkpoint_to_the_bit(model: Path, tmp_path: Path) -> None:
    table = {"method": "fedkseed", "rounds": 4} | SETTINGS["fedkseed"]
    whole = planned(model, tmp_path / "whole", (WITHOUT, {}), **table)
    cut = planned(model, tmp_path / "cut", (WITHOUT, {}), **table)
    finished(run_threads(whole))
    assert str(raised(run_threads(cut, changes={0: breaks_before(2)}))) == "it breaks here"
    again = finished(run_threads(cut, 1))
    assert [step for kind, step, _ in again[-1].reports if kind == "step"] == [1, 2, 3]
    made, other = (adapter_of(plan.folders[-1]) for plan in (whole, cut))
    for name, product in made.items():
        np.testing.assert_array_equal(other[name], product)


def node(name: str, *engines: str) -> NodeView:
    return NodeView(name, name, engines=engines)


def plan_of(model: Path, *nodes: NodeView, **table: Any) -> Any:
    settings = TRAINING.check(
        {
            "method": "fedkseed",
            "clients": [{"node": "one", "data": "rows"}, {"node": "two", "data": "rows"}],
            "server": {"node": "server"},
        }
        | table
    )
    return TRAINING.plan(settings, described(model), nodes)


def test_the_planner_takes_what_a_node_has(model: Path) -> None:
    nodes = (node("server", "shard"), node("one", "shard", "torch_blocks"), node("two", "shard"))
    plan = plan_of(model, *nodes)
    assert plan.engines == ("torch_blocks", "shard", "shard")
    assert [client["engine"] for client in plan.settings["clients"]] == ["torch_blocks", "shard"]
    assert plan.explanation == ("two evaluates losses by its engine shard, without gradients",)
    assert TRAINING.check(plan.settings) == plan.settings  # as the asked nodes look at it
    counted = [TRAINING.memory(plan.settings, described(model), plan.roles, rank) for rank in range(2)]
    assert counted == [role.memory_bytes for role in plan.roles[:2]]
    assert [TRAINING.engine_of(plan.settings, rank) for rank in range(3)] == list(plan.engines)
    asked = plan_of(model, node("laptop", "shard"), *nodes)
    assert asked.engines == (*plan.engines, "shard")
    assert asked.roles[3].memory_bytes < plan_of(model, node("laptop"), *nodes).roles[3].memory_bytes


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"method": "fedavg"}, "in a job of fedavg, which takes gradients; fedkseed, fwdllm, mezo do not"),
        ({"method": "ferret"}, "in a job of ferret, which takes gradients"),
        ({"personal": "ditto"}, "in a job with a personal adapter"),
        ({"parameters": "all"}, 'in a job with parameters = "all"'),
        ({"objective": "dpo"}, "in a job with objective = dpo"),
        ({"method": "fedbuff"}, "in a job of fedbuff, which takes gradients"),
    ],
)
def test_what_losses_alone_cannot_do_is_refused_before_it_starts(
    table: dict[str, Any], why: str, model: Path
) -> None:
    nodes = (node("server", "torch_blocks"), node("one", "torch_blocks"), node("two", "shard"))
    with pytest.raises(
        PolicyViolation, match="two has shard and not torch_blocks, and takes no part " + re.escape(why)
    ):
        plan_of(model, *nodes, **table)
    clients = [{"node": "one", "data": "rows"}, {"node": "two", "data": "rows", "engine": "shard"}]
    with pytest.raises(ConfigError, match="client 1; shard takes no part " + re.escape(why)):
        plan_of(model, *nodes, clients=clients, **table)


def test_an_engine_that_is_none_is_refused(model: Path) -> None:
    clients = [{"node": "one", "data": "rows", "engine": "llama_cpp"}]
    with pytest.raises(ConfigError, match="engine of a client as torch_blocks or shard"):
        plan_of(model, node("server"), node("one"), clients=clients)


def test_a_model_that_is_no_gguf_is_refused(model: Path) -> None:
    packed = dataclasses.replace(
        described(model), tensors=(TensorEntry("model.embed_tokens.weight", "F32", (1,), 0, 4),)
    )
    settings = plan_of(model, node("server"), node("one"), node("two")).settings
    settings = {key: value for key, value in settings.items() if not key.endswith("_engine")}
    clients = [{"node": name, "data": "rows"} for name in ("one", "two")]
    nodes = [node("server", "shard"), node("one"), node("two")]
    with pytest.raises(PolicyViolation, match=r"server has shard .* a model that is no GGUF"):
        TRAINING.plan(TRAINING.check(settings | {"clients": clients}), packed, nodes)


def test_a_checkpoint_of_another_start_is_not_gone_on_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(model, tmp_path, ({}, WITHOUT), method="fedkseed", rounds=3, **SETTINGS["fedkseed"])
    assert str(raised(run_threads(plan, changes={0: breaks_before(2)}))) == "it breaks here"
    monkeypatch.setattr(_rank, "START", "another")
    assert "a start that is drawn otherwise" in str(raised(run_threads(plan, 1)))


def test_a_join_to_a_stack_is_refused(model: Path) -> None:
    """It would have to move the frozen weights, which are the file's."""
    nodes = (node("server", "torch_blocks"), node("one", "torch_blocks"), node("two", "shard"))
    clients = [{"node": "one", "data": "rows"}, {"node": "two", "data": "rows", "method": "fedkseed"}]
    with pytest.raises(PolicyViolation, match="in a job of flora, which moves the frozen weights"):
        plan_of(model, *nodes, clients=clients, method="flora")
