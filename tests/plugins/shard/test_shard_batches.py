"""Many sequences at once: one graph for all, shared prompt prefixes, admission, batches in flight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from edged_plugins.shard import _ggml, _pace
from edged_plugins.shard._admission import Admission
from edged_plugins.shard._cache import Cache
from edged_plugins.shard._messages import BLOCK, Entry, Work, cut
from shard_rig import GREEDY, LlamaCpp, greedy_run, greedy_together, logits_run, oracle_run, running, specs_of

from edged import EngineError, Step

PROMPTS = [[5, 6, 7], list(range(10, 90)), [11] * 130, [900, 3], list(range(40, 44)), [77] * 255]


@pytest.mark.parametrize("stages", [[(1,)], [(1,), (1,)], [(1, 1)]], ids=["one rank", "layers", "tensor"])
def test_sequences_decoded_in_one_batch_get_the_tokens_they_get_alone(
    random_model: str, stages: list[tuple[int, ...]]
) -> None:
    """Also past a bucket of the cache, which one of them crosses."""
    with running(specs_of(random_model, [(1,)], "exact")) as (engine,):
        alone = [greedy_run(engine, prompt, 12) for prompt in PROMPTS]
    with running(specs_of(random_model, stages, "exact")) as engines:
        assert greedy_together(engines[0], PROMPTS, 12) == alone


def test_batches_in_flight_get_the_tokens_of_one_batch(random_model: str) -> None:
    with running(specs_of(random_model, [(1,), (1,)], "exact")) as engines:
        expected = greedy_together(engines[0], PROMPTS[:4], 6)
        found = _interleaved(engines[0], [PROMPTS[:2], PROMPTS[2:4]], 6)
    assert found == expected


def _interleaved(engine: object, groups: Sequence[Sequence[list[int]]], count: int) -> list[list[int]]:
    """Greedy tokens of all groups, each group one batch, all groups begun before one is finished."""
    numbers = itertools.count(100)
    lanes = [[(next(numbers), prompt) for prompt in group] for group in groups]
    tokens = {number: [] for lane in lanes for number, _ in lane}
    steps = [[Step(number, prompt, 0, GREEDY) for number, prompt in lane] for lane in lanes]
    for batch in steps:
        engine.begin(batch)
    for turn in range(count):
        for lane, batch in enumerate(steps):
            found = engine.finish()
            for step, token in zip(batch, found, strict=True):
                tokens[step.sequence].append(token)
            at = [(s.sequence, s.position + len(s.tokens), t) for s, t in zip(batch, found, strict=True)]
            steps[lane] = [Step(number, [token], position, GREEDY) for number, position, token in at]
            if turn + 1 < count:
                engine.begin(steps[lane])
    return list(tokens.values())


def test_finish_without_begin_is_an_engine_error(random_model: str) -> None:
    with running(specs_of(random_model, [(1,)])) as (engine,), pytest.raises(EngineError, match="begun"):
        engine.finish()


# --- prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["random", "Q8_0"])
@pytest.mark.parametrize("stages", [[(1,)], [(1,), (1,)]], ids=["one rank", "layers"])
def test_a_shared_prefix_gives_bit_equal_logits(models, model: str, stages: list[tuple[int, ...]]) -> None:
    random = np.random.default_rng(3)
    common, first, second = (random.integers(3, 900, n).tolist() for n in (300, 40, 90))
    prompt, following = common + second, [5, 6, 7]
    with running(specs_of(models(model), stages)) as engines:
        expected = logits_run(engines[0], prompt, following, sequence=1)
        engines[0].open(1, (), 1)  # forget it
        greedy_run(engines[0], common + first, 3, sequence=2)
        shared = engines[0].open(3, prompt, 500)
        assert shared == 256  # whole blocks of the common part
        found = [engines[0].logits(Step(3, prompt[shared:], shared, None))]
        for i, token in enumerate(following[:-1]):
            found.append(engines[0].logits(Step(3, [token], len(prompt) + i, None)))
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a, b)


def test_a_running_sequence_shares_its_prefix_too(random_model: str) -> None:
    prompt = list(range(200))
    with running(specs_of(random_model, [(1,)])) as (engine,):
        engine.step([Step(1, prompt, 0, GREEDY)])
        assert engine.open(2, prompt, 300) == 128
        engine.step([Step(1, [4], 200, GREEDY), Step(2, prompt[128:], 128, GREEDY)])


def test_what_single_tokens_wrote_is_not_shared(random_model: str) -> None:
    """Their rows were rounded otherwise than a prompt's."""
    with running(specs_of(random_model, [(1,)])) as (engine,):
        answer = greedy_run(engine, list(range(70)), 130, sequence=1)
        assert engine.open(2, [*range(70), *answer, *range(70)], 500) == 64


def book(positions: int = 1000, sequences: int = 4) -> Admission:
    return Admission(positions, sequences)


def fill(admission: Admission, sequence: int, prompt: list[int], positions: int) -> None:
    opening = admission.open(sequence, prompt, positions)
    assert opening is not None
    admission.note(sequence, opening.shared, prompt[opening.shared :])


def test_a_sequence_waits_while_others_hold_the_memory() -> None:
    admission = book(1000)
    fill(admission, 1, [1] * 100, 600)
    assert admission.open(2, [2] * 10, 401) is None
    fill(admission, 2, [2] * 10, 400)
    assert admission.open(3, [3], 1) is None
    admission.finish(1)
    assert admission.open(3, [3], 500) is not None


