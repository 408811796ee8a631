"""The model store and how a file gets into it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from edged import ingest as ingesting
from edged import models, wire
from edged.errors import ConfigError, EngineError, ProtocolError
from edged.identity import Home
from edged.models import CHUNK_BYTES, ModelStore
from edged.transfer import ingest
from edged.types import ModelDescription

DESCRIPTION = {
    "architecture": "llama",
    "parameters": 7,
    "layers": 2,
    "hidden": 8,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 4,
    "ffn": 16,
    "vocab": 32,
    "context_tokens": 64,
    "weight_type": "Q4_1",
    "head_unit": 2,
    "ffn_unit": 1,
    "vocab_unit": 1,
    "layer_bytes": [10, 10],
    "embedding_bytes": 5,
    "head_bytes": 5,
}
SIZE = 2 * CHUNK_BYTES + 1234


def describe(path: str) -> dict:
    """An engine's describe: takes what begins with its magic."""
    with open(path, "rb") as file:
        if file.read(4) != b"TEST":
            raise ValueError("no magic\nin this file")
    return DESCRIPTION


def describe_wrongly(path: str) -> dict:
    return {"architecture": 5}


def quiet(event: dict) -> None:
    pass


def content(seed: int = 0, size: int = SIZE) -> bytes:
    block = hashlib.shake_256(bytes([seed])).digest(65521)
    return (b"TEST" + block * (size // len(block) + 1))[:size]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.gguf"
    path.write_bytes(content())
    return path


def add(home: Home, path: Path, name: str = "m", report=quiet, engines=("test_models:describe",)) -> dict:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return ingest(
            {
                "source_fd": fd,
                "name": name,
                "models": str(home.models),
                "describe": [[f"engine{i}", dotted] for i, dotted in enumerate(engines)],
            },
            report,
        )
    finally:
        os.close(fd)


def left_in(home: Home) -> list[str]:
    return sorted(os.listdir(home.models))


def no_link(*args, **kwargs):
    raise OSError("no hard links here")


# --- ingest ---------------------------------------------------------------------------------------


def test_an_added_file_is_linked_hashed_and_listed(home, source):
    result = add(home, source)
    sha256 = hashlib.sha256(content()).hexdigest()
    assert (result["sha256"], result["bytes"], result["engine"]) == (sha256, SIZE, "engine0")
    assert result["stored"] in ("linked", "reflinked")
    store = ModelStore(home)
    (row,) = store.list()
    assert dataclasses.asdict(row) == {
        "name": "m",
        "sha256": sha256,
        "architecture": "llama",
        "parameters": 7,
        "bytes": SIZE,
        "layers": 2,
        "weight_type": "Q4_1",
        "complete": True,
        "engine": "engine0",
        "path": result["path"],
    }
    manifest = store.manifest(sha256)
    parts = [content()[i : i + CHUNK_BYTES] for i in range(0, SIZE, CHUNK_BYTES)]
    assert manifest.chunks == tuple(hashlib.sha256(part).digest() for part in parts)
    assert models.manifest_hash(manifest) == result["manifest_sha256"]
    assert store.adopt(manifest) == row
    assert store.has(sha256)
    assert not store.conditions()
    assert left_in(home) == [sha256]


def test_a_file_of_another_file_system_is_copied(home, source):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == source.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    elsewhere = shm / f"edged-test-{os.getpid()}"
    try:
        shutil.copy(source, elsewhere)
        result = add(home, elsewhere)
    finally:
        elsewhere.unlink(missing_ok=True)
    assert result["stored"] == "copied"
    assert Path(result["path"]).read_bytes() == content()
    assert ModelStore(home).has(result["sha256"])


def test_somebody_elses_file_is_copied(home, source, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: source.stat().st_uid + 1)
    assert add(home, source)["stored"] in ("copied", "reflinked")


def test_a_file_that_cannot_be_opened_again_is_described_from_its_copy(home, source, monkeypatch):
    monkeypatch.setattr(ingesting, "_reopens", lambda fd: False)
    monkeypatch.setattr(os, "link", no_link)
    seen = []
    monkeypatch.setattr(sys.modules[__name__], "describe", lambda path: seen.append(path) or DESCRIPTION)
    add(home, source, engines=(f"{__name__}:describe",))
    assert [Path(path).name for path in seen] == ["model.gguf"]


def test_the_disk_is_checked_before_a_copy(home, source, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(EngineError, match=r"bytes free for model 'm'; 4096 are"):
        add(home, source)
    assert left_in(home) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty"])
def test_only_a_regular_file_with_content_is_taken(home, tmp_path, kind):
    path = tmp_path / kind
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "empty": path.touch}[kind]()
    with pytest.raises(ConfigError, match="expected a regular file"):
        add(home, path)


def test_a_file_no_engine_takes_is_refused_with_every_reason_in_one_line(home, tmp_path):
    path = tmp_path / "junk"
    path.write_bytes(b"junk")
    engines = ("test_models:describe", "test_models:describe_wrongly", "no_such_module:describe")
    with pytest.raises(EngineError) as caught:
        add(home, path, engines=engines)
    text = str(caught.value)
    assert "\n" not in text
    for reason in ("engine0: ValueError: no magic in this file", "engine1: expected a", "engine2: Module"):
        assert reason in text
    assert left_in(home) == []


def test_the_first_engine_that_takes_the_file_has_it(home, source):
    engines = ("test_models:describe_wrongly", "test_models:describe")
    assert add(home, source, engines=engines)["engine"] == "engine1"


@pytest.mark.parametrize("name", ["m", "other"])
def test_the_same_content_again_is_answered_not_stored_twice(home, source, tmp_path, name, monkeypatch):
    first = add(home, source)
    again = tmp_path / "again"
    again.write_bytes(content())
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=0, f_frsize=1))
    assert add(home, again, name) == first | {"stored": "already"}
    assert left_in(home) == [first["sha256"]]


