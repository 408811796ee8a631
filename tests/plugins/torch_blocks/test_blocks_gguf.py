"""What a GGUF's tensors become is what libllama computes with: its logits are the oracle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from edged_plugins._gguf import Head, raw_keys, read_head
from edged_plugins.shard._random import Shape, write_model
from edged_plugins.torch_blocks._engine import open_blocks
from edged_plugins.torch_blocks._rewrite import rewrite
from edged_plugins.torch_blocks._span import shapes_of
from safetensors.numpy import save_file
from shard_rig import LlamaCpp

TOKENS = 40
LONGROPE = ("rope_factors_long", "rope_factors_short")
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 256,
}
# Small models with what is particular to each architecture in llama.cpp's conversion, and how far logits of
# about 5 may be: F32 sums in another order, and where a family's activation is GELU ggml's table of F16.
EXACT, TABLED = 2e-4, 2e-2
MODELS = {
    "llama": (Shape(), EXACT),
    "llama, tied, rope factors": (Shape(is_tied=True, rope_factors=("rope_freqs",)), EXACT),
    "llama, biases": (
        Shape(biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
        EXACT,
    ),
    "llama, wide heads": (Shape(head_dim=96), EXACT),
    "llama, linear rope": (
        Shape(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        EXACT,
    ),
    "llama, yarn": (Shape(keys=YARN), EXACT),
    "qwen2": (Shape("qwen2", biases=("attn_q", "attn_k", "attn_v")), EXACT),
    "qwen3": (Shape("qwen3", head_dim=32), EXACT),
    "gemma": (Shape("gemma", is_tied=True, head_dim=32), TABLED),
    "phi3": (Shape("phi3", has_fused_qkv=True), EXACT),
    "phi3, longrope, short": (
        Shape("phi3", rope_factors=LONGROPE, keys={"rope.scaling.original_context_length": 1024}),
        EXACT,
    ),
    "phi3, longrope, long": (
        Shape(
            "phi3",
            rope_factors=LONGROPE,
            keys={"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2},
        ),
        EXACT,
    ),
    "phi3, separate": (Shape("phi3"), EXACT),
    "gpt2": (Shape("gpt2", kv_heads=4, is_tied=True, has_fused_qkv=True), TABLED),
    "gptneox": (
        Shape(
            "gptneox",
            kv_heads=4,
            has_fused_qkv=True,
            keys={"use_parallel_residual": True, "rope.dimension_count": 16},
        ),
        TABLED,
    ),
    "gptneox, serial": (
        Shape("gptneox", kv_heads=4, has_fused_qkv=True, keys={"use_parallel_residual": False}),
        TABLED,
    ),
    "bloom": (Shape("bloom", kv_heads=4, ffn=1024, has_fused_qkv=True), TABLED),
}


WRITTEN = (
    *("llama, tied, rope factors", "llama, biases", "gemma"),
    *("phi3", "phi3, separate", "gpt2", "gptneox", "bloom"),
)


def llama_logits(path: str, ids: Sequence[int]) -> np.ndarray:
    """libllama's logits of the last token, with an F32 cache and without flash attention, which rounds."""
    llama = LlamaCpp(path, cache_type="f32", flash=False)
    try:
        llama.reset(1)
        return llama.logits(ids)
    finally:
        llama.close()


def our_logits(path: str, ids: Sequence[int]) -> np.ndarray:
    blocks = open_blocks(path)
    half = blocks.layers // 2
    first = blocks.span(0, half, embed=True)
    last = blocks.span(half, blocks.layers, head=True)
    with torch.no_grad():
        return last.project(last(first(torch.tensor([ids]))))[0, -1].numpy()


@pytest.mark.parametrize("name", list(MODELS))
def test_a_gguf_of_f32_gives_llama_cpps_logits(name: str, tmp_path: Path) -> None:
    shape, tolerance = MODELS[name]
    path = str(tmp_path / "model.gguf")
    write_model(path, shape, "F32", seed=2)
    ids = np.random.default_rng(1).integers(0, shape.vocab, TOKENS).tolist()
    ours, theirs = our_logits(path, ids), llama_logits(path, ids)
    assert theirs.std() > 0.5  # an order of magnitude that a wrong conversion would show in
    assert np.abs(ours - theirs).max() < tolerance


class Still:
    """A method's part that leaves every weight alone."""

    def __init__(self, *of: object) -> None:
        pass

    def rebuild(self, *of: object) -> None:
        pass


