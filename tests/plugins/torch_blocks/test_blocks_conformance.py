"""Every family's blocks, cut anywhere, compute what transformers' whole model with PEFT computes."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from blocks_rig import CONFIGS, LAYERS, gradients, loss_of, random_lora, rows, through
from edged_plugins._tensors.families import FAMILIES
from edged_plugins.torch_blocks._engine import Blocks, open_blocks
from edged_plugins.torch_blocks._span import PREFIX, Span
from transformers.pytorch_utils import Conv1D

Tiny = Callable[[str], tuple[Any, Path]]
R, ALPHA = 3, 5.0
CUTS: list[tuple[int, ...]] = [(), (0, 1, 2, 3, 4), (2,)]  # between all blocks, the embedding and the head
DIFFERENT = ("llama", "gpt2", "bloom")  # one with rope, one with other linear layers, one with ALiBi


def cut(blocks: Blocks, at: tuple[int, ...], **more: Any) -> list[Span]:
    """All of a model as spans that meet at these blocks."""
    edges = [0, *at, LAYERS]
    return [
        blocks.span(a, b, embed=i == 0, head=i == len(at), **more)
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapted(family: str, tiny: Tiny) -> Any:
    """Transformers' model with PEFT's LoRA on all its linear layers, of which none is zero."""
    model, path = tiny(family)
    config = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=list(FAMILIES[family].targets), fan_in_fan_out=family == "gpt2"
    )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT's use of transformers
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    span = open_blocks(str(path)).span(0, LAYERS)
    span.add_lora(r=R, alpha=ALPHA, targets=FAMILIES[family].targets, seed=0)
    state = random_lora(span)
    found = peft.set_peft_model_state_dict(wrapped, state)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora_" in name]
    return wrapped, state


def test_spans_at_any_cut_give_the_whole_models_logits_and_gradients(
    family: str, tiny: Tiny, adapted: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    wrapped, state = adapted
    ids = rows()
    theirs = wrapped(input_ids=ids, use_cache=False).logits
    loss_of(theirs, ids).backward()
    expected = {
        name.replace(".default", ""): p.grad for name, p in wrapped.named_parameters() if p.requires_grad
    }
    assert expected.keys() == state.keys()
    blocks = open_blocks(str(tiny(family)[1]))
    for at in CUTS:
        spans = cut(blocks, at)
        for span in spans:
            span.add_lora(r=R, alpha=ALPHA, targets=blocks.targets, seed=0)
            span.set_lora(state)
        ours = through(spans, ids)
        torch.testing.assert_close(
            ours, theirs, rtol=1e-6, atol=2e-6, msg=lambda m, at=at: f"cut at {at}: {m}"
        )
        loss_of(ours, ids).backward()
        found = gradients(spans)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_family_names_every_linear_layer_that_lora_can_take(family: str, tiny: Tiny) -> None:
    model, _ = tiny(family)
    record = FAMILIES[family]
    blocks = getattr(getattr(model, record.base), record.layers)
    linear = {
        name.rpartition(".")[2]
        for name, module in blocks.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    assert linear == set(record.targets)


@pytest.mark.parametrize("family", DIFFERENT)
def test_checkpointing_changes_no_gradient(family: str, tiny: Tiny) -> None:
    ids, found = rows(), []
    for checkpointing in (False, True):
        span = open_blocks(str(tiny(family)[1])).span(0, LAYERS, embed=True, head=True)
        span.add_lora(r=R, alpha=ALPHA, targets=FAMILIES[family].targets, seed=0)
        span.set_lora(random_lora(span))
        span.checkpointing = checkpointing
        loss_of(span.project(span(ids)), ids).backward()
        found.append(gradients([span]))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_states_are_what_each_block_gives_and_the_norm_stands_apart(family: str, tiny: Tiny) -> None:
    blocks = open_blocks(str(tiny(family)[1]))
    ids = rows()
    with torch.no_grad():
        states = blocks.span(0, LAYERS, embed=True, head=True).states(ids)
        model = tiny(family)[0]
        theirs = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == LAYERS + 1
    for ours, expected in zip(states[:-1], theirs[:-1], strict=True):  # transformers' last is after the norm
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("family", DIFFERENT)
def test_bf16_weights_are_rounded_once_and_all_else_is_f32(family: str, tiny: Tiny) -> None:
    ids = rows()
    path = tiny(family)[1]
    spans = cut(open_blocks(str(path)), (2,), dtype="bf16")
    kept = {name: p for span in spans for name, p in span.named_parameters()}
    assert {p.dtype for p in kept.values() if p.ndim > 1} == {torch.bfloat16}
    assert {p.dtype for p in kept.values() if p.ndim == 1} == {torch.float32}
    plain = cut(open_blocks(str(path)), (2,))
    rounded = {name: p.float() for name, p in kept.items()}
    found = []
    for each in (spans, plain):
        for span in each:
            if span is plain[0] or span is plain[1]:
                span.load_state_dict({n: rounded[n] for n in dict(span.named_parameters())})
            span.add_lora(r=R, alpha=ALPHA, targets=FAMILIES[family].targets, seed=0)
            span.set_lora(random_lora(span))
            assert {p.dtype for p in span.trainable()} == {torch.float32}
        logits = through(each, ids)
        loss_of(logits, ids).backward()
        found.append((logits.detach(), gradients(each)))
    (ours, narrow), (theirs, wide) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, gradient in narrow.items():
        torch.testing.assert_close(gradient, wide[name], rtol=1e-4, atol=1e-5)


def test_lora_starts_alike_in_every_cut(tiny: Tiny) -> None:
    blocks = open_blocks(str(tiny("llama")[1]))
    whole, *parts = cut(blocks, ()) + cut(blocks, (1, 3))
    for span in (whole, *parts):
        span.add_lora(r=R, alpha=ALPHA, targets=["q_proj", "down_proj"], seed=4)
    joined = {name: value for span in parts for name, value in span.lora().items()}
    assert list(joined) == list(whole.lora())
    for name, value in whole.lora().items():
        assert torch.equal(value, joined[name])
        assert not value.any() if "lora_B" in name else value.abs().max() <= value.shape[1] ** -0.5
    starts = [value for name, value in whole.lora().items() if "lora_A" in name and "q_proj" in name]
    assert not torch.equal(starts[0], starts[1])  # each block its own
    other = blocks.span(0, 1)
    other.add_lora(r=R, alpha=ALPHA, targets=["q_proj"], seed=5)
    assert not torch.equal(other.lora()[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"], starts[0])


def test_adding_lora_draws_nothing_from_the_global_random_numbers(tiny: Tiny) -> None:
    span = open_blocks(str(tiny("llama")[1])).span(1, 2)
    before = torch.random.get_rng_state()
    span.add_lora(r=R, alpha=ALPHA, targets=["q_proj"], seed=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_lora_changes_nothing_and_only_lora_learns(tiny: Tiny) -> None:
    ids = rows()
    (span,) = cut(open_blocks(str(tiny("gpt2")[1])), ())
    before = span(ids)
    span.add_lora(r=R, alpha=ALPHA, targets=["c_attn"], seed=4)
    assert torch.equal(span(ids), before)
    assert [p for p in span.parameters() if p.requires_grad] == span.trainable()


def test_the_base_layers_are_found_before_and_after_lora(tiny: Tiny) -> None:
    span = open_blocks(str(tiny("llama")[1])).span(2, 3)
    before = {name: getattr(*place) for name, place in span.linears(["q_proj", "up_proj"]).items()}
    assert list(before) == ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"]
    span.add_lora(r=R, alpha=ALPHA, targets=["q_proj"], seed=4)
    after = {name: getattr(*place) for name, place in span.linears(["q_proj", "up_proj"]).items()}
    assert after == before


def test_dropout_is_loras_alone(tiny: Tiny) -> None:
    ids = rows()
    (span,) = cut(open_blocks(str(tiny("gpt2")[1])), ())  # whose own dropout is a tenth
    span.train()
    assert torch.equal(span(ids), span(ids))
    span.add_lora(r=R, alpha=ALPHA, targets=["c_attn"], seed=4, dropout=0.5)
    span.set_lora(random_lora(span))
    assert not torch.equal(span(ids), span(ids))
    span.eval()
    assert torch.equal(span(ids), span(ids))
