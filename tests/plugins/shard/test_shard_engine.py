"""The engine's edges: text, bounds, errors, memory, hostile messages, self-test and benchmark."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import llama_cpp
import msgspec
import numpy as np
import pytest
from edged_plugins import _libraries, shard
from edged_plugins.shard import _check, _ggml, _measure, _messages
from edged_plugins.shard._architectures import ARCHITECTURES
from edged_plugins.shard._engine import TIMED_EACH, load
from edged_plugins.shard._measure import WEIGHT_TYPES
from edged_plugins.shard._random import Shape, write_model
from shard_rig import GREEDY, connect, greedy_run, loaded, running, specs_of

from edged import (
    ConfigError,
    Engine,
    EngineError,
    EngineSpeed,
    PeerError,
    ProtocolError,
    Role,
    Sampling,
    Step,
)
from edged.supervisor import Supervisor

TEXTS = ("Hello, world", "<|im_start|>user\nhi<|im_end|>", "naïve café 東京 \U0001f600", " a  b\n")

# --- text -----------------------------------------------------------------------------------------


def test_raw_text_is_tokenised_as_llama_cpp_does(smollm2: str) -> None:
    llama = llama_cpp.Llama(smollm2, vocab_only=True, verbose=False)
    with running(specs_of(smollm2, [(1,)])) as (engine,):
        for text in (
            "Hello, world",
            "<|im_start|>user\nhi<|im_end|>",
            "naïve café 東京 \U0001f600",
            " a  b\n",
        ):
            tokens = engine.encode(text, raw=True)
            assert tokens == llama.tokenize(text.encode(), special=True)
            assert engine.decode(llama.tokenize(text.encode(), special=False)) == text.encode()
        assert llama.token_eos() in engine.end_tokens
        assert isinstance(engine, Engine)
    llama.close()


def test_messages_go_through_the_models_chat_template(smollm2: str) -> None:
    with running(specs_of(smollm2, [(1,)])) as (engine,):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        text = (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert engine.encode(messages, raw=False) == engine.encode(text, raw=True)
        assert engine.encode("Hi", raw=False) == engine.encode([{"role": "user", "content": "Hi"}], raw=False)
        with pytest.raises(EngineError, match="raw prompt is a string"):
            engine.encode(messages, raw=True)


def test_a_chat_ends_with_an_end_token(smollm2: str) -> None:
    with running(specs_of(smollm2, [(1,)])) as (engine,):
        prompt = engine.encode("What is the capital of France? Answer in one short sentence.", raw=False)
        tokens = greedy_run(engine, prompt, 40)
        assert engine.end_tokens & set(tokens)
        assert b"Paris" in engine.decode(tokens)


# --- sampling -------------------------------------------------------------------------------------


def test_a_resumed_job_draws_the_same_tokens(random_model: str) -> None:
    sampling = Sampling(temperature=1.0, seed=7)

    def run(engine: Any, tokens: list[int], count: int, sequence: int) -> list[int]:
        at, batch, found = 0, tokens, list[int]()
        for _ in range(count):
            (token,) = engine.step([Step(sequence, batch, at, sampling)])
            at, batch = at + len(batch), [token]
            found.append(token)
        return found

    with running(specs_of(random_model, [(1,)], "exact")) as (engine,):
        whole = run(engine, [1, 2, 3], 12, 0)
        assert run(engine, [1, 2, 3, *whole[:5]], 7, 1) == whole[5:]
        other = Sampling(temperature=1.0, seed=8)
        assert engine.step([Step(2, [1, 2, 3], 0, other)]) != [whole[0]] or len(set(whole)) > 1


# --- bounds and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[(1,)], [(1,), (1, 1)]], ids=["one rank", "three ranks"])
def test_a_bad_step_is_an_engine_error_and_harms_nothing(
    random_model: str, stages: list[tuple[int, ...]]
) -> None:
    bad = {
        "context is 1024": Step(0, [1] * 1025, 0, GREEDY),
        "cannot start at 5": Step(0, [1], 5, GREEDY),
        "cannot start at 0": Step(0, [], 0, GREEDY),
        "token ids below": Step(0, [1000], 0, GREEDY),
        "token ids": Step(0, [-1], 0, GREEDY),
    }
    with running(specs_of(random_model, stages)) as engines:
        expected = greedy_run(engines[0], [1, 2], 4)
        for text, step in bad.items():
            with pytest.raises(EngineError, match=text):
                engines[0].step([step])
        with pytest.raises(EngineError, match="each sequence once"):
            engines[0].step([Step(0, [1], 0, GREEDY)] * 2)
        assert greedy_run(engines[0], [1, 2], 4) == expected
        with pytest.raises(EngineError, match="a step to run"):
            engines[0].step([])


def test_a_sequence_may_fill_the_context_to_its_last_position(random_model: str) -> None:
    with running(specs_of(random_model, [(1,)])) as (engine,):
        engine.step([Step(0, [1] * 1023, 0, GREEDY)])
        engine.step([Step(0, [2], 1023, GREEDY)])
        with pytest.raises(EngineError, match="1025 tokens; the context is 1024"):
            engine.step([Step(0, [3], 1024, GREEDY)])


def test_more_sequences_than_allowed_are_refused(random_model: str) -> None:
    with running(specs_of(random_model, [(1,)], sequences_max=2)) as (engine,):
        for sequence in (1, 2):
            engine.step([Step(sequence, [1], 0, None)])
        with pytest.raises(EngineError, match="no room for another sequence"):
            engine.step([Step(3, [1], 0, None)])
        engine.release(1)
        engine.step([Step(3, [1], 0, None)])


def _with(roles: tuple[Role, ...], which: int, **changes: Any) -> tuple[Role, ...]:
    return tuple(dataclasses.replace(r, **changes) if r.rank == which else r for r in roles)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"heads": (0, 8)}, "begins at 8"),
        ({"heads": (0, 2)}, "multiples of 4"),
        ({"ffn": (0, 500)}, "multiples of 256"),
        ({"vocab": (0, 1)}, "multiples of 32"),
        ({"layers": (0, 2)}, "share a stage but not its layers"),
        ({"rank": 1}, "order of their ranks"),
    ],
)
def test_a_plan_that_is_not_one_whole_model_is_refused(
    random_model: str, change: dict[str, Any], match: str
) -> None:
    specs = specs_of(random_model, [(1, 1)])
    broken = dataclasses.replace(specs[0], roles=_with(specs[0].roles, 0, **change))
    with pytest.raises(EngineError, match=match):
        load(broken, connect(2)[0])


def test_stages_that_leave_a_layer_out_are_refused(random_model: str) -> None:
    specs = specs_of(random_model, [(1,), (1,)])
    for layers, match in (((2, 3), "ends at layer 3"), ((1, 4), "begins at layer 2")):
        broken = dataclasses.replace(specs[0], roles=_with(specs[0].roles, 1, layers=layers))
        with pytest.raises(EngineError, match=match):
            load(broken, connect(2)[0])


# --- memory ---------------------------------------------------------------------------------------


MEMORY_SCRIPT = """
import sys, psutil
from shard_rig import Step, connect, load, specs_of
process = psutil.Process()
(spec,) = specs_of(sys.argv[1], [(1,)], "exact")
sizes = [process.memory_info().rss]
engine = load(spec, connect(1)[0])
for count in (1, 900):
    engine.step([Step(0, list(range(count)), 0, None)])
    sizes.append(process.memory_info().rss)
    engine.release(0)
    engine.open(0, (), 1)  # nothing of it is kept for others
    sizes.append(process.memory_info().rss)
