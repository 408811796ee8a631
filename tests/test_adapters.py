"""The store of adapters: what gets in, what gets out, and what a broken one costs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import resource
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edged import adapters
from edged.adapter_files import copy_out, ingest
from edged.adapters import FILES, AdapterMeta, AdapterStore
from edged.cli import adapters as command
from edged.errors import ConfigError, EdgedError, EngineError
from edged.identity import Home
from edged.supervisor import Supervisor

META = AdapterMeta("ab" * 32, "smol", 8, 16.0, scope="personal", provenance={"job": "j1", "steps": 100})
CONTENT = dict(zip(FILES, (b"{}", b"tensors" * 1000, b"GGUF" * 500), strict=True))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def store(home: Home) -> AdapterStore:
    return AdapterStore(home)


def finished(home: Home, name: str = "step-9", files: Sequence[str] = FILES) -> Path:
    """What a training leaves."""
    folder = home.path / "training" / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(CONTENT[file])
    return folder


def left_in(home: Home) -> list[str]:
    return sorted(os.listdir(home.adapters)) if home.adapters.exists() else []


# --- in -------------------------------------------------------------------------------------------


def test_an_adopted_folder_is_found_with_all_that_was_told_of_it(home: Home, store: AdapterStore) -> None:
    source = finished(home)
    adopted = store.adopt(source, "mail", META)
    assert store.list() == [adopted]
    assert store.find("mail") == adopted
    assert {name: getattr(adopted, name) for name in AdapterMeta.__slots__} == {
        name: getattr(META, name) for name in AdapterMeta.__slots__
    }
    assert adopted.bytes == sum(map(len, CONTENT.values()))
    assert Path(adopted.path).read_bytes() == CONTENT["adapter.gguf"]
    assert adopted.gguf_bytes == len(CONTENT["adapter.gguf"])
    assert adopted.sha256 == hashlib.sha256(CONTENT["adapter.gguf"]).hexdigest()
    assert json.loads((home.adapters / "mail" / "meta.json").read_text())["name"] == "mail"
    assert not source.exists()
    assert left_in(home) == ["mail"]


def test_nobody_else_may_read_an_adapter(home: Home, store: AdapterStore) -> None:
    store.adopt(finished(home), "mail", META)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (home.adapters / "mail").iterdir()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (home.adapters, home.adapters / "mail")} == {0o700}


def test_an_adapter_of_a_base_that_is_no_gguf_has_no_gguf(home: Home, store: AdapterStore) -> None:
    adopted = store.adopt(finished(home, files=FILES[:2]), "mail", META)
    assert (adopted.path, adopted.sha256, adopted.gguf_bytes) == ("", "", 0)


def test_a_taken_name_gets_a_number_unless_it_is_to_be_replaced(home: Home, store: AdapterStore) -> None:
    long = "n" * 64
    names = [store.adopt(finished(home, str(n)), "mail", META).name for n in range(3)]
    names += [store.adopt(finished(home, f"l{n}"), long, META).name for n in range(2)]
    assert names == ["mail", "mail-2", "mail-3", long, "n" * 62 + "-2"]
    other = store.adopt(finished(home, "new"), "mail-2", replace(META, r=4), replaces=True)
    assert (other.name, store.find("mail-2").r) == ("mail-2", 4)
    assert left_in(home) == sorted(names)


def test_a_name_that_is_written_again_is_another_version_of_it(home: Home, store: AdapterStore) -> None:
    def written(name: str, **how: bool) -> tuple[str, str, int]:
        made = store.adopt(finished(home, str(len(left_in(home)))), name, META, **how)
        return made.name, made.stem, made.version

    assert [written("mail") for _ in range(2)] == [("mail", "mail", 1), ("mail-2", "mail", 2)]
    assert written("notes") == ("notes", "notes", 1)
    store.remove("mail")
    assert written("mail") == ("mail", "mail", 3)  # the name is free, and it is later than the second
    assert written("mail", replaces=True) == ("mail", "mail", 4)
    meta = home.adapters / "notes" / "meta.json"
    old = {
        key: value for key, value in json.loads(meta.read_text()).items() if key not in ("stem", "version")
    }
    meta.write_text(json.dumps(old))  # of an earlier edged
    assert (store.find("notes").stem, store.find("notes").version) == ("notes", 1)


def test_rank_and_alpha_are_those_of_the_config_where_nothing_else_is_told(
    home: Home, store: AdapterStore
) -> None:
    source = finished(home)
    untold = AdapterMeta("ab" * 32, "smol")
    with pytest.raises(EngineError, match=r"expected `r` and `lora_alpha` in adapter_config\.json"):
        store.adopt(source, "mail", untold)
    (source / FILES[0]).write_text('{"peft_type": "LORA", "r": 12, "lora_alpha": 3}')
    adopted = store.adopt(source, "mail", untold)
    assert (adopted.r, adopted.alpha) == (12, 3.0)


@pytest.mark.parametrize("missing", FILES[:2])
def test_a_folder_without_its_files_is_refused_and_stays(
    home: Home, store: AdapterStore, missing: str
) -> None:
    source = finished(home, files=[file for file in FILES if file != missing])
    with pytest.raises(EngineError, match=f"{missing} is missing"):
        store.adopt(source, "mail", META)
    assert len(os.listdir(source)) == 2
    assert store.list() == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_disk_that_fails_leaves_both_folders_as_they_were(
    home: Home, store: AdapterStore, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.adopt(finished(home), "mail", META)
    source, rename = finished(home, "new"), os.rename

    def fail(old: Any, new: Any) -> None:
        if Path(old) == source:
            raise OSError(18, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(EngineError, match="expected to store adapter 'mail'; Invalid cross-device link"):
        store.adopt(source, "mail", replace(META, r=4), replaces=replaced)
    assert store.list() == [before]
    assert {*FILES} <= set(os.listdir(source))


def test_a_provenance_without_bounds_is_refused(home: Home, store: AdapterStore) -> None:
    told = replace(META, provenance={"losses": [1.5] * 10**5})
    with pytest.raises(EngineError, match="a provenance of at most 65536 bytes"):
        store.adopt(finished(home), "mail", told)
    assert left_in(home) == []


# --- the store ------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_those_that_are_known(home: Home, store: AdapterStore) -> None:
    with pytest.raises(ConfigError, match="no adapter 'x'; stored: none"):
        store.find("x")
    store.adopt(finished(home), "mail", META)
    for ask in (store.find, store.remove):
        with pytest.raises(ConfigError, match="no adapter 'x'; stored: mail"):
            ask("x")
        with pytest.raises(ConfigError, match=r"expected an? adapter name"):
            ask("../x")


def test_a_removed_adapter_is_gone_and_who_has_it_open_reads_on(home: Home, store: AdapterStore) -> None:
    adopted = store.adopt(finished(home), "mail", META)
    with open(adopted.path, "rb") as reading:
        assert store.remove("mail") == adopted
        assert reading.read() == CONTENT["adapter.gguf"]
    assert store.list() == []
    assert left_in(home) == []


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "tensors cut": lambda folder: os.truncate(folder / FILES[1], 10),
    "gguf gone": lambda folder: (folder / FILES[2]).unlink(),
    "meta gone": lambda folder: (folder / "meta.json").unlink(),
    "meta is nonsense": lambda folder: (folder / "meta.json").write_bytes(b"\xff"),
    "meta names another file": lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace("adapter.gguf", "../../secret")
    ),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_damaged_adapter_is_one_line_in_the_log_and_can_be_removed(
    home: Home, store: AdapterStore, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.adopt(finished(home), "mail", META)
    store.adopt(finished(home, "other"), "other", META)
    DAMAGE[kind](home.adapters / "mail")
    with caplog.at_level(logging.WARNING, "edged.adapters"):
        for _ in range(3):
            assert [adapter.name for adapter in store.list()] == ["other"]
    assert [record.getMessage() for record in caplog.records] == ["adapter skipped"]
    assert store.remove("mail") is None
    assert left_in(home) == ["other"]


# --- out ------------------------------------------------------------------------------------------


def opened(folder: Path) -> list[int]:
    folder.mkdir()
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    return [os.open(folder / name, flags, 0o600) for name in FILES]


def test_an_export_is_written_into_open_files_by_a_process_of_its_own(
    home: Home, store: AdapterStore, tmp_path: Path
) -> None:
    store.adopt(finished(home), "mail", META)
    descriptors = opened(tmp_path / "out")
    try:
        adapter, rows = asyncio.run(store.export("mail", descriptors, Supervisor()))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert adapter.name == "mail"
    assert rows == [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENT.items()
    ]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == CONTENT


def test_an_export_writes_into_nothing_but_new_files(home: Home, store: AdapterStore, tmp_path: Path) -> None:
    folder = store.adopt(finished(home), "mail", META).folder
    (tmp_path / "kept").write_bytes(b"mine")
    kept, (reading, writing) = os.open(tmp_path / "kept", os.O_RDWR), os.pipe()
    try:
        for file in (kept, writing):
            with pytest.raises(ConfigError, match="expected open empty files"):
                copy_out({"folder": folder, "files": [file] * 3}, print)
    finally:
        for file in (kept, reading, writing):
            os.close(file)
    assert (tmp_path / "kept").read_bytes() == b"mine"


def test_a_full_disk_of_an_export_is_said(home: Home, store: AdapterStore, tmp_path: Path) -> None:
    folder, descriptors = store.adopt(finished(home), "mail", META).folder, opened(tmp_path / "out")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(
            EngineError, match=r"expected to write adapter_model\.safetensors; File too large"
        ):
            copy_out({"folder": folder, "files": descriptors}, print)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("links", [True, False])
def test_a_finished_model_gets_its_name_on_a_disk_without_hard_links_too(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # as vfat does

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with command._made_file(tmp_path / "model.gguf") as file:
        os.write(file, b"GGUF")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUF"
    with (
        pytest.raises(ConfigError, match=r"expected to write to .*; File exists"),
        command._made_file(tmp_path / "other.gguf"),
    ):
        (tmp_path / "other.gguf").write_bytes(b"mine")
    assert (tmp_path / "other.gguf").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "other.gguf"]


def test_the_command_line_and_the_store_agree_on_the_order_of_files() -> None:
    assert command.FILES == adapters.FILES


# --- from elsewhere -------------------------------------------------------------------------------


def adapt(folder: str, base: str, out: str) -> dict[str, Any]:
    """An engine's part: takes what begins with a brace, fails as plugins do on "crash"."""
    text = Path(folder, FILES[0]).read_text()
    if text == "crash":
        raise KeyError("r")
    if not text.startswith("{"):
        raise ConfigError("expected JSON")
    Path(out).write_bytes(b"GGUF for " + base.encode())
    return {"r": 4, "alpha": 8.0, "made_for": "smol-on-a-hub"}


