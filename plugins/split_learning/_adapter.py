"""The adapter that a job made, written where the collector's node will find it: a PEFT folder of a LoRA or of
prompts, or the two files of a side network, which no other program knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .._tensors import adapters
from .._training.adapter_folder import META, write_lora, write_own
from ._job import Job

PROMPTS = "prompt_embeddings"  # PEFT's name of them


def write(
    folder: Path, tensors: Mapping[str, np.ndarray], job: Job, *, is_transposed: bool, base: str, model: str
) -> None:
    """A PEFT folder, of LoRA or of prompts, for the model named `model`; beside it adapter.gguf where `base`
    is a GGUF for which llama.cpp has such a file. `is_transposed`: of GPT-2's kind of linear layers."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that ended between two files
    if job.prompts:
        adapters.write_prompts(folder, tensors[PROMPTS], base_name=model)
        (folder / META).write_text(json.dumps({"kind": "prompts"}))
        return
    if job.topology == "parallel-adapters":
        _write_parallel(folder, tensors, job, model)
        return
    write_lora(
        folder,
        tensors,
        r=job.r,
        alpha=job.alpha,
        targets=job.target_modules,
        is_transposed=is_transposed,
        base=base,
        model=model,
    )


def _write_parallel(folder: Path, tensors: Mapping[str, np.ndarray], job: Job, model: str) -> None:
    """The side network (`_side.py`): its tensors, and a configuration in which `r` is its width."""
    planes, hidden, width = tensors["side.down"].shape
    config = {
        "base_model_name_or_path": model,
        "hidden": hidden,
        "layers": planes - 1,
        "lora_alpha": width,  # what every adapter is listed with; it counts once
        "r": width,
        "seed": job.seed,
        "width": width,
    }
    write_own(folder, "parallel", config, tensors)
