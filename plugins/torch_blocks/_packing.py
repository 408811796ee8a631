"""Packs a folder as the Hugging Face hub has models into one safetensors file that edged can store.

`__metadata__` of that file holds what else training needs, as texts: "config" (config.json), "tokenizer"
(tokenizer.json), "chat_template" where there is one, "bos_token" and "eos_token" as they are spelled. Tensors
are copied byte by byte, a piece at a time, in the order of their names: the same folder gives the same file.
No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edged import ConfigError

from .._tensors.families import FAMILIES
from ._safetensors_head import Entry, SafetensorsHead, read_safetensors_head

PIECE_BYTES = 8 << 20
ALIGNMENT = 8  # of the data, as safetensors' own files have it
TEXT_BYTES_MAX = 64 << 20  # of one JSON file of the folder
TEMPLATE, INDEX = "chat_template.jinja", "model.safetensors.index.json"
NEEDED = "expected a folder with config.json, tokenizer.json and *.safetensors"


def pack(folder: Path, out_file: Path) -> Path:
    """Write the model of `folder` to `out_file`, whole or not at all, and answer with it.

    ConfigError where a file is missing or not what it should be, or the model is of no known family;
    EngineError where a safetensors file is damaged. A file that is there already is replaced.
    """
    texts = _texts(folder)
    places: dict[str, tuple[Path, Entry]] = {}
    for shard in _shards(folder, out_file):
        head = read_safetensors_head(str(shard))
        _add(places, shard, head)
    half = out_file.with_name(f".{out_file.name}.{os.getpid()}.half")
    try:
        with half.open("wb") as out:
            out.write(packed_head(texts, {name: entry for name, (_, entry) in sorted(places.items())}))
            for _, (shard, entry) in sorted(places.items()):
                for piece in _pieces(shard, entry):
                    out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        half.rename(out_file)
    except OSError as error:
        raise ConfigError(
            f"expected to write {out_file}; {error.strerror or error}", remedy="check the disk that holds it"
        ) from error
    finally:
        half.unlink(missing_ok=True)
    return out_file


def _add(places: dict[str, tuple[Path, Entry]], shard: Path, head: SafetensorsHead) -> None:
    for name, entry in head.tensors.items():
        if name in places:
            raise ConfigError(
                f"expected each tensor once; {name!r} is in {places[name][0].name} and {shard.name}",
                remedy="leave one kind of weights in the folder",
            )
        places[name] = (shard, entry)


def packed_head(texts: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    """All before the data, of tensors that follow one another in this order."""
    table: dict[str, Any] = {"__metadata__": dict(texts)}
    at = 0
    for name, entry in entries.items():
        table[name] = {"dtype": entry.type, "shape": entry.shape, "data_offsets": [at, at + entry.bytes]}
        at += entry.bytes
    data = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    data += b" " * (-len(data) % ALIGNMENT)
    return len(data).to_bytes(8, "little") + data


def _pieces(shard: Path, entry: Entry) -> Iterator[bytes]:
    with shard.open("rb") as file:
        file.seek(entry.offset)
        left = entry.bytes
        while left:
            piece = file.read(min(PIECE_BYTES, left))
            if not piece:
                raise OSError(f"{shard.name} became shorter while it was read")
            left -= len(piece)
            yield piece


def _shards(folder: Path, out_file: Path) -> list[Path]:
    """The files of the model's weights: those of its index, or all but adapters and what is packed."""
    if (folder / INDEX).exists():
        listed = _json(folder / INDEX).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ConfigError(f"{folder / INDEX}: expected a map of file names as weight_map")
        found = sorted(folder / name for name in names)
    else:
        weights = [path for path in folder.glob("*.safetensors") if path.absolute() != out_file.absolute()]
        found = sorted(path for path in weights if not path.name.startswith("adapter_"))
    missing = [path.name for path in found if not path.is_file()]
    if missing or not found:
        raise ConfigError(
            f"{NEEDED}; {folder} lacks {', '.join(missing) or 'weights of that kind'}",
            remedy="download the model as safetensors",
        )
    return found


def _texts(folder: Path) -> dict[str, str]:
    texts = {"config": _text(folder / "config.json"), "tokenizer": _text(folder / "tokenizer.json")}
    family = _json(folder / "config.json").get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"expected a model of {', '.join(FAMILIES)}; config.json says {family!r}")
    _json(folder / "tokenizer.json")
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template = _text(folder / TEMPLATE) if (folder / TEMPLATE).exists() else _template(settings)
    if template:
        texts["chat_template"] = template
    for name in ("bos_token", "eos_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            texts[name] = value
    return texts


def _template(settings: Mapping[str, Any]) -> str:
    """One text, or a list of named ones of which the default counts."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        with contextlib.suppress(KeyError, TypeError):
            value = {each["name"]: each["template"] for each in value}.get("default")
    return value if isinstance(value, str) else ""


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > TEXT_BYTES_MAX:
            raise ConfigError(f"expected {path} of at most {TEXT_BYTES_MAX} bytes")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{NEEDED}; {path}: {reason}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected JSON in {path}; {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"expected a JSON object in {path}")
    return found
