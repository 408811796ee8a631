"""Opens a model for training: `load`. Nothing of its weights is read before a span is asked for."""

from __future__ import annotations

import functools

from edged import Channel, EngineSpec

from ._gguf_model import GgufModel
from ._span import Source, Span
from ._tokens import Tokenizer


class Blocks:
    """An opened model. `targets`: names of the linear layers that LoRA can be put on."""

    def __init__(self, source: Source) -> None:
        self.source, self.family = source, source.family.name
        config = source.config
        self.layers: int = config["num_hidden_layers"]
        self.hidden: int = config["hidden_size"]
        self.vocab: int = config["vocab_size"]
        self.context_tokens: int = config["max_position_embeddings"]
        self.targets = source.family.targets

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def span(
        self, first: int, last: int, *, embed: bool = False, head: bool = False, dtype: str = "f32"
    ) -> Span:
        """Blocks `first` to `last - 1` (none where they are equal), loaded tensor by tensor and frozen.

        `embed`: with the embedding and what belongs to it; `head`: with the final norm and the output head.
        `dtype`: "f32", or "bf16" for matrices of half the size, computed with in F32. EngineError where the
        span is not within the model, or a tensor is missing or has another shape.
        """
        return Span(self.source, first, last, embed=embed, head=head, dtype=dtype)


def load(spec: EngineSpec, channel: Channel) -> Blocks:
    """The model of `spec.model_path`, opened; EngineError where it is of no family known here."""
    return open_blocks(spec.model_path)


def open_blocks(path: str) -> Blocks:
    """The model at `path`, opened."""
    return Blocks(GgufModel(path))
