"""Every architecture computes what llama.cpp computes, whole, by layers and by tensor slices."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from edged_plugins.shard import _architectures, _check
from edged_plugins.shard._architectures import ARCHITECTURES, MATRICES, QKV
from edged_plugins.shard._masks import alibi_slopes
from edged_plugins.shard._model import read_model
from edged_plugins.shard._place import find_place
from edged_plugins.shard._random import Shape, write_model
from edged_plugins.shard._weights import parts_of
from shard_rig import (
    GREEDY,
    LlamaCpp,
    describe_model,
    greedy_run,
    greedy_together,
    logits_run,
    oracle_run,
    running,
    specs_of,
)

from edged import EngineError, PlanRequest, Step, sizes

FULL = {"heads": 4, "kv_heads": 4, "has_fused_qkv": True}
PARALLEL = {"rope.dimension_count": 16, "use_parallel_residual": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "minicpm": {},
    "qwen2": {"biases": QKV},
    "qwen3": {"head_dim": 96},
    "gemma": {"head_dim": 96, "is_tied": True},
    "gemma2": {"head_dim": 96, "is_tied": True, "keys": {"attention.sliding_window": 24}},
    "phi3": {"hidden": 384, "has_fused_qkv": True, "keys": {"rope.dimension_count": 48}},
    "gpt2": FULL,
    "gptneox": FULL | {"hidden": 384, "keys": PARALLEL},
    "bloom": FULL,
}
LONG = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.19}
LONG_FACTORS = ("rope_factors_long", "rope_factors_short")
VARIANTS: dict[str, dict[str, Any]] = {
    "llama with every bias": {"biases": MATRICES},
    "llama with fused qkv": {"has_fused_qkv": True},
    "llama longrope": {
        "rope_factors": LONG_FACTORS,
        "keys": LONG | {"rope.scaling.original_context_length": 64},
    },
    "minicpm with scales of its own": {
        "keys": {"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 0.25}
    },
    "minicpm longrope": {"rope_factors": LONG_FACTORS, "keys": LONG},
    "qwen2 without biases": {},
    "qwen2 with an output bias": {"biases": (*QKV, "output"), "has_fused_qkv": True},
    "qwen3 yarn": {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
    "gemma with one KV head": {"head_dim": 96, "is_tied": True, "kv_heads": 1},
    "gemma2 of 46 layers": {"head_dim": 96, "is_tied": True, "layers": 46, "hidden": 128, "ffn": 128},
    "gemma2 with caps of its own": {
        "is_tied": True,
        "layers": 3,
        "keys": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0},
    },
    "phi3 with long factors": {
        "has_fused_qkv": True,
        "rope_factors": LONG_FACTORS,
        "keys": LONG | {"rope.scaling.original_context_length": 64},
    },
    "phi3 with short factors": {"has_fused_qkv": True, "rope_factors": LONG_FACTORS, "keys": LONG},
    "phi3 with a window, which llama.cpp ignores": {
        "has_fused_qkv": True,
        "keys": {"attention.sliding_window": 8},
    },
    "phi3 with separate qkv": {},
    "gpt2 tied": FULL | {"is_tied": True},
    "gptneox in sequence": FULL | {"keys": PARALLEL | {"use_parallel_residual": False}},
    "bloom of six heads, tied": FULL | {"heads": 6, "kv_heads": 6, "hidden": 192, "is_tied": True},
}
KQUANTS = {  # of widths that are multiples of 256
    "gptneox": FULL | {"hidden": 512, "ffn": 1024, "keys": PARALLEL},
    "phi3": {"hidden": 512, "ffn": 1024, "has_fused_qkv": True},
}
SPLITS = {"1:1": [(1, 1)], "2:1:1": [(2, 1, 1)], "1:1 then 1, then 1:1": [(1, 1), (1,), (1, 1)]}


@pytest.fixture
def made(tmp_path: pathlib.Path) -> Callable[..., str]:
    def make(architecture: str, weight_type: str = "F16", **changes: Any) -> str:
        path = str(tmp_path / f"{architecture}-{weight_type}.gguf")
        write_model(path, Shape(architecture=architecture, **changes), weight_type, seed=3)
        return path

    return make


def sliced(architecture: str) -> dict[str, Any]:
    """The architecture's shape with four KV heads and three layers, so that every split fits."""
    return {"kv_heads": 4, "layers": 3} | {k: v for k, v in SHAPES[architecture].items() if k != "kv_heads"}


def test_every_architecture_is_tested() -> None:
    assert set(SHAPES) == set(ARCHITECTURES)


