"""A LoRA that a job made, written where its node will find it: a PEFT folder, and llama.cpp's file of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edged import ConfigError

from .._tensors import adapters

GGUF = "adapter.gguf"
GGUF_MAGIC = b"GGUF"


def write_lora(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    r: int,
    alpha: float,
    targets: Sequence[str],
    is_transposed: bool,
    base: str,
    model: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """A new PEFT folder for the model named `model`; in it adapter.gguf where `base` is a GGUF for which
    llama.cpp has such a file. `tensors` by PEFT's names; `is_transposed`: of GPT-2's kind of layers;
    `extra`: more of PEFT's configuration."""
    adapters.write_peft(
        folder,
        tensors,
        r=r,
        alpha=alpha,
        targets=targets,
        base_name=model,
        fan_in_fan_out=is_transposed,
        extra=extra,
    )
    with open(base, "rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            return
    try:
        adapters.to_gguf(folder, base, folder / GGUF)
    except ConfigError as error:
        if error.code != "no-gguf-adapter":
            raise
