"""Rounds of seeds over all weights of a model: what members hold, what travels, what is written of it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins.personal_lora import _messages
from edged_plugins.torch_blocks import _span
from edged_plugins.torch_blocks._engine import open_blocks
from edged_plugins.torch_blocks._rewrite import rewrite
from edged_plugins.zeroth_order._whole import Whole
from rig import finished, kept_by, raised, run_threads
from rounds_rig import breaks_before, federated

from edged import ConfigError

ALL: dict[str, Any] = {"method": "fedkseed", "parameters": "all", "seeds": 16, "learning_rate": 1e-4}


def written(plan: Any, out: Path, kind: str = "f32") -> Path:
    """The model that the job's base and table make."""
    folder = str(plan.folders[plan.plan.collector] / "adapter")
    with open(out, "xb") as file:
        rewrite(folder, str(plan.path), file.fileno(), kind, Whole, lambda done, total: None)
    return out


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    blocks = open_blocks(str(path))
    return {name: blocks.source.tensor(name).numpy() for name in blocks.weights()}


@pytest.mark.parametrize(("family", "submitter"), [("llama", "server"), ("gpt2", "client1"), ("gemma", "x")])
def test_the_model_written_of_a_table_is_what_every_member_holds_to_the_bit(
    family: str, submitter: str, tiny: Any, tmp_path: Path
) -> None:
    """GPT-2's head is tied: it is moved once, with the embedding."""
    plan = federated(tiny(family)[1], tmp_path / "job", submitter=submitter, **ALL)
    trainers: dict[int, Any] = {}
    changes = {rank: lambda trainer, rank=rank: trainers.update({rank: trainer}) for rank in range(2)}
    finished(run_threads(plan, changes=changes))
    base, made = tensors_of(plan.path), tensors_of(written(plan, tmp_path / "model"))
    assert base.keys() == made.keys()
    for name, values in made.items():
        assert not np.array_equal(values, base[name])
        for trainer in trainers.values():
            np.testing.assert_array_equal(trainer.model.span.get_parameter(name).numpy(), values)
    narrow = tensors_of(written(plan, tmp_path / "narrow", "f16"))
    for name, values in made.items():
        bound = 0 if values.ndim == 1 else 2.0**-11
        np.testing.assert_allclose(narrow[name], values, rtol=bound, atol=2.0**-25 if bound else 0)


def test_the_loss_of_members_falls(tiny: Any, tmp_path: Path) -> None:
    more = {"rounds": 3, "local_steps": 10, "seeds": 32, "eval_rows": 0}
    plan = federated(tiny("llama")[1], tmp_path, **(ALL | more))
    losses = finished(run_threads(plan))[-1].losses
    assert losses[-1] < losses[0]


def test_rounds_go_on_from_checkpoints_bit_for_bit(tiny: Any, tmp_path: Path) -> None:
    path = tiny("llama")[1]
    calm, broken = (federated(path, tmp_path / name, rounds=3, **ALL) for name in ("calm", "broken"))
    finished(run_threads(calm))

    assert str(raised(run_threads(broken, changes={0: breaks_before(2)}))) == "it breaks here"
    step = max(set.intersection(*(set(steps) for steps in kept_by(broken))))
    assert step >= 1
    finished(run_threads(broken, step))
    one, other = (plan.folders[-1] / "adapter" / "adapter_model.safetensors" for plan in (calm, broken))
    assert one.read_bytes() == other.read_bytes()


def test_sums_under_masks_are_those_in_clear(tiny: Any, tmp_path: Path) -> None:
    made = []
    for masked in (True, False):
        more = {"clients": ({}, {}, {}), "rounds": 1, "masked": masked, "mask_clip": 1e5}
        plan = federated(tiny("llama")[1], tmp_path / str(masked), **ALL, **more)
        finished(run_threads(plan))
        made.append(tensors_of(written(plan, tmp_path / f"{masked}.model")))
    for name, values in made[0].items():
        np.testing.assert_allclose(values, made[1][name], rtol=0, atol=1e-7)


