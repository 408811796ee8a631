"""What the engines over libllama are told by a profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edged import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """`[plugin.llama_cpp]` of a profile."""

    sequences_max: int = 32  # bound of the sequences one worker holds, each with its context in memory


def read(plugin: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their defaults; ConfigError on an unknown or impossible one."""
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"no setting plugin.{plugin}.{name}; known: {', '.join(known)}")
    chosen = Settings(**settings)
    if type(chosen.sequences_max) is not int or chosen.sequences_max < 1:
        raise ConfigError(
            f"expected plugin.{plugin}.sequences_max of 1 or more; {chosen.sequences_max!r} came"
        )
    return dataclasses.asdict(chosen)
