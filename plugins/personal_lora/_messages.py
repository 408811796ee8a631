"""What travels between the server and a member in a round, and how many bytes that is. Pure.

    down   [round]   words `start`, `frozen`, `stack`, `of`; values: the stack to merge, then the factors.
                     To one that `rests`: the stack alone; it neither trains nor answers in that round
    up     [round]   words `weight`, `of`; values: the factors that the member trained
    told   [round]   one frame: a member's `FIGURES` of the round; the last one has no `up`
                     Asynchronous: `round` is the revision that it is of; `turn`, `first` and `steps`, too
    mask   [round]   one frame, a bit for each value: after values that say `thin`, which of them came; what
                     did not is 0 in a download, and in an update as it was loaded
    cannot [round]   word `because`: in place of `up` and `told` in a semi-synchronous job, where the member's
                     device is not what the job asks for
    keys, same, shares, masked, reveal [round]   of a masked sum (`_masked`), in place of `up`
    extras [round]   words `arrays`, [name, dtype, shape] each, and their frames: what a method needs beside
                     factors, after a download or an update that says `extras`

`own_loss` is of what a member held out, with its personal adapter; a figure, and no more of that adapter.

Factors are the values of A, then B, of each adapted layer, in the order in which a model computes them
(`Layers`): who has the model and the job's file knows all names and shapes. A factor that is still the one
that the job began with is not sent: everybody draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edged import AggregatorEntry, Travels

from .._training.sizes import HASH, message_bytes, values_bytes
from . import _mode, _seen
from ._cohort import cohort_of
from ._job import Job

FIGURES = ("loss", "targets", "tokens", "seconds", "eval_loss", "eval_targets", "own_loss", "sent")  # F64
SIZES = {"u2": 2, "f4": 4, "f8": 8, "i4": 4, "i8": 8, "u1": 1, "b1": 1}  # bytes of a value, by numpy's name
SUMS = ("sums", "f4", ("seeds",))  # what members mask where a method sends no factors: an extra
KEYS_BYTES, SEALED_BYTES, SHARE_BYTES = 96, 212, 66  # as `_rounds.masks` and `shamir` have them
DIGEST_BYTES = 32
WEIGHT_MOST = 1 << 20  # rows that a masked update counts for at most, where the job says nothing
Shapes = Sequence[tuple[int, int]]  # of each adapted layer: how many values it gives and takes


def values_of(factors: str, r: int, shapes: Shapes) -> int:
    """Values of the named factors, "AB", "A", "B" or "", at rank r."""
    per_r = sum(
        (columns if "A" in factors else 0) + (rows if "B" in factors else 0) for rows, columns in shapes
    )
    return r * per_r


def hello(job_hash: str, model_hash: str) -> dict[str, Any]:
    return {"k": "hello", "at": [], "model": model_hash, "job": job_hash}


def down(
    round: int, start: str, frozen: str, stack: int, count: int, extras: int, thin: int = 0, rests: int = 0
) -> dict[str, Any]:
    """`start`: the factors that are those of the start, and do not come; `frozen`: the one not to train."""
    words = {"start": start, "frozen": frozen, "stack": stack, "of": count, "extras": extras, "thin": thin}
    return {"k": "down", "at": [round], **_said(words | {"rests": rests})}


def rest(round: int, stack: int, count: int) -> dict[str, Any]:
    """What one that is not of the cohort gets of a round: what it must merge for good, and no factor."""
    return down(round, "none", "", stack, count, 0, rests=1)


def up(round: int, weight: int, count: int, extras: int, thin: int = 0) -> dict[str, Any]:
    return {
        "k": "up",
        "at": [round],
        **_said({"weight": weight, "of": count, "extras": extras, "thin": thin}),
    }


def turn_words(turn: int, first: int, steps: int) -> dict[str, int]:
    """Of a download that waits for nobody: the turn of the member's push, and its local steps' numbers."""
    return {"turn": turn, "first": first, "steps": steps}


def _said(words: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty or 0, which is what a missing word means: a round of seeds is small."""
    return {word: value for word, value in words.items() if value}


