"""What a training should cost: memory of a rank, seconds of a step, bytes on the links. Pure.

Memory and time are estimates from shapes and measured speeds; bytes are counted from what the clients' own
rows say (`survey`), message by message, exactly but for how many digits a number in a header has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edged import ModelDescription, TrainingCost, TrainingPlan

from .._codec_sizes import kept, payload_bytes
from .._training.sizes import (
    F32,
    HASH,
    WORKER_BYTES,
    block_values,
    message_bytes,
    saved_values,
    values_bytes,
)
from ._job import Job, read
from ._places import Part, Places, shared_inputs

MESSAGE_BYTES = 190  # a header, and what ZeroMQ and CURVE put around it and its frames
ASK_BYTES, STATES_BYTES = 175, 124  # the same of parallel adapters' two kinds of message
LABEL_BYTES = 4
ANSWER_PART = 0.5  # of the positions, before the rows are known
COLLECTOR_BYTES = 64 << 20
EVAL_DONE = "eval done"  # that a batch of an evaluation is dealt with
RESIDUALS_MOST = 256  # of `_tensors.codecs`, which needs torch: a link keeps no more
LENGTH_MULTIPLE = 8  # of `_tensors.rows`: batches are padded to it


def memory_bytes(job: Job, model: ModelDescription, places: Places, rank: int) -> int:
    """Most that the worker of a rank should take."""
    parts = places.parts(rank)
    if not parts:
        return WORKER_BYTES + COLLECTOR_BYTES
    if job.topology == "parallel-adapters":
        return _parallel_memory_bytes(job, model, parts)
    is_server, clients = rank == places.server, len(places.clients)
    rows = divided(job.batch_size, job.micro_batches)[0]
    if is_server and job.schedule == "client-batch":  # one pass over the rows of all
        rows *= clients
    positions = rows * (job.max_length + job.prompts)
    window = min(len(divided(job.batch_size, job.micro_batches)), places.window(rank))
    weight = 2 if job.weights == "bf16" else F32
    total = float(WORKER_BYTES)
    for part in parts:
        count = part.last - part.first
        total += weight * (
            count * block_values(model) + (part.embed + part.head) * model.vocab * model.hidden
        )
        if job.gradient_checkpointing:
            total += F32 * positions * (window * count * model.hidden + saved_values(model))
        else:
            total += F32 * positions * window * count * saved_values(model)
        if part.head:
            loss = positions * (ANSWER_PART if job.loss_on == "answer" else 1)
            total += 3 * F32 * loss * model.vocab  # logits, their softmax, their gradient
        if part.tuned:
            values = F32 * count * adapter_values(job, model)
            total += 4 * values  # values, gradient, two moments
            if is_server and clients > 1 and job.schedule == "server-hierarchical":
                total += 3 * clients * values  # a set of each client's: no gradient
    total += _private_bytes(job, model, parts, positions) if job.topology == "private-lora" else 0
    total += _residual_bytes(job, model, places, rank)
    return round(total + window * 4 * F32 * positions * model.hidden)


def _residual_bytes(job: Job, model: ModelDescription, places: Places, rank: int) -> int:
    """What top-k keeps of the gradients that a rank sends: one of each slot and each length of a batch, on a
    link no more than RESIDUALS_MOST."""
    if job.codec not in ("topk", "adatopk") or not job.error_feedback or places.is_local:
        return 0
    is_client, slots, links = rank in places.clients, [job.batch_size * model.hidden], 1
    if job.topology in ("label-sharing", "pipeline"):
        links = 0 if is_client else len(places.clients) if not job.stages else 1
        slots = [size * model.hidden for size in divided(job.batch_size, job.micro_batches)]
    elif not is_client:
        links = len(places.clients) if job.topology == "u-shape" else 0  # frozen blocks keep nothing
    elif job.topology == "private-lora":
        for group in shared_inputs(job.target_modules):
            slots += [job.batch_size * len(group) * job.r] * model.layers
    lengths = range(job.max_length // LENGTH_MULTIPLE, 0, -1)
    every = (slot * (LENGTH_MULTIPLE * n + job.prompts) for n in lengths for slot in slots)
    return F32 * links * sum(itertools.islice(every, RESIDUALS_MOST))


def _private_bytes(job: Job, model: ModelDescription, parts: Sequence[Part], positions: float) -> float:
    """Of a server's A and B, or a client's M with gradient and moments; and of what passes through."""
    count, width = model.layers, len(job.target_modules) * job.r
    is_server = any(part.last > part.first for part in parts)
    held = count * adapter_values(job, model) if is_server else 4 * count * width * job.r
    return F32 * (held + 2 * positions * count * width)


def largest_frame(job: Job, model: ModelDescription) -> int:
    """Bytes of the largest frame between two ranks: a tensor in F32, as an evaluation sends whole batches
    and a codec may send anything. Adapters travel in pieces."""
    length = job.max_length + job.prompts
    if job.topology == "parallel-adapters":  # row by row
        return F32 * length * model.hidden
    rows = job.batch_size if job.eval_rows else divided(job.batch_size, job.micro_batches)[0]
    width = model.hidden
    if job.topology == "private-lora":
        width = max(width, *(len(group) * job.r for group in shared_inputs(job.target_modules)))
    return F32 * rows * length * width


def adapter_values(job: Job, model: ModelDescription) -> int:
    """Of one block, every target taken as wide as the hidden state."""
    return len(job.target_modules) * job.r * 2 * model.hidden


def flops_of(job: Job, model: ModelDescription, parts: Sequence[Part], positions: float) -> float:
    """Of forward and backward through frozen weights: both are one product each. Of parallel adapters, in the
    first epoch: blocks run forward only."""
    if job.topology == "parallel-adapters":
        return _parallel_flops(job, model, parts, positions)
    total = 0.0
    for part in parts:
        total += 4 * positions * (part.last - part.first) * block_values(model)
        if part.head:
            share = ANSWER_PART if job.loss_on == "answer" else 1
            total += 4 * positions * share * model.vocab * model.hidden
    return total * (4 / 3 if job.gradient_checkpointing else 1)


def crossings(job: Job, model: ModelDescription) -> list[tuple[float, int]]:
    """How many tensors of a batch go over a link in a step, and how wide they are; in the first epoch, of
    parallel adapters."""
    match job.topology:
        case "parallel-adapters":
            return [(1 + model.layers * (ANSWER_PART if job.loss_on == "answer" else 1), model.hidden)]
        case "u-shape" | "remote-blocks":
            return [(4, model.hidden)]
        case "private-lora":
            groups = shared_inputs(job.target_modules)
            return [(3, model.hidden), *((4 * model.layers, len(group) * job.r) for group in groups)]
    return [(2, model.hidden)]


def cost(plan: TrainingPlan, model: ModelDescription, surveys: Sequence[Mapping[str, Any]]) -> TrainingCost:
    """Bytes that all ranks send from the first step to the last, and seconds as far as they are known."""
    job = read(plan.settings)
    places = Places(job, plan.roles, model.layers, plan.collector)
    seconds = None if plan.step_s is None else plan.step_s * job.steps
    if seconds is not None and job.topology == "parallel-adapters":
        seconds *= _parallel_share(job, model, places, surveys)
    return TrainingCost(bytes_sent(job, model, places, surveys), seconds)


def bytes_sent(
    job: Job, model: ModelDescription, places: Places, surveys: Sequence[Mapping[str, Any]]
) -> int:
    """From the shapes of every step's batches, which each client's survey lists."""
    if places.is_local:
        return 0
    if job.topology == "parallel-adapters":
        return _asked_bytes(job, model, surveys[places.clients[0]]) + _end_bytes(job, places, surveys)
    total = _hello_bytes(places, surveys)
    for client in places.clients:
        survey = surveys[client]
        for rows, length, count in survey["shapes"]:
            each = _step_bytes(job, model, places, client, rows, length)
            total += count * (each + _inner_bytes(job, places, survey, rows, length))
        for rows, length, count in survey["eval_shapes"]:
            each = _eval_bytes(job, model, places, client, rows, length)
            total += evaluations(job) * count * (each + _inner_eval_bytes(job, survey, rows, length))
        links = len(_chain(places, client)) - 1
        total += evaluations(job) * links * message_bytes({"k": "evals", "at": [job.steps], "of": 1})
    return total + _averaging_bytes(job, places, surveys) + _end_bytes(job, places, surveys)


def _chain(places: Places, client: int) -> list[int]:
    """The way of a client's batch."""
    return places.chain if client == 0 else [client, places.server]


