"""The mean of several clients' adapters, by way of their server (SplitFed). Moments stay a client's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from edged import ProtocolError

from ._link import Link
from ._places import Places


def average_clients(
    places: Places, rank: int, link: Callable[[int], Link], parameters: Sequence[nn.Parameter], step: int
) -> None:
    """Clients send their values in one frame and take the mean's; nothing where there is one client."""
    if len(places.clients) < 2:
        return
    if rank in places.clients:
        link(places.server).send("mine", [step], {}, [flat(parameters)])
        _set(parameters, _taken(link(places.server), "mean", step))
        return
    total: np.ndarray | None = None
    for client in places.clients:
        values = _taken(link(client), "mine", step).astype(np.float64)
        if total is not None and values.shape != total.shape:
            raise ProtocolError(f"expected {total.size} values of client {client}, got {values.size}")
        total = values if total is None else total + values
    assert total is not None
    mean = (total / len(places.clients)).astype("<f4")
    for client in places.clients:
        link(client).send("mean", [step], {}, [mean])


def _taken(link: Link, kind: str, step: int) -> np.ndarray:
    """The one frame's numbers."""
    _, frames = link.receive(kind, [step])
    if len(frames) != 1 or frames[0].nbytes % 4:
        raise ProtocolError(f"expected {kind} of rank {link.other} in one frame of F32 values")
    return np.frombuffer(frames[0], "<f4")


def flat(parameters: Sequence[nn.Parameter]) -> np.ndarray:
    """Every tuned value, in the order of the parameters."""
    return np.concatenate([p.detach().cpu().numpy().astype("<f4").ravel() for p in parameters])


def _set(parameters: Sequence[nn.Parameter], values: np.ndarray) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    if values.size != sum(sizes):
        raise ProtocolError(f"expected the mean of {sum(sizes)} values, got {values.size}")
    parts = np.split(values.astype(np.float32), np.cumsum(sizes)[:-1])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(torch.from_numpy(part.copy()).reshape(parameter.shape))
