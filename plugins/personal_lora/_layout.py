"""Roles of a federated job over the nodes there are, and what it costs. Pure.

Ranks: the clients in the order of the file, the server, and last the node that the job was submitted to,
where it has no other part: it collects the adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edged import (
    AggregatorEntry,
    ConfigError,
    ModelDescription,
    NodeView,
    PolicyViolation,
    Role,
    TrainingCost,
    TrainingPlan,
)

from .._training.nodes import find, shortage
from .._training.sizes import F32, WORKER_BYTES, block_values, flops_s, saved_values
from . import _mode
from ._cohort import need_of
from ._job import LOSSES_ALONE, TORCH, Job, read, to_table, without_gradients
from ._messages import bytes_sent

ANSWER_PART = 0.5  # of the positions, before the rows are known
SERVER_BYTES = 64 << 20
LIGHT_BYTES = 96 << 20  # of a worker that has not loaded PyTorch
CACHE_ROWS = 256  # a row's length, rounded up
LOGITS_BYTES = 32 << 20  # of some rows' at a time, in F64
MASKED_SERVER, MASKED_MEMBER = 32, 40  # bytes of a value: integers of 8, their sum or mask, and F64 beside


def plan(
    aggregators: Mapping[str, AggregatorEntry],
    settings: Mapping[str, Any],
    model: ModelDescription,
    nodes: Sequence[NodeView],
) -> TrainingPlan:
    """ConfigError where the file names what is not there, PeerError where a node is away."""
    job = read(settings)
    chosen = [find(nodes, name) for name in (*(client.node for client in job.clients), job.server)]
    for one, other in itertools.combinations(chosen, 2):
        if one.node_id == other.node_id:
            raise ConfigError(
                f"expected another node for each part; {one.name} has two", remedy="mend the job's file"
            )
    server = len(job.clients)
    if nodes[0].node_id not in [node.node_id for node in chosen]:
        chosen.append(nodes[0])
    for node in chosen:
        if node.refuses:
            raise PolicyViolation(f"{node.name} takes no work now: {node.refuses}")
    job, engines = _with_engines(aggregators, job, model, chosen)
    roles = tuple(_role(aggregators, job, model, node, rank) for rank, node in enumerate(chosen))
    return TrainingPlan(
        to_table(job),
        roles,
        tuple(job.clients[rank].data if rank < server else "" for rank in range(len(roles))),
        job.rounds,
        (server,),
        next(role.rank for role in roles if role.node_id == nodes[0].node_id),
        _round_s(job, model, chosen[:server]),
        shortage(roles, chosen),
        tuple(
            f"{node.name} evaluates losses by its engine {engine}, without gradients"
            for node, engine in zip(chosen[:server], engines, strict=False)
            if engine == LOSSES_ALONE
        ),
        tuple(rank for rank in range(server) if job.is_semi and roles[rank].node_id != nodes[0].node_id),
        need_of(job) - any(role.node_id == nodes[0].node_id for role in roles[:server]) if job.is_semi else 0,
        engines,
    )


def _with_engines(
    aggregators: Mapping[str, AggregatorEntry], job: Job, model: ModelDescription, chosen: Sequence[NodeView]
) -> tuple[Job, tuple[str, ...]]:
    """The job with an engine for each rank, and those. PolicyViolation where a node has none that can do its
    part."""
    engines = []
    for rank, node in enumerate(chosen):
        lacks_torch = TORCH not in node.engines and LOSSES_ALONE in node.engines
        engines.append(job.engine_of(rank) or (LOSSES_ALONE if lacks_torch else TORCH))
        why = ""
        if engines[rank] == LOSSES_ALONE:
            is_gguf = not model.tensors or any(tensor.name == "token_embd.weight" for tensor in model.tensors)
            if not is_gguf:
                why = "in a job of a model that is no GGUF"
            elif rank < len(job.clients):
                why = without_gradients(aggregators, job, rank)
            elif job.is_whole:
                why = 'in a job with parameters = "all"'
        if why:
            raise PolicyViolation(
                f"{node.name} has {LOSSES_ALONE} and not {TORCH}, and takes no part {why}",
                remedy=f"have {TORCH} there (pip install edged[train], and its `plugins`), or leave it out",
            )
    server = len(job.clients)
    clients = (replace(client, engine=engines[rank]) for rank, client in enumerate(job.clients))
    collector = engines[server + 1] if len(engines) > server + 1 else ""
    settled = replace(job, clients=tuple(clients), server_engine=engines[server], collector_engine=collector)
    return settled, tuple(engines)


def engine_of(settings: Mapping[str, Any], rank: int) -> str:
    """That a plan's settings name for a rank; of plans from before there was a choice, torch_blocks."""
    return read(settings).engine_of(rank) or TORCH


def _role(
    aggregators: Mapping[str, AggregatorEntry], job: Job, model: ModelDescription, node: NodeView, rank: int
) -> Role:
    is_client = rank < len(job.clients)
    layers, vocab = ((0, model.layers), (0, model.vocab)) if is_client else ((0, 0), (0, 0))
    return Role(
        rank,
        node.node_id,
        rank,
        layers,
        (0, model.heads),
        (0, model.ffn),
        vocab,
        1.0 if is_client else 0.0,
        memory_bytes(aggregators, job, model, rank),
    )


