"""Commands of the contract that this version does not have yet: their options, and an honest answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..errors import ConfigError
from .options import HomeOption, JsonOption


def finetune(
    kind: Annotated[str | None, typer.Argument(metavar="split|federated|local")] = None,
    settings: Annotated[Path | None, typer.Argument(metavar="CONFIG.toml")] = None,
    resume: Annotated[str | None, typer.Option(metavar="JOB")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Training jobs. Not part of this version."""
    _refuse("finetune")


def _refuse(name: str) -> NoReturn:
    raise ConfigError(
        f"edged {name} is not part of this version", remedy="see `edged --help`", code="not-there"
    )
