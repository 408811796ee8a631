"""What goes wrong is named, and what was kept stays whole."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edged_plugins._training import checkpoints as _checkpoints
from rig import finished, kept_by, lora_of, planned, raised, run_threads
from safetensors.numpy import load_file, save_file

from edged import EngineError

Tiny = Callable[[str], tuple[Any, Path]]


def poisoned_at(step: int) -> Callable[[Any], None]:
    """A rank whose adapter has a NaN from a step on."""

    def change(trainer: Any) -> None:
        real = trainer.step

        def poisoned(number: int, report: Any) -> None:
            if number == step:
                with torch.no_grad():
                    trainer.parameters[0].fill_(math.nan)
                    trainer.parameters[1].fill_(1.0)
            real(number, report)

        trainer.step = poisoned

    return change


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("topology", "more"),
    [
        ("local", {}),
        ("label-sharing", {}),
        ("u-shape", {}),
        ("pipeline", {"stages": 1, "micro_batches": 2}),
        ("label-sharing", {"codec": "topk"}),
        ("u-shape", {"codec": "int8"}),
    ],
)
def test_a_loss_that_is_no_number_ends_the_job_at_its_step(
    topology: str, more: dict[str, Any], rank: int, tiny: Tiny, tmp_path: Path
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, topology=topology, steps=4, **more)
    rank = min(rank, len(plan.specs) - 1)
    error = raised(run_threads(plan, changes={rank: poisoned_at(2)}))
    assert isinstance(error, EngineError)
    assert error.code == "nan-loss"
    assert "step 2: the loss is nan" in str(error)
    assert all(steps[-1] == 2 for steps in kept_by(plan))  # nothing of the step itself


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(1000))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def of_another_job(path: Path) -> None:
    save_file({f"{name}9": value for name, value in load_file(path).items()}, path, {"words": '{"step": 2}'})


def of_other_shapes(path: Path) -> None:
    state = {name: value.reshape(-1)[:3].copy() for name, value in load_file(path).items()}
    save_file(state, path, {"words": '{"step": 2}'})


def of_another_step(path: Path) -> None:
    save_file(load_file(path), path, {"words": '{"step": 1}'})


def without_words(path: Path) -> None:
    save_file(load_file(path), path, {"words": "[}"})


@pytest.mark.parametrize(
    "damage", [garbage, half, nothing, of_another_job, of_other_shapes, of_another_step, without_words]
)
def test_a_damaged_checkpoint_is_named(damage: Callable[[Path], None], tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny("llama")[1], tmp_path, topology="local", steps=2)
    finished(run_threads(plan))
    damage(plan.folders[0] / "step-2.safetensors")
    error = raised(run_threads(plan, 2))
    assert isinstance(error, EngineError)
    assert error.code == "disk"
    assert "step 2" in str(error)


def test_a_full_disk_ends_the_job_and_leaves_the_earlier_checkpoint_whole(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("llama")[1], tmp_path, steps=3)
    whole = planned(tiny("llama")[1], tmp_path / "whole", steps=3)
    expected = finished(run_threads(whole))
    real, client = os.fsync, str(plan.folders[0])

    def full(file: int) -> None:
        """A file system of its own needs root; a disk that fills says so at fsync at the latest."""
        if os.readlink(f"/proc/self/fd/{file}").startswith(f"{client}/step-2"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoints.os, "fsync", full)
        outcomes = run_threads(plan)
    error = outcomes[0].error
    assert isinstance(error, EngineError)
    assert error.code == "disk"
    assert "No space left" in str(error)
    assert kept_by(plan)[0] == [1]
    assert not list(tmp_path.rglob("*.making"))
    resumed = finished(run_threads(plan, 1))
    assert {name: value.tobytes() for name, value in lora_of(resumed).items()} == {
        name: value.tobytes() for name, value in lora_of(expected).items()
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_with_another_model_is_named(rank: int, tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny("llama")[1], tmp_path).changed(rank, model_sha256="1" * 64)
    outcomes = run_threads(plan)
    error = raised(outcomes)
    assert isinstance(error, EngineError)
    assert error.code == "model-differs"
    assert any(name in str(error) for name in ("client0", "server"))
    assert not any(outcome.losses for outcome in outcomes)


def test_a_peer_with_other_settings_is_named(tiny: Tiny, tmp_path: Path) -> None:
    plan = planned(tiny("llama")[1], tmp_path)
    other = plan.changed(1, settings={**plan.plan.settings, "learning_rate": 0.5})
    error = raised(run_threads(other))
    assert isinstance(error, EngineError)
    assert error.code == "job-differs"
