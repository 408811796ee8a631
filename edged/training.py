"""Training jobs submitted to this node: planned over members, run by a trainer on each, resumed after a loss.

Every rank keeps checkpoints. After a loss the same plan is loaded again as soon as all its nodes are there,
and every rank goes on from the last step that all of them have kept: the trajectory is that of a run which
nothing disturbed. A job whose client leaves goes on; one whose daemon ends goes on when it is back.

A plan may have optional ranks: one that is lost leaves the epoch, and no more. When its node is back for a
while, the next step is the last of the epoch, and the next epoch has it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import figures, models, wire
from .accounting import estimated_training_joules, joules_with
from .adapters import META, Adapter, AdapterMeta, AdapterStore, Kind, check_adapter_name
from .choosing import Chooser
from .control import Emit
from .datasets import DataStore
from .errors import ConfigError, EdgedError, EngineError, JobError, PeerError, PolicyViolation
from .groups import REASON_CHARS_MAX, Asked, Group, Groups, Load
from .jobs import Job, JobStore, State
from .models import ModelStore
from .peers import Peers
from .plugins import Host
from .requests import FinetuneRequest
from .training_run import TrainingRun
from .types import (
    Candidate,
    EngineEntry,
    NodeView,
    PlanRequest,
    Training,
    TrainingPlan,
)
from .viewing import Viewer

log = logging.getLogger(__name__)
KIND = "finetune"
RUNNING_MAX = 8  # trainings at once; each holds a worker on every node that it uses
STEPS_MAX = 1_000_000
REPORTS_MAX = 50_000  # of steps that not every reporter has told yet
RETRIES_MAX = 5  # losses without a step between them: a plan that always ends so is a plan that cannot run
LOOK_S = 1.0  # between looks whether all nodes are there, and between offers to a node that refuses for now
ASKED_MAX = 5  # at the end, for what was sent and spent, and for reports that are under way
REST_S = 15.0  # the longest between two offers to a node that refuses for now
POLL_S = 2.0  # between questions what was sent and spent
BACK_S = 15.0  # how long a node that had left must be back before an epoch begins with it
BACK_LOADS = 2.0  # likewise, in times that it takes to load: what it brings must be worth what all pay
BACK_STEPS = 2  # fewer are left: not any more
GONE = ("worker-ended", "worker-silent", "quorum")  # codes of errors that are losses, beside PeerError
FINAL = ("no-right", "stayed-away", "privacy-budget", "privacy-changed")  # codes of what no waiting mends
SENT = "bytes_sent"  # beside a step's figures in the store: what the job had sent until then


class Trainings:
    def __init__(
        self,
        store: JobStore,
        peers: Peers,
        host: Host,
        stored_models: ModelStore,
        viewer: Viewer,
        chooser: Chooser,
        groups: Groups,
        data: DataStore,
        adapters: AdapterStore,
        trainings: Mapping[str, Training],
        engines: Mapping[str, EngineEntry],
        folder: Path,
    ) -> None:
        self._store, self._peers, self._host = store, peers, host
        self._models, self._viewer, self._chooser, self._groups = stored_models, viewer, chooser, groups
        self._data, self._adapters, self._folder = data, adapters, folder
        self._trainings, self._engines = trainings, engines
        self._runs: dict[str, TrainingRun] = {}
        self._accepting: set[str] = set()  # jobs that have data sets, and are not in the store yet
        self.is_draining = False
        peers.takes("trained", self._trained)
        groups.when_lost(self._group_lost)
        groups.when_left = self._rank_left

    @property
    def running(self) -> int:
        return len(self._runs)

    def owns(self, job: Job) -> bool:
        return job.kind == KIND

    def resume_unfinished(self) -> None:
        """Go on with what the daemon's end interrupted; called once, when peers can be reached."""
        for job_id in self._store.unfinished(KIND):
            if job_id in self._runs:  # asked for since the socket is open
                continue
            try:
                job = self._store.get(job_id)
                self._begin(job_id, self._request_of(job), job)
            except Exception as error:  # one that cannot be read must not keep the node from starting
                log.exception("training not gone on with", extra={"job_id": job_id})
                with contextlib.suppress(EdgedError):  # a store that takes nothing
                    self._store.end(job_id, "failed", time.time(), error=_failure_of(error, False))

    async def close(self) -> None:
        """Leave them as they are in the store: the next start goes on with them."""
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- jobs ---

    async def finetune(self, request: FinetuneRequest, files: Sequence[int], emit: Emit) -> dict[str, Any]:
        """Accept a training, then stream it until it ends; the document of the contract."""
        run = await self._accept(request, files)
        if request.detach:
            return {"job_id": run.job_id}
        return await self._watch(run, emit, {"event": "accepted", "job_id": run.job_id})

    async def _accept(self, request: FinetuneRequest, files: Sequence[int]) -> TrainingRun:
        if self.is_draining:
            raise PolicyViolation("this node is leaving and takes no new jobs")
        if len(self._runs) >= RUNNING_MAX:
            raise PolicyViolation(f"{len(self._runs)} trainings run, the most", remedy="try again later")
        settings = self._check(request)
        self._models.find(str(settings["model"]))
        check_adapter_name(str(settings["adapter"] or request.name))
        if request.resume:
            return self._accept_resumed(request, settings)
        job_id = secrets.token_hex(8)
        self._accepting.add(job_id)
        try:
            request = await self._with_files(job_id, request, files)
            settings = self._check(request)
            self._store.accept(job_id, KIND, msgspec.to_builtins(request), time.time())
        except BaseException:
            self._data.remove_for_job(job_id)
            raise
        finally:
            self._accepting.discard(job_id)
        return self._begin(job_id, request, None)

    def _accept_resumed(self, request: FinetuneRequest, settings: Mapping[str, Any]) -> TrainingRun:
        """An ended job goes on; its file may ask for more steps, and for nothing else."""
        job = self._store.get(str(request.resume))
        if not self.owns(job):
            raise ConfigError(f"job {job.job_id} is no training", remedy="see `edged jobs`")
        if job.job_id in self._runs:
            raise JobError(
                f"job {job.job_id} runs", remedy=f"edged jobs {job.job_id} --follow", code="running"
            )
        former = self._request_of(job)
        before = self._check(former)
        kept = dict(settings) | ({"clients": before.get("clients")} if former.file_clients else {})
        more = ("steps", self._trainings[request.kind].steps_key)
        changed = sorted(key for key in kept if kept[key] != before.get(key) and key not in more)
        if changed or former.kind != request.kind:
            raise ConfigError(
                f"expected the file of job {job.job_id}; it differs in {', '.join(changed) or 'kind'}",
                remedy=f"go on with the same settings ({more[1]} may be more), or start a new job",
            )
        if kept["steps"] < before["steps"] or (job.state == "done" and kept["steps"] == before["steps"]):
            raise ConfigError(
                f"expected more than the {before['steps']} {more[1]} of job {job.job_id}",
                remedy=f"raise `{more[1]}`",
            )
        going_on = dataclasses.replace(former, settings=former.settings | {more[1]: kept["steps"]})
        self._store.reopen(job.job_id, msgspec.to_builtins(going_on))
        try:
            return self._begin(job.job_id, going_on, self._store.get(job.job_id))
        except EdgedError as error:
            self._store.end(job.job_id, "failed", time.time(), error=error)
            raise

    async def _with_files(
        self, job_id: str, request: FinetuneRequest, files: Sequence[int]
    ) -> FinetuneRequest:
        """The request, with every file that came along as a data set of this job."""
        if not request.file_clients:
            return request
        if len(files) != len(request.file_clients):
            raise ConfigError(f"expected {len(request.file_clients)} open files; {len(files)} came")
        clients = [dict(client) for client in request.settings.get("clients", ())]
        mine = (self._peers.identity.node_id, self._peers.identity.name)
        for index, file in zip(request.file_clients, files, strict=True):
            if not 0 <= index < len(clients):
                raise ConfigError(f"expected clients 0 to {len(clients) - 1} with files; {index} came")
            node = clients[index].get("node", mine[0])
            if self._peers.find(str(node)) != mine[0]:
                raise ConfigError(
                    f"a path names data on this node only, and clients[{index}] is node {node!r}",
                    remedy="offer it there: edged data add NAME FILE; then write its name",
                )
            clients[index]["data"] = await self._data.add_for_job(job_id, index, file)
        return dataclasses.replace(request, settings=request.settings | {"clients": clients})

    def _check(self, request: FinetuneRequest) -> Mapping[str, Any]:
        training = self._trainings.get(request.kind)
        if training is None:
            known = ", ".join(sorted(self._trainings)) or "none"
            raise ConfigError(
                f"no training {request.kind!r}; loaded: {known}",
                remedy="name one of these, or load the plugin that brings it",
            )
        settings = training.check(request.settings)
        if not 1 <= settings["steps"] <= STEPS_MAX:
            raise ConfigError(f"expected steps from 1 to {STEPS_MAX}", remedy="mend the file")
        return settings

    def _request_of(self, job: Job) -> FinetuneRequest:
        try:
            return msgspec.convert(job.request, FinetuneRequest)
        except msgspec.ValidationError as error:
            raise JobError(f"expected a training that this version can read; {error}") from error

    def _begin(self, job_id: str, request: FinetuneRequest, job: Job | None) -> TrainingRun:
        settings = self._check(request)
        run = TrainingRun(job_id, request, self._trainings[request.kind], settings, time.monotonic())
        if job is not None:
            self._take_up(run, job)
        self._runs[job_id] = run
        run.task = asyncio.get_running_loop().create_task(self._run(run))
        run.task.add_done_callback(lambda task: _settled(run, task))
        return run

    def _take_up(self, run: TrainingRun, job: Job) -> None:
        """What the store knows of a job that goes on: its plan stays, but for the number of steps."""
        run.epoch = job.epoch
        for step, kind, values in self._store.steps(job.job_id):
            run.bytes_before = max(run.bytes_before, int(values.pop(SENT, 0)))
            if kind == "step":
                run.losses[step] = values["loss"]
            elif kind == "eval":
                run.evals[step] = values
        run.joules_before = None  # what was spent until then is not known any more
        if job.plan is None:
            return
        try:
            run.model_sha256 = str(job.plan["model_sha256"])
            plan = msgspec.convert(job.plan["plan"], TrainingPlan)
            run.recoveries = list(job.plan["recoveries"])
            run.egress_before = figures.egress_of(job.plan.get("egress", ()), run.bytes_before)
            run.bytes_before = sum(size for _, size in run.egress_before.values())
        except (KeyError, TypeError, msgspec.ValidationError) as error:
            raise JobError(f"expected a plan that this version can read; {error}") from error
        steps = int(run.settings["steps"])
        run.settings = dict(plan.settings) | {"steps": steps, run.training.steps_key: steps}
        run.plan = dataclasses.replace(plan, settings=run.settings, steps=steps)
        run.step = run.furthest = min(steps, len(run.losses))
        run.has_begun = True
        if job.state == "running":
            reason = f"{self._peers.identity.name}'s daemon ended"
            run.recoveries.append({"at_step": run.step, "epoch": run.epoch, "reason": reason})

    async def _watch(
        self, run: TrainingRun, emit: Emit, first: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Stream a running training. A client that goes away changes nothing."""
        assert run.task is not None
        if first is not None:
            await emit(first)
        seen = 0
        while True:
            news, batch = run.news, run.told[max(0, seen - run.told_before) :]
            seen = run.told_before + len(run.told)
            try:
                for event in batch:
                    await emit(event)
            except OSError:  # it went away; nobody hears the end
                return {}
            if seen < run.told_before + len(run.told):
                continue
            if run.task.cancelled():
                raise JobError(
                    "this node stops; the job goes on when it starts again",
                    remedy=f"then: edged jobs {run.job_id} --follow",
                    code="interrupted",
                )
            if run.task.done():
                return run.task.result()
            await _either(news, run.task)

    async def _run(self, run: TrainingRun) -> dict[str, Any]:
        """The life of one training. Whatever happens but the daemon's end, the store says how it ended."""
        try:
            document = await self._run_epochs(run)
            self._store.end(run.job_id, "done", time.time(), result=document)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and not run.is_cancelled:
                raise  # the daemon ends; its next start goes on
            failure = _failure_of(error, run.is_cancelled)
            state: State = "cancelled" if run.is_cancelled else "failed"
            with contextlib.suppress(EdgedError):
                self._store.end(run.job_id, state, time.time(), error=failure)
            self._host.observe("edged_job_finished", job_id=run.job_id, state=state, measured={})
            if not isinstance(error, EdgedError | asyncio.CancelledError):
                log.error("training failed", extra={"job_id": run.job_id}, exc_info=error)
            raise failure from error
        else:
            self._host.observe(
                "edged_job_finished", job_id=run.job_id, state="done", measured=document["measured"]
            )
            return document
        finally:
            self._leave_group(run)
            self._runs.pop(run.job_id, None)

    # --- epochs ---

    async def _run_epochs(self, run: TrainingRun) -> dict[str, Any]:
        refused_since: float | None = None
        refusals = 0
        while True:
            if run.plan is not None:
                await self._until_all_there(run)
            try:
                done = await self._run_epoch(run)
                return await self._document(run, done)
            except EdgedError as error:
                if run.is_cancelled or not _may_pass(run, error):
                    raise
                if isinstance(error, PolicyViolation):
                    now = time.monotonic()
                    refused_since = refused_since or now
                    if now - refused_since > run.patience_s:
                        raise
                    self._leave_group(run)
                    run.waits(str(error))
                    refusals += 1
                else:
                    refused_since, refusals = None, 0
                    self._note_loss(run, error)
                    if run.failures > RETRIES_MAX:
                        raise
            await asyncio.sleep(min(REST_S, LOOK_S * 2**refusals))

    def _note_loss(self, run: TrainingRun, error: EdgedError) -> None:
        self._leave_group(run)
        run.failures += 1
        lost = {"at_step": run.step, "epoch": run.epoch, "reason": str(error)}
        run.recoveries.append(lost)
        log.warning("training interrupted", extra={"job_id": run.job_id, "reason": str(error)})
        run.tell({"event": "interrupted"} | lost)

    async def _until_all_there(self, run: TrainingRun) -> None:
        """Wait for every node of the plan; PeerError when one stays away for the job's patience."""
        until = time.monotonic() + run.patience_s
        every = run.plan.roles if run.plan is not None else ()
        least = run.plan.optional_least if run.plan is not None else 0
        optional = [r for r in every if run.plan is not None and r.rank in run.plan.optional]
        roles = [r for r in every if r not in optional]
        while True:
            away = [self._peers.name_of(r.node_id) for r in roles if not self._peers.is_online(r.node_id)]
            if not away or optional:
                views = {view.node_id: view for view in await self._viewer.views(measure=False)}
                silent = [self._peers.name_of(r.node_id) for r in roles if r.node_id not in views]
                resting = [views[r.node_id] for r in roles if r.node_id in views and views[r.node_id].refuses]
                away = [
                    *dict.fromkeys([*away, *silent]),
                    *(f"{view.name} ({view.refuses})" for view in resting),
                ]
                able = [r for r in optional if r.node_id in views and not views[r.node_id].refuses]
                if len(able) < least:
                    away.append(f"{least} of {len(optional)} other nodes, of which {len(able)} are there")
            if not away:
                break
            waits_for = ", ".join(away)
            run.waits(f"it needs {waits_for}")
            if time.monotonic() > until:
                raise PeerError(
                    f"expected {waits_for} back within {run.patience_s:.0f} s",
                    remedy=f"start it, then: edged finetune {run.request.kind} FILE --resume {run.job_id}",
                    code="stayed-away",
                )
            await asyncio.sleep(LOOK_S)
        run.waits("")

    async def _run_epoch(self, run: TrainingRun) -> Mapping[str, float]:
        """Plan, load, go on from the last step that every rank has kept, to the end."""
        model = self._models.find(run.model_sha256 or str(run.settings["model"]))
        run.model_sha256 = model.sha256
        nodes = await self._viewer.views(measure=run.plan is None and "auto" in run.settings.values())
        plan = self._plan(run, model.sha256, nodes)
        run.epoch += 1
        self._store.begin_epoch(run.job_id, run.epoch, self._stored_plan(run, plan))
        candidate = Candidate(run.training.name, plan.roles, engine=run.training.engine)
        offers = tuple(
            wire.TrainingOffer(run.job_id, run.request.kind, dict(plan.settings), data) for data in plan.data
        )
        manifest = self._models.manifest(model.sha256)
        load = Load(
            plan.roles,
            manifest,
            models.manifest_hash(manifest),
            run.training.engine,
            min(int(plan.settings["max_length"]), manifest.model.context_tokens),
            "fast",
            self._chooser.holder_of(model, nodes, candidate),
            0,
            "f32",
            offers,
            optional=frozenset(plan.optional),
            engines=plan.engines,
        )
        asked = Asked(model.sha256, PlanRequest(strategy=run.training.name), frozenset())
        run.finished = asyncio.get_running_loop().create_future()
        run.back_since.clear()
        run.returning, run.failed_ranks = (), set()
        run.reports.clear()
        run.tell({"event": "progress", "text": "loading"})
        run.group = self._groups.begin(load, asked, candidate, {node.node_id: node for node in nodes})
        self._groups.enter(run.group, run.job_id)
        await self._groups.loaded(run.group, run.job_id)
        if run.group.lost is not None:
            raise run.group.lost
        run.has_begun = True
        self._start(run, plan, run.group, manifest)
        return await self._until_finished(run)

    def _stored_plan(self, run: TrainingRun, plan: TrainingPlan) -> dict[str, Any]:
        """What a job goes on with after this daemon ended."""
        return {
            "strategy": run.training.name,
            "plan": wire.to_map(plan),
            "model_sha256": run.model_sha256,
            "recoveries": run.recoveries,
            "egress": figures.egress_rows(run.egress),
        }

    def _plan(self, run: TrainingRun, sha256: str, nodes: Sequence[NodeView]) -> TrainingPlan:
        """The plan of the first epoch stays the job's: another would go another way."""
        if run.plan is None:
            description = self._models.manifest(sha256).model
            if run.training.engine not in self._engines:
                raise EngineError(
                    f"expected engine {run.training.engine!r} here; loaded: {', '.join(self._engines)}",
                    remedy=f'add "{run.training.engine}" to `plugins`',
                )
            run.plan = run.training.plan(run.settings, description, nodes)
            if run.plan.refused_because:
                raise PolicyViolation(
                    run.plan.refused_because, remedy="make it smaller, or choose other nodes"
                )
            run.settings = run.plan.settings
        for role in run.plan.roles:
            is_needed = role.rank not in run.plan.optional or run.epoch == 0
            if is_needed and not self._peers.is_online(role.node_id):
                raise PeerError(f"node {self._peers.name_of(role.node_id)} is offline")
        return run.plan

    def _start(self, run: TrainingRun, plan: TrainingPlan, group: Group, manifest: wire.Manifest) -> None:
        """Have every rank go on from the last step that all of them have kept."""
        surveys = [started.survey for started in group.started]
        run.cost = run.training.cost(plan, manifest.model, surveys)
        keepers = [
            started
            for rank, started in enumerate(group.started)
            if started.survey.get("keeps", True) and rank not in plan.optional
        ]
        kept = [{0, *keeper.steps_kept} for keeper in keepers] or [{0}]
        run.step = max(step for step in set.intersection(*kept) if step <= plan.steps)
        run.forget_from(run.step)
        told = next(step for step in itertools.count() if step not in run.losses)
        self._store.forget_steps(run.job_id, run.step)
        run.tell(
            {
                "event": "planned",
                "job_id": run.job_id,
                "epoch": run.epoch,
                "step": run.step,
                "steps": plan.steps,
                "plan": self._plan_row(run),
                "explanation": list(plan.explanation),
            }
        )
        run.patience.begin(time.monotonic())
        away = tuple(sorted(group.away))
        for role in plan.roles:
            if role.rank not in away:
                body = wire.Train(group.group_id, run.job_id, run.epoch, run.step, told, away)
                self._peers.tell(role.node_id, "train", body)

    async def _until_finished(self, run: TrainingRun) -> Mapping[str, float]:
        """Wait for the collector's last report, as long as reports keep coming."""
        assert run.group is not None
        while not run.finished.done():
            await asyncio.wait([run.finished], timeout=POLL_S)
            await self._ask_used(run, run.group)
            if run.group.away and run.group.load.optional:
                await self._look_who_is_back(run, run.group)
            if run.patience.is_over(time.monotonic()) and not run.finished.done():
                raise self._stalled(run)
        return run.finished.result()

    async def _look_who_is_back(self, run: TrainingRun, group: Group) -> None:
        """Note the nodes that left and are there again for long enough: `_report` ends the epoch for them."""
        views = {view.node_id: view for view in await self._viewer.views(measure=False)}
        now, long_s = time.monotonic(), max(BACK_S, BACK_LOADS * group.load_ms / 1000)
        for rank in set(group.away) - run.failed_ranks - group.refused:
            node_id = group.load.roles[rank].node_id
            node = views.get(node_id)  # a busy one may not answer in time
            if not self._peers.is_online(node_id) or (node is not None and node.refuses):
                run.back_since.pop(rank, None)
            else:
                run.back_since.setdefault(rank, now)
        run.returning = tuple(sorted(rank for rank, since in run.back_since.items() if now - since >= long_s))

    async def _ask_used(self, run: TrainingRun, group: Group) -> None:
        """What every role sent and spent; what one does not answer stays as it last was."""
        answers = await self._groups.used(group)
        before = run.used or (None,) * len(answers)
        run.silent = tuple(
            role.node_id
            for role, used in zip(group.load.roles, answers, strict=True)
            if used is None and role.rank not in group.away
        )
        run.used = tuple(now or last for now, last in zip(answers, before, strict=True))

    def _stalled(self, run: TrainingRun) -> PeerError:
        """It names who does not even say what it uses; a frozen one does not."""
        limit_s = run.patience.limit_s
        run.patience.heard(time.monotonic())  # the next time it is longer
        silent = [self._peers.name_of(node_id) for node_id in run.silent]
        whose = f"; {', '.join(silent)} does not answer" if silent else ""
        return PeerError(f"expected a step within {limit_s:.0f} s; none came{whose}", code="stalled")

    def _leave_group(self, run: TrainingRun) -> None:
        """The workers of a training serve nothing else."""
        if run.group is None:
            return
        run.bytes_before, run.egress_before = run.bytes_sent, run.egress
        run.joules_before = joules_with(run.joules_before, run.used) if run.used else run.joules_before
        run.used = ()
        if run.plan is not None:
            with contextlib.suppress(EdgedError):
                self._store.keep_plan(run.job_id, self._stored_plan(run, run.plan))
        group, run.group = run.group, None
        group.jobs.discard(run.job_id)
        self._groups.end(group)

    # --- what comes back ---

    def _trained(self, node_id: str, body: wire.Trained) -> None:
        run = self._runs.get(body.job)
        if run is None or run.group is None or run.epoch != body.epoch:
            return
        roles = run.group.load.roles
        if not 0 <= body.rank < len(roles) or roles[body.rank].node_id != node_id:
            return
        if body.kind == "error":
            self._failed(run, run.group, body.rank, self._error_of(node_id, body))
        elif body.kind == "done":
            if node_id == self._peers.identity.node_id and not run.finished.done():
                run.finished.set_result(body.values)
        elif body.kind == "alive":
            run.patience.heard(time.monotonic())
        elif body.kind in ("step", "eval") and run.plan is not None and figures.is_sound(body, run.plan):
            self._report(run, run.plan, body)

    def _failed(self, run: TrainingRun, group: Group, rank: int, error: EdgedError) -> None:
        """What fails in an optional rank costs its part, in this epoch; it is not waited for."""
        if rank in group.load.optional:
            run.failed_ranks.add(rank)
            self._groups.leave(group, rank, str(error)[:REASON_CHARS_MAX])
        else:
            run.fail(error)

    def _rank_left(self, group: Group, rank: int, reason: str) -> None:
        for run in self._runs.values():
            if run.group is group:
                name = self._peers.name_of(group.load.roles[rank].node_id)
                run.back_since.pop(rank, None)
                run.tell({"event": "progress", "text": f"{name} left: {reason}; the others go on"})

    def _error_of(self, node_id: str, body: wire.Trained) -> EdgedError:
        name = self._peers.name_of(node_id)
        error = body.error
        message = f"{name}: {str(error.get('message', 'it failed'))[:1000]}"
        return JobError(message, remedy=str(error.get("remedy", ""))[:300], code=str(error.get("code"))[:40])

    def _report(self, run: TrainingRun, plan: TrainingPlan, body: wire.Trained) -> None:
        """A step is told when every rank that has a part of its loss has told it: their mean by tokens."""
        is_known = body.step in (run.losses if body.kind == "step" else run.evals)
        if is_known or len(run.reports) >= REPORTS_MAX:
            return
        heard = run.reports.setdefault((body.step, body.kind), {})
        heard[body.rank] = body.values
        if len(heard) < len(plan.reporters):
            return
        del run.reports[body.step, body.kind]
        values = figures.mean(list(heard.values()))
        if body.kind == "eval" and values.get("targets") == 0:
            return  # no rank has rows that are held out, or may still send them
        try:
            self._store.add_step(run.job_id, body.step, body.kind, values | {SENT: float(run.bytes_sent)})
        except EdgedError as error:
            run.fail(error)
            return
        run.patience.heard(time.monotonic())
        if body.kind == "step":
            if body.step >= run.furthest:  # what is told again after a loss is no progress
                run.furthest, run.failures = body.step + 1, 0
            run.losses[body.step] = values["loss"]
            run.step = max(run.step, body.step + 1)
            if run.returning and body.step + BACK_STEPS < plan.steps:
                names = [self._peers.name_of(plan.roles[rank].node_id) for rank in run.returning]
                run.fail(PeerError(f"{', '.join(names)} is back: the next epoch has it again", code="back"))
        else:
            run.evals[body.step] = values
        run.tell({"event": body.kind, "step": body.step, "steps": plan.steps} | values | self._pace(run))

    def _pace(self, run: TrainingRun) -> dict[str, Any]:
        return {"bytes_sent": run.bytes_sent, "joules": joules_with(run.joules_before, run.used)}

    def _group_lost(self, group: Group) -> None:
        for run in self._runs.values():
            if run.group is group and group.lost is not None:
                run.fail(group.lost)

    # --- asking about trainings ---

    async def show(self, job: Job, follow: bool, emit: Emit) -> dict[str, Any]:
        run = self._runs.get(job.job_id)
        if follow and run is not None:
            return await self._watch(run, emit)
        if follow and job.result is not None:
            return job.result
        if follow and job.error is not None:
            raise JobError(job.error["message"], remedy=job.error["remedy"], code=job.error["code"])
        steps = self._store.steps(job.job_id)
        loss = [values["loss"] for _, kind, values in steps if kind == "step"]
        return {"jobs": [{**self.row(job), "result": job.result, "loss": loss}]}

    def row(self, job: Job) -> dict[str, Any]:
        run = self._runs.get(job.job_id)
        progress = 1.0 if job.state == "done" else None
        if run is not None and run.plan is not None and run.plan.steps:
            progress = run.step / run.plan.steps
        waits = {"until": None, "because": run.waits_for} if run and run.waits_for else None
        return job.row(progress) | {"waits": waits}

    async def cancel(self, job: Job) -> dict[str, Any]:
        run = self._runs.get(job.job_id)
        if run is None or run.task is None:
            raise JobError(f"job {job.job_id} is {job.state} already", code="ended")
        run.is_cancelled = True
        run.task.cancel()
        await asyncio.wait([run.task])
        return {"job_id": job.job_id, "state": self._store.get(job.job_id).state}

    def remove(self, job: Job) -> dict[str, Any]:
        if job.job_id in self._runs:
            raise JobError(f"job {job.job_id} runs", remedy="cancel it first", code="running")
        self._store.remove(job.job_id)
        self._data.remove_for_job(job.job_id)
        shutil.rmtree(self._state_of(job.job_id), ignore_errors=True)
        return {"job_id": job.job_id}

    def tidy(self) -> None:
        """Delete the data sets of jobs that the store does not keep any more; called now and then."""
        known = {job.job_id for job in self._store.all()}
        for job_id in self._data.jobs() - known - self._accepting:
            self._data.remove_for_job(job_id)

    def _state_of(self, job_id: str) -> Path:
        """What this node keeps of its own job to go on with."""
        return self._folder / f"{self._peers.identity.node_id[:16]}-{job_id}"

    # --- documents ---

    async def _document(self, run: TrainingRun, done: Mapping[str, float]) -> dict[str, Any]:
        assert run.group is not None
        assert run.plan is not None
        await self._hear_out(run, run.plan, run.group)
        seconds = time.monotonic() - run.since
        joules, source = joules_with(run.joules_before, run.used), "measured"
        if joules is None:
            nodes = await self._viewer.views(measure=False)
            watts = {node.node_id: node.watts for node in nodes}
            joules = estimated_training_joules([watts.get(r.node_id) for r in run.plan.roles], seconds)
            source = "estimated"
        done = figures.with_spent(done, [started.survey for started in run.group.started])
        log = figures.rounds_log(self._store.steps(run.job_id), [role.node_id for role in run.plan.roles])
        names = {role.node_id: self._peers.name_of(role.node_id) for role in run.plan.roles}
        made_by = figures.made_of(run.plan.settings, log, names)
        adapter = await asyncio.to_thread(self._adopt, run, run.plan, done, made_by)
        return {
            "job_id": run.job_id,
            "adapter": adapter.name,
            "steps": run.plan.steps,
            "loss": [run.losses[step] for step in sorted(run.losses)],
            "eval_loss": [run.evals[step]["loss"] for step in sorted(run.evals)],
            "evals": [{"step": step} | run.evals[step] for step in sorted(run.evals)],
            "bytes_sent": run.bytes_sent,
            "egress": figures.egress_rows(run.egress),
            "joules": joules,
            "joules_source": source if joules is not None else None,
            "rounds_log": log,
            "plan": self._plan_row(run),
            "measured": {
                "seconds": seconds,
                "memory_bytes": {
                    role.node_id: used.memory_bytes
                    for role, used in zip(run.plan.roles, run.used, strict=False)
                    if used is not None
                },
                "recoveries": run.recoveries,
            }
            | done,
        }

    async def _hear_out(self, run: TrainingRun, plan: TrainingPlan, group: Group) -> None:
        """The collector may overtake other ranks' last reports: what a node answers comes after these."""
        for _ in range(ASKED_MAX):
            await self._ask_used(run, group)
            if not run.silent and len(run.losses) >= plan.steps:
                return

    def _adopt(
        self, run: TrainingRun, plan: TrainingPlan, done: Mapping[str, float], made_by: Mapping[str, Any]
    ) -> Adapter:
        """Keep what the collector wrote; a job that ended between that and its own end has it already."""
        for adapter in self._adapters.list():
            if (
                adapter.provenance.get("job_id") == run.job_id
                and adapter.provenance.get("steps") == plan.steps
                and adapter.scope == "global"
            ):
                return adapter
        model = self._models.find(run.model_sha256)
        made = self._state_of(run.job_id) / f"rank-{plan.collector}" / "adapter"
        provenance = {"job_id": run.job_id, "kind": run.request.kind, "steps": plan.steps, **done, **made_by}
        meta = AdapterMeta(model.sha256, model.name, kind=_kind_of(made), provenance=provenance)
        return self._adapters.adopt(made, str(run.settings["adapter"] or run.request.name), meta)

    def _plan_row(self, run: TrainingRun) -> dict[str, Any]:
        assert run.plan is not None
        return {
            "strategy": run.training.name,
            "epoch": run.epoch,
            "cut": run.plan.settings.get("cut"),
            "roles": [
                {
                    "node": role.node_id,
                    "name": self._peers.name_of(role.node_id),
                    "layers": list(role.layers),
                    "share": role.share,
                    "memory_bytes": role.memory_bytes,
                }
                for role in run.plan.roles
            ],
            "predicted": {
                "step_s": run.plan.step_s,
                "seconds": run.cost.seconds,
                "bytes_sent": run.cost.bytes_sent,
                "memory_bytes": {role.node_id: role.memory_bytes for role in run.plan.roles},
            },
        }


def _kind_of(made: Path) -> Kind:
    """Of an adapter that is no LoRA its maker says so beside it."""
    try:
        told = (made / META).read_bytes()
    except FileNotFoundError:
        return "lora"
    return msgspec.json.decode(told, type=_Made).kind


class _Made(msgspec.Struct):
    kind: Kind


def _may_pass(run: TrainingRun, error: EdgedError) -> bool:
    """May the same plan work when the lost node is back, or a node that refuses for now does not any more?"""
    if error.code in FINAL or (error.code == "not-online" and run.epoch == 0):
        return False
    if isinstance(error, PolicyViolation):
        return run.has_begun
    return isinstance(error, PeerError) or error.code in GONE


def _failure_of(error: BaseException, is_cancelled: bool) -> EdgedError:
    if is_cancelled:
        return JobError("the job was cancelled", remedy="go on with --resume", code="cancelled")
    if isinstance(error, EdgedError):
        return error
    return JobError(f"internal error: {type(error).__name__}: {error}", code="internal")


def _settled(run: TrainingRun, task: asyncio.Task[dict[str, Any]]) -> None:
    """Wake the watchers; look at the exception, since a detached job has none."""
    run.news.set()
    if not task.cancelled():
        task.exception()


async def _either(news: asyncio.Event, task: asyncio.Task[Any]) -> None:
    """Until there is news, or the task is done."""
    waiting = asyncio.ensure_future(news.wait())
    try:
        await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