@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
@pytest.mark.parametrize("link", [True, False])
def test_another_file_under_a_taken_name_is_refused(home, source, tmp_path, size, link, monkeypatch):
    first = add(home, source)
    other = tmp_path / "other"
    other.write_bytes(content(1, size))
    if not link:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(ConfigError, match=f"'m' is {first['sha256'][:12]}") as caught:
        add(home, other)
    assert caught.value.code == "name-taken"
    assert left_in(home) == [first["sha256"]]


@pytest.mark.parametrize("link", [True, False])
def test_a_source_cut_short_while_it_is_read_is_refused(home, source, link, monkeypatch):
    if not link:
        monkeypatch.setattr(os, "link", no_link)

    def cut(event: dict) -> None:
        if event["phase"] in ("hashing", "copying"):
            os.truncate(source, CHUNK_BYTES + 5)

    with pytest.raises(EngineError, match="it ends at"):
        add(home, source, report=cut)
    assert left_in(home) == []


def test_a_source_that_changes_while_it_is_read_is_refused(home, source):
    def change(event: dict) -> None:
        if event["phase"] == "hashing":
            with open(source, "r+b") as file:
                file.write(b"X")
            os.utime(source, ns=(0, 12345))

    with pytest.raises(EngineError, match="changed while it was read"):
        add(home, source, report=change)
    assert left_in(home) == []


def test_a_linked_file_that_changes_later_is_no_longer_complete_until_it_is_added_again(home, source):
    result = add(home, source)
    if result["stored"] != "linked":
        pytest.skip("this file system copies on write")
    store = ModelStore(home)
    assert store.has(result["sha256"])
    os.utime(source, ns=(0, 12345))
    assert not store.has(result["sha256"])
    assert [model.complete for model in store.list()] == [False]
    (condition,) = store.conditions()
    assert "model m: its file changed" in condition.text
    assert add(home, source)["stored"] == "linked"
    assert store.has(result["sha256"])
    assert not store.conditions()
    assert left_in(home) == [result["sha256"]]


def test_what_a_killed_ingest_left_is_removed_by_the_next(home, source):
    program = """
import os, signal, sys
from edged.transfer import ingest
die = lambda event: event["phase"] == "hashing" and os.kill(os.getpid(), signal.SIGKILL)
params = {"source_fd": 0, "name": "m", "models": sys.argv[1], "describe": [["e", "test_models:describe"]]}
ingest(params, die)
"""
    with open(source, "rb") as file:
        child = subprocess.run(
            [sys.executable, "-c", program, str(home.models)],
            stdin=file,
            env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
            timeout=60,
        )
    assert child.returncode == -signal.SIGKILL
    assert [name[:8] for name in left_in(home)] == [".ingest-"]
    assert ModelStore(home).list() == []
    added = add(home, source)
    assert left_in(home) == [added["sha256"]]


def test_progress_reaches_the_total(home, source):
    events = []
    add(home, source, report=events.append)
    assert events[0]["phase"] == "describing"
    assert events[-1] == {"phase": "hashing", "bytes": SIZE, "total": SIZE}


# --- the store ------------------------------------------------------------------------------------


def test_models_are_found_by_name_or_by_eight_characters_of_their_hash(home, source, tmp_path):
    first = add(home, source, "one")
    other = tmp_path / "other"
    other.write_bytes(content(1))
    add(home, other, "two")
    store = ModelStore(home)
    assert [model.name for model in store.list()] == ["one", "two"]
    for text in ("one", first["sha256"], first["sha256"][:8], first["sha256"][:8].upper()):
        assert store.find(text).name == "one"
    for text in ("three", first["sha256"][:7], ""):
        with pytest.raises(ConfigError, match=r"no model '.*'; stored: one, two") as caught:
            store.find(text)
        assert caught.value.remedy == "edged models add FILE"


def test_an_empty_or_missing_store_is_no_error(home):
    store = ModelStore(home)
    assert store.list() == []
    assert not store.has("0" * 64)
    assert not store.holds("0" * 64, [(0, 1)], "0" * 64)
    with pytest.raises(ConfigError, match="stored: none"):
        store.find("m")