def _step_bytes(
    job: Job, model: ModelDescription, places: Places, client: int, rows: int, length: int
) -> int:
    """Of one batch, to and fro."""
    total = 0
    micro = divided(rows, job.micro_batches)
    labels: dict[str, Any] = {"of": len(micro), "targets": rows * length // 2}
    for a, b in itertools.pairwise(_chain(places, client)):
        ratio = places.ratio(a, b)
        for size in micro:
            shape = (size, length + job.prompts, model.hidden)
            if job.topology in ("u-shape", "remote-blocks", "private-lora"):
                kinds = ("up", "back", "back gradient", "up gradient")
                for kind in kinds[: 3 if job.topology == "private-lora" else 4]:
                    total += tensor_bytes(job, kind, shape, ratio, 1)
            else:
                total += tensor_bytes(job, "forward", shape, ratio, 2, [LABEL_BYTES * size * length], labels)
                total += tensor_bytes(job, "backward", shape, ratio, 2)
    return total


def _eval_bytes(
    job: Job, model: ModelDescription, places: Places, client: int, rows: int, length: int
) -> int:
    """Of one batch that is held out: hidden states without a codec, and labels or hidden states back."""
    length += job.prompts
    hidden = F32 * rows * length * model.hidden
    words: dict[str, Any] = {"at": [job.steps // 2, 1], "shape": [rows, length]}
    if job.topology in ("u-shape", "remote-blocks", "private-lora"):
        return sum(message_bytes({"k": kind, **words}, [hidden]) for kind in ("eval", "eval back"))
    links = len(_chain(places, client)) - 1
    done = message_bytes({"k": EVAL_DONE, "at": words["at"]})
    return links * (done + message_bytes({"k": "eval", **words}, [hidden, LABEL_BYTES * rows * length]))


def _inner_bytes(job: Job, places: Places, survey: Mapping[str, Any], rows: int, length: int) -> int:
    """Of private-lora's exchanges in a step; `survey` says how wide they are, and how many are so wide."""
    total, ratio = 0, places.ratio(0, places.server)
    for width, count in survey.get("inner", ()):
        for kind in ("inner", "inner back", "outer gradient", "outer gradient back"):
            total += count * tensor_bytes(job, kind, (rows, length, width), ratio, 2)
    return total


def _inner_eval_bytes(job: Job, survey: Mapping[str, Any], rows: int, length: int) -> int:
    """The same of an evaluation's batch: forward, without a codec."""
    total, words = 0, {"at": [job.steps // 2, 1, 1], "shape": [rows, length]}
    for width, count in survey.get("inner", ()):
        for kind in ("eval inner", "eval inner back"):
            total += count * message_bytes({"k": kind, **words}, [F32 * rows * length * width])
    return total


def evaluations(job: Job) -> int:
    """Before the first step, every so many steps, and after the last."""
    return 2 + ((job.steps - 1) // job.eval_every if job.eval_every else 0)


def _hello_bytes(places: Places, surveys: Sequence[Mapping[str, Any]]) -> int:
    """Every rank says to each of its neighbours what it trains."""
    total = 0
    for rank in range(places.server + 1):
        words = {"model": "0" * HASH, "tokenizer": "0" * HASH if rank in places.clients else ""}
        hello = message_bytes({"k": "hello", "at": [], **words, "job": "0" * HASH})
        total += hello * len(places.neighbours(rank))
    return total


# --- parallel adapters ------------------------------------------------------------------------------


def side_values(job: Job, model: ModelDescription) -> int:
    """Of the side network: D, U and V, E."""
    return job.width * ((model.layers + 2) * model.hidden + 2 * model.layers * job.width)


def _parallel_memory_bytes(job: Job, model: ModelDescription, parts: Sequence[Part]) -> int:
    weight, total = 2 if job.weights == "bf16" else F32, float(WORKER_BYTES)
    positions = job.batch_size * job.max_length // max(1, job.micro_batches)  # all may be in the loss
    for part in parts:
        count = part.last - part.first
        total += weight * (
            count * block_values(model) + (part.embed + part.head) * model.vocab * model.hidden
        )
        if count:  # one row goes through them at a time
            total += F32 * job.max_length * (2 * model.layers * model.hidden + saved_values(model))
        if part.head:
            total += 3 * F32 * positions * model.vocab  # logits, their softmax, their gradient
            total += F32 * (model.layers + 1) * (positions + job.max_length) * model.hidden  # states
            total += F32 * positions * model.layers * 6 * job.width
            total += 4 * F32 * side_values(job, model)
    return round(total)


def _parallel_flops(job: Job, model: ModelDescription, parts: Sequence[Part], positions: float) -> float:
    share, total = ANSWER_PART if job.loss_on == "answer" else 1, 0.0
    for part in parts:
        total += 2 * positions * (part.last - part.first) * block_values(model)
        if part.head:
            total += 4 * positions * share * model.vocab * model.hidden
            total += 6 * positions * share * side_values(job, model)
    return total


def _parallel_share(
    job: Job, model: ModelDescription, places: Places, surveys: Sequence[Mapping[str, Any]]
) -> float:
    """Of the time that the job would take if every step were of the first epoch: later ones run no block."""
    survey = surveys[places.clients[0]]
    visits = sum(rows * count for rows, _, count in survey["shapes"])
    asked = sum(count for _, _, count in survey["asks"]) / max(1, visits)
    parts = places.parts(places.clients[0]), places.parts(places.server)
    own = _parallel_flops(job, model, [Part(0, 0, head=True)], 1.0)
    every = sum(_parallel_flops(job, model, part, 1.0) for part in (parts[:1] if places.is_local else parts))
    return own / every + (1 - own / every) * min(1.0, asked)


def _asked_bytes(job: Job, model: ModelDescription, survey: Mapping[str, Any]) -> int:
    """Rows that the server computes: embeddings and positions up, every block's states down."""
    total = 4 * MESSAGE_BYTES  # both greetings, and that it may rest, and end
    for length, wanted, count in survey["asks"]:
        up = payload_bytes(job.codec, (length, model.hidden)) + LABEL_BYTES * wanted + ASK_BYTES
        down = model.layers * (payload_bytes(job.codec, (wanted, model.hidden)) + STATES_BYTES)
        total += count * (up + down)
    return total


# --- what all have ----------------------------------------------------------------------------------


def _averaging_bytes(job: Job, places: Places, surveys: Sequence[Mapping[str, Any]]) -> int:
    if len(places.clients) < 2:
        return 0
    times = job.steps // job.average_every + (1 if job.steps % job.average_every else 0)
    total, at = 0, [job.steps]
    for client in places.clients:
        count = surveys[client]["adapter_values"]
        total += values_bytes({"k": "mine", "at": at, "of": count}, count)
        total += values_bytes({"k": "mean", "at": at}, count)
    return times * total


def _end_bytes(job: Job, places: Places, surveys: Sequence[Mapping[str, Any]]) -> int:
    """Parts of the adapter on their way to the collector."""
    total = 0
    for rank in places.givers():
        if rank != places.collector:
            survey = surveys[rank]
            header = {"k": "part", "at": [job.steps], "tensors": []}
            total += survey.get("adapter_names", 0) + values_bytes(header, survey["adapter_values"])
    return total


# --- messages -----------------------------------------------------------------------------------------


def tensor_bytes(
    job: Job,
    kind: str,
    shape: Sequence[int],
    ratio: float,
    place: int,
    more: Sequence[int] = (),
    words: Mapping[str, Any] | None = None,
) -> int:
    """Of a tensor through the job's codec, its header of `place` numbers, and `more` frames after it."""
    said: dict[str, Any] = {"codec": job.codec, "shape": list(shape)}
    payload = payload_bytes(job.codec, shape, ratio)
    frames = [payload]
    if job.codec in ("topk", "adatopk"):
        said["k"] = kept(math.prod(shape), ratio)
        if payload < F32 * math.prod(shape) or job.codec == "topk":
            frames = [payload // 2, payload // 2]
    elif job.codec == "f16":
        said["e"] = 0  # one byte, or two where values are below 1e-5
    elif job.codec == "int8":
        frames = [payload - math.prod(shape), math.prod(shape)]
    at = [job.steps // 2, 1][:place]
    return message_bytes({"k": kind, "at": at, **(words or {}), "tensor": said}, [*frames, *more])


def divided(rows: int, parts: int) -> list[int]:
    """Rows of each micro-batch: as even as whole rows allow, the first the larger."""
    count = max(1, min(parts, rows))
    return [rows // count + (1 if index < rows % count else 0) for index in range(count)]