engine.close()
engine.close()
print(*sizes, process.memory_info().rss)
"""


def test_release_and_close_give_memory_back(smollm2: str) -> None:
    """In a process of its own, where no freed memory of other tests is used again."""
    here = str(pathlib.Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, smollm2],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    start, _, loaded, held, released, closed = (int(n) >> 20 for n in done.stdout.split())
    assert loaded - start > 300  # F32 weights
    assert held - loaded > 30  # 900 positions of 46 KB
    assert released - loaded < 16
    assert closed - start < 64


def test_a_slice_holds_its_share_of_the_weights(smollm2: str) -> None:
    (whole,) = specs_of(smollm2, [(1,)])
    with running([whole]) as (engine,):
        total = engine.memory_bytes
    with running(specs_of(smollm2, [(2, 1)])) as engines:
        assert engines[0].memory_bytes + engines[1].memory_bytes == pytest.approx(total, rel=0.01)
        assert engines[1].memory_bytes == pytest.approx(total / 3, rel=0.02)


def test_weights_are_repacked_where_this_processor_gains(tmp_path: Any) -> None:
    path = str(tmp_path / "q4_0.gguf")
    write_model(path, Shape(), "Q4_0")
    if not _ggml.extra_buffer_types(_ggml.load()):
        pytest.skip("this build of ggml rearranges no weights")
    for numerics, is_repacked in (("fast", True), ("exact", False)):
        with running(specs_of(path, [(1, 1)], numerics)) as engines:
            assert all((e._weights.repacked_bytes > 0) == is_repacked for e in engines)


# --- messages -------------------------------------------------------------------------------------

HOSTILE = [
    ({"k": "step"}, []),
    ({"k": "shutdown"}, []),
    ({}, []),
    ({"k": "release", "s": "all"}, []),
    ({"k": "fork", "s": 1, "f": 0}, []),
    ({"k": "fork", "s": 1, "f": 0, "n": -1}, []),
    ({"k": "step", "e": [[0, 0, 1, 1]]}, [b"\0" * 4]),
    ({"k": "step", "e": [[0, 0, 1, 1]], "b": 1}, [b"\0" * 4]),
    ({"k": "step", "e": [], "b": 64}, []),
    ({"k": "step", "e": [[0, 0, 1]], "b": 64}, [b"\0" * 4]),
    ({"k": "step", "e": [[0, 0, 1, 2000]], "b": 64}, [b"\0" * 4]),
    ({"k": "step", "e": [[0, 0, 1.5, 1]], "b": 64}, [b"\0" * 4]),
    ({"k": "step", "e": [[0, 0, 2, 1]], "b": 64}, [b"\0" * 4]),
    ({"k": "step", "e": [[0, 0, 1, 1]], "b": 64}, []),
    ({"k": "step", "e": [[0, 0, 1, 1]], "b": 64}, [b"\xff" * 4]),
    ({"k": "step", "e": [[0, 0, 1, 1]], "b": 64}, [b"\0\0\1\0"]),
    ({"k": "step", "e": [[0, 0, -1, 1]], "b": 64}, [b""]),
]


@pytest.mark.parametrize(("header", "frames"), HOSTILE)
def test_a_hostile_message_costs_a_protocol_error(
    random_model: str, header: dict[str, Any], frames: list[bytes]
) -> None:
    with loaded(specs_of(random_model, [(1, 1)])) as (driver, follower):
        driver._channel.send(1, header, frames)
        with pytest.raises(ProtocolError):
            follower.follow(1)


@pytest.mark.parametrize(
    ("position", "count"), [(3, 1), (0, 1025), (1024, 1)], ids=["gap", "too long", "past the end"]
)
def test_a_step_outside_the_context_does_not_reach_ggml(random_model: str, position: int, count: int) -> None:
    with loaded(specs_of(random_model, [(1, 1)])) as (driver, follower):
        entry = [0, position, count, 1]
        driver._channel.send(1, {"k": "step", "e": [entry], "b": 64}, [bytes(4 * count)])
        with pytest.raises(EngineError, match="sequence 0"):
            follower.follow(1)


def test_a_silent_rank_is_a_peer_error_within_the_timeout(
    random_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_messages, "SECONDS_PER_TOKEN", 0.01)
    with loaded(specs_of(random_model, [(1, 1)], timeout_s=0.2)) as (driver, follower):
        with pytest.raises(PeerError, match="rank 1"):
            driver.step([Step(0, [1], 0, GREEDY)])
        follower._channel.send(0, {"k": "result"}, [b""])
        with pytest.raises(ProtocolError, match="of rank 1"):
            driver.step([Step(0, [1], 0, GREEDY)])


def test_follow_returns_when_nothing_comes(random_model: str) -> None:
    with loaded(specs_of(random_model, [(1, 1)])) as (_, follower):
        follower.follow(0.01)
        with pytest.raises(EngineError, match="rank 0 drives"):
            follower.step([Step(0, [1], 0, GREEDY)])
        assert follower.end_tokens == frozenset()


# --- plugin, self-test, benchmark -----------------------------------------------------------------


def test_the_plugin_registers_one_engine_and_checks_its_settings() -> None:
    (entry,) = shard.edged_engines({"wire": "f16"})
    assert (entry.name, entry.settings["wire"]) == ("shard", "f16")
    for bad in ({"wires": "f16"}, {"wire": "f64"}, {"sequences_max": 0}):
        with pytest.raises(ConfigError, match="shard"):
            shard.edged_engines(bad)


def test_the_plugin_module_loads_neither_ggml_nor_numpy() -> None:
    code = (
        "import sys, edged_plugins.shard; "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'llama_cpp', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_self_test_is_bit_equal_here() -> None:
    assert _check.check({}) == {"version": _ggml.GGML_VERSION, "max_error": 0.0}


def test_the_self_test_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = dataclasses.replace(ARCHITECTURES["llama"], rope=_ggml.ROPE_NEOX)  # pairs other dimensions
    monkeypatch.setitem(ARCHITECTURES, "llama", llama)
    with pytest.raises(EngineError, match=r"differ from libllama's by 0?\.?\d"):
        _check.check({})


@pytest.mark.parametrize(
    "shape",
    [
        {"keys": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
        {
            "keys": {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 16,
            }
        },
        {"keys": {"rope.freq_base": 500000.0}, "rope_factors": ("rope_freqs",)},
        {"heads": 8, "kv_heads": 1},
        {"heads": 4, "kv_heads": 4, "is_tied": True},
    ],
    ids=["linear", "yarn", "llama-3 factors", "one KV head", "no groups"],
)
def test_every_supported_variant_is_bit_equal_to_llama_cpp(tmp_path: Any, shape: dict[str, Any]) -> None:
    path = str(tmp_path / "model.gguf")
    write_model(path, Shape(**shape), "Q8_0")
    assert _check.compare(path, {}) == 0.0


def test_threads_of_a_worker_wait_without_holding_the_processor(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The bound is read when OpenMP's library loads, whoever loads it first."""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    params = {"function": "edged_plugins.shard._check:check", "settings": {}}
    asyncio.run(Supervisor().run_task("edged.worker:call", params, timeout_s=200))
    said = capfd.readouterr().err
    if "GOMP_" not in said:
        pytest.skip("this build of ggml does not use GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '3000'" in said


def test_another_ggml_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ggml, "GGML_VERSION", "0.1.0")
    _ggml.load.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"expected ggml 0\.1\.0") as caught:
            _ggml.load()
        assert "pip install" in caught.value.remedy
    finally:
        _ggml.load.cache_clear()


