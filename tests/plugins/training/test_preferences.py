"""Preference tuning: its loss by hand and by autograd, its rows, and a federated job of it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edged_plugins._tensors.rows import Row, encode, read_rows
from edged_plugins._training.preference import Preference, log_probabilities
from edged_plugins._training.rows import Rows
from rig import WORDS, finished, open_blocks, run_threads
from rounds_rig import federated

from edged import ConfigError
from edged.rows import RowCheck

LABELS_IGNORED = -100


def write_pairs(path: Path, count: int = 9, held_out: int = 3, seed: int = 0, **more: Any) -> Path:
    """Pairs whose chosen answers have one word, and whose rejected ones another."""
    chance = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(f"w{chance.choice(WORDS)}" for _ in range(4)),
            "chosen": f"w{WORDS[0]} w{WORDS[1]}",
            "rejected": f"w{WORDS[2]} w{WORDS[3]} w{WORDS[2]}",
        }
        | ({"split": "test"} if number >= count else {})
        | more
        for number in range(count + held_out)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def span_of(tiny: Any, seed: int | None = None) -> Any:
    """The whole model with an adapter: B is zero, or drawn."""
    blocks = open_blocks(str(tiny("llama")[1]))
    span = blocks.span(0, blocks.layers, embed=True, head=True, dtype="f32")
    span.add_lora(r=4, alpha=8.0, targets=["q_proj", "v_proj"], seed=1)
    if seed is not None:
        drawn = torch.Generator().manual_seed(seed)
        state = {n: 0.3 * torch.randn(v.shape, generator=drawn) for n, v in span.lora().items()}
        span.set_lora(state)
    return span.train(False)


def batch_of(swap: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pairs; the first two of their eight ids are the prompt."""
    drawn = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 100, (6, 8), generator=drawn)
    labels = ids.clone()
    labels[:, :2] = LABELS_IGNORED
    labels[4, 6:] = LABELS_IGNORED  # a shorter answer
    order = [3, 4, 5, 0, 1, 2] if swap else range(6)
    return ids[list(order)], labels[list(order)]


def seen_of(span: Any, swap: bool = False) -> tuple[float, dict[str, float]]:
    objective = Preference(0.1)
    loss = objective.summed(span, *batch_of(swap)).item()
    return loss, objective.take()


def test_at_the_start_the_loss_is_ln_2_exactly(tiny: Any) -> None:
    loss, seen = seen_of(span_of(tiny))
    assert loss == pytest.approx(3 * math.log(2), abs=1e-6)
    assert seen == {"wins": 0.0, "margin_up": 0.0, "margin_down": 0.0}


def test_swapped_answers_negate_the_margin(tiny: Any) -> None:
    span = span_of(tiny, seed=2)
    _, seen = seen_of(span)
    _, swapped = seen_of(span, swap=True)
    assert seen["margin_up"] + seen["margin_down"] > 1e-3
    assert swapped["margin_up"] == pytest.approx(seen["margin_down"], abs=1e-5)
    assert swapped["margin_down"] == pytest.approx(seen["margin_up"], abs=1e-5)
    assert swapped["wins"] == 3 - seen["wins"]


def test_loss_and_gradient_are_those_of_the_formula(tiny: Any) -> None:
    """Written out row by row over the whole vocabulary, with another model, never tuned, as the reference."""
    span, reference, beta = span_of(tiny, seed=2), span_of(tiny), 0.1
    ids, labels = batch_of()

    def of(model: Any, row: int) -> torch.Tensor:
        logits = model.project(model(ids[row : row + 1]))[0].log_softmax(-1)
        return sum(
            logits[place - 1, labels[row, place]]
            for place in range(1, 8)
            if labels[row, place] != LABELS_IGNORED
        )

    total = torch.zeros(())
    for pair in range(3):
        better = of(span, pair) - of(reference, pair).detach()
        worse = of(span, 3 + pair) - of(reference, 3 + pair).detach()
        total = total - torch.log(1 / (1 + torch.exp(-beta * (better - worse))))
    expected = torch.autograd.grad(total, span.trainable())
    loss = Preference(beta).summed(span, ids, labels)
    found = torch.autograd.grad(loss, span.trainable())
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_a_bare_span_is_the_model_without_its_adapter_and_leaves_what_is_trained(tiny: Any) -> None:
    span, untuned = span_of(tiny, seed=2), span_of(tiny)
    ids, labels = batch_of()
    span.trainable()[0].requires_grad_(False)
    with torch.no_grad(), span.bare():
        bare = log_probabilities(span, span(ids), labels)
    with torch.no_grad():
        assert torch.equal(bare, log_probabilities(untuned, untuned(ids), labels))
        assert not torch.equal(bare, log_probabilities(span, span(ids), labels))
    assert [each.requires_grad for each in span.trainable()] == [False] + [True] * (len(span.trainable()) - 1)


