"""Opens a model for training: `load`. Nothing of its weights is read before a span is asked for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from edged import Channel, EngineSpec

from .._tensors.starts import adapter_start
from ._config import sizes_of
from ._gguf_model import GgufModel
from ._safetensors_head import is_safetensors
from ._safetensors_model import SafetensorsModel
from ._span import Source, Span, linear_shapes, shapes_of
from ._tokens import Tokenizer


class Blocks:
    """An opened model. `targets`: names of the linear layers that LoRA can be put on."""

    has_gradients = True

    def __init__(self, source: Source) -> None:
        self.source, self.family = source, source.family.name
        sizes = sizes_of(source.family, source.config, source.path)
        self.layers, self.hidden, self.vocab = sizes.layers, sizes.hidden, sizes.vocab
        self.context_tokens = sizes.context_tokens
        self.targets = source.family.targets

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's vocabulary and chat template, read when they are first asked for."""
        return self.source.tokenizer()

    def close(self) -> None:
        """Give back what the vocabulary took; spans live on."""
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()
            del self.tokenizer

    def span(
        self, first: int, last: int, *, embed: bool = False, head: bool = False, dtype: str = "f32"
    ) -> Span:
        """Blocks `first` to `last - 1` (none where they are equal), loaded tensor by tensor and frozen.

        `embed`: with the embedding and what belongs to it; `head`: with the final norm and the output head.
        `dtype`: "f32", or "bf16" for matrices of half the size, computed with in F32. EngineError where the
        span is not within the model, or a tensor is missing or has another shape.
        """
        return Span(self.source, first, last, embed=embed, head=head, dtype=dtype)

    def linears(self, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Full names of all blocks' linear layers that `targets` names, in the order in which they compute;
        how many values each gives and takes. Nothing is loaded. EngineError where a target is unknown."""
        return linear_shapes(self.source.family, self.source.config, targets)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Transformers' names of all tensors of the model, and their shapes, without a head that is tied to
        the embedding. Nothing is loaded."""
        shapes, head = shapes_of(self.source.family, self.source.config), f"{self.source.family.head}.weight"
        return {
            name: tuple(shape)
            for name, shape in sorted(shapes.items())
            if name != head or self.source.has(head)
        }

    @property
    def layout(self) -> str:
        """SHA-256 of the names and shapes of `weights`: seeds of all weights go by their order."""
        return hashlib.sha256(json.dumps(self.weights()).encode()).hexdigest()

    def lora_start(
        self, *, r: int, targets: Sequence[str], seed: int
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What `Span.add_lora` puts on the layers of `linears`: A (r, in) and B (out, r), which is zero."""
        return adapter_start(self.linears(targets), r, seed)


def load(spec: EngineSpec, channel: Channel) -> Blocks:
    """The model of `spec.model_path`, opened, and PyTorch told of the role's threads; EngineError where the
    model is of no family known here."""
    torch.set_num_threads(spec.threads)
    return open_blocks(spec.model_path)


def open_blocks(path: str) -> Blocks:
    """The model at `path`, opened: a GGUF, or a packed safetensors file."""
    return Blocks(SafetensorsModel(path) if is_safetensors(path) else GgufModel(path))
