"""The trainer of one rank, by the job's topology."""

from __future__ import annotations

from typing import Any

from edged import Channel, ConfigError, TrainingSpec

from ._chain import Stage
from ._collector import Collector
from ._job import read
from ._parallel import Client, Server
from ._places import Places
from ._private import PrivateClient, PrivateServer
from ._rank import Rank
from ._remote import RemoteBlocks
from ._ushape import UShape

TOPOLOGIES: dict[str, type[Rank]] = {
    "label-sharing": Stage,
    "pipeline": Stage,
    "u-shape": UShape,
    "remote-blocks": RemoteBlocks,
}


def load(spec: TrainingSpec, blocks: Any, channel: Channel) -> Rank:
    """A `Trainer`; `blocks` is what engine torch_blocks made of the model."""
    job = read(spec.settings)
    places = Places(job, spec.roles, blocks.layers, spec.collector)
    if spec.rank > places.server:
        return Collector(spec, blocks, channel)
    if job.topology == "private-lora":
        return (PrivateClient if spec.rank in places.clients else PrivateServer)(spec, blocks, channel)
    if job.topology == "parallel-adapters":
        return (Client if spec.rank in places.clients else Server)(spec, blocks, channel)
    if job.topology not in TOPOLOGIES:
        raise ConfigError(f"topology {job.topology!r} is not part of this version")
    return TOPOLOGIES[job.topology](spec, blocks, channel)
