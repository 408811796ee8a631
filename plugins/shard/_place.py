"""Where one rank stands in a plan: its slice of the model, and which ranks it talks to.

Ranks with the same stage are a tensor group over the stage's layers; stages run in sequence. The
whole plan is checked here, against the file itself, because ggml would abort on, or worse accept,
a slice that does not fall on its quantisation blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edged import EngineError, Role

from ._model import Model

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """`group`, `before`, `after`, `final`: ranks of this stage, the one before, after, and the last."""

    rank: int
    size: int
    layers: Range
    heads: Range
    ffn: Range
    vocab: Range
    group: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    final: tuple[int, ...]
    first_stage: tuple[int, ...]
    stages: int  # of the plan
    vocabs: tuple[Range, ...]  # slices of `final`, in its order

    @property
    def is_first(self) -> bool:
        return not self.before

    @property
    def is_last(self) -> bool:
        return not self.after

    @property
    def source(self) -> int:
        """The rank of the stage before that sends this one its hidden states."""
        return self.before[self.group.index(self.rank) % len(self.before)]

    @property
    def targets(self) -> tuple[int, ...]:
        """The ranks of the stage after that this one sends hidden states to."""
        mine = self.group.index(self.rank)
        return tuple(r for i, r in enumerate(self.after) if i % len(self.group) == mine)


def find_place(model: Model, roles: Sequence[Role], rank: int) -> Place:
    """The place of `rank`; EngineError when `roles` do not make exactly one whole model."""
    if not 0 <= rank < len(roles) or any(role.rank != i for i, role in enumerate(roles)):
        raise EngineError(f"expected roles in the order of their ranks, with rank {rank} among them")
    stages = sorted({role.stage for role in roles})
    groups = [tuple(r.rank for r in roles if r.stage == s) for s in stages]
    _check_layers(model, roles, groups)
    for ranks in groups:
        members = [roles[r] for r in ranks]
        _check_cover("heads", [r.heads for r in members], model.heads, model.head_unit)
        _check_cover("ffn", [r.ffn for r in members], model.ffn, model.ffn_unit)
    final = groups[-1]
    _check_cover("vocab", [roles[r].vocab for r in final], model.vocab, model.vocab_unit)
    if any(role.vocab[0] != role.vocab[1] for role in roles if role.rank not in final):
        raise EngineError("only ranks of the last stage have a slice of the vocabulary")
    at = stages.index(roles[rank].stage)
    return Place(
        rank=rank,
        size=len(roles),
        layers=roles[rank].layers,
        heads=roles[rank].heads,
        ffn=roles[rank].ffn,
        vocab=roles[rank].vocab,
        group=groups[at],
        before=groups[at - 1] if at else (),
        after=groups[at + 1] if at + 1 < len(groups) else (),
        final=final,
        first_stage=groups[0],
        stages=len(groups),
        vocabs=tuple(roles[r].vocab for r in final),
    )


def _check_layers(model: Model, roles: Sequence[Role], groups: Sequence[tuple[int, ...]]) -> None:
    at = 0
    for ranks in groups:
        start, end = roles[ranks[0]].layers
        if any(roles[r].layers != (start, end) for r in ranks):
            raise EngineError(f"ranks {list(ranks)} share a stage but not its layers")
        if start != at or end <= start:
            raise EngineError(f"expected a stage that begins at layer {at}, got layers {start} to {end}")
        at = end
    if at != model.layers:
        raise EngineError(f"the plan ends at layer {at}, the model has {model.layers}")


def _check_cover(what: str, ranges: Sequence[Range], total: int, unit: int) -> None:
    """`ranges` follow each other from 0 to `total`, cut at multiples of `unit`, none empty."""
    at = 0
    for start, end in ranges:
        if start != at or end <= start:
            raise EngineError(f"expected a slice of {what} that begins at {at}, got {start} to {end}")
        if end != total and end % unit:
            raise EngineError(f"{what} {start} to {end}: this model is cut at multiples of {unit}")
        at = end
    if at != total:
        raise EngineError(f"the slices of {what} end at {at}, the model has {total}")
