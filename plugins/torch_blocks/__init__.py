"""The engine of trainings: transformers' own blocks on PyTorch, any run of them, with LoRA.

Provides one engine, `torch_blocks`: opens a GGUF, or a packed safetensors file, of nine model families and
gives spans of its blocks with frozen weights that gradients flow through. It does not know how to
generate (no strategy may choose it), how a training divides its work, or what carries hidden states
between nodes. Blocks are on the GPU where CUDA has one, which was never tried for want of a device.

This module is light; torch, transformers and peft are loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from edged import ConfigError, EngineEntry, hookimpl

NEEDED = ("torch", "transformers", "peft")


@hookimpl
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:
    if settings:
        raise ConfigError(f"torch_blocks: unknown setting {min(settings)!r}; it has none")
    return [
        EngineEntry(
            name="torch_blocks",
            load="edged_plugins.torch_blocks._engine:load",
            describe="edged_plugins.torch_blocks._describe:describe",
            measure="edged_plugins.torch_blocks._describe:measure",
            check="edged_plugins.torch_blocks._describe:check",
            takes=("shard", "llama_cpp", "llama_rpc"),  # and so it describes last: a GGUF stays theirs
            rewrite="edged_plugins.torch_blocks._rewrite:rewrite",
            pack="edged_plugins.torch_blocks._packing:pack",
            strategies=(),
            numerics=("fast",),
            remedy="this engine trains; to generate, add the model as a GGUF",
            lacks=", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None),
        )
    ]
