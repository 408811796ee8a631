"""The shard engine: ggml, driven from Python, running a GGUF or any part of it.

Provides one engine, `shard`: the whole model, a range of its layers, or a tensor slice of those (a
share of the heads, the feed-forward's columns and the vocabulary), at llama.cpp's speed, with as many
LoRA adapters over the same weights as jobs name. It does not know: architectures without a record in
`_architectures`, other devices than the CPU, adapters of other kinds, how plans are made, or what carries
its messages (it is handed a `Channel`).

This module is light; ggml and numpy are loaded by the underscore modules, in a worker only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edged import ConfigError, EngineEntry, hookimpl

WINDOW_BYTES = 18 << 20  # two units of weights, which `_window` bounds at 8 MiB, and page edges
Wire = Literal["auto", "f32", "f16", "q8"]


@dataclass(frozen=True, slots=True)
class Settings:
    """`[plugins.shard]` of a profile."""

    # Codec of the partial sums between tensor ranks; the setting of a group's first rank rules. auto: f32, or
    # a narrower one where the measured link makes it worth its rounding. Exact numerics take f32.
    wire: Wire = "auto"
    sequences_max: int = 32  # bound of the KV caches one worker holds
    timeout_s: float = 30.0  # base of every receive; work and bytes waited for come on top
    threads: int = 0  # of the micro-benchmark, from the host; 0: every core this process may use

    def __post_init__(self) -> None:
        if self.wire not in get_args(Wire):
            raise ConfigError(f"shard: wire is one of {', '.join(get_args(Wire))}, not {self.wire!r}")
        if self.sequences_max < 1 or self.timeout_s <= 0 or self.threads < 0:
            raise ConfigError("shard: sequences_max and timeout_s are above 0, threads is 0 or more")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Settings:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"shard: unknown setting {name!r}; known: {', '.join(known)}")
        return cls(**settings)


@hookimpl
def edged_engines(settings: Mapping[str, Any]) -> Sequence[EngineEntry]:
    chosen = dataclasses.asdict(Settings.read(settings))
    if not chosen["threads"]:
        del chosen["threads"]  # the host's own count goes in here
    return [
        EngineEntry(
            name="shard",
            load="edged_plugins.shard._engine:load",
            describe="edged_plugins.shard._describe:describe",
            measure="edged_plugins.shard._measure:measure",
            check="edged_plugins.shard._check:check",
            ranges="edged_plugins.shard._ranges:ranges",
            adapt="edged_plugins._tensors.adapters:adapt",
            window_bytes=WINDOW_BYTES,
            adapters=True,
            swaps=True,
            blocks="edged_plugins.shard._blocks:load",
            settings=chosen,
        )
    ]