TALK = [{"role": "user", "content": "Add."}]
GOOD, BAD = ({"role": "assistant", "content": word} for word in ("3", "4"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Add.", "chosen": "3", "rejected": "4"},
        {"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD], "messages": [*TALK, GOOD]},
    ],
    ids=["texts", "messages", "a prompt within"],
)
def test_every_form_of_a_pair_is_read_alike(tmp_path: Path, row: Mapping[str, Any]) -> None:
    line = json.dumps(row).encode()
    check = RowCheck()
    check.feed(line)
    check.end()
    (tmp_path / "rows.jsonl").write_bytes(line)
    (found,) = read_rows(tmp_path / "rows.jsonl", pairs=True)
    assert found == Row(1, (*TALK, GOOD), rejected=(*TALK, BAD))


WRONG = {
    "no rejected answer": {"prompt": "a", "chosen": "b"},
    "no prompt": {"chosen": "b", "rejected": "c"},
    "an empty answer": {"prompt": "a", "chosen": "b", "rejected": ""},
    "a number": {"prompt": "a", "chosen": 5, "rejected": "c"},
    "unlike prompts": {"chosen": [*TALK, GOOD], "rejected": [TALK[0] | {"content": "Sub."}, BAD]},
    "an answer of the user": {"prompt": "a", "chosen": TALK, "rejected": [BAD]},
}


@pytest.mark.parametrize("row", WRONG.values(), ids=WRONG)
def test_what_is_no_pair_is_refused_by_the_store_and_by_the_reader(
    tmp_path: Path, row: Mapping[str, Any]
) -> None:
    line = json.dumps(row).encode()
    check = RowCheck()
    check.feed(line)
    with pytest.raises(ConfigError, match="row 1: expected"):
        check.end()
    (tmp_path / "rows.jsonl").write_bytes(line)
    with pytest.raises(ConfigError, match="row 1: "):
        read_rows(tmp_path / "rows.jsonl", pairs=True)


def test_a_pairs_loss_is_on_both_last_answers_and_batches_have_chosen_rows_first(
    tiny: Any, tmp_path: Path
) -> None:
    tokenizer = open_blocks(str(tiny("llama")[1])).tokenizer
    path = write_pairs(tmp_path / "pairs.jsonl")
    rows = encode(read_rows(path, pairs=True), tokenizer, 32)
    plan = federated(tiny("llama")[1], tmp_path / "job", rows=[path, path], objective="dpo")
    job = plan.load(plan.specs[0], open_blocks(str(plan.path)), None).job
    read = Rows.read(str(path), tokenizer, job, 2, objective="dpo")
    ids, labels = read.batch(0)
    assert ids.shape[0] == 2 * job.batch_size
    for place, index in enumerate(read.batches.indices(0)):
        one = rows[index]
        assert one.rejected is not None
        for at, each in ((place, one), (place + job.batch_size, one.rejected)):
            assert ids[at, : len(each.ids)].tolist() == each.ids.tolist()
            assert labels[at, : len(each.ids)].tolist() == each.labels.tolist()
            assert (labels[at, len(each.ids) :] == LABELS_IGNORED).all()
    assert [batch[0].shape[0] for batch in read.eval_batches()] == [4]


@pytest.mark.parametrize("method", ["fedavg", "fedkseed"])
def test_a_job_of_preferences_learns_to_prefer(method: str, tiny: Any, tmp_path: Path) -> None:
    rows = [write_pairs(tmp_path / f"pairs{seed}.jsonl", seed=seed) for seed in range(2)]
    more: dict[str, Any] = {"rounds": 3, "local_steps": 4, "learning_rate": 1e-2}
    if method == "fedkseed":
        more |= {"rounds": 2, "local_steps": 24, "learning_rate": 1e-3, "seeds": 64}
    plan = federated(
        tiny("llama")[1], tmp_path / "job", rows=rows, method=method, objective="dpo", beta=0.5, **more
    )
    outcomes = finished(run_threads(plan, keep="messages"))
    evals = [values for kind, _, values in outcomes[-1].reports if kind == "eval"]
    steps = [values for kind, _, values in outcomes[-1].reports if kind == "step"]
    assert evals[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (evals[0]["accuracy"], evals[0]["margin"]) == (0, 0)
    assert evals[-1]["loss"] < evals[0]["loss"]
    assert evals[-1]["margin"] > 0
    assert evals[-1]["accuracy"] > (0.5 if method == "fedavg" else 0)
    assert all(0 <= values["accuracy"] <= 1 for values in steps)
    assert steps[-1]["margin"] > steps[0]["margin"]
    told = [frames for _, header, frames in outcomes[-1].received if header["k"] == "told"]
    assert {len(b"".join(frames)) for frames in told} == {8 * 14}


@pytest.mark.parametrize(
    ("objective", "says"), [("dpo", "chosen and rejected"), ("sft", 'objective = "dpo"')]
)
def test_rows_of_the_other_kind_are_refused_before_a_round(
    objective: str, says: str, tiny: Any, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    rows = None if objective == "dpo" else [pairs, pairs]
    plan = federated(tiny("llama")[1], tmp_path / "job", rows=rows or (), objective=objective)
    with pytest.raises(ConfigError, match=says):
        plan.load(plan.specs[0], open_blocks(str(plan.path)), None)
