"""The mean of several clients' adapters, by way of their server (SplitFed). Moments stay a client's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edged import ProtocolError

from .._training.tensor_link import TensorLink
from ._places import Places

VALUES_MAX = 1 << 29  # of a client's adapter, 2 GiB: a server cannot know what its client tunes


def average_clients(
    places: Places,
    rank: int,
    link: Callable[[int], TensorLink],
    parameters: Sequence[nn.Parameter],
    step: int,
) -> None:
    """Clients send their values and take the mean's; nothing where there is one client. ProtocolError,
    naming the node, where values are not finite or not as many as expected."""
    if len(places.clients) < 2:
        return
    if rank in places.clients:
        server, count = link(places.server), sum(parameter.numel() for parameter in parameters)
        server.send_values("mine", [step], {"of": count}, flat(parameters))
        name = places.name(places.server)
        _set(parameters, server.receive_values("mean", [step], lambda _: count, name)[1])
        return
    total: np.ndarray | None = None
    for client in places.clients:  # all have the same tensors: the first says how many values
        name = places.name(client)

        def count_of(said: Mapping[str, Any], name: str = name, total: np.ndarray | None = total) -> int:
            of = said.get("of")
            if type(of) is not int or not 1 <= of <= VALUES_MAX or (total is not None and of != total.size):
                wanted = f"1 to {VALUES_MAX}" if total is None else f"{total.size}"
                raise ProtocolError(f"expected {wanted} values of {name}'s adapter; {str(of)[:20]} came")
            return of

        _, values = link(client).receive_values("mine", [step], count_of, name)
        total = values.astype(np.float64) if total is None else total + values
    assert total is not None
    mean = total / len(places.clients)
    for client in places.clients:
        link(client).send_values("mean", [step], {}, mean)


def flat(parameters: Sequence[nn.Parameter]) -> np.ndarray:
    """Every tuned value, in the order of the parameters."""
    return np.concatenate([p.detach().cpu().numpy().astype("<f4").ravel() for p in parameters])


def _set(parameters: Sequence[nn.Parameter], values: np.ndarray) -> None:
    parts = np.split(values, np.cumsum([parameter.numel() for parameter in parameters])[:-1])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(torch.from_numpy(part.copy()).reshape(parameter.shape))
