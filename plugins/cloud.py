"""Engine `cloud`: a model's tokens from an OpenAI-compatible endpoint that the profile names.

For the strategy `cloud`, which otherwise takes guests' nodes. The role is this node's own, its worker asks
the endpoint for the text and gives back tokens of the model, by the model's own vocabulary; so a job may go
on elsewhere, or come from there. The endpoint sees the prompt, which is why a private job never gets here
(docs/security.md).

It offers nothing until the profile names it, and all of this:

    [plugin.cloud]
    endpoint = "https://api.example.org/v1"
    key_file = "/home/me/.config/edged/cloud.key"
    ttft = "700ms"
    tpot = "15ms"
    models = { "smollm2-135m-instruct-q4_1" = "HuggingFaceTB/SmolLM2-135M-Instruct" }

It does not know chat-only endpoints, the exact numerics, top_k (no part of that interface), proxies, or what
the endpoint keeps. This module is light: the engine is loaded in a worker only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from edged import EngineEntry, Predicted, hookimpl

from ._cloud_settings import read, seconds_of

_ENGINE = "edged_plugins._cloud_engine"


@hookimpl
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:
    if not settings:
        return []
    chosen = read(settings)
    joules = chosen.joules_per_token
    stated = Predicted(
        ttft_ms=1000 * seconds_of(chosen, "ttft"),
        tpot_ms=1000 * seconds_of(chosen, "tpot"),
        joules_per_token=joules,
        bytes_per_token=0,  # what is sent is the prompt, once
        joules_source=None if joules is None else "estimated",
    )
    return [
        EngineEntry(
            name="cloud",
            load=f"{_ENGINE}:load",
            describe=f"{_ENGINE}:describe",
            measure=f"{_ENGINE}:measure",
            check=f"{_ENGINE}:check",
            ranges=f"{_ENGINE}:ranges",
            settings=dataclasses.asdict(chosen),
            takes=("shard", "llama_cpp"),
            strategies=("cloud",),
            numerics=("fast",),
            remedy="use --strategy cloud, or load another engine for this model",
            models=tuple(chosen.models),
            stated=stated,
        )
    ]