def test_the_longest_over_is_forgotten_first_and_only_when_needed() -> None:
    admission = book(1000)
    for sequence in (1, 2, 3):
        fill(admission, sequence, [sequence] * 200, 300)
        assert admission.finish(sequence)
    opening = admission.open(4, [9] * 10, 400)
    assert opening is not None
    assert opening.evicted == ()
    opening = admission.open(5, [9] * 10, 300)
    assert opening is not None
    assert opening.evicted == (1, 2)


def test_a_source_that_has_to_go_is_copied_first() -> None:
    admission = book(400)
    fill(admission, 1, [1] * 300, 400)
    admission.finish(1)
    opening = admission.open(2, [1] * 390, 400)
    assert opening is not None
    assert (opening.source, opening.shared, opening.evict_source, opening.evicted) == (1, 256, True, ())


def test_short_prompts_leave_nothing_behind() -> None:
    admission = book()
    fill(admission, 1, [1] * (BLOCK - 1), 100)
    assert not admission.finish(1)
    assert admission.open(2, [1] * 200, 300).shared == 0


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_narrow_cache_is_bit_equal_to_llama_cpps(
    smollm2: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp rotates what it quantises, unless it is told not to."""
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    prompt = list(range(300, 400))
    expected, tokens = _of_llama(smollm2, prompt, kind)
    with running(specs_of(smollm2, [(1,)], cache_type=kind)) as (engine,):
        found = logits_run(engine, prompt, tokens)
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a, b)


def test_a_wide_cache_is_nearer_to_plain_attention_in_f32_than_a_narrow_one(models) -> None:
    """llama.cpp's flash attention narrows an F32 cache to F16 first, so its plain attention is the oracle."""
    prompt = list(range(300, 400))
    expected, tokens = _of_llama(models("random-F16"), prompt, "f32", flash=False)
    errors = {}
    for kind in ("f32", "f16", "q8_0"):
        with running(specs_of(models("random-F16"), [(1,)], cache_type=kind)) as (engine,):
            found = logits_run(engine, prompt, tokens)
        errors[kind] = max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True))
    assert errors["f32"] <= errors["f16"] < errors["q8_0"]


def _of_llama(
    path: str, prompt: list[int], kind: str, flash: bool = True
) -> tuple[list[np.ndarray], list[int]]:
    llama = LlamaCpp(path, kind, flash)
    try:
        tokens, logits = oracle_run(llama, prompt, 6)
    finally:
        llama.close()
    return logits, tokens


def test_a_slot_is_copied_and_cleared_without_its_neighbours() -> None:
    cache = Cache(_ggml.load(), 2, 64, 3, 300, _ggml.Q8_0)
    try:
        for slot in range(3):
            cache._slots[:, slot] = slot + 1
        cache.copy(0, 2, 256)
        size = 256 * cache.row_bytes
        assert (cache._slots[:, 2, :size] == 1).all()
        assert (cache._slots[:, 2, size:] == 3).all()
        cache.clear(1)
        assert (cache._slots[:, 0] == 1).all()
        assert (cache._slots[:, 2, :size] == 1).all()
        assert cache._slots[:, 1].sum() < 2 * 4096 * 4 * 2  # all but the ends of its pages
    finally:
        cache.close()


# --- dividing work --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 128, 191, 192, 500, 512, 575, 576, 1000])
@pytest.mark.parametrize("rows", [64, 128, 512])
def test_batches_of_a_prompt_are_whole_or_at_least_a_block(count: int, rows: int) -> None:
    sizes = cut(count, rows)
    assert sum(sizes) == count
    assert all(size == rows for size in sizes[:-1])
    assert sizes[-1] >= min(count, BLOCK)


def test_single_tokens_run_together_and_prompts_after_them() -> None:
    entries = (Entry(1, 9, 1, 1), Entry(2, 0, 100, 1), Entry(3, 4, 1, 0))
    batches = Work(entries, np.arange(102), 64).batches()
    assert [[(p.entry, p.count, p.offset, p.keeps) for p in batch] for batch in batches] == [
        [(0, 1, 0, True), (2, 1, 101, False)],
        [(1, 100, 1, True)],
    ]


TIMES = {1: 29.0, 2: 56.0, 4: 52.0, 8: 99.0, 16: 147.0, 32: 294.0, 64: 400.0, 128: 700.0, 256: 1300.0}


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [(1, 1), (2, 2), (4, 1), (8, 2), (16, 2), (32, 2)],
)
def test_lanes_give_the_most_tokens_by_the_measured_times(sequences: int, expected: int) -> None:
    """The times are a measured machine's; by them two stages gain t(n)/t(n/2) at most."""
    assert _pace.lanes(sequences, 2, TIMES) == expected
    assert _pace.lanes(sequences, 1, TIMES) == 1


def test_rows_of_a_prompt_weigh_the_filling_of_the_pipeline_against_small_batches() -> None:
    steep = {64: 100.0, 128: 110.0, 256: 120.0}
    assert _pace.batch_tokens(1024, 2, steep) == 256
    assert _pace.batch_tokens(128, 2, TIMES) == 64
    assert _pace.batch_tokens(128, 1, TIMES) == 512


def test_times_between_measured_points_lie_between_them() -> None:
    assert _pace.time_of(3, TIMES) == 54.0
    assert _pace.time_of(512, TIMES) == 2600.0


def test_a_layer_is_measured_for_every_batch_size(random_model: str) -> None:
    with running(specs_of(random_model, [(1,), (1,)])) as engines:
        times = _pace.measure(engines[0]._shard, engines[0]._cache)
    assert list(times) == [*_pace.DECODE_ROWS, *_pace.PROMPT_ROWS]
    assert all(seconds > 0 for seconds in times.values())
