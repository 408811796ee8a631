"""Models between nodes: real processes, real sockets on loopback, real kills."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import msgpack
import pytest

from edged import dataplane, models
from edged.dataplane import Dial, Ends, Link, Meter
from edged.errors import ConfigError, EngineError, PeerError, ProtocolError, TrustError, by_code
from edged.identity import Home
from edged.models import CHUNK_BYTES, ModelStore
from edged.transfer import WINDOW, ingest
from edged.transport import new_keys

SIZE = 12 * CHUNK_BYTES + 777
LAST = SIZE % CHUNK_BYTES
LOOPBACK = {"interfaces": ["127.0.0.1"], "ports": [0, 1]}

# What the supervisor's child does, in a few lines: parameters on standard input, events on standard output.
DRIVER = """
import msgpack, os, re, sys
from edged import transfer
from edged.errors import EdgedError
def say(kind, body):
    sys.stdout.buffer.write(msgpack.packb([kind, body]))
    sys.stdout.buffer.flush()
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) * 1024
params = msgpack.unpackb(sys.stdin.buffer.read())
exec(sys.argv[2])
before = peak()
try:
    result = getattr(transfer, sys.argv[1])(params, lambda event: say("event", event))
    say("result", result | {"grew_bytes": peak() - before})
except EdgedError as error:
    say("error", [error.code, str(error), error.remedy, error.exit_code])
