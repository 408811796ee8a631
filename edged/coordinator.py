"""Jobs submitted to this node: from acceptance over a plan and a group of workers to the last token."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import msgspec

from . import models, planning, sizes, wire
from .accounting import Spent, estimated_joules, joules_of, pace, spent_between
from .choosing import Chooser
from .config import Profile
from .control import Emit
from .errors import EdgedError, JobError, PeerError, PolicyViolation
from .groups import SETTLE_S, Asked, Group, Groups, Load
from .jobs import ENDED, Job, JobStore, State, rfc3339
from .models import Model, ModelStore
from .peers import Peers
from .plugins import Host
from .quarantine import Quarantine
from .requests import GenerateRequest, read
from .types import AdapterFile, Deferral, NodeView, Outcome, PlanRequest, Sampling
from .viewing import Viewer

log = logging.getLogger(__name__)
RUNNING_MAX = 32  # jobs at once; rank 0 lets them in as the KV cache's memory allows
STALL_S = 120.0  # without a token for so long (and ten times the predicted prefill) a job has failed
CANCEL_S = 5.0
TOKEN_MAX = 1 << 31  # ids are int32 in every engine
TEXT_CHARS_MAX = 4096  # of one message of tokens
CONSIDER_S = 30.0  # between two looks for another plan, each of which may search for seconds
MOVE_WORTH_S = 5.0  # what is left of a job, before another plan is worth its loading
INFINITE_MS = 1e12  # of a token, where no price says
CLOCK_S = 60.0  # between looks at the clock: it may be set, and a device may sleep
ASK_LEAST_S = 1.0  # before a policy is asked again whether a job should wait
RECOVERY_S = 600.0  # a job that was lost waits so long for nodes that can hold its model
VAIN_MOST = 5  # losses on end without a token between them: then it is the job's own fault
LOOK_S, LOOK_MOST_S = 0.5, 10.0  # between looks for somebody who can go on with it
REJOIN_S = 15.0  # after a start, for the nodes that a job ran on
DAEMON_ENDED = "the daemon that coordinated it ended"
USED_BEFORE_S = 0.05  # a job waits for what its group had sent and spent before it
T = TypeVar("T")


@dataclass(slots=True)
class _Run:
    """A job that is not over."""

    job_id: str
    request: GenerateRequest
    accepted_at: float  # monotonic; where it waited on purpose, the end of that
    times: list[float] = field(default_factory=list)  # arrival of each token
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    epoch: int = 0
    group: Group | None = None
    load_ms: float = 0.0
    used_before: asyncio.Future[tuple[wire.Used | None, ...]] | None = None  # of the group's roles
    tokens_before: int = 0  # that the group had made
    is_cancelled: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Future[wire.Finished] = field(default_factory=asyncio.Future)
    watchers: int = 0
    is_detached: bool = False
    orphan: asyncio.TimerHandle | None = None
    task: asyncio.Task[dict[str, Any]] | None = None
    move: _Move | None = None  # under way
    considered_until: float = 0.0  # monotonic; before that no other move is looked for
    moves: list[_Move] = field(default_factory=list)
    start_by: float | None = None  # Unix time until which its start may wait
    waits: Deferral | None = None  # while it does
    spent_earlier: list[Spent] = field(default_factory=list)  # in earlier epochs
    adapter: AdapterFile | None = None  # its content at the first plan; later epochs have the same
    is_ordered: bool = False  # rank 0 of this epoch was told of it
    lost_at: float | None = None  # monotonic: since then it waits for its next token
    awaits: set[str] = field(default_factory=set)  # nodes that it ran on before this daemon started
    resumed_at: int = 0  # tokens that this daemon found in the store; it has times of later ones


@dataclass(slots=True)
class _Move:
    """A job leaves its group at a token boundary, for another plan."""

    node_id: str  # because of whom
    reason: str
    at_token: int
    since: float  # monotonic
    silent_s: float = 0.0  # of a loss: since the last sign of life
    is_loss: bool = False


class Coordinator:
    def __init__(
        self,
        profile: Profile,
        store: JobStore,
        peers: Peers,
        host: Host,
        stored_models: ModelStore,
        viewer: Viewer,
        chooser: Chooser,
        groups: Groups,
    ) -> None:
        self._profile, self._store, self._peers, self._host = profile, store, peers, host
        self._models, self._viewer, self._chooser = stored_models, viewer, chooser
        self._groups = groups
        self._groups.when_lost(self._group_lost)
        self._groups.when_resting = self._group_resting
        self._groups.when_rate_moved = chooser.forget_corrections
        self._moving: set[asyncio.Task[None]] = set()
        self._runs: dict[str, _Run] = {}
        self._slots = asyncio.Semaphore(RUNNING_MAX)
        self._planning = asyncio.Lock()  # two plans at once would be promised the same memory
        self._quarantine = Quarantine()
        self.is_draining = self._is_closing = False
        peers.takes("tokens", self._tokens)
        peers.takes("finished", self._finished)

    @property
    def running(self) -> int:
        return len(self._runs)

    def resume_unfinished(self) -> None:
        """Go on with what the daemon's end interrupted; called once, when peers can be reached."""
        for job_id in self._store.unfinished("generate"):
            if job_id in self._runs:  # asked for since the socket is open
                continue
            try:
                self._resume(self._store.get(job_id))
            except Exception as error:  # one that cannot be read must not keep the node from starting
                log.exception("job not gone on with", extra={"job_id": job_id})
                self._end_in_store(
                    job_id, "failed", error if isinstance(error, EdgedError) else _interrupted()
                )

    def _resume(self, job: Job) -> None:
        request = read(GenerateRequest, job.request)
        # the last token of all may have come without its end: it is made again
        tokens, text = self._store.tokens(job.job_id, request.n - 1)
        is_bound = request.strict and job.epoch > 0 and not (request.nodes and request.strategy != "auto")
        is_vain = job.epoch >= VAIN_MOST and not tokens  # it may be what ends the daemon
        if is_bound or is_vain or (request.seed is None and tokens):
            raise _interrupted()
        now = time.monotonic()
        run = _Run(job.job_id, _seeded(request), now, tokens=tokens, text=text, epoch=job.epoch)
        run.is_detached, run.lost_at, run.resumed_at = request.detach, now, len(tokens)
        if request.deferrable_s is not None and not job.epoch:
            run.start_by = job.created_at + request.deferrable_s
        if job.epoch:
            mine = self._peers.identity.node_id
            run.moves.append(_Move(mine, DAEMON_ENDED, len(tokens), now, is_loss=True))
            run.spent_earlier.append(Spent(len(tokens), 0, None))
        run.awaits = {role["node"] for role in (job.plan or {}).get("roles", ())}
        self._begin(run)
        if not run.is_detached:
            self._orphan(run)

    def _begin(self, run: _Run) -> None:
        self._runs[run.job_id] = run
        run.task = asyncio.get_running_loop().create_task(self._run(run))
        run.task.add_done_callback(lambda task: _settled(run, task))

    async def close(self) -> None:
        """Leave what runs as it is in the store: the next start goes on with it."""
        self._is_closing = True
        for task in self._moving:
            task.cancel()
        for run in self._runs.values():
            if run.task is not None:
                run.task.cancel()
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._groups.close()

    def borrowers(self, adapter_sha256: str) -> set[str]:
        """The nodes that may have this adapter now: those of its plans."""
        return self._groups.users_of(adapter_sha256)

    async def drained(self, timeout_s: float) -> None:
        """Wait until no job runs, at most so long; jobs that wait for a better time end with the daemon."""
        runs = [run for run in self._runs.values() if run.waits is None]
        tasks = [run.task for run in runs if run.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    def tidy(self) -> None:
        """End idle groups, delete old jobs; called now and then."""
        self._groups.end_idle()
        self._store.expire(time.time() - self._profile.jobs.keep)

    # --- jobs ---

    async def generate(self, request: GenerateRequest, emit: Emit) -> dict[str, Any]:
        """Accept a job, then stream it to its client until it ends; the document of the contract."""
        run = self.accept(request)
        if request.detach:
            return {"job_id": run.job_id}
        return await self._watch(run, emit, {"event": "accepted", "job_id": run.job_id})

    def accept(self, request: GenerateRequest) -> _Run:
        if self.is_draining:
            raise PolicyViolation("this node is leaving and takes no new jobs")
        if len(self._runs) >= self._profile.jobs.queue:
            raise PolicyViolation(
                f"{len(self._runs)} jobs wait, as many as the profile allows", remedy="try again later"
            )
        self._chooser.check_adapter(request, self._models.find(request.model))
        self._chooser.check_deferrable(request)
        request = _seeded(request)
        run = _Run(secrets.token_hex(8), request, time.monotonic(), is_detached=request.detach)
        now = time.time()
        run.start_by = None if request.deferrable_s is None else now + request.deferrable_s
        self._store.accept(run.job_id, "generate", msgspec.to_builtins(request), now)
        self._begin(run)
        return run

    async def _watch(self, run: _Run, emit: Emit, first: dict[str, Any] | None = None) -> dict[str, Any]:
        """Stream a running job; a client that goes away starts the orphan timer."""
        assert run.task is not None
        run.watchers += 1
        if run.orphan is not None:
            run.orphan.cancel()
        try:
            if first is not None:
                await emit(first)
            seen, told = (0, 0), None
            while not run.task.done():
                if run.waits is not None and run.waits is not told:
                    told = run.waits
                    await emit({"event": "waiting", **_waits_row(run.waits)})
                await run.news.wait()
                seen = await _emit_news(run, seen, emit)
            await _emit_news(run, seen, emit)
            return run.task.result()
        finally:
            run.watchers -= 1
            if not run.task.done() and not run.watchers and not run.is_detached:
                self._orphan(run)

    def _orphan(self, run: _Run) -> None:
        """Nobody watches it: it ends, unless somebody attaches again in time."""
        delay = float(self._profile.jobs.orphan_after)
        run.orphan = asyncio.get_running_loop().call_later(delay, self._cancel_run, run)

    async def _run(self, run: _Run) -> dict[str, Any]:
        """The life of one job. Whatever happens, the store says how it ended."""
        try:
            await self._wait_for_peers(run)
            await self._wait_for_start(run)
            async with self._slots:
                finished = await self._run_epochs(run)
            document = await self._document(run, finished)
            state: State = "cancelled" if finished.reason == "cancelled" else "done"
            self._store.end(run.job_id, state, time.time(), result=document)
        except BaseException as error:
            self._give_up(run, error)
            failure = error if isinstance(error, EdgedError) else _as_failure(error, run.is_cancelled)
            state = "cancelled" if run.is_cancelled or failure.code == "cancelled" else "failed"
            if self._is_closing and not run.is_cancelled and isinstance(error, asyncio.CancelledError):
                raise failure from error  # the next start goes on with it
            self._end_in_store(run.job_id, state, failure)
            if run.group is not None and state == "failed":
                self._chooser.learn(
                    run.group.asked.request, Outcome(run.group.candidate, None, is_done=False)
                )
            self._host.observe("edged_job_finished", job_id=run.job_id, state=state, measured={})
            if not isinstance(error, EdgedError | asyncio.CancelledError):
                log.error("job failed", extra={"job_id": run.job_id}, exc_info=error)
            raise failure from error
        else:
            self._host.observe(
                "edged_job_finished", job_id=run.job_id, state=state, measured=document["measured"]
            )
            return document
        finally:
            if run.group is not None:
                self._groups.release(run.group, run.job_id)
            for waiting in (run.orphan, run.used_before):
                if waiting is not None:
                    waiting.cancel()
            self._runs.pop(run.job_id, None)

    def _give_up(self, run: _Run, error: BaseException) -> None:
        """The worker must not go on for nobody; a group that stalled is not used again."""
        if run.group is None or run.group.lost is not None:
            return
        rank_0 = run.group.rank_0
        self._peers.tell_if_online(rank_0, "cancel", wire.Cancel(run.group.group_id, run.job_id))
        if isinstance(error, PeerError) and error.code == "stalled":
            self._groups.lose(run.group, rank_0, "no token came")

    def _end_in_store(self, job_id: str, state: State, failure: EdgedError) -> None:
        """A store that takes nothing must not hide why the job ended; the next start goes on with it."""
        try:
            self._store.end(job_id, state, time.time(), error=failure)
        except EdgedError:
            log.exception("job's end not stored", extra={"job_id": job_id})

    async def _wait_for_peers(self, run: _Run) -> None:
        """After a start, for those that it ran on: else it would be planned among this node alone."""
        for _ in range(round(REJOIN_S / LOOK_S)):
            if all(map(self._peers.is_online, run.awaits)):
                return
            await asyncio.sleep(LOOK_S)

    async def _wait_for_start(self, run: _Run) -> None:
        """While its policy knows a better time, and its start may wait."""
        while run.start_by is not None and time.time() < run.start_by:
            model = self._models.find(run.request.model)
            try:
                run.waits = await self._chooser.deferral(run.request, model, run.start_by)
            except PeerError:
                if run.lost_at is None:  # else this daemon has just started
                    raise
                run.waits = None
            if run.waits is None:
                break
            log.info("job waits", extra={"job_id": run.job_id, "until": rfc3339(run.waits.until)})
            run.news.set()
            await _until(max(run.waits.until, time.time() + ASK_LEAST_S))
            run.accepted_at = time.monotonic()
        run.waits = None

    async def _run_epochs(self, run: _Run) -> wire.Finished:
        """Until it is over: an epoch for every plan that it runs on."""
        while True:
            try:
                finished = await self._run_epoch(run)
            except EdgedError as error:
                if len(run.tokens) >= run.request.n and run.group is not None:  # all but its end came
                    return wire.Finished(run.job_id, run.epoch, "length")
                if not self._goes_on(run, error):
                    raise
                await self._recover(run, error)
                continue
            if run.move is None or run.is_cancelled or finished.reason != "cancelled":
                return finished
            await self._leave_group(run, run.move)

    def _goes_on(self, run: _Run, error: EdgedError) -> bool:
        """Is this a loss that another plan can make good, or the want of one after a loss?"""
        if run.is_cancelled:
            return False
        if _is_loss(run, error):
            here = itertools.takewhile(lambda move: move.at_token == len(run.tokens), reversed(run.moves))
            return not run.request.strict and sum(move.is_loss for move in here) < VAIN_MOST
        is_wanting = run.group is None or not run.is_ordered
        return is_wanting and run.lost_at is not None and time.monotonic() - run.lost_at < RECOVERY_S

    async def _recover(self, run: _Run, error: EdgedError) -> None:
        """Leave a group that is lost; or wait for a moment, where nobody can hold the model now."""
        now, group = time.monotonic(), run.group
        run.lost_at = run.lost_at or now
        if group is not None and _is_loss(run, error):
            if group.lost is None:
                self._groups.lose(group, group.rank_0, str(error))
            extra = {"job_id": run.job_id, "peer": group.lost_node[:8], "reason": str(error)}
            log.warning("job recovers", extra=extra)
            silent_s = now - group.heard_at if group.heard_at else 0.0
            await self._leave_group(run, _Move(group.lost_node, str(error), 0, now, silent_s, is_loss=True))
            return
        if group is not None:  # it could not be loaded; the next plan is another, where there is one
            if group.lost_node:
                self._quarantine.add(group.lost_node, now)
            self._groups.release(group, run.job_id)
            run.group, run.used_before = None, None
        if run.waits is None or run.waits.reason != str(error):
            run.waits = Deferral(time.time() + RECOVERY_S - (now - run.lost_at), str(error))
            run.news.set()
        await asyncio.sleep(min(LOOK_MOST_S, max(LOOK_S, (now - run.lost_at) / 10)))

    async def _leave_group(self, run: _Run, move: _Move) -> None:
        """Between two epochs: what was made stays, and goes through the next plan's model as history."""
        assert run.group is not None
        move.at_token, run.lost_at = len(run.tokens), run.lost_at or time.monotonic()
        run.moves.append(move)
        if move.is_loss:  # nobody is left who could say what it took
            made = len(run.tokens) - sum(earlier.tokens for earlier in run.spent_earlier)
            run.spent_earlier.append(Spent(made, 0, None))
        else:
            run.spent_earlier.append(await self._spent_of(run))
        self._groups.release(run.group, run.job_id)
        run.group, run.move, run.used_before = None, None, None
        run.finished = asyncio.get_running_loop().create_future()

    def _group_resting(self, group: Group, node_id: str, reason: str) -> None:
        for run in self._runs.values():
            if run.group is not group or run.move is not None or run.finished.done() or run.request.strict:
                continue
            if time.monotonic() >= run.considered_until:  # a resting node says so every few seconds
                run.considered_until = time.monotonic() + CONSIDER_S
                task = asyncio.get_running_loop().create_task(self._move(run, group, node_id, reason))
                self._moving.add(task)
                task.add_done_callback(self._moving.discard)

    async def _move(self, run: _Run, group: Group, node_id: str, reason: str) -> None:
        """Let a job go on elsewhere, where there is somewhere, and more than a moment of it left."""
        tpot_ms = group.candidate.predicted.tpot_ms
        left_s = (run.request.n - len(run.tokens)) * (tpot_ms or INFINITE_MS) / 1000
        if left_s < MOVE_WORTH_S:
            return
        try:
            model = self._models.find(run.request.model)
            asked = self._chooser.asked(
                _unbound(run.request), model.sha256, run.request.may_leave, run.adapter
            )
            nodes = await self._nodes(False, True)
            _, _, chosen, _ = await self._chooser.choose(model.sha256, nodes, asked.request)
        except EdgedError as error:
            log.warning("job not moved", extra={"job_id": run.job_id, "reason": str(error)})
            return
        if chosen is None:
            log.info("job stays", extra={"job_id": run.job_id, "peer": node_id[:8], "reason": reason})
            return
        if run.group is group and run.move is None and not run.finished.done():
            log.info("job moves", extra={"job_id": run.job_id, "peer": node_id[:8], "reason": reason})
            run.move = _Move(node_id, reason, len(run.tokens), time.monotonic())
            body = wire.Cancel(group.group_id, run.job_id)
            self._peers.tell_if_online(group.rank_0, "cancel", body)

    async def _run_epoch(self, run: _Run) -> wire.Finished:
        """Plan, load and generate once. What binds the plan binds the first one, unless it is strict."""
        model = self._models.find(run.request.model)
        request = _unbound(run.request) if run.moves and not run.request.strict else run.request
        run.is_ordered = False
        if run.adapter is None and run.request.adapter is not None:
            run.adapter = await self._chooser.adapter_of(run.request, model)
        may_leave = request is run.request or run.request.may_leave
        asked = self._chooser.asked(request, model.sha256, may_leave, run.adapter)
        async with self._planning:
            standing = self._groups.standing(asked) if self._chooser.is_steady(asked.request) else None
            run.group = standing or await self._plan(run, model, asked)
            self._begin_epoch(run)
            self._groups.enter(run.group, run.job_id)
        run.waits = None
        run.load_ms = await self._of_the_job(self._groups.loaded(run.group, run.job_id))
        _check_may_begin(run)
        beside = 0
        if run.adapter is not None and run.group.load.adapter is None:
            beside = await self._of_the_job(self._groups.adapt(run.group, run.job_id, run.adapter))
        run.tokens_before = run.group.tokens
        run.used_before = asyncio.ensure_future(self._groups.used(run.group))
        # before the job goes out, or its first bytes might be no part of it; not for long: over a slow link
        # the question is ahead of the order all the same
        await asyncio.wait([run.used_before], timeout=USED_BEFORE_S)
        _check_may_begin(run)
        self._peers.tell(run.group.rank_0, "generate", self._order(run, beside))
        run.is_ordered = True
        return await self._until_finished(run)

    def _begin_epoch(self, run: _Run) -> None:
        _check_may_begin(run)
        run.epoch += 1
        self._store.begin_epoch(run.job_id, run.epoch, self._plan_row(run))

    async def _plan(self, run: _Run, model: Model, asked: Asked) -> Group:
        """Plan, and begin to load what was chosen. What no job uses makes room for the whole of it."""
        request, manifest = run.request, self._models.manifest(model.sha256)
        is_free = not request.nodes or bool(run.moves)  # else whoever asked for it names its nodes
        nodes = await self._nodes(request.strategy == "auto", is_free)
        wanted, candidates, chosen, _ = await self._chooser.choose(model.sha256, nodes, asked.request)
        if chosen is None and is_free and run.lost_at is None and self._quarantine.any(time.monotonic()):
            is_free = False  # better with one that was lost than not at all
            nodes = await self._nodes(False, is_free)
            wanted, candidates, chosen, _ = await self._chooser.choose(model.sha256, nodes, asked.request)
        if wanted != asked.request:  # it does not fit, or with less than it wants
            if serving := self._groups.still_serving(asked):
                return serving
            if self._groups.end_unused():
                await asyncio.sleep(SETTLE_S)
                nodes = await self._nodes(False, is_free)
                wanted, candidates, chosen, _ = await self._chooser.choose(model.sha256, nodes, asked.request)
        if chosen is None:
            raise planning.refusal(candidates)
        candidate = candidates[chosen]
        swaps = self._chooser.swaps(candidate, manifest.model, wanted)
        if swaps:  # its adapter comes beside the model, as other jobs' do
            wanted = dataclasses.replace(wanted, adapter=None)
            candidate = sizes.at_full_size(candidate, manifest.model, wanted)
        load = Load(
            candidate.roles,
            manifest,
            models.manifest_hash(manifest),
            candidate.engine,
            wanted.context_tokens,
            request.numerics,
            self._chooser.holder_of(model, nodes, candidate),
            wanted.cache_tokens,
            wanted.cache_type,
            adapter=wanted.adapter,
        )
        by_id = {node.node_id: node for node in nodes}
        return self._groups.begin(load, asked, candidate, by_id, swaps)

    async def _nodes(self, measure: bool, is_free: bool) -> list[NodeView]:
        """Those that a plan may use. One in quarantine may be silent for good: it is not asked, where the
        plan is free to take others."""
        now = time.monotonic()
        if not is_free:
            return await self._viewer.views(measure=measure)
        nodes = await self._viewer.views(
            measure=measure, but=lambda node: self._quarantine.left_s(node, now) > 0
        )
        return self._quarantine.seen(nodes, now)

    async def _of_the_job(self, loading: Awaitable[T]) -> T:
        """Whatever class of error a peer sent: for whoever asked for the job it is the job that failed."""
        try:
            return await loading
        except EdgedError as error:
            if isinstance(error, JobError):
                raise
            raise JobError(str(error), remedy=error.remedy, code=error.code) from error

    def _order(self, run: _Run, adapter: int) -> wire.Generate:
        request = run.request
        assert run.group is not None
        messages = tuple(request.messages or ())
        if request.prompt is not None and not request.raw:
            messages = ({"role": "user", "content": request.prompt},)
        assert request.seed is not None
        return wire.Generate(
            run.group.group_id,
            run.job_id,
            run.epoch,
            messages,
            request.prompt if request.raw else None,
            request.n,
            Sampling(request.temperature, request.top_k, request.top_p, request.seed),
            request.ignore_eos,
            tuple(run.tokens),
            adapter,
            # an endpoint goes on after a text, whoever drew its tokens
            request.recovery == "exact" and run.group.candidate.stated is None,
        )

    async def _until_finished(self, run: _Run) -> wire.Finished:
        """Wait for the end, as long as tokens keep coming."""
        assert run.group is not None
        patience = STALL_S + (run.group.candidate.predicted.ttft_ms or 0) / 100
        while True:
            since = time.monotonic()
            await asyncio.wait([run.finished], timeout=patience)
            if run.finished.done():
                break
            if run.group.heard_at < since:  # another job's token is life too: this one may wait its turn
                raise PeerError(f"expected a token within {patience:.0f} s; none came", code="stalled")
        finished = run.finished.result()
        if finished.reason == "error":
            self._raise_failure(run, finished)
        return finished

    def _raise_failure(self, run: _Run, finished: wire.Finished) -> NoReturn:
        """Rank 0 may see a loss before the lost node's daemon tells of it; then the node is named here."""
        assert run.group is not None
        roles, rank = run.group.load.roles, finished.lost_rank
        if run.group.lost is None and rank is not None and 0 <= rank < len(roles):
            self._groups.lose(run.group, roles[rank].node_id, finished.error)
        if run.group.lost is not None:
            raise run.group.lost
        raise JobError(finished.error or "the worker failed", code="engine")

    # --- what comes back ---

    def _tokens(self, node_id: str, body: wire.Tokens) -> None:
        run = self._current(node_id, body.job, body.epoch)
        if run is None or run.finished.done():
            return
        if body.index != len(run.tokens):
            lost = PeerError("tokens were lost on their way", remedy="run it again", code="tokens-lost")
            run.finished.set_exception(lost)
            return
        is_sound = all(0 <= token < TOKEN_MAX for token in body.tokens) and len(body.text) <= TEXT_CHARS_MAX
        if not is_sound or len(run.tokens) + len(body.tokens) > run.request.n:
            run.finished.set_exception(PeerError("expected the tokens that were asked for; others came"))
            return
        try:
            self._store.add_tokens(run.job_id, body.index, body.tokens, body.text)
        except EdgedError as error:
            run.finished.set_exception(error)
            return
        run.tokens += body.tokens
        run.text += body.text
        run.lost_at = None
        run.times += [time.monotonic()] * len(body.tokens)
        if run.group is not None:
            run.group.heard_at = time.monotonic()
            run.group.tokens += len(body.tokens)
        run.news.set()

    def _finished(self, node_id: str, body: wire.Finished) -> None:
        run = self._current(node_id, body.job, body.epoch)
        if run is not None and not run.finished.done():
            run.finished.set_result(body)

    def _current(self, node_id: str, job: str, epoch: int) -> _Run | None:
        """The run that rank 0 of the current epoch speaks of; a late message of another is ignored."""
        run = self._runs.get(job)
        if run is None or run.group is None or run.epoch != epoch:
            return None
        return run if run.group.rank_0 == node_id else None

    def _group_lost(self, group: Group) -> None:
        if not group.load.training and group.candidate.stated is None:
            self._quarantine.add(group.lost_node, time.monotonic())
        for run in self._runs.values():
            if run.group is group and not run.finished.done() and group.lost is not None:
                run.finished.set_exception(group.lost)

    # --- asking about jobs ---

    async def show(self, job: Job, follow: bool, emit: Emit) -> dict[str, Any]:
        """One job; with `follow` its stream from the first token, ending in its document."""
        run = self._runs.get(job.job_id)
        if follow and run is not None:
            return await self._watch(run, emit)
        tokens, said = self._store.tokens(job.job_id)
        if follow and tokens:
            await emit({"event": "token", "index": 0, "tokens": tokens, "text": said})
        if follow and job.result is not None:
            return job.result
        if follow and job.error is not None:
            raise JobError(job.error["message"], remedy=job.error["remedy"], code=job.error["code"])
        return {"jobs": [{**self.row(job), "result": job.result, "text": said, "tokens": tokens}]}

    def row(self, job: Job) -> dict[str, Any]:
        run = self._runs.get(job.job_id)
        progress = 1.0 if job.state == "done" else None
        if run is not None:
            progress = len(run.tokens) / run.request.n
        waits = run.waits if run is not None else None
        return job.row(progress) | {"waits": _waits_row(waits) if waits else None}

    async def cancel(self, job: Job) -> dict[str, Any]:
        if job.state in ENDED:
            raise JobError(f"job {job.job_id} is {job.state} already", code="ended")
        run = self._runs.get(job.job_id)
        if run is None:  # its end could not be stored
            self._store.end(job.job_id, "failed", time.time(), error=_interrupted())
            return {"job_id": job.job_id, "state": "failed"}
        self._cancel_run(run)
        assert run.task is not None
        await asyncio.wait([run.task], timeout=CANCEL_S)
        if not run.task.done():
            run.task.cancel()
        return {"job_id": job.job_id, "state": self._store.get(job.job_id).state}

    def _cancel_run(self, run: _Run) -> None:
        run.is_cancelled = True
        if run.group is not None and run.is_ordered and run.group.lost is None:
            body = wire.Cancel(run.group.group_id, run.job_id)
            self._peers.tell_if_online(run.group.rank_0, "cancel", body)
        elif run.task is not None:
            run.task.cancel()

    def remove(self, job: Job) -> dict[str, Any]:
        if job.job_id in self._runs:
            raise JobError(f"job {job.job_id} runs", remedy="cancel it first", code="running")
        self._store.remove(job.job_id)
        return {"job_id": job.job_id}

    # --- documents ---

    async def _document(self, run: _Run, finished: wire.Finished) -> dict[str, Any]:
        assert run.group is not None
        spent = await self._spent_of(run)
        tpot_ms, span = pace(run.times)
        group, here = run.group, run.times[len(run.times) - spent.tokens :]  # of the last epoch
        here_ms, here_span = pace(here)
        estimated = estimated_joules(run.group.candidate.predicted, here_ms)
        if group.jobs == {run.job_id}:  # beside others a job takes longer than its plan
            # an endpoint's tokens come a word at once, so the median gap would be too good
            took_ms = 1000 * here_span / (len(here) - 1) if here_span and group.candidate.stated else here_ms
            if not group.has_moved_rate:  # the next prediction knows it
                self._chooser.correct(group.load.manifest.sha256, group.candidate, took_ms)
            each = estimated if spent.joules is None else spent.joules / max(1, spent.tokens)
            self._chooser.learn(group.asked.request, Outcome(group.candidate, each, is_done=True))
        joules, source = joules_of([*run.spent_earlier, spent], estimated)
        measured: dict[str, Any] = {
            "ttft_ms": (run.times[0] - run.accepted_at) * 1000 if run.times else None,
            "load_ms": run.load_ms,
            "tpot_ms": tpot_ms,
            "tokens_per_s": (len(run.times) - 1) / span if span else None,
            "joules": joules,
            "joules_source": source,
            "bytes_sent": spent.bytes_sent + sum(earlier.bytes_sent for earlier in run.spent_earlier),
            "recoveries": [_recovery_row(move, run) for move in run.moves],
        }
        return {
            "job_id": run.job_id,
            "text": run.text,
            "tokens": run.tokens,
            "finish_reason": finished.reason,
            "plan": self._plan_row(run),
            "measured": measured,
        }

    async def _spent_of(self, run: _Run) -> Spent:
        """What the group sent and spent since the job began in it, in proportion to the job's part of its
        tokens."""
        assert run.group is not None
        assert run.used_before is not None
        after, before = await self._groups.used(run.group), await run.used_before
        made = run.group.tokens - run.tokens_before
        mine = len(run.tokens) - sum(earlier.tokens for earlier in run.spent_earlier)
        return spent_between(before, after, mine, mine / made if made else 1.0)

    def _plan_row(self, run: _Run) -> dict[str, Any]:
        assert run.group is not None
        load, candidate = run.group.load, run.group.candidate
        if run.adapter is not None and load.adapter is None:
            asked = PlanRequest(
                context_tokens=load.context_tokens,
                numerics=load.numerics,
                cache_tokens=load.cache_tokens,
                cache_type=load.cache_type,
                adapter=run.adapter,
            )
            candidate = sizes.at_full_size(candidate, load.manifest.model, asked)
        row = self._chooser.row_of(candidate)
        told = {"epoch": run.epoch, "adapter": run.request.adapter}
        return {key: row[key] for key in ("strategy", "roles", "predicted")} | told


def _unbound(request: GenerateRequest) -> GenerateRequest:
    """The same job on any nodes, by any strategy."""
    return dataclasses.replace(request, strategy="auto", nodes=None, shares=None)


def _recovery_row(move: _Move, run: _Run) -> dict[str, Any]:
    """A change of plan, as the contract shows it. A loss was noticed so long after the last token; a planned
    change is told."""
    at = move.at_token - run.resumed_at
    resumed = run.times[at] if 0 <= at < len(run.times) else None
    return {
        "at_token": move.at_token,
        "lost": move.node_id,
        "reason": move.reason,
        "detect_ms": move.silent_s * 1000,
        "resume_ms": None if resumed is None else (resumed - move.since) * 1000,
    }


def _waits_row(waits: Deferral) -> dict[str, Any]:
    return {"until": rfc3339(waits.until), "because": waits.reason}


async def _until(moment: float) -> None:
    """Until that Unix time, by the clock as it is set."""
    while True:
        left_s = moment - time.time()
        if left_s <= 0:
            return
        await asyncio.sleep(min(left_s, CLOCK_S))


def _interrupted() -> JobError:
    return JobError("the daemon ended while this job ran", remedy="run it again", code="interrupted")


async def _emit_news(run: _Run, seen: tuple[int, int], emit: Emit) -> tuple[int, int]:
    """Send what came after `seen` (tokens, characters); the new `seen`."""
    run.news = asyncio.Event() if run.news.is_set() else run.news
    now = (len(run.tokens), len(run.text))
    if now != seen:
        await emit(
            {
                "event": "token",
                "index": seen[0],
                "tokens": run.tokens[seen[0] : now[0]],
                "text": run.text[seen[1] : now[1]],
            }
        )
    return now


def _settled(run: _Run, task: asyncio.Task[dict[str, Any]]) -> None:
    """Wake the watchers; look at the exception, since a detached job has none."""
    run.news.set()
    if not task.cancelled():
        task.exception()


def _is_loss(run: _Run, error: EdgedError) -> bool:
    """Of a group that computes: what breaks an endpoint would break it again."""
    if run.group is None or run.group.candidate.stated is not None:
        return False
    return run.group.lost is not None or isinstance(error, PeerError)


def _seeded(request: GenerateRequest) -> GenerateRequest:
    """With a seed: every epoch draws with the same, whoever coordinates it."""
    return request if request.seed is not None else dataclasses.replace(request, seed=secrets.randbits(32))


def _check_may_begin(run: _Run) -> None:
    """JobError where it was cancelled meanwhile; PeerError where its group was lost."""
    if run.is_cancelled:
        raise JobError("the job was cancelled", code="cancelled")
    if run.group is not None and run.group.lost is not None:
        raise run.group.lost


def _as_failure(error: BaseException, is_cancelled: bool) -> JobError:
    if isinstance(error, asyncio.CancelledError):
        return JobError("the job was cancelled", code="cancelled") if is_cancelled else _interrupted()
    return JobError(f"internal error: {type(error).__name__}: {error}", code="internal")
