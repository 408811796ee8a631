"""Moves a model's chunks between two nodes. Tasks of a child process: `serve` and `fetch`.

One ZeroMQ connection with CURVE, a fresh key pair on each side, and ZAP that admits exactly the other
side's key. Either side may be the one that dials. Headers are as in `wire`:

    open                     dialler -> listener   I am here
    chunk {index}            fetch -> serve        send this chunk; at most WINDOW are outstanding
    piece {index, offset}    serve -> fetch        and one raw frame of at most PIECE_BYTES
    alive                    either way            every ALIVE_S, while nothing else is sent
    done                     fetch -> serve        I have what I want
    error                    either way            I give up, because

Time limits are between two pieces, never for a whole model: a slow link that moves is not a dead one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import wire
from .dataplane import ALIVE_S, PIECE_BYTES, Dial, Ends, GoneError, Link, Listen, Meter
from .errors import EdgedError, EngineError, PeerError, ProtocolError
from .ingest import Progress, Report, ingest
from .models import (
    MODEL,
    PART,
    chunks_of,
    entries,
    held,
    owner_of,
    pack_manifest,
    unpack_manifest,
    write_entry,
)
from .partial import Partial, check_disk, fsync_folder, rebind
from .types import Range

WINDOW = 4  # chunks asked for and not here: 16 MiB in memory, enough for 100 MB/s at 160 ms
FLOOR_BYTES_S = 16 << 10  # a link slower than this counts as silent
LAST_WORD_S = 1.0


@dataclass(frozen=True, slots=True)
class _Serve:
    path: str
    manifest: bytes = field(repr=False)
    keys: tuple[bytes, bytes] = field(repr=False)
    dial: Dial | None = None
    listen: Listen | None = None
    peer_key: bytes | None = None
    node: str = "the peer"
    bytes_s: int | None = None
    idle_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _Fetch:
    models: str
    manifest: bytes = field(repr=False)
    keys: tuple[bytes, bytes] = field(repr=False)
    dial: Dial | None = None
    listen: Listen | None = None
    peer_key: bytes | None = None
    node: str = "the peer"
    engine: str | None = None
    ranges: tuple[Range, ...] | None = None
    bytes_s: int | None = None
    silence_s: float = 30.0


# --- serving --------------------------------------------------------------------------------------


def serve(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Answer chunk requests of one model file until the other side is done, idle for `idle_s` or gone.

    Reports {"port", "public_key"} once it listens. Result: bytes, seconds, bytes_s, `ended` ("done",
    "idle", "gone" or "failed"). Raises EngineError (the file is not what the manifest says),
    ProtocolError (not a chunk of it), PeerError (takes nothing), TrustError (keys).
    """
    want = wire.read_body(_Serve, params)
    manifest, meter = unpack_manifest(want.manifest), Meter(want.bytes_s)
    with contextlib.ExitStack() as stack:
        fd = _open(want.path, manifest)
        stack.callback(os.close, fd)
        link = _linked(stack, want, report)
        try:
            ended = _answer_all(want, manifest, fd, link, meter, Progress(report, "serving", manifest.size))
        except GoneError:
            ended = "gone"
        except EdgedError as error:
            link.fail(error)
            raise
    return meter.result() | {"ended": ended}


def _linked(stack: contextlib.ExitStack, want: _Serve | _Fetch, report: Report) -> Link:
    ends = Ends(want.keys, want.dial, want.listen, want.peer_key, want.node)
    link = stack.enter_context(Link(ends))
    if want.listen:
        report({"port": link.port, "public_key": want.keys[0]})
    return link


def _open(path: str, manifest: wire.Manifest) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EngineError(f"expected to read model {manifest.name!r}; {error.strerror}") from error
    if (found := os.fstat(fd).st_size) != manifest.size:
        os.close(fd)
        raise EngineError(
            f"expected {manifest.size} bytes of model {manifest.name!r}; its file has {found}",
            remedy="add the model again",
        )
    return fd


def _answer_all(
    want: _Serve, manifest: wire.Manifest, fd: int, link: Link, meter: Meter, progress: Progress
) -> str:
    while True:
        message, _ = link.receive(want.idle_s)
        if message is None:
            return "idle"
        if message.kind in ("done", "error"):
            return "done" if message.kind == "done" else "failed"
        if message.kind != "chunk":
            continue
        for header, piece in _pieces(fd, manifest, message.body, want.bytes_s):
            time.sleep(meter.pause_s())
            meter.owe(len(piece))
            link.send("piece", header, piece, want.idle_s + PIECE_BYTES / FLOOR_BYTES_S)
            meter.count(len(piece))
        progress(min(meter.bytes, manifest.size))


