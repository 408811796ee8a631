"""Remote blocks: the client borrows the last blocks of a server that learns nothing and keeps nothing.

Petals' fine-tuning (Borzunov et al., arXiv:2209.01188): the server holds frozen blocks, answers a forward
pass, keeps that pass's graph, and answers its backward pass with the gradient of what it was sent. The client
has the embedding, the first blocks, the norm and the head; no id, label or logit leaves it. It tunes either
an adapter of its own blocks, or soft prompts (Lester et al., arXiv:2104.08691): vectors before the embeddings
of each row, which start as those of tokens drawn from the seed. Four tensors a batch, as in the U-shape.

With cut 0 the hidden states of a row are its embeddings, which who holds the model's file can turn back into
ids; so can it with a few blocks, at more cost. Noise, or a deeper cut, is what stands against that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .._tensors.streams import stream
from .._training.loss import IGNORED
from ._adapter import PROMPTS
from ._ushape import UShape


class RemoteBlocks(UShape):
    """A client, or the server, which has no parameters: no optimiser, no checkpoint."""

    def build(self) -> None:
        super().build()
        self.prompts: nn.Parameter | None = None
        if self.job.prompts and self.is_client:
            random = stream(self.job.seed, PROMPTS)
            drawn = torch.randint(self.blocks.vocab, (self.job.prompts,), generator=random)
            self.prompts = nn.Parameter(self.spans[0].vectors(drawn).cpu())

    def feedback_key(self, key: str) -> str:
        """The server remembers nothing of what a codec left out, either: no checkpoint would hold it."""
        return super().feedback_key(key) if self.is_client else ""

    def own_parameters(self) -> list[nn.Parameter]:
        return [] if self.prompts is None else [self.prompts]

    def adapter(self) -> dict[str, np.ndarray]:
        if self.prompts is None:
            return super().adapter()
        return {PROMPTS: self.prompts.detach().numpy().copy()}

    def lower(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.spans[0](ids, self.prompts)
        return hidden

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids (B, S) of a step, and labels (B, n + S) where there are n prompts; these are no targets."""
        ids, labels = super().batch(step)
        return ids, self._after_prompts(labels)

    def eval_batches(self) -> list[tuple[Tensor, Tensor]]:
        return [(ids, self._after_prompts(labels)) for ids, labels in super().eval_batches()]

    def _after_prompts(self, labels: Tensor) -> Tensor:
        return nn.functional.pad(labels, (self.job.prompts, 0), value=IGNORED)