def mask_bytes(count: int) -> int:
    """A bit for each value, in a frame."""
    return -(-count // 8)


def extras_bytes(round: int, arrays: Sequence[tuple[str, str, Sequence[int]]]) -> int:
    """Of a method's extras; 0 where it has none."""
    if not arrays:
        return 0
    sizes = [SIZES[dtype] * math.prod(shape) for _, dtype, shape in arrays]
    named = [[name, dtype, list(shape)] for name, dtype, shape in arrays]
    return message_bytes({"k": "extras", "at": [round], "arrays": named}, sizes)


def down_bytes(job: Job, round: int, travels: Travels, r: int, shapes: Shapes) -> int:
    """Of a round's download of a member with rank r."""
    start = "".join(side for side in "AB" if side not in travels.down)
    frozen = "".join(side for side in "AB" if side not in travels.up)
    count = values_of("AB", travels.stack, shapes) + values_of(travels.down, r, shapes)
    extras = arrays_of(job, travels.down_extras, r, shapes)
    sent, more = _part(job, travels.down_part, round, count)
    header = down(round, start, frozen, travels.stack, sent, len(extras), int(more > 0))
    return values_bytes(header, sent) + more + extras_bytes(round, extras)


def rest_bytes(round: int, travels: Travels, shapes: Shapes) -> int:
    """Of a round's download of a member that rests."""
    count = values_of("AB", travels.stack, shapes)
    return values_bytes(rest(round, travels.stack, count), count)


def up_bytes(job: Job, round: int, travels: Travels, r: int, weight: int, shapes: Shapes) -> int:
    """Of a round's update of a member with rank r."""
    count = values_of(travels.up, r, shapes)
    extras = arrays_of(job, travels.up_extras, r, shapes)
    sent, more = _part(job, travels.up_part, round, count)
    header = up(round, weight, sent, len(extras), int(more > 0))
    return values_bytes(header, sent) + more + extras_bytes(round, extras)


def weight_most(job: Job) -> int:
    """Rows that a member of a masked sum counts for at most."""
    return job.weight_most or WEIGHT_MOST


def masked_values(job: Job, sides: str, r: int, shapes: Shapes) -> int:
    """Values that a member masks: of the sides it trains, or a sum for each seed."""
    return values_of(sides, r, shapes) if sides else math.prod(int(job.options[name]) for name in SUMS[2])


def masked_bytes(job: Job, round: int, travels: Travels, r: int, shapes: Shapes) -> int:
    """Of a member's part in a masked sum, both ways, where nobody drops out."""
    n = len(job.clients)
    ranks = list(range(n))

    def step(kind: str, size: int = 0, **words: Any) -> int:
        return message_bytes({"k": kind, "at": [round], **words}, [size] if size else [])

    keys = step("keys", KEYS_BYTES) + step("keys", n * KEYS_BYTES, ranks=ranks)
    keys += (n - 1) * step("same", DIGEST_BYTES)
    shares = step("shares", n * SEALED_BYTES) + step("shares", n * SEALED_BYTES, ranks=ranks)
    reveal = step("reveal", dropped=[], stayed=ranks) + step("reveal", n * SHARE_BYTES)
    values = masked_values(job, travels.up, r, shapes)
    return keys + shares + reveal + values_bytes({"k": "masked", "at": [round]}, 2 * (values + 1))


def _part(job: Job, key: str, round: int, count: int) -> tuple[int, int]:
    """Values that are sent of `count`, and the bytes of their mask."""
    if not key:
        return count, 0
    return max(1, int(job.options[key] * count)), message_bytes(
        {"k": "mask", "at": [round]}, [mask_bytes(count)]
    )


def arrays_of(
    job: Job, extras: Sequence[tuple[str, str, Sequence[str]]], r: int, shapes: Shapes
) -> list[tuple[str, str, list[int]]]:
    """With numbers in place of names."""
    known: dict[str, Any] = {"local_steps": job.local_steps, **job.options}
    known |= {"values": values_of("AB", r, shapes), "layers": len(shapes), "blocks": 2 * len(shapes), "r": r}
    return [(name, dtype, [int(known[n]) for n in shape]) for name, dtype, shape in extras]


def told_bytes(round: int, figures: int = len(FIGURES)) -> int:
    return message_bytes({"k": "told", "at": [round]}, [8 * figures])


def travels_of(entry: AggregatorEntry, round: int, ranks: Sequence[int]) -> Travels:
    if entry.travels is not None:
        return entry.travels(round, ranks)
    return Travels() if round else Travels(down="")


def bytes_sent(
    entries: Mapping[str, AggregatorEntry], job: Job, collector: int, surveys: Sequence[Mapping[str, Any]]
) -> int:
    """Over all links, from the greeting to the adapter's way to the collector."""
    server = len(job.clients)
    shapes: Shapes = [(rows, columns) for rows, columns in surveys[server]["shapes"]]
    ranks = [job.r_of(rank) for rank in range(server)]
    total = 2 * server * message_bytes(hello("0" * HASH, "0" * HASH))
    if _mode.is_asynchronous(job):
        total += pushed_bytes(job, [survey["weight"] for survey in surveys[:server]], shapes)
        return total + (_part_bytes(job, shapes, 0) if collector != server else 0)
    stacked, figures = 0, len(FIGURES) + len(_seen.names(job))
    for round in range(job.rounds + 1):
        former = cohort_of(job, max(0, round - 1))  # whose updates come down now
        travels = travels_of(entries[job.method], round, [ranks[rank] for rank in former])
        stacked += travels.stack
        cohort = cohort_of(job, round) if round < job.rounds else range(server)
        total += 0 if job.is_semi else (server - len(cohort)) * rest_bytes(round, travels, shapes)
        for rank, r in ((rank, ranks[rank]) for rank in cohort):
            total += down_bytes(job, round, travels, r, shapes) + told_bytes(round, figures)
            if round < job.rounds and job.masked:
                total += masked_bytes(job, round, travels, r, shapes)
            elif round < job.rounds:
                joins = job.joins(rank)
                sent = travels_of(entries[joins], round, ranks) if joins else travels
                total += up_bytes(job, round, sent, r, surveys[rank].get("weight", 1), shapes)
    if collector != server:
        total += _part_bytes(job, shapes, stacked)
    return total


def pushed_bytes(job: Job, weights: Sequence[int], shapes: Shapes) -> int:
    """Of as many pushes as make all revisions, what members get for each, and their evaluations: an
    expectation. Pushes that are refused, or on their way at the end, come on top; a member that is so slow
    that it passes an evaluation over takes less."""
    members, size, steps = len(weights), _mode.pushes_of(job), job.local_steps
    count, total = values_of("AB", job.r_most, shapes), 0

    def given(revision: int, turn: int) -> int:
        start, of = ("", count) if revision else ("AB", 0)
        return values_bytes(down(revision, start, "", 0, of, 0) | turn_words(turn, turn * steps, steps), of)

    for push in range(job.rounds * size):
        turn, rank = divmod(push, members)
        revision = max(0, push + 1 - members) // size  # that it began at, where members take turns
        total += given(revision, turn)
        total += values_bytes(up(revision, weights[rank], count, 0) | {"turn": turn}, count)
        total += told_bytes(revision)
    due = [0, *(range(job.eval_every, job.rounds, job.eval_every) if job.eval_every else ())]
    total += members * sum(told_bytes(revision) for revision in due)
    last = values_bytes(down(job.rounds, "", "", 0, count, 0), count) + told_bytes(job.rounds)
    begun = sum(given(job.rounds - 1, job.rounds * size // members) for _ in range(members - 1))
    return total + members * last + begun


def _part_bytes(job: Job, shapes: Shapes, stacked: int) -> int:
    """The adapter on its way to the collector: as wide as all that was stacked, or as the widest member."""
    if job.is_whole:
        size = math.prod(int(job.options[name]) for name in SUMS[2])
        return values_bytes({"k": "part", "at": [job.rounds], "of": size}, size)
    ranks = [min(stacked, *shape) if stacked else job.r_most for shape in shapes]
    count = sum(r * (rows + columns) for r, (rows, columns) in zip(ranks, shapes, strict=True))
    said = {"k": "part", "at": [job.rounds], "r": ranks, "of": count}
    return values_bytes(said, count)
