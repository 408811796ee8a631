"""Sparse tuning: a fixed part of an adapter's values is trained, the rest stays as it is.

Which part, the gradients of the first batches decide: the values with the largest |gradient|, or with the
largest |weight x gradient| (the change of the loss to first order if the weight were zero; Molchanov et al.
2017, "Pruning convolutional neural networks", equation 7). Every rank chooses among the parameters it has.

A LoRA's B begins at zero, so A has no gradient until B has moved, and B no weight: scored before the first
step, "gradient" chooses B's values only, and "weight" decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from edged import ConfigError


class Scores:
    """Sums what each value of the named parameters is worth, batch after batch."""

    def __init__(self, by: Literal["gradient", "weight"] = "gradient") -> None:
        if by not in ("gradient", "weight"):
            raise ConfigError(f'sparse: expected "gradient" or "weight", got {by!r}')
        self._by = by
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """After a backward pass. A parameter without a gradient adds nothing."""
        for name, parameter in parameters.items():
            total = self._sums.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32))
            if parameter.grad is not None:
                worth = parameter.grad.float()
                total += (worth * parameter if self._by == "weight" else worth).abs()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sums = {name: state[name].clone() for name in sorted(state)}

    def choose(self, fraction: float) -> SparseMask:
        """The round(fraction n) best of all n values; of equals the earlier, in the order they were added.

        ConfigError for a fraction that chooses none, and for scores that are not finite.
        """
        if not self._sums:
            raise ConfigError("expected scores of at least one batch, got none")
        flat = torch.cat([total.reshape(-1).cpu() for total in self._sums.values()])
        count = round(fraction * len(flat)) if 0 < fraction <= 1 else 0
        if not count:
            raise ConfigError(
                f"sparse: expected a fraction of {len(flat)} values above 0 and up to 1, got {fraction}"
            )
        if not flat.isfinite().all():
            raise ConfigError("expected finite gradients to choose values by, got NaN or infinity")
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[flat.sort(descending=True, stable=True).indices[:count]] = True
        parts = chosen.split([total.numel() for total in self._sums.values()])
        return SparseMask(
            {
                name: part.reshape(total.shape).to(total.device)
                for (name, total), part in zip(self._sums.items(), parts, strict=True)
            }
        )


class SparseMask:
    """Which values of the named parameters are trained: a bool tensor of each one's shape."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)

    @property
    def selected(self) -> int:
        """How many values are trained."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """A step of `optimizer` that leaves the bits of all unselected values as they are: their gradients
        are zero, and what weight decay or an older momentum does to them is undone.

        Their moments in the optimiser stay zero if they were. ConfigError for parameters of another mask.
        """
        self._check(parameters)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                # not by multiplication: an infinity would become NaN
                parameter.grad.masked_fill_(~self._masks[name], 0.0)
        optimizer.step()
        for name, parameter in parameters.items():
            parameter.copy_(torch.where(self._masks[name], parameter, before[name]))

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._masks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._masks = dict(state)

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        ours = {name: tuple(mask.shape) for name, mask in self._masks.items()}
        if {name: tuple(parameter.shape) for name, parameter in parameters.items()} != ours:
            raise ConfigError(
                f"expected the {len(ours)} parameters of the mask, got {len(parameters)} others"
            )
