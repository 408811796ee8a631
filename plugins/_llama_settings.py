"""What the engines over libllama are told by a profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from edged import ConfigError

SEQUENCES_MAX = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """`[plugin.llama_cpp]` of a profile."""

    sequences_max: int = SEQUENCES_MAX  # held by one worker, each with its context in memory


S = TypeVar("S", bound=Settings)


def read(plugin: str, settings: Mapping[str, Any], kind: type[S]) -> S:
    """The settings as `kind`; ConfigError on an unknown or impossible one."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"no setting plugin.{plugin}.{name}; known: {', '.join(known)}")
    chosen = kind(**settings)
    if type(chosen.sequences_max) is not int or chosen.sequences_max < 1:
        raise ConfigError(
            f"expected plugin.{plugin}.sequences_max of 1 or more; {chosen.sequences_max!r} came"
        )
    return chosen