def seeds_for(path: str, folder: Path) -> Path:
    """What a training by seeds leaves, without a seed."""
    folder.mkdir()
    config = {"edged_kind": "seeds", "settings": {}, "layout": open_blocks(path).layout}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"table": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_a_gguf_that_is_written_again_has_the_tensors_and_keys_it_had(name: str, tmp_path: Path) -> None:
    """Every tensor as llama.cpp has it, so that what our reading undoes is done again; Gemma's norms, of
    which one is taken and given back, within rounding."""
    path, out = str(tmp_path / "model.gguf"), str(tmp_path / "out.gguf")
    write_model(path, MODELS[name][0], "F32", seed=2)
    with open(out, "xb") as file:
        rewrite(str(seeds_for(path, tmp_path / "seeds")), path, file.fileno(), "f32", Still, lambda *of: None)
    before, after = read_head(path), read_head(out)
    assert raw_keys(path) == raw_keys(out)
    assert before.tensors.keys() == after.tensors.keys()
    for tensor, entry in before.tensors.items():
        one, other = (numbers_of(head, tensor) for head in (before, after))
        assert entry.shape == after.tensors[tensor].shape
        np.testing.assert_allclose(other, one, rtol=0, atol=2.0**-24 * np.abs(one).max())


def numbers_of(head: Head, tensor: str) -> np.ndarray:
    entry = head.tensors[tensor]
    return np.fromfile(head.path, "<f4", entry.bytes // 4, offset=entry.offset)


def test_a_quantised_gguf_is_written_as_what_it_stands_for(tmp_path: Path) -> None:
    plain, narrow, out = (str(tmp_path / name) for name in ("plain", "narrow", "out"))
    write_model(plain, Shape(), "F32", seed=2)
    quantise(plain, narrow, "MOSTLY_Q4_1")
    with open(out, "xb") as file:
        folder = str(seeds_for(narrow, tmp_path / "seeds"))
        rewrite(folder, narrow, file.fileno(), "f32", Still, lambda *of: None)
    assert read_head(out).keys["general.file_type"] == 0
    ids = list(range(2, 2 + TOKENS))
    assert np.abs(llama_logits(out, ids) - our_logits(narrow, ids)).max() < EXACT


def quantise(source: str, target: str, kind: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    parameters.nthread, parameters.allow_requantize = 1, True
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters) == 0


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_K_M", "Q4_K_M", "Q2_K"])
def test_a_quantised_tensor_is_what_ggml_makes_of_it(kind: str, tmp_path: Path) -> None:
    plain, narrow, wide = (str(tmp_path / name) for name in ("plain", "narrow", "wide"))
    write_model(plain, Shape(), "F32", seed=2)
    quantise(plain, narrow, f"MOSTLY_{kind}")
    quantise(narrow, wide, "ALL_F32")  # by ggml's own dequantisation
    ours, theirs = open_blocks(narrow).source, open_blocks(wide).source
    for name in shapes_of(ours.family, ours.config):
        torch.testing.assert_close(ours.tensor(name), theirs.tensor(name), rtol=1e-6, atol=1e-7)


def test_smollm2_goes_on_as_llama_cpp_says(smol: Path) -> None:
    blocks = open_blocks(str(smol))
    ids = blocks.tokenizer.encode("Gravity is")
    ours, theirs = our_logits(str(smol), ids), llama_logits(str(smol), ids)
    assert ours.argmax() == theirs.argmax()
    assert np.corrcoef(ours, theirs)[0, 1] > 0.999


def test_no_more_of_a_model_is_read_than_its_span(smol: Path) -> None:
    blocks = open_blocks(str(smol))
    assert blocks.source.reads == []
    blocks.span(1, 2)
    assert len(blocks.source.reads) == 9
    assert all(name.startswith("blk.1.") for name in blocks.source.reads)
    blocks.source.reads.clear()
    blocks.span(0, 0, embed=True)
    assert blocks.source.reads == ["token_embd.weight"]
    blocks.source.reads.clear()
    blocks.span(30, 30, head=True)
    assert sorted(blocks.source.reads) == ["output_norm.weight", "token_embd.weight"]  # the head is tied
    blocks.source.reads.clear()
    blocks.span(30, 30, embed=True, head=True)  # and loaded once where both are here
    assert sorted(blocks.source.reads) == ["output_norm.weight", "token_embd.weight"]
