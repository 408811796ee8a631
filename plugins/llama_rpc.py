"""Engine `llama_rpc`: any model of libllama's, its layers spread over several nodes' memory.

llama.cpp's own RPC backend, inside workers, its bytes inside the plan's encrypted channel. For models
that no node holds alone and that the shard engine does not cut; layers run one after the other, so it
is no faster than one node. A job that loses a node starts again.

It offers nothing until the profile says `[plugin.llama_rpc] allow = true`: the RPC server believes
whatever it is sent, down to raw addresses, so every node whose jobs this one takes could run its own
code here; and while it runs, other users of this machine can reach its loopback port
(docs/security.md). It does not know tensor slices, the exact numerics or recovery in place.

This module is light; libllama is loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edged import ConfigError, EngineEntry, hookimpl

from . import _llama_settings


@dataclass(frozen=True, slots=True)
class Settings(_llama_settings.Settings):
    """`[plugin.llama_rpc]` of a profile."""

    allow: bool = False  # llama.cpp calls its RPC backend insecure: see above
    timeout_s: float = 30.0  # base of a peer's silence that ends the worker; bytes waited for come on top


@hookimpl
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:
    chosen = _llama_settings.read("llama_rpc", settings, Settings)
    if type(chosen.allow) is not bool or not chosen.timeout_s > 0:
        raise ConfigError("expected plugin.llama_rpc.allow of true or false, and timeout_s above 0")
    if not chosen.allow:
        return []
    return [
        EngineEntry(
            name="llama_rpc",
            load="edged_plugins._llama_rpc_engine:load",
            describe="edged_plugins._llama_describe:describe",
            measure="edged_plugins._llama_describe:measure",
            check="edged_plugins._llama_rpc_engine:check",
            ranges="edged_plugins._llama_rpc_engine:ranges",
            settings=dataclasses.asdict(chosen),
            takes=("llama_cpp", "shard"),
            strategies=("layers",),
            numerics=("fast",),
            remedy="use --strategy layers, or load another engine for this model",
        )
    ]
