"""The same of a real model: SmolLM2-135M, whose file transformers reads by its own code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rig import (
    Outcome,
    Processes,
    assert_same_bits,
    finished,
    gradients_of,
    largest_difference,
    plain_loop,
    planned,
    small_start,
)
from transformers import AutoModelForCausalLM
from transformers.utils import logging

pytestmark = pytest.mark.slow

EXACT = 1e-6
TEXTS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name a colour of the rainbow.", "Green is one of its seven colours."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What do bees make?", "Bees make honey from nectar."),
    ("Where does the sun rise?", "It rises in the east."),
]
CUTS = [("label-sharing", cut) for cut in (1, 3, 15, 29)] + [("u-shape", cut) for cut in (1, 3, 15, 28)]


@pytest.fixture(scope="module")
def smol_model(smol: Path) -> Any:
    logging.disable_progress_bar()  # a thread of its own
    model = AutoModelForCausalLM.from_pretrained(str(smol.parent), gguf_file=smol.name, dtype="float32")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in TEXTS))
    return path


def start_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {name: value for outcome in outcomes for name, value in outcome.start.items()}


@pytest.fixture(scope="module")
def unsplit() -> dict[str, Any]:
    """The start and the gradient, which are alike for every cut: filled by the first."""
    return {}


@pytest.mark.parametrize(("topology", "cut"), CUTS)
def test_a_split_gradient_is_the_unsplit_ones(
    topology: str,
    cut: int,
    smol: Path,
    smol_model: Any,
    unsplit: dict[str, Any],
    texts: Path,
    processes: Processes,
    tmp_path: Path,
) -> None:
    plan = planned(
        smol, tmp_path, rows=[texts], topology=topology, cut=cut, steps=1, batch_size=1, max_length=64
    )
    outcomes = finished(processes.run(plan, change=small_start).outcomes)
    if not unsplit:
        unsplit["start"] = start_of(outcomes)
        unsplit["gradient"] = plain_loop(smol_model, plan, unsplit["start"]).gradients[0]
    assert_same_bits(start_of(outcomes), unsplit["start"])
    plain = unsplit["gradient"]
    assert largest_difference(gradients_of(outcomes), plain) <= EXACT
    assert all(abs(value).max() > 0 for value in plain.values())


def test_twenty_steps_follow_a_plain_loop_on_the_same_batches(
    smol: Path, smol_model: Any, texts: Path, processes: Processes, tmp_path: Path
) -> None:
    settings = {"steps": 20, "batch_size": 1, "max_length": 64, "learning_rate": 5e-4, "eval_every": 0}
    plan = planned(smol, tmp_path, rows=[texts], cut=3, checkpoint_every=20, **settings)
    outcomes = finished(processes.run(plan).outcomes)
    plain = plain_loop(smol_model, plan, start_of(outcomes))
    assert outcomes[1].losses == pytest.approx(plain.losses, abs=1e-4)
    assert len(set(plain.losses)) == 20
