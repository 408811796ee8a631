"""Jobs that tune all weights of a model by seeds: a member's weights, and what such a job leaves.

A member has the model once, as for inference. At the start of a round it reads every tensor's start from the
file again, one by one in its place, and moves it by the table that came; the local steps change it in place
along directions that are drawn a piece at a time. The server holds the table alone and never loads the model.

What is left is an adapter of kind "seeds": the table, and in adapter_config.json what it takes to go from the
base to the weights (`settings`, of the method), whose base that is, and a digest of its tensors' names and
shapes (`layout`), by whose order a direction goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edged import Download, EngineError, Factors, WholePart

from .._training.adapter_folder import write_own
from ._messages import SUMS
from ._rank import Rank, Report, resolve

TABLE = "table"  # the extra of a download that has all that was learned


class Weights:
    """`LocalPart` over the model's own weights; there are no factors. `member`: its rank, with `model` the
    whole one in F32 and nothing put on it."""

    def __init__(self, member: Any, settings: Mapping[str, Any]) -> None:
        method, wholes, span = member.job.method, member.spec.wholes, member.model.span
        if method not in wholes:
            raise EngineError(
                f'expected a method here for parameters = "all"; {method} is none of '
                f"{', '.join(sorted(wholes)) or 'none that is loaded'}",
                remedy="load the plugin zeroth_order",
            )
        if span.device.type != "cpu":
            raise EngineError(
                f"expected the model in the processor's memory; it is on {span.device}",
                remedy="start this node with CUDA_VISIBLE_DEVICES= to tune all weights",
            )
        sizes = {name: int(np.prod(shape)) for name, shape in member.blocks.weights().items()}
        self._part: WholePart = resolve(wholes[method])(settings, sizes, member.rank)
        self._span, self._source, self._look = span, member.blocks.source, member.look
        self._names, self._is_start = tuple(sizes), True

    def begin(self, download: Download) -> Factors:
        """The start, moved by what came."""
        for name in self._names:
            self._look()
            if not self._is_start:
                self._span.reload(self._source, name)
            self._part.rebuild(name, self._flat(name), download.extras)
        self._is_start = False
        return {}

    def train(
        self, steps: range, parameters: Mapping[str, Any], loss: Callable[[int], float]
    ) -> Mapping[str, Any]:
        """The method's local steps, in place."""
        self._is_start = False
        return self._part.train(steps, {name: self._flat(name) for name in self._names}, loss)

    def _flat(self, name: str) -> np.ndarray:
        """The tensor's own memory, (size,)."""
        found: np.ndarray = self._span.get_parameter(name).detach().view(-1).numpy()
        return found


def give(server: Rank, extras: Mapping[str, Any], report: Report) -> None:
    """The table of the last round to the node that asked; of the server."""
    table, number = np.asarray(extras[TABLE], "<f4"), server.job.rounds
    if server.spec.collector == server.rank:
        write(server, table)
        report("done", number, {})
        return
    server.link(server.spec.collector).send_values("part", [number], {"of": table.size}, table)


def take(rank: Rank, report: Report) -> None:
    """The other end of `give`."""
    size = int(np.prod([int(rank.job.options[name]) for name in SUMS[2]]))
    _, table = rank.link(rank.server).receive_values(
        "part", [rank.job.rounds], lambda header: size, rank.name(rank.server)
    )
    write(rank, table)
    report("done", rank.job.rounds, {})


def write(rank: Rank, table: np.ndarray) -> None:
    """An adapter of kind "seeds" in the rank's folder. EngineError, code "disk", where it cannot be."""
    job = rank.job
    config = {
        "base_model_name_or_path": rank.spec.model_name,
        "base_sha256": rank.spec.model_sha256,
        "layout": rank.blocks.layout,
        "method": job.method,
        "settings": {"learning_rate": job.learning_rate, "seed": job.seed, **job.options},
    }
    write_own(Path(rank.spec.state_folder) / "adapter", "seeds", config, {TABLE: table})