def _pieces(
    fd: int, manifest: wire.Manifest, body: dict[str, Any], bytes_s: int | None
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The pieces of one chunk; small ones at a low rate, so that each takes about a second at most."""
    index = body.get("index")
    if type(index) is not int or not 0 <= index < len(manifest.chunks):
        raise ProtocolError(f"expected a chunk from 0 to {len(manifest.chunks) - 1}")
    start = index * manifest.chunk_bytes
    length = min(manifest.chunk_bytes, manifest.size - start)
    size = PIECE_BYTES if bytes_s is None else max(1 << 10, min(PIECE_BYTES, bytes_s))
    for offset in range(0, length, size):
        piece = os.pread(fd, min(size, length - offset), start + offset)
        if len(piece) != min(size, length - offset):
            raise EngineError(f"the file of model {manifest.name!r} was cut short while it was sent")
        yield {"index": index, "offset": offset}, piece


# --- fetching -------------------------------------------------------------------------------------


def fetch(params: dict[str, Any], report: Report) -> dict[str, Any]:
    """Bring a model, or the chunks that `ranges` touch, into the store.

    The manifest is trusted: the daemon checked it against the plan. Every chunk is checked against it.
    Result: sha256, name, path, complete, bytes (received now), bytes_resumed (were here), seconds, bytes_s.
    Raises PeerError (silent, gone, sent a chunk wrong twice), EngineError (disk), TrustError (keys).
    """
    want = wire.read_body(_Fetch, params)
    manifest = unpack_manifest(want.manifest)
    chunks_of(manifest, want.ranges)
    with contextlib.ExitStack() as stack:
        link = _linked(stack, want, report)
        try:
            folder = _entry_folder(Path(want.models), manifest.sha256)
            with held(folder, f"model {manifest.name!r}"):
                result = _fetch(want, manifest, folder, link, report)
            with contextlib.suppress(PeerError):  # everything is here: who left is no matter
                link.send("done", {}, None, LAST_WORD_S)
        except OSError as error:
            failed = EngineError(f"expected to write model {manifest.name!r}; {error.strerror or error}")
            link.fail(failed)
            raise failed from error
        except EdgedError as error:
            link.fail(error)
            raise
    return result


def _entry_folder(models: Path, sha256: str) -> Path:
    folder = models / sha256
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fsync_folder(models)
    return folder


def _fetch(want: _Fetch, manifest: wire.Manifest, folder: Path, link: Link, report: Report) -> dict[str, Any]:
    entry, meter = entries(folder.parent).get(manifest.sha256), Meter(want.bytes_s)
    if entry and entry.model and entry.model.complete:
        return _fetched(manifest, entry.model.name, folder / MODEL, True, meter, manifest.size)
    packed = pack_manifest(manifest)
    with held(folder.parent, wait=True):
        name = entry.model.name if entry and entry.model else _free_name(folder.parent, manifest)
        rebind(folder, manifest)
        write_entry(folder, name, want.engine, None, packed)
    wanted = chunks_of(manifest, want.ranges)

    def checked(phase: str) -> Callable[[int], None]:
        progress = Progress(report, phase, manifest.size)

        def tick(done: int) -> None:
            progress(done)
            with contextlib.suppress(PeerError):  # asking for the next chunk will say so
                link.keep_alive()

        return tick

    with Partial(folder, manifest) as part:
        if not part.is_settled or part.missing(wanted):
            part.open_for_writing(checked("checking"))
        missing = part.missing(wanted)
        resumed = sum(map(part.length, wanted)) - sum(map(part.length, missing))
        check_disk(folder, sum(map(part.length, missing)), f"model {manifest.name!r}")
        _Pull(want, manifest, part, link, meter, report).run(missing)
        complete = not part.missing(range(len(manifest.chunks)))
        if complete:
            wrong = part.verify(checked("verifying"))
            _Pull(want, manifest, part, link, meter, report).run(wrong)
            if wrong and part.verify(checked("verifying")):
                raise EngineError(
                    f"expected the disk to keep what was written of model {manifest.name!r}; it does not",
                    remedy="check the disk that holds the home",
                )
            path = part.finish(name, want.engine, packed)
        else:
            part.settle()
            path = folder / PART
    return _fetched(manifest, name, path, complete, meter, resumed)


def _free_name(models: Path, manifest: wire.Manifest) -> str:
    """The model's own name, or one with its hash where another model has that."""
    owner = owner_of(models, manifest.name)
    if owner is None or owner.sha256 == manifest.sha256:
        return manifest.name
    return f"{manifest.name[:55]}-{manifest.sha256[:8]}"


def _fetched(
    manifest: wire.Manifest, name: str, path: Path, complete: bool, meter: Meter, resumed: int
) -> dict[str, Any]:
    row = {"sha256": manifest.sha256, "name": name, "path": str(path), "complete": complete}
    return row | meter.result() | {"bytes_resumed": resumed}


class _Pull:
    """Asks for chunks, a window at a time, and writes those whose hash is right."""

    def __init__(
        self,
        want: _Fetch,
        manifest: wire.Manifest,
        part: Partial,
        link: Link,
        meter: Meter,
        report: Report,
    ) -> None:
        self._manifest, self._part, self._link, self._meter = manifest, part, link, meter
        self._node = want.node
        self._silence_s = want.silence_s + PIECE_BYTES / FLOOR_BYTES_S
        self._report = report
        self._coming: dict[int, list[Any]] = {}  # chunk -> its pieces so far
        self._again: set[int] = set()

    def run(self, chunks: list[int]) -> None:
        progress = Progress(self._report, "fetching", sum(map(self._part.length, chunks)))
        if chunks:
            self._link.wait(self._silence_s)
        waiting, done = list(reversed(chunks)), 0
        self._quiet_since = time.monotonic()
        while waiting or self._coming:
            while waiting and len(self._coming) < WINDOW and not self._meter.pause_s():
                self._ask(waiting.pop())
            arrived = self._receive()
            if arrived is not None:
                done += self._part.length(arrived)
                progress(done)

    def _ask(self, index: int) -> None:
        if not self._coming:
            self._quiet_since = time.monotonic()
        self._link.send("chunk", {"index": index}, None, self._silence_s)
        self._meter.owe(self._part.length(index))
        self._coming[index] = []

    def _receive(self) -> int | None:
        """Take one message; the chunk that it made whole."""
        message, frame = self._link.receive(min(ALIVE_S, self._meter.pause_s() or ALIVE_S))
        if message is None or message.kind in ("open", "alive"):
            if self._coming and time.monotonic() - self._quiet_since > self._silence_s:
                raise PeerError(
                    f"expected chunk {next(iter(self._coming))} of {self._manifest.name!r} from "
                    f"{self._node} to go on within {self._silence_s:.0f} s; nothing came"
                )
            return None
        if message.kind == "error":
            reason = str(message.body.get("message", ""))[:500]
            raise PeerError(f"{self._node} cannot send {self._manifest.name!r}: {reason}")
        index, offset = message.body.get("index"), message.body.get("offset")
        pieces = self._coming.get(index) if isinstance(index, int) else None
        if message.kind != "piece" or not isinstance(index, int) or pieces is None or frame is None:
            raise ProtocolError(f"expected a piece that was asked for from {self._node}")
        here, length = sum(map(len, pieces)), self._part.length(index)
        if offset != here or not 0 < len(frame) <= length - here:
            raise ProtocolError(f"expected byte {here} of chunk {index} from {self._node}")
        pieces.append(frame)
        self._meter.count(len(frame))
        self._quiet_since = time.monotonic()
        return self._check(index, pieces) if here + len(frame) == length else None

    def _check(self, index: int, pieces: list[Any]) -> int | None:
        found = hashlib.sha256()
        for piece in pieces:
            found.update(piece)
        del self._coming[index]
        if found.digest() == self._manifest.chunks[index]:
            self._part.write(index, pieces)
            return index
        if index in self._again:
            raise PeerError(
                f"expected chunk {index} of {self._manifest.name!r} as its manifest says; {self._node} "
                "sent it wrong twice",
                remedy="fetch from another node, or add the model again on that one",
            )
        self._again.add(index)
        self._ask(index)
        return None


__all__ = ["fetch", "ingest", "serve"]
