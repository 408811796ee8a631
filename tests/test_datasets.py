"""The store of data sets and how a file gets into it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from edged.datasets import DataSet, DataStore
from edged.errors import ConfigError, EngineError
from edged.identity import Home
from edged.ingest_rows import PIECE_BYTES, ingest
from edged.supervisor import Supervisor

ROWS = [{"text": f"row {n}", "split": "test" if n % 10 == 0 else "train"} for n in range(100)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def quiet(event: dict) -> None:
    pass


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def store(home: Home) -> DataStore:
    return DataStore(home, Supervisor())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "rows.jsonl")


def written(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(content)
    return path


def add(home: Home, path: Path, name: str = "notes", report: Callable[[dict], None] = quiet) -> str:
    """As the child process does."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        stored: str = ingest({"source_fd": fd, "name": name, "data": str(home.data)}, report)["stored"]
        return stored
    finally:
        os.close(fd)


def left_in(home: Home) -> list[str]:
    return sorted(os.listdir(home.data)) if home.data.exists() else []


# --- ingest ---------------------------------------------------------------------------------------


def test_an_added_file_is_copied_hashed_and_listed(home: Home, store: DataStore, source: Path) -> None:
    assert add(home, source) == "copied"
    row = DataSet("notes", 100, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), 10)
    assert store.list() == [row]
    assert store.find("notes") == row
    assert store.path_of("notes").read_bytes() == CONTENT
    assert left_in(home) == ["notes"]


def test_nobody_else_may_read_a_data_set(home: Home, source: Path) -> None:
    add(home, source)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [home.data, *home.data.rglob("*")]}
    assert modes == {"data": 0o700, "notes": 0o700, "rows.jsonl": 0o600, "meta.json": 0o600}


def test_what_is_written_to_the_source_later_is_not_in_the_store(
    home: Home, store: DataStore, source: Path
) -> None:
    add(home, source)
    source.write_bytes(b"{}")
    assert store.path_of("notes").read_bytes() == CONTENT


def test_the_same_content_again_is_answered_not_stored_twice(
    home: Home, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(home, source)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=0, f_frsize=1))
    assert add(home, written(tmp_path / "again")) == "already"
    assert left_in(home) == ["notes"]


@pytest.mark.parametrize("other", [CONTENT.replace(b"row 7", b"row 8"), CONTENT + CONTENT])
def test_other_content_under_a_taken_name_is_refused(
    home: Home, store: DataStore, source: Path, tmp_path: Path, other: bytes
) -> None:
    add(home, source)
    with pytest.raises(ConfigError, match="'notes' has 100 rows of other content") as caught:
        add(home, written(tmp_path / "other", other))
    assert caught.value.code == "name-taken"
    assert "edged data rm notes" in caught.value.remedy
    assert store.path_of("notes").read_bytes() == CONTENT
    assert left_in(home) == ["notes"]


def test_the_faster_of_two_that_add_under_one_name_has_it(
    home: Home, store: DataStore, source: Path, tmp_path: Path
) -> None:
    other = written(tmp_path / "other", CONTENT + CONTENT)
    raced = []

    def race(event: dict) -> None:
        if not raced:
            raced.append(add(home, source))

    with pytest.raises(ConfigError, match="of other content"):
        add(home, other, report=race)
    assert raced == ["copied"]
    assert store.find("notes").rows == 100
    assert left_in(home) == ["notes"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected at least one row"),
        (CONTENT + b"not json\n", "row 101: expected a JSON object"),
        (CONTENT + b'{"text": "\xff"}', "row 101: expected UTF-8; byte 11"),
        (b"x" * (5 << 20), "row 1: expected at most 4194304 bytes in a line"),
    ],
)
def test_a_wrong_file_is_refused_by_its_row_and_leaves_nothing(
    home: Home, tmp_path: Path, content: bytes, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        add(home, written(tmp_path / "wrong", content))
    assert left_in(home) == []


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_only_a_regular_file_is_taken(home: Home, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(ConfigError, match="expected a regular file"):
        add(home, path)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "n" * 65, "with space"])
def test_a_name_that_is_no_file_name_is_refused(
    home: Home, store: DataStore, source: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="expected a data set name"):
        add(home, source, name)
    for ask in (store.find, store.remove):
        with pytest.raises(ConfigError, match="expected a data set name"):
            ask(name)


def test_the_disk_is_checked_before_the_first_byte(
    home: Home, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_bavail=1, f_frsize=4096))
    monkeypatch.setattr(os, "pread", None)
    with pytest.raises(EngineError, match=r"bytes free for data set 'notes'; 4096 are") as caught:
        add(home, source)
    assert "edged data rm" in caught.value.remedy
    assert left_in(home) == []


