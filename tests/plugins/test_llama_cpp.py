"""The engine over libllama, against llama-cpp-python's own generation and against the shard engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf", "numpy")):
    pytest.skip("llama-cpp-python is not installed (pip install edged[llama])", allow_module_level=True)

import llama_cpp
import msgspec
import tiny_models
from edged_plugins import _libllama
from edged_plugins import llama_cpp as plugin
from edged_plugins._llama_describe import check, describe, measure
from edged_plugins._llama_engine import LlamaEngine, load
from edged_plugins.shard import _check, _engine

from edged import ConfigError, Engine, EngineError, EngineSpec, ModelDescription, Role, Sampling, Step

GREEDY = Sampling(temperature=0)
PROMPT = "Why is the sky blue?"
ARCHITECTURES = ("stablelm", "starcoder2", "mamba")
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES)


def spec_of(path: Path, ranks: int = 1, **fields: object) -> EngineSpec:
    model = msgspec.convert(describe(str(path)), ModelDescription)
    whole = ((0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab))
    roles = tuple(Role(rank, "n", 0, *whole, share=1.0) for rank in range(ranks))
    chosen = {"context_tokens": 256, "cache_tokens": 4 * 256, "threads": 1} | fields
    return EngineSpec(str(path), model, roles, 0, **chosen)


@contextmanager
def engine_of(path: Path, **fields: object) -> Iterator[LlamaEngine]:
    engine = load(spec_of(path, **fields), _check.Alone())
    try:
        yield engine
    finally:
        engine.close()


def step(engine: Engine, *steps: Step) -> list[int | None]:
    """One batch."""
    engine.begin(steps)
    return engine.finish()


def generate(
    engine: Engine, prompt: str, count: int, sequence: int = 0, sampling: Sampling = GREEDY
) -> list[int]:
    pending, position, made = engine.encode(prompt, raw=True), 0, []
    assert engine.open(sequence, pending, len(pending) + count) == 0
    for _ in range(count):
        [token] = step(engine, Step(sequence, pending, position, sampling))
        assert token is not None
        position += len(pending)
        pending = [token]
        made.append(token)
    return made


def theirs(path: Path, prompt: str, count: int) -> list[int]:
    """llama-cpp-python's greedy tokens, through its own Llama class."""
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, flash_attn=True, verbose=False)
    try:
        found = model.generate(model.tokenize(prompt.encode(), special=True), temp=0.0)
        return [token for token, _ in zip(found, range(count), strict=False)]
    finally:
        model.close()


# --- generation -----------------------------------------------------------------------------------


@EACH
def test_an_architecture_that_shard_refuses_gives_the_tokens_of_llama_cpp(
    architecture: str, smol: Path
) -> None:
    path = tiny_models.tiny(architecture, smol)
    with engine_of(path) as engine:
        made = generate(engine, PROMPT, 24)
    assert made == theirs(path, PROMPT, 24)
    assert len(set(made)) > 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=5), Sampling(1.2, 0, 0.9, 8)])
def test_a_model_that_both_engines_run_gives_the_same_tokens(smol: Path, sampling: Sampling) -> None:
    shard = _engine.load(spec_of(smol), _check.Alone())
    try:
        expected = generate(shard, PROMPT, 24, sampling=sampling)
    finally:
        shard.close()
    with engine_of(smol) as engine:
        assert generate(engine, PROMPT, 24, sampling=sampling) == expected


@EACH
def test_sequences_of_a_batch_say_what_each_says_alone(architecture: str, smol: Path) -> None:
    """They come one after the other, so the context grows under those that run."""
    path = tiny_models.tiny(architecture, smol)
    prompts = [PROMPT, "Name three birds.", "One", "A longer prompt than the others, of several words."]
    with engine_of(path) as engine:
        alone = []
        for number, prompt in enumerate(prompts):
            alone.append(generate(engine, prompt, 12, number))
            engine.release(number)
        assert together(engine, prompts, 12) == alone


