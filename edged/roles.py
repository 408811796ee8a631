"""This node's part in other nodes' plans, and in its own: a worker for each role it admitted.

The coordinator offers a role; guards, rights, memory and the model decide; a worker is prepared, told
where its peers are, loaded, used, stopped. A worker that ends otherwise is reported to its coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import sizes, wire
from .adapters import NAME_CHARS_MAX, AdapterMeta, AdapterStore
from .config import Profile
from .datasets import DataStore
from .device import Device
from .errors import ConfigError, EdgedError, EngineError, PeerError, PolicyViolation, ProtocolError
from .models import MODEL_BYTES_MAX, is_sha256
from .peers import Peers
from .plugins import Host
from .supervisor import Supervisor, WorkerHandle
from .transfers import Transfers
from .types import (
    AggregatorEntry,
    EngineEntry,
    EngineSpec,
    ModelDescription,
    PlanRequest,
    Training,
    TrainingSpec,
)
from .watching import Watch, Watched

log = logging.getLogger(__name__)
LOAD_S = 60.0  # plus the time to read the weights
LOAD_BYTES_S = 20e6  # a slow SD card
ADAPT_S = 300.0  # for a worker to be between two batches, each maybe minutes of a prompt on a slow device
BESIDE_MAX = 32  # adapters over one model; a coordinator keeps fewer
PROVENANCE = ("method", "rounds")  # settings of a job that a personal adapter's provenance has
PERSONAL = "-personal"  # after the job's name for an adapter, of one that stays here
STOPPED_MAX = 64  # a stop overtakes its offer by microseconds


@dataclass(slots=True)
class _Beside:
    """An adapter that came after its role; it counts from the moment it begins to."""

    memory_bytes: int
    is_coming: bool = True  # its worker was not told of it yet
    is_given_back: bool = False


@dataclass(slots=True)
class _Held:
    """One admitted role."""

    offer: wire.Offer
    coordinator: str
    worker: WorkerHandle
    path: str  # the model file, as the worker reaches it
    model: ModelDescription  # as this node's own store has it
    memory_bytes: int  # that it was admitted with
    adapter_path: str = ""  # likewise
    beside: dict[int, _Beside] = field(default_factory=dict)  # adapters that came later, by number

    def uncount(self, number: int, beside: _Beside) -> None:
        """An adapter is not there any more; the number may be another's by now."""
        if self.beside.get(number) is beside:
            del self.beside[number]
            self.memory_bytes -= beside.memory_bytes


@dataclass(slots=True)
class _Admitting:
    """A role between its offer and its worker; it ends by cancelling the task that answers the offer."""

    offer: wire.Offer
    coordinator: str
    task: asyncio.Task[Any]
    memory_bytes: int
    ended: str = ""  # why it was ended from outside


