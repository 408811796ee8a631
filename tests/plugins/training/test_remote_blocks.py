"""Remote frozen blocks: the client tunes as an unsplit model would, and the server keeps nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from edged_plugins.split_learning._job import check_local, check_split, read
from edged_plugins.split_learning._layout import plan_split
from edged_plugins.torch_blocks._engine import open_blocks
from rig import (
    client_batch,
    described,
    finished,
    largest_difference,
    last_common,
    planned,
    random_start,
    run_threads,
    stopping_at,
)

from edged import ConfigError, NodeView
from edged.adapters import AdapterMeta, AdapterStore
from edged.identity import Home

# peft asks transformers for what transformers calls by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
Tiny = Callable[[str], tuple[Any, Path]]
EXACT = 1e-6
ADAPTER: dict[str, Any] = {"topology": "remote-blocks", "cut": 2}
PROMPTS: dict[str, Any] = {"topology": "remote-blocks", "tune": "prompts", "prompt_tokens": 3}


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of logits (B, n + S, V), the last S positions of which are those of the labels (B, S)."""
    before = logits.shape[1] - labels.shape[1]
    first = 0 if before else 1  # a prompt's last vector predicts the first token
    predicting = logits[:, max(0, before - 1) : -1]
    return torch.nn.functional.cross_entropy(
        predicting.flatten(0, 1), labels[:, first:].flatten(), ignore_index=-100
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_adapter_of_the_clients_blocks_has_the_unsplit_gradient(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    model, path = tiny(family)
    plan = planned(path, tmp_path, steps=1, **ADAPTER)
    client, _ = finished(run_threads(plan, changes={0: random_start}))
    job = read(plan.plan.settings)
    config = peft.LoraConfig(
        r=job.r,
        lora_alpha=job.alpha,
        target_modules=list(job.target_modules),
        layers_to_transform=[0, 1],
        fan_in_fan_out=family == "gpt2",
    )
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    named = {name.replace(".default.", "."): p for name, p in tuned.named_parameters() if p.requires_grad}
    assert set(named) == set(client.start)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(client.start[name].copy()))
    ids, labels = client_batch(plan, 0)
    loss = loss_of(tuned(input_ids=ids).logits, labels)
    loss.backward()
    assert client.losses == pytest.approx([loss.item()], abs=1e-5)
    expected = {name: p.grad.numpy() for name, p in named.items() if p.grad is not None}
    assert largest_difference(client.gradients[0], expected) <= EXACT


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma", "bloom"]
)  # positions, scale and norm after them
def test_prompts_have_the_gradient_of_pefts(family: str, cut: int, tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny(family)
    more = {"target_modules": ["query_key_value"]} if family == "bloom" else {}
    plan = planned(path, tmp_path, steps=1, cut=cut, **PROMPTS, **more)
    client, _ = finished(run_threads(plan))
    (start,) = client.start.values()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    (parameter,) = [p for p in tuned.parameters() if p.requires_grad]
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(start.copy()))
    ids, labels = client_batch(plan, 0)
    loss = loss_of(tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, labels)
    loss.backward()
    assert client.losses == pytest.approx([loss.item()], abs=1e-5)
    (gradient,) = client.gradients[0].values()
    assert np.abs(gradient - parameter.grad.numpy()).max() <= EXACT


