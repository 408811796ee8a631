"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from ..errors import ConfigError
from ..types import RIGHTS, Right, Zone

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", help="The node's folder. Default: EDGED_HOME, your own, the system's."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
JsonLinesOption = Annotated[bool, typer.Option("--jsonl", help="One JSON line an event.")]
ModelOption = Annotated[str, typer.Option("--model", "-m", metavar="M", help="A model's name or hash.")]
StrategyOption = Annotated[
    str, typer.Option(metavar="S", help="auto, local, remote, layers, tensor, hybrid or cloud.")
]
AdapterOption = Annotated[str | None, typer.Option(metavar="A", help="A LoRA adapter.")]
PolicyOption = Annotated[str | None, typer.Option(metavar="P", help="What chooses among priced plans.")]
NodesOption = Annotated[str | None, typer.Option(metavar="A,B", help="Names or ids, in rank order.")]
SharesOption = Annotated[
    str | None, typer.Option(metavar="2:1", help="Parts of the work, one a node. Default: by measured speed.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Share no worker with another's job.")]
GuestOption = Annotated[bool, typer.Option("--allow-guest", help="Guests' nodes may help, too.")]
RightsOption = Annotated[str | None, typer.Option(metavar="LIST", help=f"Of {','.join(RIGHTS)}.")]
ZoneOption = Annotated[str | None, typer.Option(metavar="own|guest", help="Whose device it is.")]


def nodes(text: str | None) -> list[str] | None:
    """ "laptop, phone" -> two names, in rank order"""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise ConfigError(
            f"expected --nodes as names with commas between, each once; {text!r} came",
            remedy="write --nodes laptop,phone",
        )
    return names


def shares(text: str | None, names: Sequence[str] | None) -> list[float] | None:
    """ "2:1" -> [2.0, 1.0], one for each of --nodes"""
    if text is None:
        return None
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not parts or not all(math.isfinite(part) and part > 0 for part in parts):
        raise ConfigError(
            f"expected --shares as numbers above 0 with colons between; {text!r} came",
            remedy="write --shares 2:1",
        )
    if names is not None and len(names) != len(parts):
        raise ConfigError(
            f"expected one of --shares for each of --nodes; {len(parts)} came for {len(names)} nodes",
            remedy="give as many shares as nodes",
        )
    return parts


def rights(text: str | None) -> list[Right] | None:
    """ "submit,serve" -> rights; "none" takes all of them away"""
    if text is None:
        return None
    words = [] if text == "none" else [word.strip() for word in text.split(",")]
    known = [right for right in RIGHTS if right in words]
    if len(known) != len(words):
        raise ConfigError(
            f"expected --rights of {', '.join(RIGHTS)}, or none; {text!r} came",
            remedy=f"write --rights {','.join(RIGHTS)}",
        )
    return known


def zone(text: str | None) -> Zone | None:
    if text is None:
        return None
    known: tuple[Zone, ...] = get_args(Zone)
    for name in known:
        if text == name:
            return name
    raise ConfigError(f"expected --zone own or guest; {text!r} came", remedy="own: it is mine")


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ConfigError(
            f"expected {option} {' or '.join(allowed)}; {value!r} came", remedy="use one of these"
        )
    return value


def check_form(as_json: bool, as_lines: bool) -> None:
    if as_json and as_lines:
        raise ConfigError("expected --json or --jsonl; both came", remedy="choose one")


def check_sampling(
    *, n: int, temperature: float, top_k: int = 40, top_p: float = 0.95, seed: int | None = None
) -> None:
    rules = (
        (n >= 1, f"-n of 1 or more; {n} came"),
        (math.isfinite(temperature) and temperature >= 0, f"--temperature of 0 or more; {temperature} came"),
        (top_k >= 0, f"--top-k of 0 or more; {top_k} came"),
        (0 < top_p <= 1, f"--top-p above 0 and at most 1; {top_p} came"),
        (seed is None or 0 <= seed < 2**63, f"--seed from 0 to 2**63 - 1; {seed} came"),
    )
    for holds, expected in rules:
        if not holds:
            raise ConfigError(f"expected {expected}", remedy="mend the argument")
