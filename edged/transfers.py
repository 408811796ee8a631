"""Models on their way: adding a file to the store, fetching one from a member, serving it.

An adapter goes the same way, from the coordinator of a plan to the plan's other nodes and to nobody else.
There it lies in a store of its own in the cache, which nothing lists, the few last used alone.

The bytes never pass through the daemon: a process of its own hashes, serves or fetches, over a data
plane with fresh keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from . import models, wire
from .config import Profile, data_ports
from .errors import ConfigError, EngineError, PeerError, PolicyViolation, ProtocolError
from .identity import Home
from .lending import Lending
from .models import Model, ModelStore
from .peers import Peers
from .supervisor import Supervisor
from .transport import new_keys
from .types import AdapterFile, EngineEntry, EngineSpec, ModelDescription, Range

log = logging.getLogger(__name__)
ASK_S = 10.0
RANGES_S = 60.0  # a child process reads the head of a file
SERVING_MAX = 16  # transfers out at once
BORROWED_MAX = 8  # adapters of others that are kept: more than a node's workers use at once
NEEDS_MAX = 64  # roles whose byte ranges are remembered: more than a node's workers
Progress = Callable[[dict[str, Any]], None]
Ranges = tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class _Fetching:
    """A transfer on its way. `ranges` None: the whole file; `manifest_sha256` None: any manifest."""

    ranges: Ranges | None
    manifest_sha256: str | None
    task: asyncio.Task[Model]

    def brings(self, manifest_sha256: str | None, ranges: Ranges | None) -> bool:
        """Does it bring these bytes, checked against this manifest? A part is worth no more than that."""
        return self.manifest_sha256 == manifest_sha256 and self.ranges in (None, ranges)


class Transfers:
    def __init__(
        self,
        home: Home,
        profile: Profile,
        store: ModelStore,
        lending: Lending,
        peers: Peers,
        supervisor: Supervisor,
        engines: Mapping[str, EngineEntry],
    ) -> None:
        self._home, self._profile, self._store = home, profile, store
        self._lending, self._borrowed = lending, ModelStore(home, home.cache / "adapters")
        self.borrowers: Callable[[str], set[str]] = lambda adapter_sha256: set()
        self._peers, self._supervisor, self._engines = peers, supervisor, engines
        self._fetching: dict[str, _Fetching] = {}
        self._needs: dict[Any, Ranges] = {}
        self._serving: set[asyncio.Task[Any]] = set()
        peers.answers("manifest", self._manifest)
        peers.answers("serve", self._serve)

    async def close(self) -> None:
        tasks = [*(fetching.task for fetching in self._fetching.values()), *self._serving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def path_of(self, sha256: str) -> Path:
        """The whole file; EngineError where it is not here."""
        if not self._store.has(sha256):
            raise EngineError(f"expected model {sha256[:12]} whole in the store; it is not")
        return Path(self._store.adopt(self._store.manifest(sha256)).path)

    def open_part(self, offer: wire.Offer) -> int | None:
        """A descriptor of the file of which a role has its part; None where the whole is here.

        A part is renamed when the rest arrives, perhaps while a worker loads: a descriptor stays.
        """
        if self._store.has(offer.model_sha256):
            return None
        return self._open(offer, self._needs.get(_key(offer)))

    def _open(self, offer: wire.Offer, ranges: Ranges | None) -> int:
        """A descriptor of the file that has these bytes of the offer's model, by the offer's manifest."""
        path = self._store.adopt(self._store.manifest(offer.model_sha256)).path
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EngineError(f"expected to read model {offer.model_name!r}; {error.strerror}") from error
        # looked up after the file is open: a transfer by another manifest begins another file
        if ranges is None or not self._store.holds(offer.model_sha256, ranges, offer.manifest_sha256):
            os.close(file)
            raise EngineError(
                f"expected the role's part of model {offer.model_name!r} in the store; it is gone"
            )
        return file

    def description_of(self, sha256: str) -> ModelDescription:
        """What this node itself knows of a stored model."""
        return self._store.manifest(sha256).model

    async def add(self, name: str, file: int, on_progress: Progress) -> dict[str, Any]:
        """Store an open file; answers with its row and how it was stored."""
        ordered = sorted(self._engines.values(), key=lambda entry: len(entry.takes))  # the special first
        described: dict[str, str] = {}  # by function: two engines may describe alike
        for entry in ordered:
            described.setdefault(entry.describe, entry.name)
        params = {
            "source_fd": file,
            "name": models.check_model_name(name),
            "models": str(self._home.models),
            "describe": [[name, function] for function, name in described.items()],
        }
        return await self._supervisor.run_task(
            "edged.transfer:ingest", params, timeout_s=None, on_progress=on_progress, inherit=(file,)
        )

    # --- adapters ---

    async def ensure_adapter(self, offer: wire.Offer, coordinator: str) -> None:
        """Have the offer's adapter, from its coordinator where it is not here yet."""
        adapter = offer.adapter
        if adapter is None or coordinator == self._peers.identity.node_id:
            return
        if not self._borrowed.has(adapter.sha256):
            self._borrowed.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self.fetch(adapter.sha256, coordinator, None, adapter=adapter)
        now = time.time()
        os.utime(self._borrowed.folder / adapter.sha256, (now, now))
        await asyncio.to_thread(self._forget_adapters)

    def open_adapter(self, offer: wire.Offer, coordinator: str) -> int | None:
        """A descriptor of the offer's adapter, which stays when the file is forgotten; None: it has none."""
        adapter = offer.adapter
        if adapter is None:
            return None
        if coordinator == self._peers.identity.node_id:
            lent = self._lending.lendable(adapter.sha256)
            path = lent.path if lent is not None else ""
        else:
            path = str(self._borrowed.folder / adapter.sha256 / models.MODEL)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EngineError(
                f"expected adapter {adapter.sha256[:12]} as the plan has it; it is gone or was replaced",
                remedy="run it again",
            ) from error

    def _forget_adapters(self) -> None:
        """All of other nodes' adapters but the last used ones; what is being fetched stays."""
        folders = [self._borrowed.folder / sha256 for sha256 in models.entries(self._borrowed.folder)]
        for folder in sorted(folders, key=_used_at)[:-BORROWED_MAX]:
            with contextlib.suppress(ConfigError, OSError):
                self._borrowed.remove(folder.name)

    def _lent_manifest(self, node_id: str, sha256: str) -> tuple[wire.Manifest, str] | None:
        """Manifest and path of an adapter that this node may have now; None where there is no such."""
        lent = self._lending.lendable(sha256)
        if lent is None or node_id not in self.borrowers(sha256):
            return None
        base = dataclasses.replace(self._store.manifest(lent.base_sha256).model, tensors=())
        name = f"adapter-{sha256[:8]}"  # what its owner calls it is nobody else's business
        size = lent.file.bytes
        return wire.Manifest(sha256, size, models.CHUNK_BYTES, lent.chunks, base, name), lent.path

    # --- fetching ---

    async def ensure(self, offer: wire.Offer) -> None:
        """Have what an offered role reads of its model, from the holder where it is not here yet.

        An engine that can say which bytes a role reads is asked, once the head of the file is here.
        """
        entry, tensors = self._engines[offer.engine], offer.model.tensors
        if self._store.has(offer.model_sha256):
            return
        if not entry.ranges or not tensors or offer.training is not None:  # a training's roles are its own
            await self.fetch(offer.model_sha256, offer.holder, offer.manifest_sha256)
            return
        head = ((0, max(0, min(tensor.offset for tensor in tensors))),)
        await self._have(offer, head)
        if self._store.has(offer.model_sha256):
            return
        if self.description_of(offer.model_sha256) != offer.model:
            raise ProtocolError(
                f"expected model {offer.model_name!r} as its manifest describes it; the offer has another"
            )
        await self._have(offer, await self._needed(entry, offer, head))

    async def _have(self, offer: wire.Offer, ranges: Ranges) -> None:
        if not self._store.holds(offer.model_sha256, ranges, offer.manifest_sha256):
            await self.fetch(offer.model_sha256, offer.holder, offer.manifest_sha256, ranges=ranges)

    async def _needed(self, entry: EngineEntry, offer: wire.Offer, head: Ranges) -> Ranges:
        """The byte ranges that a role reads: its engine says, in a process of its own."""
        key = _key(offer)
        if key not in self._needs:
            file = self._open(offer, head)
            try:
                path = f"/proc/self/fd/{file}"
                spec = EngineSpec(path, offer.model, offer.roles, offer.rank, offer.context_tokens)
                params = {"function": entry.ranges, "spec": wire.to_map(spec)}
                result = await self._supervisor.run_task(
                    "edged.worker:ranges", params, timeout_s=RANGES_S, inherit=(file,)
                )
            finally:
                os.close(file)
            while len(self._needs) >= NEEDS_MAX:
                del self._needs[next(iter(self._needs))]
            self._needs[key] = msgspec.convert(result["ranges"], Ranges)
        return self._needs[key]

    async def fetch(
        self,
        sha256: str,
        holder: str,
        manifest_sha256: str | None,
        on_progress: Progress = lambda event: None,
        ranges: Ranges | None = None,
        adapter: AdapterFile | None = None,
    ) -> Model:
        """Bring the whole file, or the chunks that `ranges` touch. One transfer of a model at a time:
        who wants the same bytes by the same manifest shares it, who wants others waits and looks again.
        `adapter`: it is one, of that size."""
        while (running := self._fetching.get(sha256)) is not None and not running.task.done():
            if running.brings(manifest_sha256, ranges):
                return await asyncio.shield(running.task)
            await asyncio.wait([running.task])  # its error is told to those who asked for it
            if ranges is not None and manifest_sha256 and self._store.holds(sha256, ranges, manifest_sha256):
                return self._store.adopt(self._store.manifest(sha256))
        work = self._fetch(sha256, holder, manifest_sha256, on_progress, ranges, adapter)
        fetching = _Fetching(ranges, manifest_sha256, asyncio.get_running_loop().create_task(work))
        self._fetching[sha256] = fetching
        fetching.task.add_done_callback(lambda _: self._fetched(sha256, fetching))
        return await asyncio.shield(fetching.task)

    def _fetched(self, sha256: str, fetching: _Fetching) -> None:
        if self._fetching.get(sha256) is fetching:
            del self._fetching[sha256]

    async def _fetch(
        self,
        sha256: str,
        holder: str,
        manifest_sha256: str | None,
        on_progress: Progress,
        ranges: Ranges | None,
        adapter: AdapterFile | None,
    ) -> Model:
        store = self._store if adapter is None else self._borrowed
        if holder == self._peers.identity.node_id:
            raise EngineError(
                f"expected all that the role reads of model {sha256[:12]} in this node's store; it is not",
                remedy="start a node that has the whole model, or add it again",
            )
        name = self._peers.name_of(holder)
        answer = await self._peers.ask(holder, "manifest", wire.ManifestRequest(sha256), ASK_S)
        offered = wire.read_body(wire.ManifestOf, answer)
        manifest = offered.manifest
        if manifest.sha256 != sha256 or manifest_sha256 not in (None, models.manifest_hash(manifest)):
            raise PeerError(f"expected the manifest that the plan names; {name} sent another")
        if adapter is not None and manifest.size != adapter.bytes:
            raise PeerError(f"expected an adapter of {adapter.bytes} bytes; {name} has {manifest.size}")
        keys = new_keys()
        serving = wire.read_body(
            wire.Serving, await self._peers.ask(holder, "serve", wire.Serve(sha256, keys[0]), ASK_S)
        )
        what = "model" if adapter is None else "adapter"
        log.info("fetching", extra={what: sha256[:12], "peer": holder[:8]})
        params = {
            "manifest": models.pack_manifest(manifest),
            "models": str(store.folder),
            "keys": list(keys),
            "node": name,
            "dial": {
                "address": self._peers.address_of(holder),
                "port": serving.port,
                "public_key": serving.public_key,
            },
            "ranges": ranges,
            "bytes_s": self._profile.budget.transfer_bytes_s,
            "engine": offered.engine,
        }
        await self._supervisor.run_task(
            "edged.transfer:fetch", params, timeout_s=None, on_progress=on_progress
        )
        return store.adopt(manifest)

    # --- serving ---

    async def _manifest(self, node_id: str, body: wire.ManifestRequest) -> wire.ManifestOf:
        if lent := self._lent_manifest(node_id, body.sha256):
            return wire.ManifestOf(lent[0], None)
        self._check_right(node_id)
        return wire.ManifestOf(self._store.manifest(body.sha256), self._store.find(body.sha256).engine)

    async def _serve(self, node_id: str, body: wire.Serve) -> wire.Serving:
        if lent := self._lent_manifest(node_id, body.sha256):
            manifest, path = lent
        else:
            self._check_right(node_id)
            path, manifest = str(self.path_of(body.sha256)), self._store.manifest(body.sha256)
        if len(self._serving) >= SERVING_MAX:
            raise PolicyViolation(
                f"{self._peers.identity.name} serves {SERVING_MAX} transfers; try again later"
            )
        ports = data_ports(self._profile.network.data_ports)
        keys = new_keys()
        listening: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        params = {
            "path": path,
            "manifest": models.pack_manifest(manifest),
            "keys": list(keys),
            "peer_key": body.public_key,
            "listen": {
                "interfaces": list(self._profile.network.interfaces),
                "ports": [ports.start, ports.stop],
            },
            "bytes_s": self._profile.budget.transfer_bytes_s,
        }

        def on_progress(event: dict[str, Any]) -> None:
            if "port" in event and not listening.done():
                listening.set_result(event)

        task = asyncio.get_running_loop().create_task(
            self._supervisor.run_task("edged.transfer:serve", params, timeout_s=None, on_progress=on_progress)
        )
        self._serving.add(task)
        task.add_done_callback(self._served)
        await asyncio.wait([listening, task], timeout=ASK_S, return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            task.cancel()
            raise EngineError("expected the transfer to listen; it did not")
        return wire.Serving(keys[0], listening.result()["port"])

    def _served(self, task: asyncio.Task[Any]) -> None:
        self._serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("transfer ended", extra={"reason": str(error)})

    def _check_right(self, node_id: str) -> None:
        """Models go to members that may serve this node's jobs, or whose jobs may use this node."""
        member = self._peers.membership.member(node_id)
        if member is None or not {"serve", "submit"} & set(member.rights):
            raise PolicyViolation(f"{self._peers.identity.name} gives no models to this node")


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _key(offer: wire.Offer) -> tuple[object, ...]:
    """What decides which bytes a role reads; the file's head, which says so, is its manifest's."""
    cuts = tuple((role.stage, role.layers, role.heads, role.ffn, role.vocab) for role in offer.roles)
    return offer.model_sha256, offer.manifest_sha256, offer.engine, cuts, offer.rank
