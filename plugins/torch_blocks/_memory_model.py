"""A model of random weights in memory: what the self-check runs, and whoever needs a model without a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from edged import EngineError

from .._tensors.families import Family
from ._span import shapes_of
from ._tokens import Tokenizer


class MemoryModel:
    """Random tensors of a family's configuration, each a function of its name; the head is tied."""

    path = "a model in memory"

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family, self.reads = family, list[str]()
        self.config: Mapping[str, Any] = dict(config) | {"tie_word_embeddings": True}
        self._shapes = shapes_of(family, self.config)

    def has(self, name: str) -> bool:
        return name in self._shapes and not name.startswith(self.family.head)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not self.has(name):
            raise EngineError(f"{self.path} lacks tensor {name!r}")
        self.reads.append(name)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = torch.randn(self._shapes[name], generator=torch.Generator().manual_seed(seed))
        return (values / values.shape[-1] ** 0.5).to(dtype) if values.ndim > 1 else 1 + values / 8

    def rope_factors(self) -> torch.Tensor | None:
        return None

    def tokenizer(self) -> Tokenizer:
        raise EngineError(f"{self.path} has no vocabulary")