def test_a_disk_that_fills_up_leaves_nothing(home: Home, tmp_path: Path) -> None:
    """A real write that fails: the file may not grow beyond a limit of this process."""
    big = written(tmp_path / "big", CONTENT * (1 + 3 * PIECE_BYTES // len(CONTENT)))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE_BYTES, before[1]))
    try:
        with pytest.raises(EngineError, match="expected to store data set 'notes'; File too large"):
            add(home, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert left_in(home) == []


def test_a_source_that_changes_while_it_is_read_is_refused(home: Home, source: Path) -> None:
    def change(event: dict) -> None:
        with open(source, "ab") as file:
            file.write(b'{"text": "late"}\n')
        os.utime(source, ns=(0, 12345))

    with pytest.raises(EngineError, match="changed while it was read"):
        add(home, source, report=change)
    assert left_in(home) == []


def test_what_a_killed_ingest_left_is_removed_by_the_next(home: Home, store: DataStore, source: Path) -> None:
    program = """
import os, signal, sys
from edged.ingest_rows import ingest
die = lambda event: os.kill(os.getpid(), signal.SIGKILL)
ingest({"source_fd": 0, "name": "notes", "data": sys.argv[1]}, die)
"""
    with open(source, "rb") as file:
        child = subprocess.run([sys.executable, "-c", program, str(home.data)], stdin=file, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert [name[:8] for name in left_in(home)] == [".ingest-"]
    assert store.list() == []
    add(home, source)
    assert left_in(home) == ["notes"]


def test_progress_reaches_the_total(home: Home, source: Path) -> None:
    events: list[dict] = []
    add(home, source, report=events.append)
    assert events[-1] == {"phase": "checking", "bytes": len(CONTENT), "total": len(CONTENT)}


# --- the store ------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_those_that_are_known(
    home: Home, store: DataStore, source: Path
) -> None:
    with pytest.raises(ConfigError, match="no data set 'x'; offered here: none"):
        store.find("x")
    add(home, source, "b")
    add(home, source, "a")
    for ask in (store.find, store.path_of, store.remove):
        with pytest.raises(ConfigError, match="no data set 'x'; offered here: a, b") as caught:
            ask("x")
    assert caught.value.code == "no-data"


def test_a_removed_data_set_is_gone_and_its_source_is_not(home: Home, store: DataStore, source: Path) -> None:
    add(home, source)
    with open(store.path_of("notes"), "rb") as reading:
        removed = store.remove("notes")
        assert removed is not None
        assert removed.rows == 100
        assert reading.read() == CONTENT  # a training that has it open reads on
    assert store.list() == []
    assert left_in(home) == []
    assert source.read_bytes() == CONTENT


def damage(home: Home, kind: str) -> None:
    entry = home.data / "notes"
    match kind:
        case "rows changed":
            (entry / "rows.jsonl").write_bytes(CONTENT[:-1])
        case "rows gone":
            (entry / "rows.jsonl").unlink()
        case "meta gone":
            (entry / "meta.json").unlink()
        case "meta is nonsense":
            (entry / "meta.json").write_bytes(b"\xff{")
        case "meta of wrong types":
            (entry / "meta.json").write_text('{"rows": "many"}')


@pytest.mark.parametrize(
    "kind", ["rows changed", "rows gone", "meta gone", "meta is nonsense", "meta of wrong types"]
)
def test_a_damaged_data_set_is_one_line_in_the_log_and_can_be_removed(
    home: Home, store: DataStore, source: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    add(home, source)
    add(home, source, "other")
    damage(home, kind)
    with caplog.at_level(logging.WARNING, "edged.datasets"):
        for _ in range(3):
            assert [row.name for row in store.list()] == ["other"]
    assert [record.getMessage() for record in caplog.records] == ["data set skipped"]
    with pytest.raises(ConfigError, match="no data set 'notes'"):
        store.path_of("notes")
    with pytest.raises(ConfigError, match="'notes' is a damaged one") as caught:
        add(home, source)
    assert "edged data rm notes" in caught.value.remedy
    assert store.remove("notes") is None
    assert add(home, source) == "copied"
    assert store.find("notes").rows == 100


# --- through the supervisor -----------------------------------------------------------------------


async def opened(add: Callable, path: Path) -> object:
    fd = os.open(path, os.O_RDONLY)
    try:
        return await add(fd)
    finally:
        os.close(fd)


def test_a_process_of_its_own_checks_and_its_error_names_the_row(
    home: Home, tmp_path: Path, source: Path
) -> None:
    async def run() -> None:
        store = DataStore(home, Supervisor())
        events: list[dict] = []
        added = await opened(lambda fd: store.add("notes", fd, events.append), source)
        assert added == (store.find("notes"), "copied")
        assert events[-1]["bytes"] == len(CONTENT)
        wrong = written(tmp_path / "wrong", CONTENT + b"{}")
        with pytest.raises(ConfigError, match="row 101: expected one of") as caught:
            await opened(lambda fd: store.add("wrong", fd), wrong)
        assert caught.value.code == "bad-row"

    asyncio.run(run())
    assert left_in(home) == ["notes"]


def test_what_a_job_named_by_a_path_is_seen_by_that_job_alone_and_goes_with_it(
    home: Home, source: Path
) -> None:
    async def run() -> None:
        store = DataStore(home, Supervisor())
        name = await opened(lambda fd: store.add_for_job("a1b2", 0, fd), source)
        assert name == "job-a1b2-0"
        assert store.list() == []
        assert store.path_of(name, job_id="a1b2").read_bytes() == CONTENT
        for job_id in (None, "a1b", "a1b2-0", "ffff"):
            with pytest.raises(ConfigError, match="no data set 'job-a1b2-0'; offered here: none"):
                store.find(name, job_id=job_id)
        with pytest.raises(ConfigError, match="does not begin with 'job-'"):
            await store.add(name, 0)

    asyncio.run(run())
    store = DataStore(home, Supervisor())
    store.remove_for_job("a1b")
    assert left_in(home) == ["job-a1b2-0"]
    store.remove_for_job("a1b2")
    assert left_in(home) == []
    store.remove_for_job("a1b2")
