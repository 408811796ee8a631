"""The job store, on a real SQLite file: what was acknowledged is there, what was deleted is not."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged import jobs
from edged.errors import ConfigError, EdgedError, PeerError
from edged.jobs import SCHEMA_VERSION, JobStore

SECRET = "the owner's own words"
REQUEST = {"model": "m", "prompt": SECRET, "n": 8}
PLAN = {"strategy": "local", "roles": []}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[JobStore]:
    made = JobStore(path)
    yield made
    made.close()


def bytes_of(path: Path) -> bytes:
    """The store's file and whatever SQLite keeps beside it."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


# --- durability -----------------------------------------------------------------------------------

ACCEPTS_AND_DIES = """
import os, signal, sys
from pathlib import Path
from edged.jobs import JobStore
store = JobStore(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    store.accept(f"job-{number}", "generate", {"number": number}, 1000.0 + number)
store.begin_epoch("job-0", 1, {"strategy": "local"})
store.add_tokens("job-0", 0, [5, 6], "hi")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_accepted_job_survives_the_kill_that_follows(path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", ACCEPTS_AND_DIES, str(path), "3"], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = JobStore(path)
    found = map(store.get, store.unfinished("generate"))
    assert [(job.job_id, job.state, job.epoch) for job in found] == [
        ("job-0", "running", 1),
        ("job-1", "queued", 0),
        ("job-2", "queued", 0),
    ]
    assert store.get("job-0").plan == {"strategy": "local"}
    assert store.get("job-2").request == {"number": 2}
    assert store.tokens("job-0") == ([5, 6], "hi")
    store.close()


def test_acceptance_is_written_to_the_disk_and_tokens_need_not_be(store: JobStore) -> None:
    """What a power cut may take: SQLite's own word for it, at the moment of each transaction."""
    seen: list[int] = []
    for work in (
        lambda: store.accept("j", "generate", REQUEST, 1.0),
        lambda: store.begin_epoch("j", 1, PLAN),
        lambda: store.keep_plan("j", PLAN),
        lambda: store.add_tokens("j", 0, [1], "a"),
        lambda: store.end("j", "done", 2.0),
    ):
        work()
        seen.append(store._db.execute("PRAGMA synchronous").fetchone()[0])
    full, normal = 2, 1
    assert seen == [full, full, normal, normal, full]
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


# --- the life of a job ----------------------------------------------------------------------------


def test_a_job_is_read_as_it_was_written(store: JobStore) -> None:
    store.accept("job-a", "generate", REQUEST, 1000.5)
    assert store.get("job-a") == jobs.Job("job-a", "generate", "queued", 1000.5, 0, REQUEST, None, None, None)
    store.begin_epoch("job-a", 1, PLAN)
    store.begin_epoch("job-a", 2, PLAN | {"strategy": "remote"})
    running = store.get("job-a")
    assert (running.state, running.epoch, running.plan) == ("running", 2, PLAN | {"strategy": "remote"})
    store.end("job-a", "done", 1001.0, result={"text": "hi"})
    assert (store.get("job-a").state, store.get("job-a").result) == ("done", {"text": "hi"})
    assert store.unfinished("generate") == []


def test_a_failed_job_keeps_its_reason(store: JobStore) -> None:
    store.accept("job-a", "generate", REQUEST, 1.0)
    store.end("job-a", "failed", 2.0, error=PeerError("node phone was lost", remedy="run it again"))
    row = store.get("job-a").row(0.5)
    assert row["error"] == {"code": "peer-lost", "message": "node phone was lost", "remedy": "run it again"}
    assert (row["progress"], row["created_at"]) == (0.5, "1970-01-01T00:00:01.000Z")


def test_tokens_are_kept_in_their_order_and_replaced_where_they_come_again(store: JobStore) -> None:
    store.accept("job-a", "generate", REQUEST, 1.0)
    store.add_tokens("job-a", 2, [12, 13], "cd")
    store.add_tokens("job-a", 0, [10, 11], "ab")
    assert store.tokens("job-a") == ([10, 11, 12, 13], "abcd")
    store.add_tokens("job-a", 3, [99], "x")
    assert store.tokens("job-a")[0] == [10, 11, 12, 99]
    assert store.tokens("nobody") == ([], "")


def test_tokens_of_a_job_that_was_removed_have_no_place(store: JobStore) -> None:
    with pytest.raises(EdgedError) as caught:
        store.add_tokens("gone", 0, [1], "a")
    assert caught.value.code == "store"


def test_jobs_are_listed_newest_first_and_taken_up_oldest_first(store: JobStore) -> None:
    for number in (2, 1, 3):
        store.accept(f"job-{number}", "generate", REQUEST, float(number))
    assert [job.job_id for job in store.all()] == ["job-3", "job-2", "job-1"]
    assert store.unfinished("generate") == ["job-1", "job-2", "job-3"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("abcd12", "abcd12"),
        ("abcd1", "abcd12"),
        ("xyz9", "xyz99"),
        ("abcd", "3 jobs match"),
        ("xyz", "no job"),  # a prefix of three
        ("", "no job"),
        ("%", "no job"),
        ("____", "no job"),
    ],
)
def test_a_job_is_found_by_id_or_prefix(store: JobStore, text: str, found: str) -> None:
    for job_id in ("abcd12", "abcd34", "abcd56", "xyz99"):
        store.accept(job_id, "generate", {}, 1.0)
    if " " in found:
        with pytest.raises(ConfigError, match=found):
            store.get(text)
    else:
        assert store.get(text).job_id == found