def test_a_machine_without_llama_cpp_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_libraries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="llama-cpp-python") as caught:
        _libraries.library_folder()
    assert "pip install" in caught.value.remedy


def test_the_benchmark_gives_two_speeds_per_weight_type() -> None:
    found = [msgspec.convert(m, EngineSpeed) for m in _measure.measure({"threads": 1})]
    assert tuple(s.weight_type for s in found) == WEIGHT_TYPES
    assert all(s.decode_bytes_s > 1e6 and s.prefill_flops_s > 1e6 for s in found)
    assert all(0 < s.attend_s < 1e-6 for s in found)  # a multiplication and an addition, twice


def test_quantised_benchmark_weights_are_real_ones() -> None:
    lib = _ggml.load()
    weights = np.random.default_rng(0).standard_normal((128, 256), dtype=np.float32)
    packed = _measure.quantise(lib, 12, weights)  # Q4_K
    assert packed.nbytes == 128 * 144
    back = np.empty((64, 256), np.float32)
    lib.get_type_traits(12).contents.to_float(packed.ctypes.data, back.ctypes.data, back.size)
    assert np.abs(back - weights[:64]).max() < 0.5


# --- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [[(1,)], [(2, 1)], [(1,), (1,)]], ids=str)
def test_every_rank_counts_what_it_computes_and_times_single_tokens(
    random_model: str, stages: list[tuple[int, ...]]
) -> None:
    with running(specs_of(random_model, stages)) as engines:
        started = time.perf_counter()
        greedy_run(engines[0], [1, 2, 3], 2 * TIMED_EACH + 1)  # the first runs the prompt
        took = time.perf_counter() - started
        for engine in engines:
            done = engine.computed
            assert done.tokens == 2
            assert done.positions == (2 + TIMED_EACH) + (2 + 2 * TIMED_EACH)
            assert 0 < done.token_s < done.compute_s < took
            assert done.token_cpu_s > 0
