"""Roles of a training job over the nodes there are, and the cut where it is left to the planner. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edged import ConfigError, ModelDescription, NodeView, PolicyViolation, Role, TrainingPlan

from .._codec_sizes import ada_ratios, payload_bytes
from .._cut_layer import Cut
from .._training import sizes
from .._training.nodes import find, shortage
from . import _cost
from ._job import Job, least_cut, read, to_table
from ._places import Places

UNCUT = ("private-lora", "parallel-adapters")  # all blocks are the server's
BATTERY_WEIGHT = 2.0  # a second of a node on battery counts so many times
CUTS_MAX = 2000  # that are each planned; of more, a grid, refined
LEAST_AUTO = 2
TELL_THEMSELVES = ("u-shape", "remote-blocks", "private-lora", "parallel-adapters")  # clients have the loss
INSTABILITY = 1e-3  # seconds a step that a cut's bound on stability is worth


def plan_local(
    settings: Mapping[str, Any], model: ModelDescription, nodes: Sequence[NodeView]
) -> TrainingPlan:
    """The whole model on the submitting node."""
    return _plan(read(settings), model, nodes, [nodes[0]], ())


def plan_split(
    settings: Mapping[str, Any], model: ModelDescription, nodes: Sequence[NodeView]
) -> TrainingPlan:
    """ConfigError where the file names what is not there, PeerError where a node is away."""
    job = read(settings)
    names = [*(client.node for client in job.clients), *job.stages, job.server]
    chosen = [find(nodes, name) for name in names]
    ids = [node.node_id for node in chosen]
    for one, other in itertools.combinations(range(len(ids)), 2):
        if ids[one] == ids[other]:
            raise ConfigError(
                f"expected another node for each part; {chosen[one].name} has two",
                remedy="mend the job's file",
            )
    if nodes[0].node_id not in ids:
        chosen.append(nodes[0])
    for node in chosen:
        if node.refuses:
            raise PolicyViolation(f"{node.name} takes no work now: {node.refuses}")
    notes: list[str] = []
    if job.cut == "auto" and job.topology not in UNCUT:
        job = _with_cut(job, model, chosen, notes)
    _check_cut(job, model)
    _check_frames(job, model)
    if job.codec == "adatopk" and not job.link_ratios:
        job = _with_ratios(job, model, chosen, notes)
    return _plan(job, model, nodes, chosen, notes)


def _plan(
    job: Job,
    model: ModelDescription,
    nodes: Sequence[NodeView],
    chosen: Sequence[NodeView],
    notes: Sequence[str],
) -> TrainingPlan:
    roles = _roles(job, model, chosen)
    collector = next(role.rank for role in roles if role.node_id == nodes[0].node_id)
    places = Places(job, roles, model.layers, collector, [node.name for node in chosen])
    tells_loss = tuple(places.clients) if job.topology in TELL_THEMSELVES else (places.server,)
    return TrainingPlan(
        to_table(job),
        roles,
        tuple(job.clients[rank].data if rank in places.clients else "" for rank in range(len(roles))),
        job.steps,
        tells_loss,
        collector,
        _step_s(job, model, places, chosen),
        shortage(roles, chosen),
        tuple(notes),
    )


def _roles(job: Job, model: ModelDescription, chosen: Sequence[NodeView]) -> tuple[Role, ...]:
    places = Places(job, (), model.layers)
    found = []
    for rank, node in enumerate(chosen):
        parts = places.parts(rank)
        layers = (parts[0].first, parts[0].last) if parts else (0, 0)
        if job.topology == "u-shape" and rank in places.clients and not places.is_local:
            layers = (0, parts[0].last)
        vocab = (0, model.vocab) if any(part.head for part in parts) else (0, 0)
        memory = _cost.memory_bytes(job, model, places, rank)
        share = sum(part.last - part.first for part in parts) / model.layers
        whole = (0, model.heads), (0, model.ffn)
        found.append(Role(rank, node.node_id, rank, layers, *whole, vocab, share, memory))
    return tuple(found)


def memory(settings: Mapping[str, Any], model: ModelDescription, roles: Sequence[Role], rank: int) -> int:
    """Bytes of a rank's worker, from the settings of a plan and this node's own view of the model.
    ConfigError where they are none that a plan has."""
    job = read(settings)
    places = Places(job, roles, model.layers)
    if not places.is_local:
        _check_cut(job, model)
    if not 0 <= rank < len(roles) or len(roles) <= places.server:
        raise ConfigError(
            f"expected {places.server + 1} roles of this job or one more; {len(roles)} came",
            remedy="submit it with the same version of edged",
        )
    return _cost.memory_bytes(job, model, places, rank)


def _check_frames(job: Job, model: ModelDescription) -> None:
    """ConfigError where a tensor that travels is larger than a link takes."""
    largest, most = _cost.largest_frame(job, model), sizes.FRAME_BYTES_MAX - sizes.BOX_BYTES
    if largest > most:
        raise ConfigError(
            f"expected tensors of at most {most >> 20} MiB between nodes; a batch of {job.batch_size} rows "
            f"of {job.max_length + job.prompts} tokens makes {largest >> 20} MiB",
            remedy=f"lower batch_size or max_length, {-(-largest // most)} times or more",
        )


def _check_cut(job: Job, model: ModelDescription) -> None:
    cuts = job.cut if isinstance(job.cut, tuple) else (job.cut,)
    last = model.layers - (job.tail if job.topology == "u-shape" else 0)
    if job.topology in UNCUT:
        return
    if job.topology == "pipeline" and len(cuts) != len(job.stages) + 1:
        raise ConfigError(
            f"expected {len(job.stages) + 1} cuts for a pipeline of {len(job.stages) + 2}; {len(cuts)} came",
            remedy='mend `cut`, or write "auto"',
        )
    for cut in cuts:
        if not isinstance(cut, int) or not least_cut(job) <= cut < last:
            raise ConfigError(
                f"expected a cut from {least_cut(job)} to {last - 1} of this model's {model.layers} blocks; "
                f"{cut!r} came",
                remedy='mend `cut`, or write "auto"',
            )


# --- what a step takes --------------------------------------------------------------------------------


def _step_s(job: Job, model: ModelDescription, places: Places, chosen: Sequence[NodeView]) -> float | None:
    """Seconds of a step of full rows; None where a device or a link was never measured."""
    positions = job.batch_size * (job.max_length + job.prompts)
    times = []
    for rank, node in enumerate(chosen[: places.server + 1]):
        speed = sizes.flops_s(node)
        if speed is None:
            return None
        times.append(_cost.flops_of(job, model, places.parts(rank), positions) / speed)
    if places.is_local:
        return times[0]
    by_id = {node.node_id: node for node in chosen}
    links = []
    for client in places.clients:
        chain = places.chain if client == 0 else [client, places.server]
        for a, b in itertools.pairwise(chain):
            took = 0.0
            for count, width in _cost.crossings(job, model):
                shape = (job.batch_size, job.max_length + job.prompts, width)
                size = payload_bytes(job.codec, shape, places.ratio(a, b))
                each = sizes.link_s(by_id, chosen[a].node_id, chosen[b].node_id, size)
                if each is None:
                    return None
                took += count * each
            links.append(took)
    clients = len(places.clients)
    served = clients * times[places.server]
    if job.micro_batches > 1:
        stages = [times[0], *times[clients : places.server], times[places.server], *links]
        slowest = max(stages)
        return slowest + (sum(stages) - slowest) / job.micro_batches
    return max(times[:clients]) + max(links) + served


# --- what is left to the planner ----------------------------------------------------------------------


def _with_cut(job: Job, model: ModelDescription, chosen: Sequence[NodeView], notes: list[str]) -> Job:
    """The cut of the least step among those that fit every memory."""
    stages = len(job.stages) + 1
    fitting = [
        cuts
        for cuts in _cuts(job, model, stages)
        if not shortage(_roles(_cut_at(job, cuts), model, chosen), chosen)
    ]
    if not fitting:
        least = _cut_at(job, next(iter(_cuts(job, model, stages))))
        raise PolicyViolation(
            f"no cut fits; at the first one, {shortage(_roles(least, model, chosen), chosen)}",
            remedy="lower batch_size or max_length, or set gradient_checkpointing",
        )
    price = _price(job, model, chosen)
    if price is None:
        middle = (
            fitting[0] if job.topology != "pipeline" else min(fitting, key=lambda cuts: _spread(cuts, model))
        )
        notes.append(f"cut {middle}: speeds are not measured, so the client gets the least that works")
        return _cut_at(job, middle)
    best = _refined(min(fitting, key=lambda cuts: (price(cuts), cuts)), price, job, model, chosen)
    shown = best[0] if len(best) == 1 else best
    notes.append(f"cut {shown}: {price(best):.3g} s a step, weighed, of {len(fitting)} cuts that fit")
    return _cut_at(job, best)


def _cuts(job: Job, model: ModelDescription, stages: int) -> Iterator[tuple[int, ...]]:
    """All cuts where these are few, else those of a grid."""
    places = _range(job, model, stages)
    step = 1
    while math.comb(len(places[::step]), stages) > CUTS_MAX:
        step += 1
    return itertools.combinations(places[::step], stages)


def _range(job: Job, model: ModelDescription, stages: int) -> range:
    """Blocks that may be a client's last: the planner leaves it two, since hidden states of the first one
    are all but words."""
    last = model.layers - (job.tail if job.topology == "u-shape" else 0)
    least = least_cut(job)
    shows_words = job.topology in ("label-sharing", "u-shape", "pipeline")
    return range(max(least, min(LEAST_AUTO if shows_words else least, last - stages)), last)


def _refined(
    cuts: tuple[int, ...],
    price: Callable[[tuple[int, ...]], float],
    job: Job,
    model: ModelDescription,
    chosen: Sequence[NodeView],
) -> tuple[int, ...]:
    """Cuts moved by a block at a time, as long as that is cheaper and fits."""
    places = _range(job, model, len(cuts))
    while True:
        near = ((*cuts[:i], cuts[i] + by, *cuts[i + 1 :]) for i in range(len(cuts)) for by in (-1, 1))
        sound = [
            other
            for other in near
            if all(a < b for a, b in itertools.pairwise(other))
            and all(cut in places for cut in other)
            and not shortage(_roles(_cut_at(job, other), model, chosen), chosen)
        ]
        better = min(sound, key=price, default=cuts)
        if price(better) >= price(cuts):
            return cuts
        cuts = better


def _cut_at(job: Job, cuts: tuple[int, ...]) -> Job:
    return dataclasses.replace(job, cut=cuts if len(cuts) > 1 else cuts[0])


def _spread(cuts: tuple[int, ...], model: ModelDescription) -> int:
    return max(b - a for a, b in itertools.pairwise((0, *cuts, model.layers)))


def _price(
    job: Job, model: ModelDescription, chosen: Sequence[NodeView]
) -> Callable[[tuple[int, ...]], float] | None:
    """Seconds of a step, those of a node on battery counted more, and what a deep cut does to stability."""
    first = _cut_at(job, tuple(range(1, len(job.stages) + 2)))
    if _step_s(first, model, Places(first, (), model.layers), chosen) is None:
        return None
    stability = Cut(model.layers, 0.0, 0.0, samples=job.steps * job.batch_size, instability=INSTABILITY)

    def price(cuts: tuple[int, ...]) -> float:
        cut = _cut_at(job, cuts)
        places = Places(cut, (), model.layers)
        total = _step_s(cut, model, places, chosen) or 0.0
        for rank, node in enumerate(chosen[: places.server + 1]):
            battery = node.device.battery
            if battery is not None and battery.percent is not None and not battery.plugged:
                flops = _cost.flops_of(cut, model, places.parts(rank), job.batch_size * job.max_length)
                total += (BATTERY_WEIGHT - 1) * flops / (sizes.flops_s(node) or 1.0)
        return total + stability.cost(cuts[0])

    return price


def _with_ratios(job: Job, model: ModelDescription, chosen: Sequence[NodeView], notes: list[str]) -> Job:
    """AdaTopK: how much each link is thinned, by the time that its tensors would take."""
    places, by_id = Places(job, (), model.layers), {node.node_id: node for node in chosen}
    size = 4 * job.batch_size * job.max_length * model.hidden
    times: dict[str, float] = {}
    for client in places.clients:
        chain = places.chain if client == 0 else [client, places.server]
        for a, b in itertools.pairwise(chain):
            took = sizes.link_s(by_id, chosen[a].node_id, chosen[b].node_id, size)
            if took is None:
                notes.append("adatopk: a link was never measured, so every link has the same ratio")
                return job
            times[f"{min(a, b)}-{max(a, b)}"] = took
    ratios = ada_ratios(times, job.ratio, 1.0)  # the slowest link has the file's own ratio
    notes += [f"link {link}: one of {ratio:.3g} values" for link, ratio in ratios.items()]
    return dataclasses.replace(job, link_ratios=tuple(ratios.items()))
