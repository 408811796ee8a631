"""One node and layer-parallel stages compute what llama.cpp computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from shard_rig import LlamaCpp, greedy_run, greedy_together, logits_run, oracle_run, running, specs_of

from edged import Step

PROMPTS = (
    "The capital of France is",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "Why is the sky blue? Explain it to a child.",
    "List three uses of a paper clip:",
    "Once upon a time, in a village by the river,",
    "Translate to German: Good morning, my friend.",
    "12 + 30 =",
)
TOKENS = 64
MODELS = ("Q4_1", "Q8_0", "Q4_K_M", "random")
LENGTHS = (1, 17, 128, 700)  # 700: two prompt batches


def prompts_of(engine: object, name: str, vocab: int) -> list[list[int]]:
    if name != "random":
        return [engine.encode(p, raw=i % 2 == 0) for i, p in enumerate(PROMPTS)]
    random = np.random.default_rng(3)
    return [random.integers(0, vocab, 5 + 4 * i).tolist() for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def oracle(models: Callable[[str], str]) -> Iterator[Callable[[str], LlamaCpp]]:
    made: dict[str, LlamaCpp] = {}

    def get(name: str) -> LlamaCpp:
        if name not in made:
            made[name] = LlamaCpp(models(name))
        return made[name]

    yield get
    for llama in made.values():
        llama.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_one_node_and_two_and_three_stages_give_llama_cpps_tokens(
    models: Callable[[str], str], oracle: Callable[[str], LlamaCpp], name: str
) -> None:
    llama, path = oracle(name), models(name)
    with running(specs_of(path, [(1,)])) as (engine,):
        prompts = prompts_of(engine, name, llama.vocab)
        expected = [oracle_run(llama, p, TOKENS) for p in prompts]
        for prompt, (tokens, logits) in zip(prompts, expected, strict=True):
            ours = logits_run(engine, prompt, tokens)
            assert all(np.array_equal(a, b) for a, b in zip(ours, logits, strict=True))
    for stages in ([(1,)] * 2, [(1,)] * 3):
        with running(specs_of(path, stages)) as engines:
            # Each alone: the product of K-quants sums several rows in another order than one.
            found = [greedy_run(engines[0], p, TOKENS) for p in prompts]
        assert found == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("stages", [[(1,)], [(1,), (1,)]], ids=["one node", "two stages"])
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_bit_equal_for_prompts_of_any_length(
    smollm2: str, oracle: Callable[[str], LlamaCpp], stages: list[tuple[int, ...]], length: int
) -> None:
    llama = oracle("Q4_1")
    prompt = np.random.default_rng(length).integers(0, llama.vocab, length).tolist()
    tokens, logits = oracle_run(llama, prompt, 4, threads=1)
    with running(specs_of(smollm2, stages, threads=1)) as engines:
        ours = logits_run(engines[0], prompt, tokens)
        assert all(np.array_equal(a, b) for a, b in zip(ours, logits, strict=True))


@pytest.mark.parametrize("edge", [256, 512])
def test_logits_stay_bit_equal_when_the_context_grows_past_a_bucket(
    smollm2: str, oracle: Callable[[str], LlamaCpp], edge: int
) -> None:
    llama = oracle("Q4_1")
    prompt = np.random.default_rng(edge).integers(0, llama.vocab, edge - 4).tolist()
    tokens, logits = oracle_run(llama, prompt, 9)
    with running(specs_of(smollm2, [(1,)])) as (engine,):
        ours = logits_run(engine, prompt, tokens)
        assert all(np.array_equal(a, b) for a, b in zip(ours, logits, strict=True))


def test_sequences_run_together_as_they_run_alone(smollm2: str) -> None:
    prompts = [[1, 2, 3], list(range(40, 90)), [7]]
    with running(specs_of(smollm2, [(1,), (1,)])) as engines:
        alone = [greedy_run(engines[0], p, 6, 7) for p in prompts]
        assert greedy_together(engines[0], prompts, 6) == alone


def test_a_prompt_in_parts_is_replayed_bit_for_bit(smollm2: str) -> None:
    with running(specs_of(smollm2, [(1,)])) as (engine,):
        assert engine.step([Step(0, [5, 6, 7], 0, None)]) == [None]
        first = engine.logits(Step(0, [8], 3, None))
        engine.step([Step(0, [9, 10], 4, None)])
        assert np.array_equal(engine.logits(Step(0, [8], 3, None)), first)  # back to position 3
