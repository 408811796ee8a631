"""Which bytes of a model file one role needs: so that a node fetches its shard and not the whole file.

Follows from what `_weights` loads, so there is one rule. Rows of a tensor lie together; a cut by
columns takes a piece of every row, which is why the whole tensor counts.
"""

from __future__ import annotations

from edged import EngineSpec

from ._model import Model, read_model
from ._place import Place, Range, find_place
from ._weights import Part, mapped_of, parts_of


def ranges(spec: EngineSpec) -> list[Range]:
    """Byte ranges, ascending and apart, that loading the role of `spec` reads, the file's head included.

    Only the head of the file at `spec.model_path` is read. EngineError where the roles do not fit it.
    """
    model = read_model(spec.model_path)
    return ranges_of(model, find_place(model, spec.roles, spec.rank))


def ranges_of(model: Model, place: Place) -> list[Range]:
    """As `ranges`: the head holds the tensor table, and the vocabulary that rank 0 speaks."""
    found = [(0, min(t.offset for t in model.head.tensors.values()))]
    found += [(t.offset, t.offset + t.bytes) for t in mapped_of(model, place).values()]
    found += [_rows_of(part) for part in parts_of(model, place)]
    return _joined(found)


def _rows_of(part: Part) -> Range:
    tensor = part.tensor
    first, last = part.rows
    return tensor.offset + first * tensor.row_bytes, tensor.offset + last * tensor.row_bytes


def _joined(ranges: list[Range]) -> list[Range]:
    """Overlapping and touching ranges as one."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