def together(engine: Engine, prompts: Sequence[str], count: int) -> list[list[int]]:
    """All prompts at once, each beginning two steps after the one before."""
    made: list[list[int]] = [[] for _ in prompts]
    pending = [list(engine.encode(prompt, raw=True)) for prompt in prompts]
    positions = [0] * len(prompts)
    for turn in range(count + 2 * len(prompts)):
        live = [n for n in range(len(prompts)) if turn >= 2 * n and len(made[n]) < count]
        if not live:
            break
        for n in live:
            assert positions[n] or engine.open(n, pending[n], len(pending[n]) + count) == 0
        tokens = step(engine, *(Step(n, pending[n], positions[n], GREEDY) for n in live))
        for n, token in zip(live, tokens, strict=True):
            assert token is not None
            positions[n] += len(pending[n])
            pending[n] = [token]
            made[n].append(token)
    return made


def test_a_prompt_in_parts_and_one_of_several_batches_give_the_same_token(smol: Path) -> None:
    path = tiny_models.tiny("stablelm", smol)
    with engine_of(path, context_tokens=1024, cache_tokens=2048) as engine:
        ids = engine.encode("word " * 700, raw=True)
        assert len(ids) > 512
        assert [engine.open(number, ids, 1024) for number in (0, 1)] == [0, 0]
        whole = step(engine, Step(0, ids, 0, GREEDY))
        assert step(engine, Step(1, ids[:300], 0, None)) == [None]
        assert step(engine, Step(1, ids[300:], 300, GREEDY)) == whole
        again = step(engine, Step(1, ids[100:], 100, GREEDY))  # back to an earlier position
        assert again == whole


def test_what_cannot_run_is_an_error_and_not_an_abort(smol: Path) -> None:
    path = tiny_models.tiny("mamba", smol)
    with engine_of(path) as engine:
        generate(engine, PROMPT, 2)
        assert engine.open(1, [1], 256) == 0
        for wrong, reason in (
            (Step(0, [1], 200, GREEDY), "cannot start at 200"),
            (Step(0, [], 0, GREEDY), "one token or more"),
            (Step(0, [1 << 30], 0, GREEDY), "ids below"),
            (Step(1, [1] * 300, 0, GREEDY), "it may have 256"),
            (Step(0, [1], 1, GREEDY), "cannot go back"),
            (Step(2, [1], 0, GREEDY), "sequence 2 to be opened"),
        ):
            with pytest.raises(EngineError, match=reason):
                step(engine, wrong)
    engine.close()


def test_a_sequence_is_admitted_while_there_is_room(smol: Path) -> None:
    path = tiny_models.tiny("stablelm", smol)
    with engine_of(path, settings={"sequences_max": 2}) as engine:
        assert engine.lanes(2) == 1
        assert engine.open(0, [1], 256) == 0
        assert engine.open(1, [1], 10) == 0
        assert engine.open(2, [1], 10) is None
        with pytest.raises(EngineError, match="it may have 10"):
            step(engine, Step(1, [1] * 11, 0, GREEDY))
        engine.begin([Step(0, [1], 0, None), Step(1, [2], 0, GREEDY)])
        nothing, token = engine.finish()
        assert nothing is None
        assert token is not None
        engine.release(1)
        assert engine.open(2, [1], 256) == 0
        assert step(engine, Step(2, [2], 0, GREEDY)) == [token]


