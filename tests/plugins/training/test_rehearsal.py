"""Rehearsal against forgetting: which rows a batch has, and what it does to what was learnt before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edged_plugins._training.rows import Rows
from rig import WORDS, finished, open_blocks, run_threads
from rounds_rig import federated

from edged import ConfigError
from edged.rows import RowCheck


def write_tasks(path: Path, new: int = 10, old: int = 7, held_out: int = 3, is_marked: bool = True) -> Path:
    """Two tasks with the same prompts and other answers; rows of the older one are marked."""
    rows = [
        {
            "instruction": f"w{WORDS[number % 5]} w{WORDS[3 + number % 3]}",
            "output": f"w{WORDS[task]} w{WORDS[task + 2]}",
        }
        | ({"rehearsal": True} if task and is_marked else {})
        | ({"split": "test"} if number >= count else {})
        for task, count in enumerate((new, old))
        for number in range(count + held_out)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Reading:
    batch_size, max_length, loss_on, seed = 4, 32, "answer", 3


def read(tiny: Any, path: Path, part: float = 0.25) -> Rows:
    tokenizer = open_blocks(str(tiny("llama")[1])).tokenizer
    return Rows.read(str(path), tokenizer, Reading(), 2, rehearsal=part)


def test_every_batch_has_the_part_and_every_row_has_its_turn(tiny: Any, tmp_path: Path) -> None:
    rows = read(tiny, write_tasks(tmp_path / "rows.jsonl"))
    batches = [rows.batches.indices(step) for step in range(70)]
    assert all(len(batch) == 4 and sum(index >= 10 for index in batch) == 1 for batch in batches)
    counts = Counter(index for batch in batches for index in batch)
    assert {counts[index] for index in range(10)} == {21}  # 70 x 3 / 10
    assert {counts[index] for index in range(10, 17)} == {10}  # 70 x 1 / 7
    assert len({tuple(batch[3:]) for batch in batches[:7]}) == 7
    assert rows.count == 10
    assert (len(rows.held_out), len(rows.rehearsed)) == (2, 2)


def test_a_batch_is_a_function_of_the_step_alone(tiny: Any, tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "rows.jsonl")
    one, other = read(tiny, path), read(tiny, path)
    backwards = {step: other.batch(step) for step in reversed(range(9))}
    for step in range(9):
        for mine, again in zip(one.batch(step), backwards[step], strict=True):
            np.testing.assert_array_equal(mine, again)
    assert one.digest == other.digest


@pytest.mark.parametrize(("counts", "says"), [((5, 0), "0 and 5 came"), ((0, 5), "5 and 0 came")])
def test_rows_of_one_kind_alone_are_refused(
    counts: tuple[int, int], says: str, tiny: Any, tmp_path: Path
) -> None:
    path = write_tasks(tmp_path / "rows.jsonl", *counts, held_out=0)
    with pytest.raises(ConfigError, match=says):
        read(tiny, path)


def test_a_mark_is_true_or_false_for_the_store_and_the_reader(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "rehearsal": "yes"}')
    with pytest.raises(ConfigError, match="row 1: "):
        read(tiny, path)
    check = RowCheck()
    check.feed(path.read_bytes())
    with pytest.raises(ConfigError, match="row 1: "):
        check.end()


def test_what_is_rehearsed_is_forgotten_less(tiny: Any, tmp_path: Path) -> None:
    """The same job on the same new rows, with marked rows in each batch and with too few to matter."""

    def old_loss(name: str, part: float) -> list[float]:
        rows = [write_tasks(tmp_path / f"{name}{client}.jsonl") for client in range(2)]
        plan = federated(
            tiny("llama")[1],
            tmp_path / name,
            rows=rows,
            rounds=2,
            local_steps=6,
            batch_size=8,
            learning_rate=1e-2,
            rehearsal=part,
        )
        outcomes = finished(run_threads(plan))
        return [v["rehearsal_loss"] for kind, _, v in outcomes[-1].reports if kind == "eval"]

    much, little = old_loss("much", 0.5), old_loss("little", 1 / 8)
    assert much[0] == little[0]
    assert much[-1] < little[-1]
