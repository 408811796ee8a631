"""A GGUF is described from its head, and one that cannot run is refused in one line."""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from edged_plugins.shard._describe import describe
from edged_plugins.shard._random import Shape, write_model
from gguf import GGUFReader
from shard_rig import describe_model

from edged import EngineError, ModelDescription


def test_a_description_agrees_with_ggufs_own_reader(smollm2: str) -> None:
    found, reader = describe(smollm2), GGUFReader(smollm2)
    model = msgspec.convert(found, ModelDescription)
    assert [(t.name, t.type, t.shape, t.offset, t.bytes) for t in model.tensors] == [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]
    assert (model.layers, model.hidden, model.heads, model.kv_heads, model.head_dim) == (30, 576, 9, 3, 64)
    assert (model.ffn, model.vocab, model.context_tokens, model.weight_type) == (1536, 49152, 8192, "Q4_1")
    assert model.parameters == sum(int(t.n_elements) for t in reader.tensors)
    assert model.chat_template
    layers = sum(int(t.n_bytes) for t in reader.tensors if t.name.startswith("blk."))
    assert sum(model.layer_bytes) == layers


@pytest.mark.parametrize(("name", "heads", "ffn"), [("Q4_1", 3, 32), ("Q4_K_M", 3, 256), ("random", 4, 256)])
def test_units_are_whole_kv_groups_and_whole_blocks(
    models: Callable[[str], str], name: str, heads: int, ffn: int
) -> None:
    model = describe_model(models(name))
    assert (model.head_unit, model.ffn_unit) == (heads, ffn)
    assert model.vocab_unit % 8 == 0


def refused(path: pathlib.Path, match: str) -> None:
    with pytest.raises(EngineError, match=match) as caught:
        describe(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [10, 100, 700, 200_000])
def test_a_truncated_file_is_refused(tmp_path: pathlib.Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape(), "F16")
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "truncated|past the end|has 10 bytes")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK" * 100)
    refused(path, "not a GGUF")
    refused(tmp_path / "missing.gguf", "cannot read")


def test_another_architecture_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape(), "F16")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    refused(path, "architecture 'mamba'; the shard engine runs llama, minicpm, qwen2")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'"),
        ({"attention.causal": False}, "attends to later tokens"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"attention.value_length": 32}, "value heads"),
        ({"rope.dimension_count": 66}, "rope over 66"),
        ({"attention.key_length": 128, "attention.value_length": 128}, "its keys promise"),
    ],
)
def test_a_variant_the_graph_does_not_compute_is_refused(
    tmp_path: pathlib.Path, keys: dict[str, Any], match: str
) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape(keys=keys), "F16")
    refused(path, match)


def test_a_missing_key_or_tensor_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape(), "F16")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.block_kount"))
    refused(path, "lacks the key llama.block_count")
    path.write_bytes(whole.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    refused(path, "lacks the tensor blk.1.attn_q.weight")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "gptneox", "bloom"])
def test_no_damaged_head_does_worse_than_an_engine_error(tmp_path: pathlib.Path, architecture: str) -> None:
    path = tmp_path / "model.gguf"
    keys = {"use_parallel_residual": True} if architecture == "gptneox" else {}
    write_model(str(path), Shape(architecture, layers=1, keys=keys), "F16")
    whole = path.read_bytes()
    huge = struct.pack("<Q", 2**63)
    for at in range(4, 1400, 3):
        path.write_bytes(whole[:at] + huge + whole[at + 8 :])
        try:
            describe(str(path))
        except EngineError:
            continue


@pytest.mark.parametrize(
    ("architecture", "keys", "match"),
    [
        ("gemma2", {"attention.sliding_window": 0}, "attention.sliding_window is 0"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "expected more than 0"),
        ("gemma2", {"rope.freq_base_swa": 5000.0}, "windowed layers"),
        ("qwen2", {"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ("gptneox", {}, "lacks the key gptneox.use_parallel_residual"),
        ("gptneox", {"use_parallel_residual": 1}, "use_parallel_residual is 1"),
    ],
)
def test_a_variant_of_another_architecture_is_refused(
    tmp_path: pathlib.Path, architecture: str, keys: dict[str, Any], match: str
) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape(architecture, keys=keys), "F16")
    refused(path, match)


@pytest.mark.parametrize(
    ("architecture", "tensor", "other", "match"),
    [
        (
            "qwen3",
            "blk.1.attn_q_norm.weight",
            "blk.1.attn_x_norm.weight",
            "lacks the tensor blk.1.attn_q_norm",
        ),
        ("gpt2", "blk.0.ffn_up.bias", "blk.0.ffn_ux.bias", "lacks the tensor blk.0.ffn_up.bias"),
        ("bloom", "token_embd_norm.bias", "token_embx_norm.bias", "lacks the tensor token_embd_norm.bias"),
    ],
)
def test_tensors_that_a_record_lacks_or_needs_are_named(
    tmp_path: pathlib.Path, architecture: str, tensor: str, other: str, match: str
) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape(architecture), "F16")
    path.write_bytes(path.read_bytes().replace(tensor.encode(), other.encode()))
    refused(path, match)


def test_a_tensor_that_no_record_names_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(str(path), Shape("qwen3", biases=("attn_output",)), "F16")
    refused(path, "tensor blk.0.attn_output.bias belongs to a variant of qwen3")