class Roles:
    def __init__(
        self,
        profile: Profile,
        peers: Peers,
        host: Host,
        device: Device,
        supervisor: Supervisor,
        transfers: Transfers,
        engines: Mapping[str, EngineEntry],
        trainings: Mapping[str, Training],
        aggregators: Mapping[str, AggregatorEntry],
        data: DataStore,
        adapters: AdapterStore,
        training_folder: Path,
    ) -> None:
        self._profile, self._peers, self._host = profile, peers, host
        self._device, self._supervisor, self._transfers = device, supervisor, transfers
        self._engines, self._data, self._adapters = engines, data, adapters
        self._trainings, self._aggregators = trainings, aggregators
        self._watch = Watch(device)
        self._training_folder = training_folder
        self._held: dict[str, _Held] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._admitting: dict[str, _Admitting] = {}
        self._stopped: deque[tuple[str, str]] = deque(maxlen=STOPPED_MAX)  # (coordinator, group) never held
        self._emptied = asyncio.Event()  # the last role ended
        self.is_draining = False
        for kind, answer in (
            ("offer", self._offer),
            ("start", self._start),
            ("adapt", self._adapt),
            ("usage", self._usage),
        ):
            peers.answers(kind, answer)
        peers.takes("stop", lambda node_id, body: self._stop(node_id, body.group))
        peers.takes("generate", self._generate)
        peers.takes("cancel", self._cancel)
        peers.takes("train", self._train)
        peers.takes("left", self._left)
        peers.when_gone(self._peer_gone)
        device.promised = lambda: self.memory_promised

    @property
    def count(self) -> int:
        return len(self._held)

    @property
    def memory_taken(self) -> int:
        """Bytes that the roles here, and those on their way in, were admitted with."""
        held = sum(held.memory_bytes for held in self._held.values())
        return held + sum(admitting.memory_bytes for admitting in self._admitting.values())

    @property
    def memory_promised(self) -> int:
        """Of these, the bytes that are in no worker's memory yet, and so still look free."""
        waiting = sum(admitting.memory_bytes for admitting in self._admitting.values())
        return waiting + sum(
            max(0, held.memory_bytes - self._device.resident(held.worker.pid)) for held in self._held.values()
        )

    async def drain(self, timeout_s: float) -> None:
        """Take no new role, and wait until the coordinators are done with those that are here."""
        self.is_draining = True
        for coordinator in {held.coordinator for held in self._held.values()}:
            self._peers.tell_if_online(coordinator, "draining", wire.Empty())
        if self._held:
            self._emptied.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._emptied.wait()

    def relieve(self) -> None:
        """Memory is short here: ask the coordinators for the roles that no job uses. They know, and a
        worker that ended by itself would fail the job that is on its way to it."""
        for coordinator in {held.coordinator for held in self._held.values()}:
            self._peers.tell_if_online(coordinator, "short", wire.Empty())

    def rest(self) -> None:
        """This device saves energy: the coordinators give its roles no new job, and move what runs here
        where they can."""
        resting = wire.Resting(self._device.saving)
        for coordinator in {held.coordinator for held in self._held.values()}:
            self._peers.tell_if_online(coordinator, "resting", resting)

    async def close(self) -> None:
        for group in [*self._admitting, *self._held]:
            self._end(group, "the node stops")
        await self._watch.close()
        await asyncio.gather(*self._stopping, return_exceptions=True)

    # --- from the coordinator ---

    async def _offer(self, coordinator: str, offer: wire.Offer) -> wire.Offered:
        if (coordinator, offer.group) in self._stopped:
            raise PeerError(f"{self._peers.identity.name} takes no role that was stopped already")
        entry, memory_bytes = self._check_offer(coordinator, offer)
        task = asyncio.current_task()
        assert task is not None
        admitting = self._admitting[offer.group] = _Admitting(offer, coordinator, task, memory_bytes)
        try:
            await self._device.check(entry)
            await self._transfers.ensure(offer)
            await self._transfers.ensure_adapter(offer, coordinator)
            if offer.training is not None and self._stopping:  # this rank's last worker still writes there
                await asyncio.wait(set(self._stopping))
            model = self._transfers.description_of(offer.model_sha256)
            admitting.memory_bytes = 0  # it is not beside itself
            admitting.memory_bytes = self._check_memory(offer, model)
            return await self._prepare(admitting, model)
        except EngineError as error:
            raise self._named(error) from error
        except asyncio.CancelledError:
            if not admitting.ended:
                raise
            task.uncancel()  # the coordinator gets an answer, and stops waiting for it
            raise PeerError(f"{self._peers.identity.name} ended the role: {admitting.ended}") from None
        finally:
            self._admitting.pop(offer.group, None)

    def _check_offer(self, coordinator: str, offer: wire.Offer) -> tuple[EngineEntry, int]:
        """Every reason to refuse, before anything is started; its engine, and the memory it is to have."""
        mine = self._peers.identity
        if not 0 <= offer.rank < len(offer.roles) or offer.roles[offer.rank].node_id != mine.node_id:
            raise ProtocolError("expected an offer of a role for this node")
        if offer.group in self._held or offer.group in self._admitting:
            raise ProtocolError("expected a new group")
        role = offer.roles[offer.rank]
        member = self._peers.membership.member(coordinator)
        right = "train" if offer.training is not None else "submit"
        if member is not None and right not in member.rights:
            raise PolicyViolation(
                f"{mine.name}: {member.name} has no right to {right} jobs here",
                remedy=f"give it there: edged trust {member.name} --rights submit,serve,train",
                code="no-right",
            )
        if offer.training is not None:
            self._check_training(coordinator, offer.training)
        if self._device.saving and coordinator != mine.node_id:
            raise PolicyViolation(f"{mine.name} takes no new roles: {self._device.saving}")
        if self.is_draining:
            raise PolicyViolation(f"{mine.name} is leaving and takes no new roles")
        if len(self._held) + len(self._admitting) >= self._profile.budget.workers:
            raise PolicyViolation(
                f"{mine.name} holds {len(self._held)} workers, as many as its profile allows",
                remedy="raise budget.workers there, or wait",
            )
        if offer.engine not in self._engines:
            known = ", ".join(sorted(self._engines)) or "none"
            raise EngineError(f"{mine.name} has no engine {offer.engine!r}; loaded: {known}")
        self._check_engine(offer)
        self._check_adapter(offer)
        if self._engines[offer.engine].stated is not None and coordinator != mine.node_id:
            raise PolicyViolation(f"{mine.name} asks its own endpoint for its own jobs only")
        memory_bytes = self._check_memory(offer, offer.model)
        role = dataclasses.replace(role, memory_bytes=memory_bytes)  # a guard judges what it will take
        reason = self._host.guard(
            "edged_admit_role", role=role, model_sha256=offer.model_sha256, coordinator=coordinator
        )
        if reason is not None:
            raise PolicyViolation(f"{mine.name} refuses the role: {reason}")
        return self._engines[offer.engine], memory_bytes

    def _check_engine(self, offer: wire.Offer) -> None:
        name, entry = self._peers.identity.name, self._engines[offer.engine]
        if entry.lacks:
            raise EngineError(
                f"{name}: its engine {entry.name!r} needs {entry.lacks}, which is not installed there",
                remedy="install it there, or leave that node out",
            )
        if offer.training is None:
            return
        training = self._trainings[offer.training.kind]
        of = training.engine_of
        named = of(offer.training.settings, offer.rank) if of is not None else training.engine
        if entry.name != named:  # its memory is counted by what the settings name
            raise EngineError(
                f"{name}: expected engine {named!r} for its part of this training; {entry.name!r} was offered"
            )

    def _check_training(self, coordinator: str, offered: wire.TrainingOffer) -> None:
        """It must be one that this node knows, sound by its own check, on data that its owner offers."""
        training = self._trainings.get(offered.kind)
        if training is None:
            known = ", ".join(sorted(self._trainings)) or "none"
            raise EngineError(
                f"{self._peers.identity.name} has no training {offered.kind!r}; loaded: {known}",
                remedy="add the plugin that brings it to `plugins` there",
            )
        try:
            training.check(offered.settings)
            if offered.data:
                self._rows_of(coordinator, offered)
        except ConfigError as error:
            raise self._named(error) from error

    def _rows_of(self, coordinator: str, offered: wire.TrainingOffer) -> Path:
        """A data set that the owner offers; those of a job are for this node's own jobs."""
        is_mine = coordinator == self._peers.identity.node_id
        return self._data.path_of(offered.data, job_id=offered.job if is_mine else None)

    def _check_adapter(self, offer: wire.Offer) -> None:
        adapter, engine = offer.adapter, self._engines[offer.engine]
        if adapter is None:
            return
        if not is_sha256(adapter.sha256) or not 0 < adapter.bytes <= MODEL_BYTES_MAX:
            raise ProtocolError("expected an adapter by its SHA-256 and size")
        if not engine.adapters:
            raise EngineError(
                f"{self._peers.identity.name}: its engine {engine.name!r} applies no adapters",
                remedy="drop --adapter, or leave that node out",
            )

    def _check_memory(self, offer: wire.Offer, model: ModelDescription) -> int:
        """Bytes that the role gets here; PolicyViolation where not even the least that works fits."""
        name, role = self._peers.identity.name, offer.roles[offer.rank]
        if not 1 <= offer.context_tokens <= model.context_tokens or not sizes.is_within(role, model):
            raise ProtocolError("expected a role and a context within the model's size")
        request, entry = _request_of(offer), self._engines[offer.engine]
        budget = self._device.memory_budget(self.memory_taken)
        if offer.training is not None:
            counted = self._counted(offer, offer.training, model)
            given = max(role.memory_bytes, counted)
            if budget is not None and given > budget:
                raise PolicyViolation(
                    f"{name}: its part of this training needs {counted >> 20} MiB by its own count and "
                    f"{role.memory_bytes >> 20} MiB by the plan's, and the budget is {budget >> 20} MiB",
                    remedy="free memory there, or lower batch_size or max_length",
                )
            return given
        given = sizes.admitted(role, model, request, budget, entry.window_bytes)
        if budget is not None and given > budget:
            raise PolicyViolation(
                f"{name}: its part needs at least {given >> 20} MiB, and the budget is {budget >> 20} MiB",
                remedy="free memory there, or give it a smaller share",
            )
        return given

    def _counted(self, offer: wire.Offer, offered: wire.TrainingOffer, model: ModelDescription) -> int:
        """Bytes of a training's role, as the training's own plugin counts them here."""
        memory = self._trainings[offered.kind].memory
        counted = memory(offered.settings, model, offer.roles, offer.rank) if memory is not None else 0
        return max(counted, sizes.WORKER_BYTES)

    async def _prepare(self, admitting: _Admitting, model: ModelDescription) -> wire.Offered:
        offer, group = admitting.offer, admitting.offer.group
        worker, path, adapter_path = await self._spawn(offer, admitting.coordinator)
        self._held[group] = _Held(
            offer, admitting.coordinator, worker, path, model, admitting.memory_bytes, adapter_path
        )
        role = dataclasses.replace(offer.roles[offer.rank], memory_bytes=admitting.memory_bytes)
        self._watch.begin(group, Watched(worker, role, model, _request_of(offer)))
        admitting.memory_bytes = 0  # counted with the held ones from here on
        worker.on_exit = lambda reason: self._worker_ended(group, reason)
        try:
            return await worker.prepare(
                group, offer.rank, len(offer.roles), offer.listens_for, self._profile.network
            )
        except BaseException:
            self._end(group, "it could not be prepared")
            raise

    async def _spawn(self, offer: wire.Offer, coordinator: str) -> tuple[WorkerHandle, str, str]:
        """A worker for the role, and the paths of the model file and the adapter as it sees them."""

        def on_event(message: wire.Message) -> None:
            self._from_worker(offer.group, message)

        with contextlib.ExitStack() as stack:
            given: list[int] = []

            def seen(file: int | None) -> str:
                if file is None:
                    return ""
                stack.callback(os.close, file)
                given.append(file)
                return f"/proc/self/fd/{file}"

            path = seen(self._transfers.open_part(offer)) or str(self._transfers.path_of(offer.model_sha256))
            adapter_path = seen(self._transfers.open_adapter(offer, coordinator))
            return await self._supervisor.spawn(on_event, given), path, adapter_path

    async def _start(self, coordinator: str, start: wire.Start) -> wire.Started:
        held = self._of(coordinator, start.group)
        offer = held.offer
        ends = {end.rank: self._peers.way_to(end) for end in start.ends}
        role = dataclasses.replace(offer.roles[offer.rank], memory_bytes=held.memory_bytes)
        request, entry = _request_of(offer), self._engines[offer.engine]
        spec = EngineSpec(
            held.path,
            held.model,
            offer.roles,
            offer.rank,
            offer.context_tokens,
            offer.numerics,
            self._device.threads,
            entry.settings,
            sizes.weights_room(role, held.model, request),
            str(self._device.cache_folder),
            offer.cache_tokens,
            offer.cache_type,
            offer.model_name,
            held.adapter_path,
        )
        body = {
            "group": offer.group,
            "load": (offer.training is not None and entry.blocks) or entry.load,
            "spec": wire.to_map(spec),
            "ends": ends,
            "may_spin": self._device.may_spin,
        }
        if offer.training is not None:
            body |= self._training_of(coordinator, offer, offer.training)
        timeout_s = LOAD_S + sizes.memory_of(role, held.model, request) / LOAD_BYTES_S
        try:
            return wire.read_body(wire.Started, await held.worker.call("load", body, timeout_s))
        except EdgedError as error:
            self._end(offer.group, "it could not be loaded")
            raise self._named(error) from error

    def _training_of(
        self, coordinator: str, offer: wire.Offer, offered: wire.TrainingOffer
    ) -> dict[str, Any]:
        """What a worker is told to load a trainer. Checkpoints are a coordinator's own."""
        collector = next((role.rank for role in offer.roles if role.node_id == coordinator), 0)
        folder = self._state_of(coordinator, offer, offered)
        spec = TrainingSpec(
            offered.job,
            offered.settings,
            offer.roles,
            offer.rank,
            str(self._rows_of(coordinator, offered)) if offered.data else "",
            str(folder),
            collector,
            offer.model_name,
            offer.model_sha256,
            self._device.threads,
            {name: entry.load for name, entry in self._aggregators.items()},
            {name: entry.local for name, entry in self._aggregators.items() if entry.local},
            {name: (entry.joins, entry.replays) for name, entry in self._aggregators.items() if entry.joins},
            {name: entry.whole for name, entry in self._aggregators.items() if entry.whole},
            min((each.weight_most for each in self._aggregators.values() if each.weight_most), default=0),
        )
        return {"trainer": self._trainings[offered.kind].load, "training": wire.to_map(spec)}

    def _state_of(self, coordinator: str, offer: wire.Offer, offered: wire.TrainingOffer) -> Path:
        """Of a rank of a job: its checkpoints, and what it makes."""
        return self._training_folder / f"{coordinator[:16]}-{offered.job}" / f"rank-{offer.rank}"

    def tidy(self, before: float) -> None:
        """Delete what trainings that did not go on since `before` (Unix time) left for going on."""
        held = {held.offer.training.job for held in self._held.values() if held.offer.training is not None}
        for folder in self._training_folder.glob("*-*"):
            if folder.name.rpartition("-")[2] in held:
                continue
            with contextlib.suppress(OSError):
                if max(path.stat().st_mtime for path in (folder, *folder.glob("*/*"))) < before:
                    shutil.rmtree(folder)

    async def _adapt(self, coordinator: str, body: wire.Adapt) -> wire.Empty:
        """Have an adapter beside the model of a role, or give others back."""
        held = self._of(coordinator, body.group)
        told = {"number": 0, "path": "", "forgets": body.forgets, "undoes": body.undoes}
        if body.file is None:
            await self._unadapt(held, told)
            return wire.Empty()
        offer = dataclasses.replace(held.offer, adapter=body.file)
        beside = held.beside[body.number] = _Beside(self._check_room(held, offer, body.number))
        held.memory_bytes += beside.memory_bytes
        try:
            await self._transfers.ensure_adapter(offer, coordinator)
            beside.is_coming = False
            if beside.is_given_back:
                raise PeerError(f"{self._peers.identity.name}: the adapter was given back while it came")
            with contextlib.ExitStack() as stack:
                file = self._transfers.open_adapter(offer, coordinator)
                if file is not None:
                    stack.callback(os.close, file)
                # the content that was checked, whatever happens to its name
                told |= {"number": body.number, "path": f"/proc/{os.getpid()}/fd/{file}"}
                await held.worker.call("adapt", told, ADAPT_S + body.file.bytes / LOAD_BYTES_S)
        except BaseException as error:
            held.uncount(body.number, beside)
            if isinstance(error, EngineError):
                raise self._named(error) from error
            raise
        return wire.Empty()

    async def _unadapt(self, held: _Held, told: dict[str, Any]) -> None:
        """Give adapters back. A worker that was told will do it, also where its answer is not waited for."""
        given_back = {n: held.beside[n] for n in (*told["forgets"], told["undoes"]) if n in held.beside}
        for beside in given_back.values():
            beside.is_given_back = True
        try:
            await held.worker.call("adapt", told, ADAPT_S)
        except EdgedError as error:
            if error.code != "worker-silent":  # it says that it keeps them
                given_back = {}
            raise
        finally:
            for number, beside in given_back.items():
                if not beside.is_coming:  # one that comes is refused when it is here
                    held.uncount(number, beside)

    def _check_room(self, held: _Held, offer: wire.Offer, number: int) -> int:
        """Bytes that an adapter takes beside a role's model. PolicyViolation where they are not to be had."""
        self._check_adapter(offer)
        name = self._peers.identity.name
        if held.offer.training is not None or not self._engines[offer.engine].swaps:
            raise EngineError(f"{name}: its engine {offer.engine!r} takes no adapter beside a loaded model")
        if number < 1 or number in held.beside or len(held.beside) >= BESIDE_MAX:
            raise ProtocolError(f"expected a new number, and at most {BESIDE_MAX} adapters over one model")
        need = round(sizes.adapter_bytes_of(offer.roles[offer.rank], held.model, _request_of(offer)))
        budget = self._device.memory_budget(self.memory_taken)
        if budget is not None and need > budget:
            raise PolicyViolation(
                f"{name}: the adapter needs {need >> 20} MiB beside the model, and the budget is "
                f"{budget >> 20} MiB",
                remedy="free memory there, or run fewer adapters at once",
                code="no-room-for-adapter",
            )
        return need

    def _train(self, coordinator: str, body: wire.Train) -> None:
        worker = self._of(coordinator, body.group).worker
        worker.send("device", self._device.read())
        worker.send("train", body)

    def _left(self, coordinator: str, body: wire.Left) -> None:
        self._of(coordinator, body.group).worker.send("left", body)

    def tell_device(self) -> None:
        """Give the workers that train a new reading of this device; called every few seconds."""
        workers = [held.worker for held in self._held.values() if held.offer.training is not None]
        reading = self._device.read() if workers else None
        for worker in workers:
            with contextlib.suppress(EdgedError):  # one that just ended: its end is told elsewhere
                worker.send("device", reading)

    def _named(self, error: EdgedError) -> EdgedError:
        """The same error, saying whose it is."""
        named = f"{self._peers.identity.name}: {error}"
        return type(error)(named, remedy=error.remedy, code=error.code)

    def _generate(self, coordinator: str, body: wire.Generate) -> None:
        self._of(coordinator, body.group).worker.send("generate", body)

    def recheck_rights(self) -> None:
        """End the roles of coordinators that may not submit such jobs here any more."""
        for group, held in list(self._held.items()):
            member = self._peers.membership.member(held.coordinator)
            right = "submit" if held.offer.training is None else "train"
            if member is not None and right not in member.rights:
                self._give_back(group, f"{member.name} has no right to {right} jobs here any more")

    def _give_back(self, group: str, reason: str) -> None:
        """End a role from this side: its coordinator gives it no other job."""
        held = self._held[group]
        self._peers.tell_if_online(held.coordinator, "lost", wire.Lost(group, held.offer.rank, reason))
        self._end(group, reason)

    async def _usage(self, coordinator: str, body: wire.Usage) -> wire.Used:
        self._of(coordinator, body.group)
        return await self._watch.used(body.group)

    def _cancel(self, coordinator: str, body: wire.Cancel) -> None:
        self._of(coordinator, body.group).worker.send("cancel", {"job": body.job})

    def _stop(self, coordinator: str, group: str) -> None:
        entry = self._held.get(group) or self._admitting.get(group)
        if entry is None:  # its offer may not have been looked at yet: both came at once
            self._stopped.append((coordinator, group))
        elif entry.coordinator == coordinator:
            self._end(group, "its coordinator is done with it")

    def _of(self, coordinator: str, group: str) -> _Held:
        """A role is its coordinator's alone."""
        held = self._held.get(group)
        if held is None or held.coordinator != coordinator:
            raise PeerError(f"{self._peers.identity.name} holds no such role; its worker has ended")
        return held

    # --- from the worker ---

    def _from_worker(self, group: str, message: wire.Message) -> None:
        held = self._held.get(group)
        if held is None:
            return
        if message.kind == "failed":
            reason = str(message.body.get("message"))
            log.warning("worker failed", extra={"group": group, "reason": reason})
            if not message.body.get("is_peer"):
                self._give_back(group, reason)
            elif isinstance(rank := message.body.get("rank"), int):  # its own node may be gone with it
                self._peers.tell_if_online(held.coordinator, "lost", wire.Lost(group, rank, reason))
        elif message.kind in ("tokens", "finished", "trained"):
            body = wire.read_body(wire.BODIES[message.kind], message.body)
            if isinstance(body, wire.Trained) and body.kind == "kept":
                self._keep(held, body)
                return
            self._peers.tell_if_online(held.coordinator, message.kind, body)

    def _keep(self, held: _Held, body: wire.Trained) -> None:
        """Store the adapter that a trainer made for this node alone. Nobody else is told of it."""
        offered = held.offer.training
        if offered is None:
            return
        made = self._state_of(held.coordinator, held.offer, offered) / "kept"
        stem = str(offered.settings.get("adapter") or offered.job)
        name = stem[: NAME_CHARS_MAX - len(PERSONAL)] + PERSONAL
        told = {key: offered.settings[key] for key in PROVENANCE if offered.settings.get(key)}
        provenance = {"job_id": offered.job, "kind": offered.kind, "steps": body.step, **body.values, **told}
        offer = held.offer
        meta = AdapterMeta(offer.model_sha256, offer.model_name, scope="personal", provenance=provenance)

        def adopt() -> None:
            try:
                if made.is_dir() and not self._is_kept(offered.job, body.step):
                    self._adapters.adopt(made, name, meta)
            except EdgedError as error:
                log.error("personal adapter not kept", extra={"job_id": offered.job, "reason": str(error)})

        task = asyncio.get_running_loop().create_task(asyncio.to_thread(adopt))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    def _is_kept(self, job: str, steps: int) -> bool:
        """A job that went on after its end was near tells the same again."""
        kept = [adapter.provenance for adapter in self._adapters.list() if adapter.scope == "personal"]
        return any(each.get("job_id") == job and each.get("steps") == steps for each in kept)

    def _pop(self, group: str) -> _Held | None:
        held = self._held.pop(group, None)
        self._watch.end(group)
        if not self._held:
            self._emptied.set()
        return held

    def _worker_ended(self, group: str, reason: str) -> None:
        held = self._pop(group)
        if held is None:
            return
        log.warning("worker ended", extra={"group": group, "reason": reason})
        self._peers.tell_if_online(held.coordinator, "lost", wire.Lost(group, held.offer.rank, reason))

    def _peer_gone(self, node_id: str, reason: str) -> None:
        """Its own groups have no coordinator any more; groups that it was a part of cannot go on."""
        for group, entry in list(self._admitting.items()):
            if entry.coordinator == node_id:
                self._end(group, f"its coordinator is gone: {reason}")
        for group, held in list(self._held.items()):
            if held.coordinator == node_id:
                self._end(group, f"its coordinator is gone: {reason}")
                lost = wire.Lost(group, held.offer.rank, f"it lost its coordinator: {reason}")
                self._peers.tell_when_online(node_id, "lost", lost)

    def _end(self, group: str, reason: str) -> None:
        admitting = self._admitting.get(group)
        if admitting is not None and admitting.task is not asyncio.current_task():
            admitting.ended = reason
            admitting.task.cancel()
        held = self._pop(group)
        if held is None:
            return
        log.info("role ended", extra={"group": group, "reason": reason})
        task = asyncio.get_running_loop().create_task(held.worker.stop())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


def _request_of(offer: wire.Offer) -> PlanRequest:
    """What of a plan's request decides a role's memory."""
    return PlanRequest(
        context_tokens=offer.context_tokens,
        numerics=offer.numerics,
        cache_tokens=max(0, offer.cache_tokens),
        cache_type=offer.cache_type,
        adapter=offer.adapter,
    )
