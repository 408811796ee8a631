"""The adapter that a job made, written where the collector's node will find it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edged import ConfigError

from .._tensors import adapters
from ._job import Job

GGUF = "adapter.gguf"
GGUF_MAGIC = b"GGUF"
META = "meta.json"  # the kind of what is no LoRA
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
    adapters.write_peft(
        folder,
        tensors,
        r=job.r,
        alpha=job.alpha,
        targets=job.target_modules,
        base_name=model,
        fan_in_fan_out=is_transposed,
    )
    with open(base, "rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            return
    try:
        adapters.to_gguf(folder, base, folder / GGUF)
    except ConfigError as error:
        if error.code != "no-gguf-adapter":
            raise
