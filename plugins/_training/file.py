"""The keys of a training job's file: their types and rules, and what is said of a wrong one. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from edged import ConfigError

Rule = tuple[Any, str]  # does it hold, and what is expected
WORDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
REMEDY = "mend the job's file"


def key(default: Any, text: str) -> Any:
    """A field of a job's dataclass; `text` is what `edged config --explain` says of it."""
    return field(default=default, metadata={"text": text})


def check(rules: Sequence[Rule]) -> None:
    """ConfigError of the first rule that does not hold."""
    for holds, expected in rules:
        if not holds:
            raise ConfigError(f"expected {expected}", remedy=REMEDY)


def one_of(job: Any, name: str, known: Sequence[str]) -> Rule:
    value = getattr(job, name)
    return value in known, f"{name} as one of {', '.join(known)}; {value!r} came"


def least(job: Any, name: str, low: float, high: float = math.inf) -> Rule:
    """`low` or more, up to `high`."""
    value = getattr(job, name)
    most = f" to {high:g}" if high < math.inf else " or more"
    return math.isfinite(value) and low <= value <= high, f"{name} of {low:g}{most}; {value!r} came"


def unknown(name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(
        f"no key {name!r} in a training job; {hint}",
        remedy="mend or remove the key; `edged config --explain` lists all",
    )


def typed(name: str, default: Any, value: Any) -> Any:
    """The value, if it is of its default's type; a whole number is a number, too."""
    if isinstance(default, float) and type(value) in (int, float):
        return float(value)
    if type(value) is type(default):
        return value
    raise ConfigError(f"expected {WORDS[type(default)]} for {name}; {value!r} came", remedy=REMEDY)


def server_of(value: Any) -> str:
    """The node of [server]."""
    node = value.get("node") if isinstance(value, Mapping) else value
    if not isinstance(node, str) or (isinstance(value, Mapping) and set(value) != {"node"}):
        raise ConfigError('expected [server] with node = "NAME"', remedy=REMEDY)
    return node


def clients_of(value: Any, known: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of [[clients]], with keys that are known; texts are checked, other values are not."""
    found = []
    for number, entry in enumerate(value if isinstance(value, list | tuple) else [None]):
        if not isinstance(entry, Mapping) or not all(
            isinstance(entry.get(name, ""), str) for name in ("node", "data")
        ):
            raise ConfigError(
                f"expected [[clients]] as tables with node and data; {entry!r} came", remedy=REMEDY
            )
        for name in entry:
            if name not in known:
                raise unknown(f"clients[{number}].{name}", list(known))
        found.append(dict(entry))
    return found


def texts_of(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) and word for word in value):
        raise ConfigError(f"expected a list of texts for {name}; {value!r} came", remedy=REMEDY)
    return tuple(value)
