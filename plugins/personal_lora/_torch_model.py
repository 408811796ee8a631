"""A member's model in PyTorch: losses of an adapter, and what gradients make of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from edged import EngineError

from .._training.loss import tensors_of
from .._training.preference import objective_of
from .._training.rows import Batch, seed_of
from ._job import Job
from ._rank import PREFIX, Arrays

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's own
Correct = Callable[[Arrays], Arrays]


class TorchModel:
    """The whole model of a rank with an adapter of `times` its r, or without one where all weights are tuned.
    `blocks` is what engine torch_blocks opened."""

    def __init__(self, blocks: Any, job: Job, rank: int, threads: int, times: int = 1) -> None:
        torch.set_num_threads(max(1, threads))
        self._job, self._rank = job, rank
        self._objective = objective_of(job.objective, job.beta)
        self._given: Arrays | None = None  # what `values` gave, where it is no memory of the model
        self.span = blocks.span(0, blocks.layers, embed=True, head=True, dtype=job.weights)
        if not job.is_whole:
            self.span.add_lora(
                r=times * job.r_of(rank),
                alpha=times * job.alpha_of(rank),
                targets=job.target_modules,
                seed=job.seed,
                dropout=job.dropout,
            )
            self.span.checkpointing = job.gradient_checkpointing
        self.span.train(False)
        self._tuned = self._pairs()

    # --- the adapter --------------------------------------------------------------------------------

    def set(self, factors: Arrays) -> None:
        """Copies of A and B of every layer, F32."""
        self._given = None
        self._put(factors)

    def _put(self, factors: Arrays) -> None:
        self.span.set_lora(
            {
                f"{PREFIX}{name}.lora_{letter}.weight": torch.from_numpy(np.ascontiguousarray(pair[side]))
                for name, pair in factors.items()
                for side, letter in enumerate("AB")
            }
        )

    def factors(self) -> Arrays:
        """Copies of what stands."""
        found = self.span.lora()
        return {
            name: (
                found[f"{PREFIX}{name}.lora_A.weight"].numpy(),
                found[f"{PREFIX}{name}.lora_B.weight"].numpy(),
            )
            for name in self._tuned
        }

    def values(self) -> Arrays:
        """A and B to be changed in place: `loss` sees it until `set` is called."""
        views = {name: (_array(a), _array(b)) for name, (a, b) in self._tuned.items()}
        if any(parameter.device.type != "cpu" for pair in self._tuned.values() for parameter in pair):
            self._given = views
        return views

    def merge(self, factors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Add B A, of each layer "A" and "B", to the frozen weights."""
        self.span.merge(
            {
                name: (torch.from_numpy(pair["A"].copy()), torch.from_numpy(pair["B"].copy()))
                for name, pair in factors.items()
            }
        )

    def _pairs(self) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """A and B of each layer, in the order of layers."""
        found: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in self.span.named_parameters():
            layer, is_lora, _ = name.partition(".lora_")
            if is_lora:
                found.setdefault(layer, []).append(parameter)
        return {name: (a, b) for name, (a, b) in found.items()}

    # --- losses -------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> float:
        """Summed over what `targets` counts; no gradient is kept."""
        if self._given is not None:
            self._put(self._given)
        ids, labels = tensors_of(batch)
        with torch.no_grad():
            return float(self._objective.summed(self.span, ids, labels).item())

    def targets(self, batch: Batch) -> int:
        return self._objective.targets(tensors_of(batch)[1])

    def take(self) -> dict[str, float]:
        """What was seen beside the loss since this was last called."""
        return self._objective.take()

    # --- gradients ----------------------------------------------------------------------------------

    def steps(
        self,
        where: str,
        batches: Iterable[tuple[int, Batch]],
        frozen: str = "",
        correct: Correct | None = None,
        is_plain: bool = False,
    ) -> tuple[float, float, float, float]:
        """Optimiser steps, each with its number, from the adapter as it is: loss by targets summed, targets,
        tokens, and seconds. `correct` gives what is added to the gradient at some factors; `is_plain`: by
        SGD, without momentum. EngineError, code "nan-loss", at a loss that is not finite."""
        job, began = self._job, time.monotonic()
        tuned: dict[tuple[str, int], torch.nn.Parameter] = {}
        for name, pair in self._tuned.items():
            for side, (letter, parameter) in enumerate(zip("AB", pair, strict=True)):
                parameter.requires_grad_(letter != frozen)
                if parameter.requires_grad:
                    tuned[name, side] = parameter
        optimiser = self._optimiser(list(tuned.values()), is_plain)
        losses, targets, tokens = 0.0, 0, 0
        self.span.train(True)  # dropout is for local steps alone
        try:
            for step, batch in batches:
                torch.manual_seed(seed_of(job.seed, step, self._rank))
                ids, labels = tensors_of(batch)
                count = self._objective.targets(labels)
                loss = self._objective.summed(self.span, ids, labels) / max(1, count)
                if not math.isfinite(loss.item()):
                    raise EngineError(
                        f"{where}, step {step}: the loss is {loss.item()}; nothing of this round is kept",
                        remedy="lower learning_rate, or look at the rows of this step",
                        code="nan-loss",
                    )
                loss.backward()
                if correct is not None:
                    more = correct(self.factors())
                    for (layer, side), parameter in tuned.items():
                        added = torch.from_numpy(np.array(more[layer][side], np.float32))
                        parameter.grad += added.to(parameter.device)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                losses, targets, tokens = losses + loss.item() * count, targets + count, tokens + ids.numel()
        finally:
            self.span.train(False)
        return losses, float(targets), float(tokens), time.monotonic() - began

    def _optimiser(self, tuned: list[torch.nn.Parameter], is_plain: bool) -> torch.optim.Optimizer:
        job = self._job
        if is_plain:
            return torch.optim.SGD(tuned, lr=job.rate_of(self._rank), weight_decay=job.weight_decay)
        return torch.optim.AdamW(
            tuned, lr=job.rate_of(self._rank), betas=BETAS, eps=EPSILON, weight_decay=job.weight_decay
        )


def _array(parameter: torch.nn.Parameter) -> np.ndarray:
    return parameter.detach().cpu().numpy()
