"""A LoRA adapter in the shard engine: what a model computes whose weights have it merged into them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import lora_files
import msgspec
import numpy as np
import pytest
from edged_plugins import _llama_describe, _llama_engine
from edged_plugins.shard import _check, _ggml
from edged_plugins.shard._adapter import Adapter
from edged_plugins.shard._engine import ShardEngine
from edged_plugins.shard._model import read_model
from edged_plugins.shard._place import find_place
from edged_plugins.shard._random import Shape, write_model
from shard_rig import GREEDY, LlamaCpp, greedy_run, logits_run, plan, running, specs_of
from test_shard_architectures import SHAPES, sliced

from edged import EngineError, EngineSpec, ModelDescription, Sampling, Step

SPLITS: dict[str, list[tuple[int, ...]]] = {
    "whole": [(1,)],
    "layers": [(1,), (1,)],
    "tensor": [(2, 1, 1)],
    "hybrid": [(1, 1), (2, 1)],
}
PROMPT = [3, 141, 59, 26, 5, 358, 97, 93, 238, 46]
FOLLOWING = [264, 338, 327]
NEAR = 1e-4
# ggml looks GELU up in a table of 16-bit floats, so that a last bit becomes a step: the same merged model,
# whole and cut by tensors, differs by 8e-4 in such architectures, with no adapter at all.
NEAR_GELU = 2e-3
FUSED = ("phi3", "gptneox", "bloom")
BIASED = {"biases": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")}


def adapted(specs: Sequence[EngineSpec], adapter: pathlib.Path) -> list[EngineSpec]:
    return [dataclasses.replace(spec, adapter_path=str(adapter)) for spec in specs]


@pytest.fixture
def made(tmp_path: pathlib.Path) -> Callable[..., str]:
    def make(architecture: str = "llama", weight_type: str = "F32", **changes: Any) -> str:
        path = str(tmp_path / f"{architecture}-{weight_type}.gguf")
        write_model(path, Shape(architecture=architecture, **changes), weight_type, seed=3)
        return path

    return make


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"kv_heads": 4, "layers": 3} | BIASED),
        ("llama", {"kv_heads": 4, "layers": 2, "has_fused_qkv": True, "is_tied": True}),
        *((name, sliced(name)) for name in (*FUSED, "gemma2")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_are_those_of_the_model_with_the_adapter_merged(
    made: Callable[..., str], tmp_path: pathlib.Path, architecture: str, changes: dict[str, Any]
) -> None:
    base = made(architecture, **changes)
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, r=6)
    merged = str(lora_files.write_merged(tmp_path / "merged.gguf", base, adapter))
    with running(specs_of(merged, [(1,)], "exact")) as (engine,):
        expected = logits_run(engine, PROMPT, FOLLOWING)
    with running(specs_of(base, [(1,)], "exact")) as (engine,):
        plain = logits_run(engine, PROMPT, FOLLOWING)
    assert min(np.abs(a - b).max() for a, b in zip(plain, expected, strict=True)) > 0.1
    near = NEAR if architecture in ("llama", "phi3") else NEAR_GELU
    for stages in SPLITS.values():
        with running(adapted(specs_of(base, stages, "exact"), adapter)) as engines:
            found = logits_run(engines[0], PROMPT, FOLLOWING)
        assert max(np.abs(a - b).max() for a, b in zip(expected, found, strict=True)) < near, stages


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("architecture", "weight_type"), [("llama", "Q4_0"), ("llama", "F32"), ("bloom", "Q8_0")]
)
def test_fast_numerics_are_libllama_s_bit_for_bit(
    made: Callable[..., str], tmp_path: pathlib.Path, architecture: str, weight_type: str, dtype: Any
) -> None:
    base = made(architecture, weight_type, **SHAPES[architecture])
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, dtype=dtype, matrices=lora_files.LAYER)
    with running(adapted(specs_of(base, [(1,)], threads=1), adapter)) as (engine,):
        found = logits_run(engine, PROMPT, FOLLOWING)
    theirs = libllama(base, adapter)
    try:
        theirs.reset(1)
        batches = [PROMPT, *([token] for token in FOLLOWING[:-1])]
        assert all(np.array_equal(a, theirs.logits(b)) for a, b in zip(found, batches, strict=True))
    finally:
        theirs.close()


def libllama(base: str, adapter: pathlib.Path) -> LlamaCpp:
    """libllama itself with the adapter, with nothing of our own calls."""
    model = LlamaCpp(base)
    loaded = llama_cpp.llama_adapter_lora_init(model._model, str(adapter).encode())
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
    scales = (llama_cpp.ctypes.c_float * 1)(1.0)
    llama_cpp.llama_free(model._context)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = 1024
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    model._context = llama_cpp.llama_init_from_model(model._model, parameters)
    assert llama_cpp.llama_set_adapters_lora(model._context, adapters, 1, scales) == 0
    return model


def test_exact_numerics_draw_the_same_tokens_however_the_model_is_cut(
    made: Callable[..., str], tmp_path: pathlib.Path
) -> None:
    base = made("llama", "Q4_0", kv_heads=4, layers=4)
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, dtype=np.float16)
    tokens = {}
    for split, stages in SPLITS.items():
        with running(adapted(specs_of(base, stages, "exact"), adapter)) as engines:
            tokens[split] = greedy_run(engines[0], PROMPT, 24)
    assert tokens == dict.fromkeys(SPLITS, tokens["whole"])
    with running(specs_of(base, [(1,)], "exact")) as (engine,):
        assert greedy_run(engine, PROMPT, 24) != tokens["whole"]


def test_an_adapter_of_nothing_changes_nothing(made: Callable[..., str], tmp_path: pathlib.Path) -> None:
    """B is zero when training begins."""
    base = made("llama", "Q4_0")
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, size=0.0)
    with running(specs_of(base, [(1,)])) as (engine,):
        expected = logits_run(engine, PROMPT, FOLLOWING)
    with running(adapted(specs_of(base, [(1,)]), adapter)) as (engine,):
        found = logits_run(engine, PROMPT, FOLLOWING)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_adapter_of_some_matrices_works_beside_a_window_over_the_weights(
    made: Callable[..., str], tmp_path: pathlib.Path
) -> None:
    base = made("llama", "F32", layers=3, hidden=512, ffn=1024)
    adapter = lora_files.write_adapter(
        tmp_path / "a.gguf", base, matrices=r"blk\.\d\.(attn_q|ffn_down)\.weight"
    )
    (spec,) = adapted(specs_of(base, [(1,)], "exact"), adapter)
    small = dataclasses.replace(spec, weights_bytes=20 << 20, cache_folder=str(tmp_path))
    runs = []
    for each in (spec, small):
        with running([each]) as (engine,):
            runs.append(logits_run(engine, PROMPT, FOLLOWING))
            is_windowed = engine._weights._window is not None
    assert is_windowed
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_rank_holds_its_slice_alone(made: Callable[..., str], tmp_path: pathlib.Path) -> None:
    """Of a matrix cut by rows all of A and a part of B, of one cut by columns the other way round; of the
    layers of other stages nothing."""
    base = made(**{"kv_heads": 4, "layers": 2, "hidden": 256, "heads": 4, "ffn": 512, "vocab": 512})
    r = 8
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, r=r)
    model, lib = read_model(base), _ggml.load()
    half = {
        "attn_q": (256, 128),
        "attn_k": (256, 128),
        "attn_v": (256, 128),
        "attn_output": (128, 256),
        "ffn_gate": (256, 256),
        "ffn_up": (256, 256),
        "ffn_down": (256, 256),
    }
    layer = sum(4 * r * (wide + high) for wide, high in half.values())
    head = 4 * r * (256 + 256)
    description = specs_of(base, [(1,)])[0].model
    held = []
    for stages in ([(1, 1)], [(1, 1), (1, 1)]):
        roles = plan(description, stages)
        for rank in range(len(roles)):
            found = Adapter(lib, str(adapter), model, find_place(model, roles, rank), exact=False)
            held.append(found.bytes)
            found.close()
    expected = [2 * layer + head] * 2 + [layer] * 2 + [layer + head] * 2
    assert all(0 <= a - b < 32 * 32 for a, b in zip(held, expected, strict=True)), (held, expected)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"architecture": "qwen2"}, "adapts architecture 'qwen2'; the model is of 'llama'"),
        ({"kind": "cvec"}, "is no LoRA adapter"),
        ({"matrices": "none"}, "adapts nothing"),
        ({"matrices": r"token_embd\.weight"}, r"adapts token_embd\.weight, which the shard engine cannot"),
        ({"extra": [("blk.9.attn_q.weight.lora_a", np.ones((4, 256), np.float32))]}, r"adapts blk\.9"),
        ({"extra": [("blk.0.attn_q.weight", np.ones((4, 256), np.float32))]}, "neither a lora_a nor"),
        (
            {
                "matrices": "none",
                "extra": [("blk.0.attn_q.weight.lora_a", np.ones((4, 256), np.float32))],
            },
            "alone; expected both",
        ),
        (
            {
                "matrices": "none",
                "extra": [
                    ("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32)),
                    ("blk.0.attn_q.weight.lora_b", np.ones((256, 4), np.float32)),
                ],
            },
            "do not fit it",
        ),
        ({"size": np.nan}, "no finite number"),
        ({"alpha": np.inf}, "expected a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_adapter_of_the_model_is_refused_with_the_reason(
    made: Callable[..., str], tmp_path: pathlib.Path, wrong: dict[str, Any], reason: str
) -> None:
    base = made()
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, **wrong)
    (spec,) = adapted(specs_of(base, [(1,)]), adapter)
    with pytest.raises(EngineError, match=reason):
        ShardEngine(spec, _check.Alone())


# --- libllama's engine ------------------------------------------------------------------------------


def test_the_engine_over_libllama_draws_the_shard_engine_s_tokens(
    smollm2: str, tmp_path: pathlib.Path
) -> None:
    """Also for the second sequence, for which the context grows."""
    base = str(lora_files.tiny(pathlib.Path(smollm2)))
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", base, matrices=lora_files.LAYER)
    with running(adapted(specs_of(base, [(1,)], threads=1), adapter)) as (engine,):
        expected = [greedy_run(engine, prompt, 6) for prompt in (PROMPT, FOLLOWING)]
    model = msgspec.convert(_llama_describe.describe(base), ModelDescription)
    (spec,) = adapted(specs_of(base, [(1,)], threads=1), adapter)
    spec = dataclasses.replace(spec, model=model, context_tokens=128, cache_tokens=512)
    engine = _llama_engine.load(spec, _check.Alone())
    try:
        assert [drawn(engine, number, each, 6) for number, each in enumerate((PROMPT, FOLLOWING))] == expected
    finally:
        engine.close()
    plain = _llama_engine.load(dataclasses.replace(spec, adapter_path=""), _check.Alone())
    try:
        assert drawn(plain, 0, PROMPT, 6) != expected[0]
    finally:
        plain.close()


def drawn(
    engine: _llama_engine.LlamaEngine,
    sequence: int,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling = GREEDY,
) -> list[int]:
    tokens: list[int] = []
    batch, at = list(prompt), 0
    assert engine.open(sequence, prompt, 100) == 0
    for _ in range(count):
        engine.begin([Step(sequence, batch, at, sampling)])
        (token,) = engine.finish()
        assert token is not None
        at, batch = at + len(batch), [token]
        tokens.append(token)
    return tokens


def test_libllama_says_why_it_takes_no_adapter(
    smollm2: str, made: Callable[..., str], tmp_path: pathlib.Path
) -> None:
    adapter = lora_files.write_adapter(tmp_path / "a.gguf", made())
    (spec,) = adapted(specs_of(smollm2, [(1,)]), adapter)
    with pytest.raises(EngineError, match="cannot apply the adapter"):
        _llama_engine.load(spec, _check.Alone())
