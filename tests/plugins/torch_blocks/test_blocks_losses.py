"""What a training without PyTorch is given by the engine shard is what it would have of torch_blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edged_plugins._tensors.families import FAMILIES
from edged_plugins._training.loss import summed, tensors_of
from edged_plugins.shard import _blocks
from edged_plugins.shard._random import write_model
from edged_plugins.torch_blocks._engine import open_blocks
from edged_plugins.torch_blocks._span import PREFIX
from shard_rig import describe_model, plan
from test_blocks_gguf import MODELS

from edged import EngineError, EngineSpec

NAMES = ("llama", "llama, wide heads", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gptneox", "bloom")
R, ALPHA, TOKENS = 3, 5.0, 24
NEAR = {"gemma": 5e-3, "gpt2": 5e-3, "gptneox": 5e-3, "bloom": 5e-3}  # ggml's GELU is a table of F16


def without_gradients(path: str) -> _blocks.Blocks:
    model = describe_model(path)
    spec = EngineSpec(path, model, plan(model, [(1,)]), 0, TOKENS)
    return _blocks.load(spec, None)  # type: ignore[arg-type]


def batch(vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unlike answers, one of which ends early."""
    ids = np.random.default_rng(seed).integers(0, vocab, (3, TOKENS)).astype(np.int32)
    labels = ids.copy()
    labels[0, :10] = labels[1, 15:] = -100
    return ids, labels


@pytest.mark.parametrize("name", NAMES)
def test_names_starts_and_losses_are_those_of_the_blocks_with_gradients(name: str, tmp_path: Path) -> None:
    path, (shape, _) = str(tmp_path / "model.gguf"), MODELS[name]
    write_model(path, shape, "F32", seed=2)
    plain, blocks = without_gradients(path), open_blocks(path)
    targets = FAMILIES[blocks.family].targets
    assert plain.family == blocks.family
    assert list(plain.linears(targets).items()) == list(blocks.linears(targets).items())
    starts = [each.lora_start(r=R, targets=targets, seed=7) for each in (plain, blocks)]
    assert list(starts[0]) == list(starts[1])
    for layer, (a, b) in starts[0].items():
        np.testing.assert_array_equal(a, starts[1][layer][0])
        assert not b.any()
        assert b.shape == starts[1][layer][1].shape

    chance = np.random.default_rng(4)
    factors: dict[str, tuple[Any, Any]] = {
        layer: (a, chance.standard_normal(b.shape, np.float32) * 0.1) for layer, (a, b) in starts[0].items()
    }
    span = blocks.span(0, blocks.layers, embed=True, head=True)
    span.add_lora(r=R, alpha=ALPHA, targets=targets, seed=7)
    losses = plain.losses(r=R, alpha=ALPHA, targets=targets, tokens_max=TOKENS)
    (ids, labels), found = batch(shape.vocab, 5), []
    for given in (starts[0], factors, starts[0]):
        losses.set(given)
        span.set_lora(
            {
                f"{PREFIX}{layer}.lora_{letter}.weight": torch.from_numpy(pair[side])
                for layer, pair in given.items()
                for side, letter in enumerate("AB")
            }
        )
        with torch.no_grad():
            tensors = tensors_of((ids, labels))
            wanted = summed(span, span(tensors[0]), tensors[1]).item()
        found.append(losses(ids, labels))
        assert found[-1] == pytest.approx(wanted, rel=NEAR.get(name, 2e-5))
    assert found[0] == found[2]
    assert abs(found[1] - found[0]) > 0.1
    losses.close()
    losses.close()


def test_layers_that_the_file_has_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "model.gguf")
    write_model(path, MODELS["phi3, separate"][0], "F32", seed=2)
    with pytest.raises(EngineError, match=r"lacks tensor 'blk\.0\.attn_qkv\.weight'"):
        without_gradients(path).linears(["qkv_proj"])
    write_model(str(tmp_path / "llama.gguf"), MODELS["llama"][0], "F32", seed=2)
    with pytest.raises(EngineError, match="targets: expected some of q_proj"):
        without_gradients(str(tmp_path / "llama.gguf")).linears(["c_attn"])