def memory(
    aggregators: Mapping[str, AggregatorEntry],
    settings: Mapping[str, Any],
    model: ModelDescription,
    roles: Sequence[Role],
    rank: int,
) -> int:
    """Bytes of a rank's worker, from the settings of a plan and this node's own view of the model.
    ConfigError where they are none that a plan has."""
    job = read(settings)
    if job.method not in aggregators:
        raise ConfigError(
            f"no method {job.method!r} here; loaded: {', '.join(sorted(aggregators)) or 'none'}",
            remedy="load the plugin that brings it",
        )
    parts = len(job.clients) + 1
    if not 0 <= rank < len(roles) or not parts <= len(roles) <= parts + 1:
        raise ConfigError(
            f"expected {parts} roles of this job or one more; {len(roles)} came",
            remedy="submit it with the same version of edged",
        )
    return memory_bytes(aggregators, job, model, rank)


def memory_bytes(
    aggregators: Mapping[str, AggregatorEntry], job: Job, model: ModelDescription, rank: int
) -> int:
    """Most that the worker of a rank should take."""
    clients = range(len(job.clients))
    ranks = [job.r_of(client) for client in clients]
    entry = aggregators[job.method]
    height = job.rounds * (entry.travels(1, ranks).stack if entry.travels else 0)
    if rank >= len(job.clients):
        worker = SERVER_BYTES + (LIGHT_BYTES if job.engine_of(rank) == LOSSES_ALONE else WORKER_BYTES)
        if rank > len(job.clients):
            return worker
        values = _values(job, model, job.r_most)
        kept = aggregators[job.method].bytes_kept
        more = kept(len(job.clients), values) if kept else 0
        more += F32 * _values(job, model, min(height, model.hidden))  # all stacks together
        more += MASKED_SERVER * values if job.masked else F32 * len(job.clients) * values  # the residual's
        return round(worker + 10 * F32 * values + more)
    if job.clients[rank].engine == LOSSES_ALONE:
        return _losses_bytes(job, model, rank)
    positions = job.rows_most * job.max_length
    weight = 2 if job.weights == "bf16" else F32
    total = float(WORKER_BYTES)
    total += weight * (model.layers * block_values(model) + 2 * model.vocab * model.hidden)
    saved = saved_values(model)
    is_blind = (entry.local and not entry.after_gradients) or job.joins(rank)
    if is_blind and job.keeps == "none":  # nothing is kept for a backward pass
        saved += model.hidden
    elif job.gradient_checkpointing:
        saved += model.layers * model.hidden
    else:
        saved *= model.layers
    total += F32 * positions * saved
    total += 3 * F32 * positions * (ANSWER_PART if job.loss_on == "answer" else 1) * model.vocab
    of_value = 8 * F32 + (MASKED_MEMBER if job.masked else 0)
    total += of_value * _values(job, model, job.r_of(rank))
    return round(total + F32 * _values(job, model, height))  # stacks, kept one by one


def _losses_bytes(job: Job, model: ModelDescription, rank: int) -> int:
    """Of a client without gradients: weights in F32, one row at a time with its keys and values, logits where
    they are scored, and the adapter with what it is rebuilt from."""
    length = -(-job.max_length // CACHE_ROWS) * CACHE_ROWS
    total = float(LIGHT_BYTES + F32 * (model.layers * block_values(model) + 2 * model.vocab * model.hidden))
    total += F32 * length * (saved_values(model) + 2 * model.layers * model.hidden)
    total += F32 * length**2 * (model.heads + 2)  # scores of a layer's attention, and masks
    total += F32 * length * (ANSWER_PART if job.loss_on == "answer" else 1) * model.vocab + LOGITS_BYTES
    of_value = 8 * F32 + (MASKED_MEMBER if job.masked else 0)
    return round(total + of_value * _values(job, model, job.r_of(rank)))


def _values(job: Job, model: ModelDescription, r: int) -> int:
    """Of an adapter, every target taken as wide as the hidden state."""
    return model.layers * len(job.target_modules) * r * 2 * model.hidden


def _round_s(job: Job, model: ModelDescription, clients: Sequence[NodeView]) -> float | None:
    """Seconds of the slowest client's local steps on full rows, or between two revisions that wait for
    nobody; None where one was never measured."""
    share = ANSWER_PART if job.loss_on == "answer" else 1
    positions = job.rows_most * job.max_length
    flops = 4 * positions * (model.layers * block_values(model) + share * model.vocab * model.hidden)
    speeds = [flops_s(node) for node in clients]
    if not all(speeds):
        return None
    flops *= 1.5 if job.objective == "dpo" else 1  # a forward pass of the reference
    work = job.local_steps * flops * (4 / 3 if job.gradient_checkpointing else 1)
    seconds = [work / speed for speed in speeds if speed]
    return _mode.waited_s(job, seconds) if _mode.is_asynchronous(job) else max(seconds)


def cost(
    aggregators: Mapping[str, AggregatorEntry],
    plan: TrainingPlan,
    model: ModelDescription,
    surveys: Sequence[Mapping[str, Any]],
) -> TrainingCost:
    """Bytes that all ranks send from the first round to the last, and seconds as far as they are known."""
    job = read(plan.settings)
    seconds = None if plan.step_s is None else plan.step_s * job.rounds
    return TrainingCost(bytes_sent(aggregators, job, plan.collector, surveys), seconds)
