"""`edged models`: the store. Files are opened here and handed over, since the daemon may not see them."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..models import check_model_name, name_of
from ..plugins import Host
from .asking import ask, open_file
from .detecting import first_party_plugins
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import sized, table

models = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The model store, by content hash.",
    short_help="The model store: ls, add, rm, pull.",
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A model's name or hash.")]


@models.command("ls")
def ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The models this node holds."""
    show(ask(home, "models.ls"), as_json, _show_models)


@models.command("add")
def add(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A GGUF file, or a folder with config.json and safetensors."),
    ],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Instead of the file's own.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a model; its name comes from the file's. A folder is packed into one file first, for training."""
    chosen = check_model_name(name) if name is not None else name_of(file.resolve().name)
    with _as_file(file) as packed:
        descriptor = open_file(packed, "model file")
        try:
            document = ask(home, "models.add", {"name": chosen}, [descriptor], silence_s=None)
        finally:
            os.close(descriptor)
    show(document, as_json, _show_models)


@contextlib.contextmanager
def _as_file(path: Path) -> Iterator[Path]:
    """`path` itself, or the file that an engine packs a folder into, gone afterwards."""
    if not path.is_dir():
        yield path
        return
    host = Host()
    host.load(first_party_plugins()[0], {})
    engines = host.registrations("edged_engines").values()
    packers = [engine.pack for engine in engines if engine.pack]
    if not packers:
        raise ConfigError(
            f"expected a model file; {path} is a folder, and no plugin packs folders",
            remedy="install edged with the extra that brings one: pip install 'edged[train]'",
        )
    module, _, attribute = packers[0].partition(":")
    with tempfile.TemporaryDirectory(prefix="edged-pack-") as folder:
        packed = Path(folder) / "model.safetensors"
        getattr(importlib.import_module(module), attribute)(path, packed)
        yield packed


@models.command("rm")
def rm(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Delete a model from this node."""
    show(ask(home, "models.rm", {"name": name}, silence_s=None), as_json, _show_models)


@models.command("pull")
def pull(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Fetch a model from a member that has it."""
    show(ask(home, "models.pull", {"name": name}, silence_s=None), as_json, _show_models)


def _show_models(document: Document) -> None:
    rows = [
        (
            model.get("name"),
            str(model.get("sha256"))[:12],
            model.get("architecture"),
            _count(model.get("parameters")),
            sized(model.get("bytes")),
            model.get("layers"),
            model.get("weight_type"),
            model.get("complete"),
        )
        for model in document.get("models", ())
    ]
    headings = ("name", "sha256", "architecture", "parameters", "size", "layers", "weights", "complete")
    table(headings, rows, empty="no models; add one with `edged models add FILE`")


def _count(parameters: int | None) -> str | None:
    if not isinstance(parameters, int):
        return None
    return f"{parameters / 1e9:.3g} B" if parameters >= 10**9 else f"{parameters / 1e6:.4g} M"
