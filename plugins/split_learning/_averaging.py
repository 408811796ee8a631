"""The mean of several clients' adapters, by way of their server (SplitFed). Moments stay a client's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edged import ProtocolError

if TYPE_CHECKING:
    from ._rank import Rank


def average_clients(rank: Rank, step: int) -> None:
    """Clients send their values in one frame and take the mean's; nothing where there is one client."""
    places = rank.places
    if len(places.clients) < 2 or rank.rank > places.server:
        return
    if rank.rank in places.clients:
        link = rank.link(places.server)
        link.send("mine", [step], {}, [flat(rank)])
        _, (frame,) = link.receive("mean", [step])
        _set(rank, np.frombuffer(frame, "<f4"))
        return
    total: np.ndarray | None = None
    for client in places.clients:
        _, (frame,) = rank.link(client).receive("mine", [step])
        values = np.frombuffer(frame, "<f4").astype(np.float64)
        if total is not None and values.shape != total.shape:
            raise ProtocolError(f"expected {total.size} values of client {client}, got {values.size}")
        total = values if total is None else total + values
    assert total is not None
    mean = (total / len(places.clients)).astype("<f4")
    for client in places.clients:
        rank.link(client).send("mean", [step], {}, [mean])


def flat(rank: Rank) -> np.ndarray:
    """Every tuned value, in the order of the parameters."""
    return np.concatenate([p.detach().numpy().astype("<f4").ravel() for p in rank.parameters])


def _set(rank: Rank, values: np.ndarray) -> None:
    sizes = [parameter.numel() for parameter in rank.parameters]
    if values.size != sum(sizes):
        raise ProtocolError(f"expected the mean of {sum(sizes)} values, got {values.size}")
    parts = np.split(values.astype(np.float32), np.cumsum(sizes)[:-1])
    with torch.no_grad():
        for parameter, part in zip(rank.parameters, parts, strict=True):
            parameter.copy_(torch.from_numpy(part.copy()).reshape(parameter.shape))
