"""`edged adapters`: what training left. Files are opened here and handed over, both ways."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import ConfigError
from ..models import check_model_name
from .asking import ask, open_file
from .options import HomeOption, JsonOption
from .output import Document, show
from .tables import facts, sized, table

FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter.gguf")  # in the daemon's order

adapters = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="LoRA adapters: PEFT folders, with llama.cpp's file beside them.",
    short_help="LoRA adapters: ls, show, add, export, write, rm.",
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name.")]


@adapters.command("ls")
def ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """The adapters this node holds."""
    show(ask(home, "adapters.ls"), as_json, _show_adapters)


@adapters.command("show")
def show_one(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """One adapter, and how it came to be."""
    check_model_name(name, "adapter")
    rows = ask(home, "adapters.ls")["adapters"]
    found = [row for row in rows if row["name"] == name]
    if not found:
        names = ", ".join(row["name"] for row in rows) or "none"
        raise ConfigError(
            f"no adapter {name!r}; stored: {names}", remedy="see `edged adapters ls`", code="no-adapter"
        )
    show({"adapters": found}, as_json, lambda document: facts(_facts_of(found[0])))


@adapters.command("add")
def add(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A PEFT folder made elsewhere.")],
    model: Annotated[str, typer.Option(metavar="M", help="The stored model that it belongs to.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a LoRA of peft against a stored model and keep it under a name."""
    check_model_name(name, "adapter")
    with contextlib.ExitStack() as stack:
        descriptors = []
        for file in FILES[:2]:
            descriptors.append(open_file(folder / file, "adapter file"))
            stack.callback(os.close, descriptors[-1])
        body = {"name": name, "model": model}
        document = ask(home, "adapters.add", body, descriptors, silence_s=None)
    show(document, as_json, _show_adapters)


