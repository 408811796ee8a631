"""`edged data`: what this node's owner offers to training jobs. Files are opened here and handed over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..models import check_model_name
from .asking import ask, open_file
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import sized, table

data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Data sets that this node's owner offers to training jobs, by name; no job can name a path here.",
    short_help="Data sets offered to training jobs: ls, add, rm.",
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What jobs call it.")]


@data.command("ls")
def ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The data sets offered here."""
    show(ask(home, "data.ls"), as_json, _show_data)


@data.command("add")
def add(
    name: NameArgument,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON Lines: instruction/input/output, messages or text.")
    ],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check every row of a file and keep a copy under a name."""
    check_model_name(name, "data set")
    descriptor = open_file(file, "data file")
    try:
        document = ask(home, "data.add", {"name": name}, [descriptor], silence_s=None)
    finally:
        os.close(descriptor)
    show(document, as_json, _show_data)


@data.command("rm")
def rm(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Delete a data set from this node; the file it was added from stays."""
    show(ask(home, "data.rm", {"name": name}, silence_s=None), as_json, _show_data)


def _show_data(document: Document) -> None:
    rows = [
        (row.get("name"), row.get("rows"), sized(row.get("bytes")), str(row.get("sha256"))[:12])
        for row in document.get("data", ())
    ]
    table(
        ("name", "rows", "size", "sha256"),
        rows,
        empty="no data sets; add one with `edged data add NAME FILE`",
    )
