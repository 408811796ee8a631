"""Several adapters over one engine's weights: each sequence gets what it gets where its adapter is alone."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import lora_files
import pytest
from edged_plugins.shard._admission import Admission
from edged_plugins.shard._engine import ShardEngine
from edged_plugins.shard._messages import Entry, Work, read_adapt, read_forget
from edged_plugins.shard._random import Shape, write_model
from shard_rig import GREEDY, following, greedy_run, loaded, running, specs_of

from edged import EngineError, ProtocolError, Step

SPLITS: dict[str, list[tuple[int, ...]]] = {
    "whole": [(1,)],
    "layers": [(1,), (1,)],
    "tensor": [(2, 1, 1)],
    "hybrid": [(1, 1), (2, 1)],
}
PROMPT = [3, 141, 59, 26, 5, 358, 97, 93, 238, 46]
LONG = [token % 500 for token in range(7, 7 + 5 * 130, 5)]
NUMBERS = (0, 1, 2)  # none, and two adapters


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model") / "base.gguf")
    write_model(path, Shape(kv_heads=4, layers=4), "Q4_0", seed=3)
    return path


@pytest.fixture(scope="module")
def files(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        number: str(lora_files.write_adapter(folder / f"{number}.gguf", base, seed=number, r=3 + number))
        for number in NUMBERS[1:]
    }


@pytest.fixture(scope="module")
def alone(base: str, files: Mapping[int, str]) -> Callable[[str, Sequence[int], int], dict[int, list[int]]]:
    """Greedy tokens of a prompt by adapter, each in an engine that was loaded with it."""
    known: dict[tuple[str, int, int], dict[int, list[int]]] = {}

    def run(numerics: str, prompt: Sequence[int], count: int) -> dict[int, list[int]]:
        key = (numerics, len(prompt), count)
        if key not in known:
            (spec,) = specs_of(base, [(1,)], numerics, threads=1)
            known[key] = {}
            for number in NUMBERS:
                own = dataclasses.replace(spec, adapter_path=files.get(number, ""))
                with running([own]) as (engine,):
                    known[key][number] = greedy_run(engine, prompt, count)
            assert len({tuple(tokens) for tokens in known[key].values()}) == len(NUMBERS)
        return known[key]

    return run


def adapt(engines: Sequence[ShardEngine], files: Mapping[int, str]) -> None:
    for engine in engines:
        for number, path in files.items():
            engine.adapt(number, path)


def together(
    engine: ShardEngine, prompt: Sequence[int], numbers: Sequence[int], count: int
) -> list[list[int]]:
    """Greedy tokens of a sequence for each adapter, all in the same steps."""
    tokens: list[list[int]] = [[] for _ in numbers]
    batches, at = [], []
    for sequence, number in enumerate(numbers):
        shared = engine.open(sequence, prompt, len(prompt) + count, number)
        assert shared is not None
        batches.append(list(prompt[shared:]))
        at.append(shared)
    for _ in range(count):
        found = engine.step([Step(i, batch, at[i], GREEDY) for i, batch in enumerate(batches)])
        at = [a + len(batch) for a, batch in zip(at, batches, strict=True)]
        batches = [[token] for token in found]
        for seen, token in zip(tokens, found, strict=True):
            seen.append(token)
    return tokens


@pytest.mark.parametrize("split", SPLITS)
def test_sequences_of_one_step_get_what_each_adapter_gives_alone(
    base: str, files: dict[int, str], alone: Callable[..., dict[int, list[int]]], split: str
) -> None:
    """Exact numerics: alike however the model is cut, and beside others with the same adapter."""
    numbers = (1, 0, 2, 1, 0)
    expected = alone("exact", PROMPT, 12)
    with loaded(specs_of(base, SPLITS[split], "exact")) as engines:
        adapt(engines, files)  # each by its own worker, before any sequence
        with following(engines):
            found = together(engines[0], PROMPT, numbers, 12)
    assert found == [expected[number] for number in numbers]


def test_in_fast_numerics_too_each_of_unlike_adapters_gets_its_own_bits(
    base: str, files: dict[int, str], alone: Callable[..., dict[int, list[int]]]
) -> None:
    expected = alone("fast", LONG, 8)
    with running(specs_of(base, [(1,)], threads=1)) as (engine,):
        adapt([engine], files)
        assert together(engine, LONG, NUMBERS, 8) == [expected[number] for number in NUMBERS]


def test_a_prompt_s_rows_are_shared_within_an_adapter_alone(base: str, files: dict[int, str]) -> None:
    with running(specs_of(base, [(1,)], threads=1)) as (engine,):
        adapt([engine], files)
        shared = []
        for sequence, number in enumerate((1, 2, 0, 1, 2, 0)):
            found = engine.open(sequence, LONG, 200, number)
            assert found is not None
            shared.append(found)
            engine.step([Step(sequence, LONG[found:], found, GREEDY)])
            engine.release(sequence)
        assert shared == [0, 0, 0, 64, 64, 64]


@pytest.mark.parametrize("split", ["whole", "layers"])
def test_memory_grows_by_the_adapter_and_is_given_back_after_its_last_sequence(
    base: str, files: dict[int, str], alone: Callable[..., dict[int, list[int]]], split: str
) -> None:
    expected = alone("exact", LONG, 4)
    with loaded(specs_of(base, SPLITS[split], "exact")) as engines:
        before = [engine.memory_bytes for engine in engines]
        adapt(engines, files)
        size = sum(pathlib.Path(path).stat().st_size for path in files.values())
        held = [engine.memory_bytes - was for engine, was in zip(engines, before, strict=True)]
        assert all(0 < each <= size for each in held)
        with following(engines):
            first = engines[0]
            assert first.open(7, LONG, 200, 1) == 0
            tokens = first.step([Step(7, LONG, 0, GREEDY)])
            first.forget(1)  # in use: it waits for the end of the sequence
            with pytest.raises(EngineError, match="no adapter 1 here"):
                first.open(8, LONG, 200, 1)
            for at in range(3):
                tokens += first.step([Step(7, [tokens[-1]], len(LONG) + at, GREEDY)])
            assert tokens == expected[1]
            first.release(7)
            first.forget(2)  # nobody's: at once
            assert greedy_run(first, LONG, 4, sequence=9) == expected[0]
    assert [engine._adapters.bytes for engine in engines] == [0] * len(engines)


def test_what_one_rank_could_not_load_the_others_give_back_alone(base: str, files: dict[int, str]) -> None:
    with loaded(specs_of(base, [(1,), (1,)], "exact")) as engines:
        before = engines[1].memory_bytes
        engines[1].adapt(1, files[1])
        engines[1].undo(1)
        assert engines[1].memory_bytes == before
        with pytest.raises(EngineError, match="no unused adapter 1"):
            engines[1].undo(1)


def test_a_bad_adapter_leaves_the_engine_as_it_was(
    base: str, files: dict[int, str], tmp_path: pathlib.Path
) -> None:
    bad = lora_files.write_adapter(tmp_path / "bad.gguf", base, architecture="qwen2")
    with running(specs_of(base, [(1,)], threads=1)) as (engine,):
        expected = greedy_run(engine, PROMPT, 4)
        with pytest.raises(EngineError, match="adapts architecture 'qwen2'"):
            engine.adapt(1, str(bad))
        engine.adapt(1, files[1])
        with pytest.raises(EngineError, match="1 is taken"):
            engine.adapt(1, files[1])
        for wrong in (2, -1):
            with pytest.raises(EngineError, match=f"no adapter {wrong}"):
                engine.open(3, PROMPT, 40, wrong)
            with pytest.raises(EngineError, match="to forget"):
                engine.forget(wrong)
        with pytest.raises(EngineError, match="to forget"):
            engine.forget(0)
        assert greedy_run(engine, PROMPT, 4) == expected


@pytest.mark.parametrize(
    "header",
    [
        {"k": "adapt", "s": 1, "a": 9},
        {"k": "adapt", "s": "x", "a": 1},
        {"k": "adapt"},
        {"k": "forget", "a": 9},
    ],
    ids=str,
)
def test_a_rank_does_not_believe_in_an_adapter_that_it_has_not(base: str, header: dict[str, object]) -> None:
    with loaded(specs_of(base, [(1,), (1,)])) as engines:
        engines[0]._channel.send(1, header)
        with pytest.raises(ProtocolError, match="adapter"):
            engines[1].follow(5.0)


@pytest.mark.parametrize("header", [{}, {"a": 0}, {"a": "1"}, {"a": True}], ids=str)
def test_only_a_number_above_0_can_be_forgotten(header: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="number of an adapter"):
        read_forget(header)
    with pytest.raises(ProtocolError, match="number of its adapter"):
        read_adapt(header)


def test_single_tokens_run_together_by_adapter_and_in_a_fixed_order() -> None:
    entries = tuple(Entry(s, 5, 1 if s != 3 else 70, 1) for s in range(6))
    of = {0: 2, 1: 0, 2: 2, 4: 1, 5: 0}
    batches = Work(entries, ()).batches(lambda sequence: of.get(sequence, 0))
    assert [[piece.sequence for piece in batch] for batch in batches] == [[0, 2], [1, 5], [4], [3]]


def test_an_adapter_s_rows_are_forgotten_with_it() -> None:
    book = Admission(1000, 8)
    for sequence, adapter in enumerate((1, 2, 1)):
        assert book.open(sequence, (), 200, adapter) is not None
        book.note(sequence, 0, range(128))
    assert book.finish(0)
    assert book.forget(1) == [0]  # the other runs
    assert book.finish(2)
    assert book.forget(1) == [2]
    assert book.forget(1) == []
