"""What a job made, written where its node will find it: a PEFT folder of a LoRA with llama.cpp's file of it,
or the files of a kind that no other program knows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from edged import ConfigError, EngineError

from .._tensors import adapters

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "meta.json"
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


def write_own(folder: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A new folder of edged's own `kind`, which is beside the adapter and in its configuration, too. What
    stood there goes: a run ended between two files. EngineError, code "disk", where it cannot be."""
    files = {
        CONFIG: (json.dumps({**config, "edged_kind": kind}, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS: safetensors.numpy.save({name: tensors[name] for name in sorted(tensors)}),
        META: json.dumps({"kind": kind}).encode(),
    }
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise EngineError(
            f"expected to write an adapter at {folder}; {error.strerror}",
            remedy="free disk space there, then go on with --resume",
            code="disk",
        ) from error