@adapters.command("export")
def export(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as a PEFT folder, with adapter.gguf for llama.cpp where its base is a GGUF."""
    check_model_name(name, "adapter")
    with _made(folder) as (staged, descriptors):
        document = ask(home, "adapters.export", {"name": name}, descriptors, silence_s=None)
        for file in set(FILES) - {row["name"] for row in document["files"]}:
            (staged / file).unlink()
    show(document | {"path": str(folder)}, as_json, _show_export)


@adapters.command("write")
def write(
    name: NameArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new file, for `edged models add`.")],
    type_: Annotated[
        Literal["f32", "f16"], typer.Option("--type", help="Of matrices: f32 as trained, f16 half the size.")
    ] = "f32",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model that an adapter of kind seeds and its base make."""
    check_model_name(name, "adapter")
    with _made_file(out) as descriptor:
        body = {"name": name, "type": type_}
        document = ask(home, "adapters.write", body, [descriptor], silence_s=None)
    show(document | {"path": str(out)}, as_json, _show_written)


@adapters.command("rm")
def rm(name: NameArgument, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Delete an adapter from this node."""
    show(ask(home, "adapters.rm", {"name": name}, silence_s=None), as_json, _show_adapters)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[tuple[Path, list[int]]]:
    """A hidden folder beside `folder` and its open files; it becomes `folder` unless there is an error."""
    target = Path(os.path.abspath(folder))
    try:
        if (target.exists() or target.is_symlink()) and not (target.is_dir() and not any(target.iterdir())):
            raise ConfigError(
                f"expected a new or empty folder; there is something at {folder}",
                remedy="name another folder: nothing is overwritten",
                code="exists",
            )
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ConfigError(
            f"expected a place to write to at {folder}; {error.strerror}", remedy="name another folder"
        ) from error
    try:
        with contextlib.ExitStack() as stack:
            descriptors = []
            for name in FILES:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptors.append(os.open(staged / name, flags, 0o600))
                stack.callback(os.close, descriptors[-1])
            yield staged, descriptors
        os.rename(staged, target)  # over an empty folder at most
    except OSError as error:
        raise ConfigError(
            f"expected to write to {folder}; {error.strerror}", remedy="name another folder"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def _made_file(out: Path) -> Iterator[int]:
    """A hidden file beside `out`, open; it becomes `out` unless there is an error."""
    target = Path(os.path.abspath(out))
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.exists() or target.is_symlink():
            raise ConfigError(
                f"expected a new file; there is something at {out}",
                remedy="name another file: nothing is overwritten",
                code="exists",
            )
        descriptor = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        _publish(staged, target)
    except OSError as error:
        raise ConfigError(
            f"expected to write to {out}; {error.strerror}", remedy="name another file"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or it could not be made, which was said
            staged.unlink()


def _publish(staged: Path, target: Path) -> None:
    """Give a finished file its name; FileExistsError where something came there meanwhile."""
    try:
        os.link(staged, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links, such as vfat: the name is taken first
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.rename(staged, target)


def _show_adapters(document: Document) -> None:
    rows = [
        (
            adapter.get("name"),
            adapter.get("base_name"),
            str(adapter.get("base_sha256"))[:12],
            adapter.get("r"),
            adapter.get("alpha"),
            adapter.get("kind"),
            adapter.get("scope"),
            adapter.get("version"),
            _made_by(adapter.get("provenance") or {}),
            sized(adapter.get("bytes")),
        )
        for adapter in document.get("adapters", ())
    ]
    headings = ("name", "base", "sha256", "r", "alpha", "kind", "scope", "version", "made by", "size")
    table(headings, rows, empty="no adapters; a training makes one: `edged finetune`")


def _made_by(provenance: Document) -> str | None:
    """Its training in a few words."""
    if provenance.get("added"):
        return "added"
    members, rounds = provenance.get("members"), provenance.get("rounds")
    if rounds:
        of = f" of {len(members)} members" if members else ""
        parts = [f"{provenance.get('method') or 'federated'}, {rounds} rounds{of}"]
    elif provenance.get("steps"):
        parts = [f"{provenance.get('kind') or 'training'}, {provenance['steps']} steps"]
    else:
        return None
    return ", ".join(parts + _spent(provenance))


def _spent(provenance: Document) -> list[str]:
    """Of a privacy budget, by whoever spent most."""
    epsilon, delta = provenance.get("epsilon"), provenance.get("delta")
    if epsilon is None:
        return []
    return [f"epsilon {epsilon:.4g}" + (f" at delta {delta:.1g}" if delta else "")]


def _facts_of(adapter: Document) -> Document:
    """Names and values, for a person."""
    told = dict(adapter.get("provenance") or {})
    members = told.pop("members", None) or ()
    found: Document = {
        "name": adapter.get("name"),
        "version": f"{adapter.get('version') or 1} of {adapter.get('stem') or adapter.get('name')}",
        "base": f"{adapter.get('base_name')} ({adapter.get('base_sha256')})",
        "rank": f"r {adapter.get('r')}, alpha {adapter.get('alpha')}",
        "kind": f"{adapter.get('kind')}, {adapter.get('scope')}, {sized(adapter.get('bytes'))}",
        "created": adapter.get("created_at"),
        "made by": _made_by(told | {"members": members}),
    }
    if members:
        found["members"] = ", ".join(f"{row['name']} ({row['rounds']} rounds)" for row in members)
    if found["made by"] and not told.get("added"):  # of what came from elsewhere nothing is known
        found["privacy spent"] = ", ".join(_spent(told)) or "not counted: no noise was added"
    if "job_id" in told:
        found["job"] = told.pop("job_id")
    shown = ("method", "rounds", "kind", "steps", "added", "epsilon", "delta")
    return found | {name: value for name, value in told.items() if name not in shown and value is not None}


def _show_export(document: Document) -> None:
    rows = [(row.get("name"), sized(row.get("bytes"))) for row in document.get("files", ())]
    table((f"written to {document.get('path')}", "size"), rows)


def _show_written(document: Document) -> None:
    model = document.get("model", {})
    rows = [(document.get("path"), model.get("type"), model.get("tensors"), sized(model.get("bytes")))]
    table(("model", "type", "tensors", "size"), rows)
