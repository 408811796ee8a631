"""What a job over all weights leaves, written where its node will find it: a table of seeds, and whose base
it moves. `personal_lora._whole` says what the configuration has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from edged import EngineError

CONFIG, TENSORS, META = "adapter_config.json", "adapter_model.safetensors", "meta.json"


def write_seeds(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """An adapter of kind "seeds", its `tensors` F32. EngineError, code "disk", where it cannot be."""
    arrays = {name: np.ascontiguousarray(value, "<f4") for name, value in sorted(tensors.items())}
    files = {
        CONFIG: (json.dumps({**config, "edged_kind": "seeds"}, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS: safetensors.numpy.save(arrays),
        META: json.dumps({"kind": "seeds"}).encode(),
    }
    shutil.rmtree(folder, ignore_errors=True)  # of a run that ended between two files
    try:
        folder.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise EngineError(
            f"expected to write the table at {folder}; {error.strerror}",
            remedy="free disk space there, then go on with --resume",
            code="disk",
        ) from error