"""

CORRUPT = """
real, seen = transfer._pieces, []
def pieces(fd, manifest, body, bytes_s):
    for header, piece in real(fd, manifest, body, bytes_s):
        if header == {{"index": 3, "offset": 0}} and len(seen) < {times}:
            seen.append(1)
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        yield header, piece
transfer._pieces = pieces
"""
NO_DISK = """
import types
os.statvfs = lambda path: types.SimpleNamespace(f_bavail=1, f_frsize=4096)
"""
IMPATIENT = "transfer.FLOOR_BYTES_S = 1 << 30"


def describe(path: str) -> dict:
    numbers = "parameters layers hidden heads kv_heads head_dim ffn vocab context_tokens head_unit ffn_unit"
    described = dict.fromkeys([*numbers.split(), "vocab_unit", "embedding_bytes", "head_bytes"], 1)
    return described | {"architecture": "llama", "weight_type": "Q4_1", "layer_bytes": [1]}


class Task:
    """One task in a process of its own."""

    def __init__(self, function: str, params: dict, before: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, function, before],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process.stdin.write(msgpack.packb(params))
        self.process.stdin.close()
        self._said = msgpack.Unpacker(self.process.stdout, read_size=1)

    def event(self, wanted) -> dict:
        """The next event that `wanted` accepts."""
        for kind, body in self._said:
            if kind == "error":
                raise by_code(*body)
            assert kind == "event", f"ended early with {body}"
            if wanted(body):
                return body
        raise AssertionError("the task ended without a word")

    def result(self) -> dict:
        for kind, body in self._said:
            if kind == "error":
                raise by_code(*body)
            if kind == "result":
                return body
        raise AssertionError("the task ended without a word")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Pair:
    """A holder with one model, and a node that wants it."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        self.holder, self.home = Home(folder / "holder"), Home(folder / "home")
        self.home.models.mkdir(parents=True)
        block = hashlib.shake_256(b"model").digest(65521)
        source = folder / "source"
        with open(source, "wb") as file:
            file.writelines(block for _ in range(size // len(block) + 1))
            file.truncate(size)
        with open(source, "rb") as file:
            self.added = ingest(
                {
                    "source_fd": file.fileno(),
                    "name": "m",
                    "models": str(self.holder.models),
                    "describe": [["shard", "test_transfer:describe"]],
                },
                lambda event: None,
            )
        self.source, self.sha256 = source, self.added["sha256"]
        self.manifest = ModelStore(self.holder).manifest(self.sha256)
        self.folder = self.home.models / self.sha256
        self.store = ModelStore(self.home)
        self.tasks: list[Task] = []

    def task(self, function: str, params: dict, before: str = "") -> Task:
        self.tasks.append(Task(function, params, before))
        return self.tasks[-1]

    def serve(self, peer_key: bytes, before: str = "", **changed) -> tuple[Task, dict]:
        """A serving task that listens, and how to dial it."""
        keys = new_keys()
        params = self.serving(keys) | {"listen": LOOPBACK, "peer_key": peer_key} | changed
        task = self.task("serve", params, before)
        event = task.event(lambda event: "port" in event)
        assert event["public_key"] == keys[0]
        return task, {"address": "127.0.0.1", "port": event["port"], "public_key": keys[0]}

    def serving(self, keys) -> dict:
        packed = models.pack_manifest(self.manifest)
        return {"path": self.added["path"], "manifest": packed, "keys": list(keys), "node": "phone"}

    def fetching(self, keys) -> dict:
        packed = models.pack_manifest(self.manifest)
        named = {"models": str(self.home.models), "manifest": packed, "engine": "shard", "node": "laptop"}
        return named | {"keys": list(keys)}

    def fetch(self, before: str = "", served: str = "", serving=None, **changed) -> tuple[Task, Task]:
        """Both tasks, connected: (fetching, serving)."""
        keys = new_keys()
        server, dial = self.serve(keys[0], served, **(serving or {}))
        return self.task("fetch", self.fetching(keys) | {"dial": dial} | changed, before), server

    def holds(self, ranges, manifest=None) -> bool:
        return self.store.holds(self.sha256, ranges, models.manifest_hash(manifest or self.manifest))

    def is_whole(self) -> bool:
        return self.store.has(self.sha256) and sha256_of(self.folder / "model.gguf") == self.sha256


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def pair(tmp_path):
    made = Pair(tmp_path)
    yield made
    for task in made.tasks:
        task.close()


# --- whole models ---------------------------------------------------------------------------------


def test_a_model_arrives_whole_and_is_found_under_its_name(pair):
    fetching, serving = pair.fetch()
    result = fetching.result()
    assert (result["bytes"], result["bytes_resumed"], result["complete"]) == (SIZE, 0, True)
    assert result["bytes_s"] == pytest.approx(SIZE / result["seconds"])
    served = serving.result()
    assert (served["bytes"], served["ended"]) == (SIZE, "done")
    assert pair.is_whole()
    row = pair.store.adopt(pair.manifest)
    assert (row.name, row.engine, row.path) == ("m", "shard", result["path"])
    assert sorted(os.listdir(pair.folder)) == ["manifest.bin", "meta.json", "model.gguf"]
    assert models.manifest_hash(pair.store.manifest(pair.sha256)) == pair.added["manifest_sha256"]


def test_the_holder_can_be_the_one_that_dials(pair):
    ours, theirs = new_keys(), new_keys()
    fetching = pair.task("fetch", pair.fetching(ours) | {"listen": LOOPBACK, "peer_key": theirs[0]})
    port = fetching.event(lambda event: "port" in event)["port"]
    dial = {"address": "127.0.0.1", "port": port, "public_key": ours[0]}
    serving = pair.task("serve", pair.serving(theirs) | {"dial": dial})
    assert fetching.result()["bytes"] == SIZE
    assert serving.result()["ended"] == "done"
    assert pair.is_whole()


def test_a_fetched_model_can_be_served_on(pair):
    pair.fetch()[0].result()
    pair.added["path"] = str(pair.folder / "model.gguf")
    pair.home = Home(pair.home.path.parent / "third")
    fetching, _ = pair.fetch()
    assert fetching.result()["complete"]
    assert ModelStore(pair.home).has(pair.sha256)


def test_a_model_that_is_here_is_not_fetched_again(pair):
    pair.fetch()[0].result()
    fetching, serving = pair.fetch()
    assert (fetching.result()["bytes"], serving.result()["ended"]) == (0, "done")


def test_a_name_that_is_taken_here_gets_its_hash_added(pair, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"another model")
    with open(other, "rb") as file:
        params = {"source_fd": file.fileno(), "name": "m", "models": str(pair.home.models)}
        ingest(params | {"describe": [["shard", "test_transfer:describe"]]}, lambda event: None)
    assert pair.fetch()[0].result()["name"] == f"m-{pair.sha256[:8]}"
    assert [model.name for model in pair.store.list()] == ["m", f"m-{pair.sha256[:8]}"]


def test_memory_stays_within_a_few_windows_whatever_the_models_size(tmp_path):
    size = 200 << 20
    pair = Pair(tmp_path, size)
    try:
        fetching, serving = pair.fetch()
        assert fetching.result()["grew_bytes"] < 4 * WINDOW * CHUNK_BYTES
        assert serving.result()["grew_bytes"] < 4 * WINDOW * CHUNK_BYTES
        assert pair.is_whole()
    finally:
        for task in pair.tasks:
            task.close()


# --- interruptions --------------------------------------------------------------------------------


def killed_midway(pair: Pair) -> int:
    """Kill -9 a fetch in its middle; the bytes it had reported."""
    fetching, serving = pair.fetch(bytes_s=40 << 20)
    at = fetching.event(lambda e: e.get("phase") == "fetching" and 0 < e["bytes"] < SIZE)
    fetching.kill()
    assert serving.result()["ended"] in ("gone", "idle")
    assert not pair.store.has(pair.sha256)
    assert [model.complete for model in pair.store.list()] == [False]
    return at["bytes"]


def test_a_killed_fetch_goes_on_where_it_stopped(pair):
    had = killed_midway(pair)
    result = pair.fetch()[0].result()
    assert result["bytes_resumed"] >= had > 0
    assert result["bytes"] + result["bytes_resumed"] == SIZE
    assert pair.is_whole()


def test_a_marked_chunk_that_a_power_cut_lost_is_fetched_again(pair):
    killed_midway(pair)
    with open(pair.folder / "model.part", "r+b") as part:
        part.write(bytes(CHUNK_BYTES))
    result = pair.fetch()[0].result()
    assert result["bytes"] + result["bytes_resumed"] == SIZE
    assert pair.is_whole()


@pytest.mark.parametrize("have", [b"", b"junk" * 100, None])
def test_a_bitmap_that_is_none_counts_as_empty(pair, have):
    killed_midway(pair)
    (pair.folder / "have").unlink()
    if have is not None:
        (pair.folder / "have").write_bytes(have)
    assert pair.fetch()[0].result()["bytes"] == SIZE
    assert pair.is_whole()


def test_a_part_makes_way_for_the_same_file_added_by_hand(pair):
    killed_midway(pair)
    with open(pair.source, "rb") as file:
        params = {"source_fd": file.fileno(), "name": "m", "models": str(pair.home.models)}
        ingest(params | {"describe": [["shard", "test_transfer:describe"]]}, lambda event: None)
    assert pair.is_whole()
    assert not (pair.folder / "model.part").exists()


def test_a_holder_that_dies_ends_the_fetch_with_its_name(pair):
    fetching, serving = pair.fetch(bytes_s=40 << 20)
    fetching.event(lambda e: e.get("phase") == "fetching" and 0 < e["bytes"] < SIZE)
    serving.kill()
    with pytest.raises(PeerError, match="laptop") as caught:
        fetching.result()
    assert caught.value.code == "peer-lost"
    result = pair.fetch()[0].result()
    assert result["bytes_resumed"] > 0
    assert pair.is_whole()


def test_a_holder_that_falls_silent_ends_the_fetch(pair):
    fetching, serving = pair.fetch(IMPATIENT, bytes_s=40 << 20, silence_s=3.0)
    fetching.event(lambda e: e.get("phase") == "fetching" and 0 < e["bytes"] < SIZE)
    serving.process.send_signal(signal.SIGSTOP)
    with pytest.raises(PeerError, match=r"expected chunk \d+ of 'm' from laptop to go on"):
        fetching.result()


def test_a_holder_that_cannot_be_reached_ends_the_fetch(pair):
    keys = new_keys()
    task, dial = pair.serve(keys[0])
    task.kill()
    fetching = pair.task("fetch", pair.fetching(keys) | {"dial": dial, "silence_s": 0.2}, IMPATIENT)
    with pytest.raises(PeerError, match="laptop"):
        fetching.result()


def test_a_holder_nobody_asks_ends_by_itself(pair):
    task, _ = pair.serve(new_keys()[0], idle_s=0.2)
    result = task.result()
    assert (result["ended"], result["bytes"], result["bytes_s"]) == ("idle", 0, None)


def test_one_fetch_of_a_model_at_a_time(pair):
    first, _ = pair.fetch(bytes_s=40 << 20)
    first.event(lambda event: event.get("phase") == "fetching")
    first.process.send_signal(signal.SIGSTOP)
    second, serving = pair.fetch()
    with pytest.raises(ConfigError, match="a transfer of it runs"):
        second.result()
    assert serving.result()["ended"] == "failed"
    with pytest.raises(ConfigError, match="a transfer of it runs"):
        pair.store.remove("m")
    first.process.send_signal(signal.SIGCONT)
    assert first.result()["complete"]


# --- what must not get through --------------------------------------------------------------------


def test_a_chunk_damaged_once_is_asked_for_again(pair):
    fetching, _ = pair.fetch(served=CORRUPT.format(times=1))
    assert fetching.result()["bytes"] == SIZE + CHUNK_BYTES
    assert pair.is_whole()


def test_a_chunk_damaged_twice_ends_the_fetch_with_node_and_chunk(pair):
    fetching, serving = pair.fetch(served=CORRUPT.format(times=2))
    with pytest.raises(PeerError, match="chunk 3 of 'm' as its manifest says; laptop sent it wrong"):
        fetching.result()
    assert serving.result()["ended"] in ("failed", "gone")  # it may still have been sending
    assert not pair.store.has(pair.sha256)
    result = pair.fetch()[0].result()
    assert result["bytes_resumed"] >= 3 * CHUNK_BYTES
    assert pair.is_whole()


def test_a_stranger_is_refused_and_the_admitted_key_is_still_served(pair):
    stranger, admitted = new_keys(), new_keys()
    _, dial = pair.serve(admitted[0])
    with pytest.raises(TrustError, match="laptop"):
        pair.task("fetch", pair.fetching(stranger) | {"dial": dial}).result()
    assert not list(pair.folder.glob("model.gguf"))
    assert pair.task("fetch", pair.fetching(admitted) | {"dial": dial}).result()["complete"]


def test_a_listener_with_another_key_is_not_talked_to(pair):
    keys = new_keys()
    _, dial = pair.serve(keys[0])
    dial["public_key"] = new_keys()[0]
    fetching = pair.task("fetch", pair.fetching(keys) | {"dial": dial, "silence_s": 0.5}, IMPATIENT)
    with pytest.raises(PeerError, match="laptop"):
        fetching.result()
    assert not pair.store.has(pair.sha256)


def test_the_disk_is_checked_before_the_first_byte(pair):
    fetching, serving = pair.fetch(NO_DISK)
    with pytest.raises(EngineError, match="bytes free for model 'm'; 4096 are"):
        fetching.result()
    served = serving.result()
    assert (served["bytes"], served["ended"]) == (0, "failed")


def test_a_file_cut_short_before_it_is_served_is_refused(pair):
    os.truncate(pair.added["path"], SIZE - 1)
    assert not ModelStore(pair.holder).has(pair.sha256)
    with pytest.raises(EngineError, match=f"expected {SIZE} bytes of model 'm'"):
        pair.serve(new_keys()[0])


def test_a_file_cut_short_while_it_is_served_ends_both_sides(pair):
    keys = new_keys()
    serving, dial = pair.serve(keys[0])
    os.truncate(pair.added["path"], 5 * CHUNK_BYTES)
    fetching = pair.task("fetch", pair.fetching(keys) | {"dial": dial})
    with pytest.raises(PeerError, match=r"laptop .*: .* cut short"):
        fetching.result()
    with pytest.raises(EngineError, match="cut short"):
        serving.result()


def test_a_manifest_whose_chunks_do_not_make_the_file_is_found_out(pair):
    pair.manifest = dataclasses.replace(pair.manifest, sha256="0" * 64)
    fetching, _ = pair.fetch()
    with pytest.raises(EngineError, match="its chunks agree with the manifest"):
        fetching.result()
    assert not pair.store.has("0" * 64)


@pytest.mark.parametrize("index", [13, -1, 2**53, True, "3", None, 1.5])
def test_only_chunks_of_the_one_file_are_served(pair, index):
    keys = new_keys()
    serving, dial = pair.serve(keys[0])
    with Link(Ends(keys, Dial(**dial), None, None, "laptop")) as link:
        link.send("chunk", {"index": index}, None, 1.0)
        with pytest.raises(ProtocolError, match="expected a chunk from 0 to 12"):
            serving.result()


@pytest.mark.parametrize(
    ("kind", "body", "frame"),
    [
        ("piece", {"index": 12, "offset": 0}, b"x"),
        ("piece", {"index": 0, "offset": 1}, b"x"),
        ("piece", {"index": 0, "offset": 0}, b""),
        ("piece", {"index": 0, "offset": 0}, None),
        ("piece", {"index": [0], "offset": 0}, b"x"),
        ("tokens", {}, None),
    ],
)
def test_a_piece_that_was_not_asked_for_ends_the_fetch(pair, kind, body, frame):
    ours, theirs = new_keys(), new_keys()
    fetching = pair.task("fetch", pair.fetching(ours) | {"listen": LOOPBACK, "peer_key": theirs[0]})
    port = fetching.event(lambda event: "port" in event)["port"]
    with Link(Ends(theirs, Dial("127.0.0.1", port, ours[0]), None, None, "phone")) as link:
        message, _ = link.receive(30)
        assert (message.kind, message.body) == ("chunk", {"index": 0})
        link.send(kind, body, frame, 1.0)
        with pytest.raises(ProtocolError, match="from laptop"):
            fetching.result()


@pytest.mark.parametrize(
    "changed",
    [
        {"dial": None},
        {"listen": LOOPBACK},
        {"dial": None, "listen": LOOPBACK},
        {"keys": [b"", b""]},
        {"ranges": [[0, SIZE + 1]]},
        {"manifest": b"junk"},
        {"bytes_s": "fast"},
    ],
)
def test_wrong_parameters_are_refused(pair, changed):
    keys = new_keys()
    dial = {"address": "127.0.0.1", "port": 9, "public_key": new_keys()[0]}
    with pytest.raises((ConfigError, ProtocolError, TrustError)):
        pair.task("fetch", pair.fetching(keys) | {"dial": dial} | changed).result()
    assert not pair.folder.exists()


# --- shards ---------------------------------------------------------------------------------------


def test_a_shard_alone_brings_only_the_chunks_it_touches(pair):
    ranges = [[10, 20], [CHUNK_BYTES * 5 - 1, CHUNK_BYTES * 5 + 1], [SIZE - 1, SIZE]]
    result = pair.fetch(ranges=ranges)[0].result()
    assert (result["complete"], result["bytes"]) == (False, 3 * CHUNK_BYTES + LAST)
    assert Path(result["path"]).name == "model.part"
    (row,) = pair.store.list()
    assert (row.complete, row.path) == (False, result["path"])
    assert not pair.store.has(pair.sha256)
    assert pair.holds(ranges)
    assert not pair.holds([(0, CHUNK_BYTES + 1)])
    with open(pair.source, "rb") as source, open(result["path"], "rb") as part:
        for start, stop in ranges:
            assert os.pread(part.fileno(), stop - start, start) == os.pread(
                source.fileno(), stop - start, start
            )
    again = pair.fetch(ranges=ranges)[0].result()
    assert (again["bytes"], again["bytes_resumed"]) == (0, 3 * CHUNK_BYTES + LAST)
    rest = pair.fetch()[0].result()
    assert (rest["bytes"], rest["complete"]) == (SIZE - result["bytes"], True)
    assert pair.is_whole()
    assert pair.holds([(0, SIZE)])


def test_a_part_that_was_touched_since_is_not_trusted(pair):
    pair.fetch(ranges=[[0, 1]])[0].result()
    assert pair.holds([(0, 1)])
    with open(pair.folder / "model.part", "r+b") as part:
        part.write(b"touched")
    assert not pair.holds([(0, 1)])
    assert pair.fetch(ranges=[[0, 1]])[0].result()["bytes"] == CHUNK_BYTES
    assert pair.holds([(0, 1)])


def planted(pair: Pair) -> tuple[dict, dict]:
    """What a fetch and a serving task are told of other bytes under the model's SHA-256."""
    other = pair.source.with_name("planted")
    other.write_bytes(b"planted" + pair.source.read_bytes()[7:])
    chunks = list(pair.manifest.chunks)
    chunks[0] = hashlib.sha256(other.read_bytes()[:CHUNK_BYTES]).digest()
    manifest = models.pack_manifest(dataclasses.replace(pair.manifest, chunks=tuple(chunks)))
    return {"manifest": manifest}, {"manifest": manifest, "path": str(other)}


def test_a_part_by_another_manifest_is_not_trusted_and_makes_way(pair):
    fetched, served = planted(pair)
    ranges = [[0, 1], [CHUNK_BYTES, CHUNK_BYTES + 1]]
    before = pair.fetch(ranges=ranges, serving=served, **fetched)[0].result()
    assert pair.holds(ranges, models.unpack_manifest(fetched["manifest"]))
    assert not pair.holds(ranges)
    with open(before["path"], "rb") as used:  # as by a worker
        result = pair.fetch(ranges=ranges)[0].result()
        assert (result["bytes"], result["bytes_resumed"]) == (2 * CHUNK_BYTES, 0)
        assert used.read(7) == b"planted"  # nobody wrote under its hands
    assert pair.holds(ranges)
    with open(result["path"], "rb") as part, open(pair.source, "rb") as source:
        assert part.read(2 * CHUNK_BYTES) == source.read(2 * CHUNK_BYTES)


def test_a_killed_fetch_by_another_manifest_leaves_nothing_to_go_on_from(pair):
    fetched, served = planted(pair)
    fetching, _ = pair.fetch(bytes_s=40 << 20, serving=served, **fetched)
    fetching.event(lambda e: e.get("phase") == "fetching" and CHUNK_BYTES < e["bytes"] < SIZE)
    fetching.kill()
    assert pair.fetch()[0].result()["bytes"] == SIZE
    assert pair.is_whole()


def test_a_part_stays_where_only_the_description_differs(pair):
    described = dataclasses.replace(pair.manifest.model, context_tokens=7)
    other = dataclasses.replace(pair.manifest, model=described)
    pair.fetch(ranges=[[0, 1]], manifest=models.pack_manifest(other))[0].result()
    assert not pair.holds([(0, 1)])
    assert pair.fetch(ranges=[[0, 1]])[0].result()["bytes"] == 0
    assert pair.holds([(0, 1)])
    assert pair.store.manifest(pair.sha256).model == pair.manifest.model


def test_a_whole_file_is_bound_by_its_own_hash_whatever_the_manifest(pair):
    pair.fetch()[0].result()
    other = models.unpack_manifest(planted(pair)[0]["manifest"])
    assert pair.holds([(0, SIZE)], other)


# --- pace -----------------------------------------------------------------------------------------


def test_a_meter_gives_each_byte_its_time(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(dataplane, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    meter = Meter(1000)
    assert meter.pause_s() == 0
    meter.owe(500)
    assert meter.pause_s() == 0.5
    meter.owe(500)
    assert meter.pause_s() == 1.0
    clock.now += 10
    assert meter.pause_s() == 0
    meter.count(1000)
    assert meter.result() == {"bytes": 1000, "seconds": 10.0, "bytes_s": 100.0}
    meter.owe(100)
    assert meter.pause_s() == pytest.approx(0.1)
    free = Meter(None)
    free.owe(10**12)
    assert free.pause_s() == 0
