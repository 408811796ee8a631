"""Commands of the contract that this version does not have yet: their options, and an honest answer."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from ..errors import ConfigError
from .options import HomeOption, JsonOption

Action = Annotated[str | None, typer.Argument(metavar="[ACTION]")]
Words = Annotated[list[str] | None, typer.Argument(metavar="[NAME] [FILE]")]


def adapters(
    action: Action = None, names: Words = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """LoRA adapters: ls, export NAME DIR, rm NAME. Not part of this version."""
    _refuse("adapters")


def _refuse(name: str) -> NoReturn:
    raise ConfigError(
        f"edged {name} is not part of this version", remedy="see `edged --help`", code="not-there"
    )