@pytest.mark.parametrize("weight_type", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_logits_are_bit_equal_to_llama_cpp(
    made: Callable[..., str], architecture: str, weight_type: str
) -> None:
    assert _check.compare(made(architecture, weight_type, **SHAPES[architecture]), {}) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_bit_equal_to_llama_cpp(made: Callable[..., str], variant: str) -> None:
    assert _check.compare(made(variant.split()[0], "Q8_0", **VARIANTS[variant]), {}) == 0.0


@pytest.mark.parametrize("weight_type", ["Q4_K_M", "Q2_K", "IQ4_NL"])
@pytest.mark.parametrize("architecture", ["gptneox", "phi3"])
def test_quantised_rows_of_a_fused_tensor_are_bit_equal(
    made: Callable[..., str], quantised: Callable[[str, str], str], architecture: str, weight_type: str
) -> None:
    """Whichever layout the whole and its pieces are rearranged to."""
    path = quantised(made(architecture, **KQUANTS[architecture]), weight_type)
    assert _check.compare(path, {}) == 0.0


@pytest.mark.parametrize("architecture", ["gemma2", "bloom", "gpt2", "phi3"])
def test_prompts_past_a_batch_a_bucket_and_a_window_are_bit_equal(
    made: Callable[..., str], architecture: str
) -> None:
    path = made(architecture, "Q8_0", **SHAPES[architecture])
    llama = LlamaCpp(path)
    try:
        for length in (30, 250, 700):  # 700: two prompt batches
            prompt = np.random.default_rng(length).integers(0, llama.vocab, length).tolist()
            tokens, logits = oracle_run(llama, prompt, 9, threads=1)
            with running(specs_of(path, [(1,)], threads=1)) as (engine,):
                ours = logits_run(engine, prompt, tokens)
            assert all(np.array_equal(a, b) for a, b in zip(ours, logits, strict=True))
    finally:
        llama.close()


@pytest.mark.parametrize("architecture", SHAPES)
def test_stages_compute_what_one_rank_computes(made: Callable[..., str], architecture: str) -> None:
    path = made(architecture, "Q8_0", **SHAPES[architecture] | {"layers": 3})
    prompt = list(range(40))
    with running(specs_of(path, [(1,)], threads=1)) as (engine,):
        tokens = greedy_run(engine, prompt, 6)
        expected = logits_run(engine, prompt, tokens)
    for stages in ([(1,)] * 2, [(1,)] * 3):
        with running(specs_of(path, stages)) as engines:
            found = logits_run(engines[0], prompt, tokens)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_slices_give_one_ranks_tokens(made: Callable[..., str], architecture: str, split: str) -> None:
    """In exact mode, along one rank's own answer: the same tokens, and logits as near as rounding
    another order of summation allows. ggml takes gelu from a table by F16 arguments, so there a
    last bit can move a value by 2**-11 of itself. Seen, of logits up to 15: 1e-5, with gelu 8e-4."""
    path = made(architecture, "Q8_0", **sliced(architecture))
    prompt = np.random.default_rng(1).integers(0, 512, 40).tolist()
    with running(specs_of(path, [(1,)], "exact")) as (engine,):
        tokens = greedy_run(engine, prompt, 12)
        expected = logits_run(engine, prompt, tokens)
    with running(specs_of(path, SPLITS[split], "exact")) as engines:
        assert greedy_run(engines[0], prompt, 12) == tokens
        found = logits_run(engines[0], prompt, tokens)
    bound = 1e-4 if ARCHITECTURES[architecture].activation == "swiglu_split" else 5e-3
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) < bound


@pytest.mark.parametrize("architecture", SHAPES)
def test_ranks_of_a_group_hold_bit_identical_hidden_states(
    made: Callable[..., str], architecture: str
) -> None:
    path = made(architecture, "Q4_0", **sliced(architecture))
    with running(specs_of(path, [(2, 1, 1)])) as engines:
        for at, tokens in ((0, list(range(100, 140))), (40, [7]), (41, [8])):
            engines[0].step([Step(0, tokens, at, GREEDY)])
            states = [engine.hidden for engine in engines]
            assert states[0].shape == (1, SHAPES[architecture].get("hidden", 256))
            assert all(np.array_equal(states[0], s) for s in states[1:])


@pytest.mark.parametrize("architecture", SHAPES)
def test_a_description_tells_what_of_a_layer_is_cut(made: Callable[..., str], architecture: str) -> None:
    shape = Shape(architecture=architecture, **SHAPES[architecture])
    model, sizes = describe_model(made(architecture, "F32", **SHAPES[architecture])), shape.sizes
    assert (model.heads, model.kv_heads, model.head_dim) == (shape.heads, shape.kv_heads, sizes["head"])
    matrices = 3 if ARCHITECTURES[architecture].is_gated else 2
    for total, (by_heads, by_ffn, kept) in zip(model.layer_bytes, model.layer_cuts, strict=True):
        assert total == by_heads + by_ffn + kept
        assert by_heads >= 4 * 2 * shape.hidden * (sizes["heads"] + sizes["kv"])
        assert by_ffn >= 4 * matrices * shape.hidden * shape.ffn
        assert 0 < kept < 0.02 * total  # norms, and biases of what is summed
    layers = sum(t.bytes for t in model.tensors if t.name.startswith("blk."))
    assert sum(model.layer_bytes) == layers
    outside = sum(t.bytes for t in model.tensors) - layers
    shared = shape.sizes["hidden"] * shape.vocab * 4 if shape.is_tied else 0
    assert outside == model.embedding_bytes + model.head_bytes - shared
    assert model.reductions == (1 if architecture == "gptneox" else 2)


