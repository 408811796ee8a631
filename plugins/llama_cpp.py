"""Engine `llama_cpp`: libllama itself, for every architecture that the shard engine does not run.

A model runs whole, on one node, in a worker: Falcon, StableLM, Phi-2, mixtures of experts, Mamba and
whatever else this libllama knows. It does not know parts of a model (`llama_rpc` spreads one over
several nodes), the exact numerics, other devices than the CPU, or images. A LoRA adapter is libllama's.

This module is light; libllama and numpy are loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edged import EngineEntry, hookimpl

from ._llama_settings import Settings, read


@hookimpl
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:
    return [
        EngineEntry(
            name="llama_cpp",
            load="edged_plugins._llama_engine:load",
            describe="edged_plugins._llama_describe:describe",
            measure="edged_plugins._llama_describe:measure",
            check="edged_plugins._llama_describe:check",
            adapt="edged_plugins._tensors.adapters:adapt",
            settings=dataclasses.asdict(read("llama_cpp", settings, Settings)),
            takes=("shard",),
            adapters=True,
            strategies=("local", "remote", "cloud"),
            numerics=("fast",),
            remedy='use --strategy local, remote or cloud, or load "llama_rpc" and set '
            "`[plugin.llama_rpc] allow = true` on every node",
        )
    ]
