"""A role computes the same from a file that holds its byte ranges and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from edged_plugins._gguf import read_head
from edged_plugins.shard._ranges import ranges
from shard_rig import Shares, greedy_run, running, specs_of

from edged import EngineSpec

PLANS = ([(1, 1)], [(1,), (1,)], [(2, 1), (1, 1)], [(1,)])


def keep_only(spec: EngineSpec, target: Path) -> EngineSpec:
    """`spec` on a file with zeros wherever its role does not read."""
    with open(spec.model_path, "rb") as source, open(target, "wb") as file:
        for start, stop in ranges(spec):
            source.seek(start)
            file.seek(start)
            file.write(source.read(stop - start))
        file.truncate(source.seek(0, 2))
    return dataclasses.replace(spec, model_path=str(target))


@pytest.mark.parametrize("stages", PLANS, ids=str)
@pytest.mark.parametrize("name", ["random", "Q4_1"], ids=["untied", "tied"])
def test_the_ranges_of_a_role_are_all_that_it_reads(
    models: Callable[[str], str], tmp_path: Path, name: str, stages: Sequence[Shares]
) -> None:
    specs = specs_of(models(name), stages)
    parts = [keep_only(spec, tmp_path / f"{spec.rank}.gguf") for spec in specs]
    with running(specs) as (engine, *_):
        expected = greedy_run(engine, [1, 2, 3, 4], 8)
    with running(parts) as (engine, *_):
        assert greedy_run(engine, [1, 2, 3, 4], 8) == expected


@pytest.mark.parametrize("stages", PLANS, ids=str)
@pytest.mark.parametrize("name", ["random", "Q4_1"], ids=["untied", "tied"])
def test_together_the_roles_read_every_tensor_and_each_its_share(
    models: Callable[[str], str], name: str, stages: Sequence[Shares]
) -> None:
    specs = specs_of(models(name), stages)
    tensors = read_head(specs[0].model_path).tensors.values()
    found = [np.array(ranges(spec)) for spec in specs]
    read = [[_bytes_in(each, t.offset, t.offset + t.bytes) for t in tensors] for each in found]
    for tensor, parts in zip(tensors, zip(*read, strict=True), strict=True):
        assert sum(parts) >= tensor.bytes, tensor.name
        readers = sum(map(bool, parts))
        strided = "attn_output" in tensor.name or "ffn_down" in tensor.name
        if len(tensor.shape) > 1 and not strided and tensor.name.startswith("blk."):
            assert sum(parts) == tensor.bytes, tensor.name  # cut between whole rows: nobody reads another's
        if tensor.name.startswith("blk."):
            assert readers in {len(shares) for shares in stages}


def test_a_later_stage_reads_neither_the_embedding_nor_other_layers(models: Callable[[str], str]) -> None:
    first, last = specs_of(models("random"), [(1,), (1,)])
    tensors = read_head(first.model_path).tensors
    mine, edge = np.array(ranges(last)), last.role.layers[0]
    for tensor in tensors.values():
        layer = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else None
        is_read = bool(_bytes_in(mine, tensor.offset, tensor.offset + tensor.bytes))
        assert is_read == (tensor.name != "token_embd.weight" if layer is None else layer >= edge)


def _bytes_in(found: np.ndarray, start: int, stop: int) -> int:
    """Of (ranges, 2), the bytes between `start` and `stop`: a cut by columns reads a range for each row."""
    return int((np.minimum(found[:, 1], stop) - np.maximum(found[:, 0], start)).clip(0).sum())