def test_where_the_context_cannot_grow_the_new_sequence_waits_and_the_others_go_on(
    smol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(smol) as engine:
        ids = engine.encode(PROMPT, raw=True)
        assert engine.open(0, ids, 200) == 0
        token = step(engine, Step(0, ids, 0, GREEDY))
        with monkeypatch.context() as patched:
            patched.setattr(_libllama, "open_context", _no_memory)
            assert engine.open(1, ids, 200) is None
            step(engine, Step(0, token, len(ids), GREEDY))
        assert engine.open(1, ids, 200) == 0  # once there is memory
        assert step(engine, Step(1, ids, 0, GREEDY)) == token


def _no_memory(*_: object, **__: object) -> int:
    raise EngineError("libllama cannot make room")


def test_the_cache_s_room_admits_and_its_type_is_libllama_s(smol: Path) -> None:
    """A cache of 300 tokens has room for one sequence of 200; a context is the least it may be."""
    sizes = {}
    for cache_type in ("f32", "f16", "q8_0"):
        with engine_of(smol, cache_tokens=300, cache_type=cache_type) as engine:
            made = generate(engine, PROMPT, 12)
            sizes[cache_type] = llama_cpp.llama_state_seq_get_size(engine._sequences.context, 0)
            assert len(made) == 12
            assert engine.open(1, [1], 300) is None
            engine.release(0)
            assert engine.open(1, [1], 300) == 0
    assert 1.9 < sizes["f32"] / sizes["f16"] < 2.1
    assert 1.8 < sizes["f16"] / sizes["q8_0"] < 1.9  # 16 bits to 8.5


def test_a_cache_type_that_heads_do_not_fit_is_refused_with_the_reason(smol: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"q8_0 with block size 32 does not divide .*16") as caught,
        engine_of(tiny_models.tiny("stablelm", smol), cache_type="q8_0"),
    ):
        pass
    assert "jobs.cache_type" in (caught.value.remedy or "")


def test_parts_of_a_model_and_exact_numerics_are_refused(smol: Path) -> None:
    with pytest.raises(EngineError, match="whole, on one node"):
        load(spec_of(smol, ranks=2), _check.Alone())
    with pytest.raises(EngineError, match="exact numerics need shard"):
        load(spec_of(smol, numerics="exact"), _check.Alone())


# --- descriptions ---------------------------------------------------------------------------------


@EACH
def test_a_description_accounts_for_every_byte_and_cuts_nothing(architecture: str, smol: Path) -> None:
    path = tiny_models.tiny(architecture, smol)
    model = msgspec.convert(describe(str(path)), ModelDescription)
    assert (model.architecture, model.layers, model.hidden) == (architecture, tiny_models.LAYERS, 64)
    assert model.context_tokens == tiny_models.CONTEXT
    assert (model.head_unit, model.ffn_unit, model.vocab_unit) == (model.heads, model.ffn, model.vocab)
    assert sum(t.bytes for t in model.tensors) == (
        sum(model.layer_bytes) + model.embedding_bytes + model.head_bytes
    )
    assert all(model.layer_bytes)


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(smol: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    tiny_models.write(path, "starcoder2", smol, lambda name: name != "blk.2.ffn_up.weight")
    with pytest.raises(EngineError, match=r"blk\.2\.ffn_up\.weight"):
        describe(str(path))


def test_an_architecture_nobody_knows_is_refused_with_those_that_run(smol: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    tiny_models.write(path, "perceptron", smol)
    with pytest.raises(EngineError, match=r"no architecture 'perceptron'; it runs .*falcon.*stablelm"):
        describe(str(path))
    assert set(ARCHITECTURES) < set(_libllama.architectures())
    assert "bert" not in _libllama.architectures()


def test_a_model_that_generates_nothing_is_refused(smol: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.gguf"
    tiny_models.write(path, "bert", smol)
    with pytest.raises(EngineError, match="'bert' generates no text"):
        describe(str(path))


def test_the_library_answers_and_nothing_is_measured_twice() -> None:
    assert check({})["max_error"] == 0
    assert measure({}) == []


@pytest.mark.parametrize("settings", [{"sequence_max": 1}, {"sequences_max": 0}, {"sequences_max": "4"}])
def test_a_wrong_setting_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="sequences_max"):
        plugin.edged_engines(settings)