@pytest.mark.parametrize("architecture", SHAPES)
def test_slices_hold_every_byte_once_but_for_what_none_can_cut(
    made: Callable[..., str], architecture: str
) -> None:
    """Biases added to a sum are held by one rank, norms by all."""
    path = made(architecture, "F32", **sliced(architecture))
    held: dict[str, int] = {}
    specs = specs_of(path, [(1, 1)])
    model = read_model(path)
    for spec in specs:
        for part in parts_of(model, find_place(model, spec.roles, spec.rank)):
            width, height = part.shape
            held[part.key] = held.get(part.key, 0) + width * height
    for piece in model.all_pieces():
        if piece.key not in held:  # read by rows from the file
            continue
        whole = int(np.prod(model.pieces.shape(piece)))
        is_kept = not piece.once and not {"heads", "kv", "ffn", "vocab"} & set(piece.axes)
        assert held[piece.key] == whole * (2 if is_kept else 1), piece.key


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_planning_expects_the_memory_that_slices_take(
    made: Callable[..., str], architecture: str, numerics: str
) -> None:
    """All of one type, so that what the tables by rows are stored as does not blur it; the rest is
    biases of sums, which one rank has and planning gives to each, and the allocator's alignment."""
    path = made(architecture, "F16", **sliced(architecture) | {"vocab": 2048})
    specs = specs_of(path, [(2, 1, 1)], numerics)
    request = PlanRequest(numerics=numerics)
    with running(specs) as engines:
        for spec, engine in zip(specs, engines, strict=True):
            expected = sizes.held_bytes_of(spec.roles[spec.rank], spec.model, request)
            assert engine.memory_bytes == pytest.approx(expected, rel=0.02)


def test_one_sum_a_layer_where_attention_and_feed_forward_are_parallel(made: Callable[..., str]) -> None:
    counts = {}
    for is_parallel in (True, False):
        keys = PARALLEL | {"use_parallel_residual": is_parallel}
        path = made("gptneox", "F16", **FULL | {"layers": 3, "keys": keys})
        with running(specs_of(path, [(1, 1)])) as engines:
            engines[0].step([Step(0, [1, 2, 3], 0, None)])
            before = engines[1]._channel.bytes_sent
            engines[0].step([Step(0, [4], 3, GREEDY)])
            counts[is_parallel] = engines[1]._channel.bytes_sent - before
    row = 4 * 256
    assert counts[False] - counts[True] == 3 * row


def test_slopes_of_heads_are_those_of_the_paper() -> None:
    """Press et al. (2022): a geometric sequence from 2**(-8/n) on; other counts take every other one
    of twice the next lower power of two."""
    assert alibi_slopes(8, 8.0).tolist() == [2.0**-i for i in range(1, 9)]
    assert np.allclose(alibi_slopes(12, 8.0)[8:], [2.0 ** -(i / 2) for i in (1, 3, 5, 7)], rtol=1e-6)


def test_a_context_beyond_learned_positions_is_refused(made: Callable[..., str]) -> None:
    path = made("gpt2", **FULL | {"context_tokens": 512})
    with pytest.raises(EngineError, match="at most 512"), running(specs_of(path, [(1,)])):
        pass


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma", {"activation": "swiglu_split"}),
        ("gptneox", {"rope": 0}),
        ("bloom", {"alibi": 4.0}),
        ("gemma2", {"window": 0}),
        ("gemma2", {"attention_softcap": 0.0}),
        ("gemma", {"scales": _architectures._unscaled}),
        ("phi3", {"has_scaled_queries": False}),
        ("minicpm", {"scales": _architectures._unscaled}),
    ],
)
def test_a_wrong_record_is_found(
    made: Callable[..., str], monkeypatch: pytest.MonkeyPatch, architecture: str, changes: dict[str, Any]
) -> None:
    """The comparison above sees each of these, so it would see a mistake in a record."""
    path = made(architecture, "F32", **SHAPES[architecture])
    wrong = dataclasses.replace(ARCHITECTURES[architecture], **changes)
    monkeypatch.setitem(ARCHITECTURES, architecture, wrong)
    assert _check.compare(path, {}) > 0


@pytest.mark.parametrize("stages", [[(1,)], [(2, 1, 1)]], ids=["one rank", "slices"])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "gptneox", "bloom"])
def test_sequences_run_together_as_they_run_alone(
    made: Callable[..., str], architecture: str, stages: list[tuple[int, ...]]
) -> None:
    """Each with windows, positions and distances of its own."""
    path, random = made(architecture, "Q8_0", **sliced(architecture)), np.random.default_rng(1)
    prompts = [random.integers(0, 512, length).tolist() for length in (40, 3, 70, 1)]
    with running(specs_of(path, stages, "exact")) as engines:
        alone = [greedy_run(engines[0], prompt, 8, 10 + i) for i, prompt in enumerate(prompts)]
        assert greedy_together(engines[0], prompts, 8) == alone