def test_prompts_start_as_embeddings_of_tokens_that_the_seed_draws(tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny("llama")
    starts = []
    for seed in (1, 1, 2):
        plan = planned(path, tmp_path / str(len(starts)), steps=1, cut=0, seed=seed, **PROMPTS)
        starts.append(next(iter(finished(run_threads(plan))[0].start.values())))
    rows = {row.tobytes() for row in model.get_input_embeddings().weight.numpy()}
    assert all(row.tobytes() in rows for row in starts[0])
    assert starts[0].tobytes() == starts[1].tobytes() != starts[2].tobytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_the_prompts_and_gives_the_same_logits(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny(family)
    client, _ = finished(run_threads(planned(path, tmp_path, cut=0, **PROMPTS)))
    folder = tmp_path / "rank-0" / "adapter"
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    ids = torch.arange(2, 12)[None]
    theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    span = open_blocks(str(path)).span(0, 4, embed=True, head=True)
    (prompts,) = client.lora.values()
    ours = span.project(span(ids, torch.from_numpy(prompts)))
    assert (ours - theirs).abs().max() <= 1e-5
    assert client.start.keys() == client.lora.keys()
    assert all((client.start[name] != client.lora[name]).any() for name in client.start)


def test_an_adapter_of_prompts_is_stored_as_such(tiny: Tiny, tmp_path: Path) -> None:
    finished(run_threads(planned(tiny("llama")[1], tmp_path / "job", cut=0, **PROMPTS)))
    folder = tmp_path / "job" / "rank-0" / "adapter"
    kind = json.loads((folder / "meta.json").read_text())["kind"]
    store = AdapterStore(Home(tmp_path / "home"))
    stored = store.adopt(folder, "mine", AdapterMeta("0" * 64, "tiny", kind=kind))
    assert (stored.kind, stored.path) == ("prompts", "")  # no file that `edged generate` would load
    assert [adapter.name for adapter in store.list()] == ["mine"]


@pytest.mark.parametrize("table", [ADAPTER, {**PROMPTS, "cut": 0}], ids=["adapter", "prompts"])
def test_the_server_gets_hidden_states_and_keeps_nothing(
    table: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, **table)
    before: list[dict[str, torch.Tensor]] = []
    spans: list[Any] = []

    def look(trainer: Any) -> None:
        spans.extend(trainer.spans)
        before.extend({k: v.clone() for k, v in span.state_dict().items()} for span in trainer.spans)

    _, server = finished(run_threads(plan, keep="messages", changes={1: look}))
    assert server.survey["keeps"] is False
    assert not plan.folders[1].exists()
    for span, state in zip(spans, before, strict=True):
        for name, value in span.state_dict().items():
            assert torch.equal(value, state[name])
            assert not span.get_parameter(name).requires_grad
    kinds = set()
    for _, header, frames in server.received:
        kinds.add(header["k"])
        if header["k"] not in ("hello", "evals"):  # one frame each: as large as hidden states, and no more
            shape = header["tensor"]["shape"] if "tensor" in header else [*header["shape"], 32]
            assert [len(frame) for frame in frames] == [4 * math.prod(shape)]
            assert shape[2] == 32
    assert kinds == {"hello", "evals", "eval", "up", "back gradient"}


@pytest.mark.parametrize(
    "table",
    [ADAPTER, {**PROMPTS, "cut": 1}, {**ADAPTER, "codec": "topk", "ratio": 3.0}],
    ids=["adapter", "prompts", "topk"],
)
def test_a_job_goes_on_from_the_clients_checkpoint_alone(
    table: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    _, path = tiny("llama")
    whole = finished(run_threads(planned(path, tmp_path / "whole", steps=5, **table)))
    plan = planned(path, tmp_path / "parts", steps=5, **table)
    step = last_common(finished(run_threads(plan, changes={0: stopping_at(3)})))
    assert step == 3
    again = finished(run_threads(plan, step))
    assert again[0].losses == whole[0].losses[3:]
    assert largest_difference(again[0].lora, whole[0].lora) == 0


# --- the job's file -------------------------------------------------------------------------------

TWO = {"clients": [{"node": "a", "data": "d"}], "server": {"node": "b"}}


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ({"topology": "remote-blocks", "cut": 0}, "cut as a block number"),
        ({"topology": "u-shape", "tune": "prompts"}, "remote-blocks only"),
        (
            {"topology": "remote-blocks", "clients": [*TWO["clients"], {"node": "c", "data": "d"}]},
            "one client",
        ),
        ({"topology": "remote-blocks", "micro_batches": 2}, "micro_batches"),
    ],
)
def test_a_job_that_cannot_be_is_refused(table: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        check_split({**TWO, **table})


def test_one_node_alone_has_no_remote_blocks() -> None:
    with pytest.raises(ConfigError, match="on one node"):
        check_local({"data": "d", "topology": "remote-blocks"})


@pytest.mark.parametrize(("tune", "cut"), [("adapter", 1), ("prompts", 0)])
def test_the_planner_gives_the_client_the_least_that_works(tune: str, cut: int, tiny: Tiny) -> None:
    settings = check_split({**TWO, "topology": "remote-blocks", "tune": tune, "cut": "auto"})
    plan = plan_split(settings, described(tiny("llama")[1]), [NodeView("a", "a"), NodeView("b", "b")])
    assert plan.settings["cut"] == cut
    assert [role.layers for role in plan.roles] == [(0, cut), (cut, 4)]