def taken(home: Home, folder: Path, name: str = "mail") -> str:
    descriptors = [os.open(folder / file, os.O_RDONLY) for file in FILES[:2]]
    params = {
        "files": descriptors,
        "name": name,
        "home": str(home.path),
        "adapt": "test_adapters:adapt",
        "base": "model.gguf",
        "base_sha256": "cd" * 32,
        "base_name": "smol",
    }
    try:
        return str(ingest(params, lambda event: None)["name"])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_folder_from_elsewhere_is_copied_checked_and_stored_for_its_base(
    home: Home, store: AdapterStore
) -> None:
    folder = finished(home, files=FILES[:2])
    assert taken(home, folder) == "mail"
    adapter = store.find("mail")
    assert (adapter.base_sha256, adapter.base_name, adapter.r, adapter.alpha) == ("cd" * 32, "smol", 4, 8.0)
    assert adapter.provenance == {"added": True, "made_for": "smol-on-a-hub"}
    assert Path(adapter.path).read_bytes() == b"GGUF for model.gguf"
    assert (folder / FILES[1]).read_bytes() == (home.adapters / "mail" / FILES[1]).read_bytes()
    assert left_in(home) == ["mail"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [(b"[]", ConfigError, "expected JSON"), (b"crash", EngineError, "takes as 'mail'; KeyError: 'r'")],
)
def test_what_an_engine_refuses_leaves_nothing(
    home: Home, content: bytes, kind: type[EdgedError], words: str
) -> None:
    folder = finished(home, files=FILES[:2])
    (folder / FILES[0]).write_bytes(content)
    with pytest.raises(kind, match=words):
        taken(home, folder)
    assert left_in(home) == []