def test_a_removed_model_is_gone_and_its_source_is_not(home, source):
    sha256 = add(home, source)["sha256"]
    store = ModelStore(home)
    removed = store.remove("m")
    assert removed is not None
    assert removed.sha256 == sha256
    assert store.list() == []
    assert source.read_bytes() == content()


def test_a_model_at_work_is_not_removed(home, source):
    sha256 = add(home, source)["sha256"]
    with models.held(home.models / sha256), pytest.raises(ConfigError, match="a transfer of it runs"):
        ModelStore(home).remove("m")
    assert ModelStore(home).has(sha256)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("manifest.bin", b""),
        ("manifest.bin", b"\xc1junk"),
        ("manifest.bin", wire.pack("manifest", {"sha256": "x"})),
        ("manifest.bin", None),
        ("meta.json", b"[]"),
        ("meta.json", b'{"name": "../up"}'),
        ("meta.json", b"\xff"),
        ("meta.json", None),
        ("model.gguf", None),
    ],
)
def test_a_damaged_entry_is_reported_and_can_be_removed_or_mended(home, source, file, damage):
    sha256 = add(home, source)["sha256"]
    store = ModelStore(home)
    assert store.has(sha256)
    path = home.models / sha256 / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    assert not store.has(sha256)
    (condition,) = store.conditions()
    assert condition.code == "model-damaged"
    assert sha256[:12] in condition.remedy
    add(home, source)
    assert store.has(sha256)
    path.unlink()
    store.remove(sha256[:12])
    assert left_in(home) == []


def test_a_folder_that_is_not_its_manifests_is_reported(home, source):
    sha256 = add(home, source)["sha256"]
    (home.models / sha256).rename(home.models / ("0" * 64))
    store = ModelStore(home)
    assert store.list() == []
    assert "its manifest is of" in store.conditions()[0].text


def test_an_unchanged_store_is_not_read_again(home, source, monkeypatch):
    sha256 = add(home, source)["sha256"]
    calls = []
    real = models.unpack_manifest
    monkeypatch.setattr(models, "unpack_manifest", lambda packed: calls.append(1) or real(packed))
    store = ModelStore(home)
    for _ in range(5):
        assert store.has(sha256)
    assert len(calls) == 1


# --- manifests and names --------------------------------------------------------------------------


def manifest(**changed) -> wire.Manifest:
    model = wire.read_body(ModelDescription, DESCRIPTION)
    sound = wire.Manifest("0" * 64, CHUNK_BYTES + 1, CHUNK_BYTES, (bytes(32), bytes(32)), model, "m")
    return dataclasses.replace(sound, **changed)


def test_a_manifest_survives_packing_and_its_hash_leaves_the_name_out():
    assert models.unpack_manifest(models.pack_manifest(manifest())) == manifest()
    assert models.manifest_hash(manifest()) == models.manifest_hash(manifest(name="other"))
    assert models.manifest_hash(manifest()) != models.manifest_hash(manifest(size=CHUNK_BYTES + 2))


@pytest.mark.parametrize(
    "changed",
    [
        {"sha256": "../" + "0" * 61},
        {"sha256": "A" * 64},
        {"sha256": "0" * 63 + "\n"},
        {"size": 0, "chunks": ()},
        {"size": -1},
        {"size": 10**15},
        {"chunk_bytes": 0},
        {"chunk_bytes": 2**40, "chunks": (bytes(32),)},
        {"chunks": (bytes(32),)},
        {"chunks": (bytes(32), bytes(31))},
        {"name": "../m"},
        {"name": ""},
        {"name": "\x1b[2J"},
    ],
)
def test_a_hostile_manifest_is_refused(changed):
    with pytest.raises(ProtocolError):
        models.unpack_manifest(models.pack_manifest(manifest(**changed)))


@pytest.mark.parametrize("packed", [b"", b"\x80", b"junk", wire.pack("manifest", {})])
def test_bytes_that_are_no_manifest_are_refused(packed):
    with pytest.raises(ProtocolError):
        models.unpack_manifest(packed)


def test_byte_ranges_name_the_chunks_they_touch():
    assert models.chunks_of(manifest(), None) == [0, 1]
    assert models.chunks_of(manifest(), [(0, 0)]) == []
    assert models.chunks_of(manifest(), [(CHUNK_BYTES, CHUNK_BYTES + 1)]) == [1]
    assert models.chunks_of(manifest(), [(CHUNK_BYTES - 1, CHUNK_BYTES + 1), (0, 1)]) == [0, 1]
    for wrong in ((-1, 1), (2, 1), (0, CHUNK_BYTES + 2)):
        with pytest.raises(ConfigError, match="expected byte ranges within"):
            models.chunks_of(manifest(), [wrong])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("/x/SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct-q4_1"),
        ("qwen2.5-0.5b.gguf", "qwen2.5-0.5b"),
        ("my model (1).F16.GGUF", "my-model-1-f16"),
        ("...", "model"),
    ],
)
def test_a_name_is_made_from_the_files(file, name):
    assert models.name_of(file) == name
    assert models.check_model_name(name) == name