# --- deleting -------------------------------------------------------------------------------------


def ended(store: JobStore, job_id: str, at: float) -> None:
    store.accept(job_id, "generate", REQUEST, at)
    store.add_tokens(job_id, 0, [1, 2], f"{SECRET}, answered")
    store.end(job_id, "done", at, result={"text": SECRET})


def test_a_removed_job_leaves_no_word_of_it_on_the_disk(path: Path, store: JobStore) -> None:
    ended(store, "job-a", 1.0)
    assert SECRET.encode() in bytes_of(path)
    store.remove("job-a")
    assert SECRET.encode() not in bytes_of(path)
    assert store.all() == []


def test_old_jobs_expire_and_the_others_stay(path: Path, store: JobStore) -> None:
    ended(store, "old", 10.0)
    ended(store, "new", 20.0)
    store.accept("running", "generate", {}, 1.0)
    assert store.expire(before=20.0) == 1
    assert {job.job_id for job in store.all()} == {"new", "running"}
    assert store.tokens("old") == ([], "")
    store.remove("new")
    assert store.expire(before=10**12) == 0
    assert SECRET.encode() not in bytes_of(path)


# --- a file that is not as it was -----------------------------------------------------------------


def test_nobody_else_reads_the_store(path: Path, store: JobStore) -> None:
    store.accept("job-a", "generate", REQUEST, 1.0)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == dict.fromkeys(("state.db", "state.db-wal", "state.db-shm"), 0o600)


def test_a_store_is_private_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        store = JobStore(path)
        store.accept("job-a", "generate", REQUEST, 1.0)
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        store.close()
    finally:
        os.umask(before)
    assert modes == {0o600}


@pytest.mark.parametrize(
    "damage", [b"\0" * 4096, b"SQLite format 3\0" + b"\xff" * 5000, b"not a database" * 300]
)
def test_a_damaged_file_is_refused_and_left_alone(path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    with pytest.raises(EdgedError, match="expected a job store at") as caught:
        JobStore(path)
    assert "backup" in caught.value.remedy
    assert path.read_bytes() == damage


def test_a_store_of_a_newer_edged_is_refused_and_left_alone(path: Path) -> None:
    newer = sqlite3.connect(path)
    newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(EdgedError, match=f"version {SCHEMA_VERSION} or older; {SCHEMA_VERSION + 1} came"):
        JobStore(path)
    assert path.read_bytes()[100:] == before[100:]


def test_a_store_may_be_opened_again_and_again(path: Path) -> None:
    for number in range(3):
        store = JobStore(path)
        store.accept(str(number), "generate", {}, float(number))
        assert len(store.all()) == number + 1
        store.close()


FILLS_UP = """
import resource, sys
from pathlib import Path
from edged.errors import EdgedError
from edged.jobs import JobStore
store = JobStore(Path(sys.argv[1]))
store.accept("before", "generate", {}, 1.0)
size = Path(sys.argv[1] + "-wal").stat().st_size
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, limits[1]))
try:
    store.accept("too-large", "generate", {"prompt": "p" * 200_000}, 2.0)
except EdgedError as error:
    print(error.code, error.remedy, sep="|")
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
store.accept("after", "generate", {}, 3.0)
print(*sorted(job.job_id for job in store.all()))
store.close()
"""


def test_a_full_disk_refuses_the_job_and_harms_no_other(path: Path) -> None:
    """The kernel refuses the write (a file size limit), as it does where there is no space."""
    ran = subprocess.run(
        [sys.executable, "-c", FILLS_UP, str(path)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["store|free disk space on this node", "after before"]


def test_a_store_that_may_not_grow_says_so(store: JobStore) -> None:
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(EdgedError, match="database or disk is full") as caught:
        store.accept("too-large", "generate", {"prompt": "p" * 100_000}, 1.0)
    assert caught.value.code == "store"
    assert store.all() == []


def test_the_same_id_twice_is_refused(store: JobStore) -> None:
    store.accept("job-a", "generate", REQUEST, 1.0)
    with pytest.raises(EdgedError) as caught:
        store.accept("job-a", "generate", {}, 2.0)
    assert caught.value.code == "store"
    assert store.get("job-a").request == REQUEST


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "1970-01-01T00:00:00.000Z"), (1795000000.1239, "2026-11-18T11:06:40.123Z")]
)
def test_times_are_rfc_3339_in_utc(seconds: float, text: Any) -> None:
    assert jobs.rfc3339(seconds) == text


def test_a_token_that_no_column_holds_leaves_the_store_usable(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "state.db")
    store.accept("j", "generate", {}, 1.0)
    with pytest.raises(EdgedError) as caught:
        store.add_tokens("j", 0, [2**63], "x")
    assert caught.value.code == "store"
    store.add_tokens("j", 0, [7], "x")
    assert store.tokens("j") == ([7], "x")
    store.close()