def test_a_round_of_all_weights_is_below_18_kilobytes_on_the_wire(
    tiny: Any, processes: Any, tmp_path: Path
) -> None:
    """As with factors: 4096 seeds and 200 steps; and no frame is of any weight's size."""
    more = {"seeds": 4096, "local_steps": 200, "rounds": 1, "learning_rate": 1e-6, "eval_rows": 0}
    plan = federated(
        tiny("llama")[1], tmp_path, submitter="laptop", clients=({},), batch_size=1, **(ALL | more)
    )
    ran = processes.run(plan, keep="messages")
    server = finished(ran.outcomes)[1]
    rows = [values for kind, _, values in server.reports if kind == "step"]
    assert plan.predicted_bytes(ran.outcomes) == pytest.approx(ran.bytes, rel=0.01)
    told = _messages.told_bytes(1)
    assert all(17_984 < row["down_0"] + row["up_0"] + told < 18 * 1024 for row in rows)
    assert max(len(frame) for _, _, frames in server.received for frame in frames) <= 4 * 200


def test_local_steps_and_a_new_round_keep_no_copy_of_the_weights(tiny: Any, tmp_path: Path) -> None:
    """Of numpy no more than a few pieces of a direction, whatever the weights; theirs stay where they are."""
    sizes = {"a": 1 << 20, "b": 1 << 21}
    weights = {name: np.ones(size, np.float32) for name, size in sizes.items()}
    settings = {"seeds": 4, "seed": 0, "learning_rate": 1e-3, "perturbation": 2.0**-11}
    part, table = Whole(settings, sizes, 0), np.array([1, 0, -2, 0], np.float32)
    tracemalloc.start()
    try:
        for name, values in weights.items():
            part.rebuild(name, values, {"table": table})
        part.train(range(1), weights, lambda step: float(weights["a"][0]))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 * sum(sizes.values()) / 4


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "factors": ({"method": "fedavg"}, 'parameters = "adapter" with fedavg, .* "all" is for fedkseed'),
    "mezo": ({"method": "mezo"}, 'parameters = "adapter" with mezo, which sends factors'),
    "narrow": ({"weights": "bf16"}, 'weights f32 with parameters = "all"'),
    "personal": ({"personal": "ditto"}, 'personal = none with parameters = "all"'),
    "dropout": ({"dropout": 0.1}, 'no dropout with parameters = "all"'),
    "an r": ({"clients": ({"r": 2}, {"r": 2})}, 'no r or alpha of a client with parameters = "all"'),
    "one joins": (
        {"method": "flora", "clients": ({}, {"method": "fedkseed"})},
        'parameters = "adapter" with',
    ),
    "half": ({"parameters": "half"}, "parameters as one of adapter, all"),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_what_all_weights_cannot_be_tuned_with_is_named(
    changes: dict[str, Any], says: str, tiny: Any, tmp_path: Path
) -> None:
    table = {key: value for key, value in (ALL | changes).items() if key != "seeds"}
    with pytest.raises(ConfigError, match=says):
        federated(tiny("llama")[1], tmp_path, **table)


def test_seeds_of_another_model_are_not_written(tiny: Any, tmp_path: Path) -> None:
    plan = federated(tiny("llama")[1], tmp_path / "job", **(ALL | {"rounds": 1}))
    finished(run_threads(plan))
    other = federated(tiny("gpt2")[1], tmp_path / "other", **ALL)
    folder = str(plan.folders[-1] / "adapter")
    with open(tmp_path / "out", "xb") as file, pytest.raises(ConfigError, match="this model's tensors"):
        rewrite(folder, str(other.path), file.fileno(), "f32", Whole, lambda done, total: None)


@pytest.mark.parametrize("apart", [0, 1 << 30])
def test_a_tensor_is_read_again_and_a_tied_head_with_it(
    apart: int, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large tensor, in place of what it was; a small one, in its memory. The file stays as it is."""
    monkeypatch.setattr(_span, "RELOADED_APART", apart)
    path = tiny("gpt2")[1]
    blocks = open_blocks(str(path))
    span, before = blocks.span(0, blocks.layers, embed=True, head=True), path.read_bytes()
    for name, values in tensors_of(path).items():
        for _ in range(2):
            span.get_parameter(name).add_(1)
            np.testing.assert_array_equal(span.reload(blocks.source, name).numpy(), values)
            np.testing.assert_array_equal(span.get_parameter(name).numpy(), values)
    embedding = span.get_parameter("transformer.wte.weight")
    assert span.get_parameter("lm_head.weight").data_ptr() == embedding.data_ptr()
    assert path.read_bytes() == before
