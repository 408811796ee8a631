"""Updates of which only a part moves: `lora-a2` by ranks, `flasc` by values.

LoRA-A2 (Koo et al. 2025, 2410.22815): even rounds leave A as it is, odd ones B, so that in each the mean of
products is the product of means; a member sends the ranks whose change is worth most, as far as a budget of
values goes. FLASC (Kuo et al. 2024, 2406.05233): members load the largest values of the factors, train all of
them, and send the largest changes; the server takes the mean change for a gradient of FedAdam. Which ones
those are, members choose (`_local`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edged import ConfigError, Download, Factors, Member, Update

from ._factors import Array
from ._local import allowed, largest, most_of_ranks, of_ranks, rank_sizes
from ._mean import Mean
from ._optimisers import Adaptive, Optimised, adaptive
from ._settings import DOWNLOAD_DENSITY, RANKS_SENT, UPLOAD_DENSITY, number


class Alternating(Mean):
    """lora-a2. In a download's extras "ranks_sent", what part of the values a member may change, in whole
    ranks; in an update's "ranks", bool (modules, r) by name of module, those that it did."""

    def __init__(self, part: float, start: Factors, members: Sequence[Member]) -> None:
        super().__init__("lora-a2", start, members)
        self._part = part

    def frozen(self, round: int) -> str:
        return "B" if round % 2 else "A"

    def take(self, row: Array, weight: float, update: Update) -> None:
        frozen, ranks = self.frozen(self.round), np.asarray(update.extras.get("ranks"))
        sizes, most = rank_sizes(self.layout, frozen), most_of_ranks(self.layout, frozen, self._part)
        is_sound = ranks.shape == sizes.shape and ranks.dtype == bool
        if not is_sound or sizes[ranks].sum() > most:
            raise ConfigError(
                f"lora-a2: expected which of {sizes.shape} ranks rank {update.member.rank} changed, "
                f"of {most} values at most",
                remedy="send extras.ranks as the member's part of the method makes it",
            )
        if (row != self.row)[~of_ranks(self.layout, ranks, frozen)].any():
            raise ConfigError(
                f"lora-a2: rank {update.member.rank} changed ranks that it did not choose",
                remedy="send the loaded values of ranks that are not chosen",
            )
        super().take(row, weight, update)

    def download(self, member: Member) -> Download:
        return Download(self.factors, extras={"ranks_sent": np.array(self._part)})


class Sparse(Optimised):
    """flasc. The server's factors are dense; members load their largest values and zeros. In a download's
    extras "upload_density", what part of all values a member may change."""

    def __init__(
        self, optimiser: Adaptive, down: float, up: float, start: Factors, members: Sequence[Member]
    ) -> None:
        self._down, self._up = down, up
        super().__init__("flasc", optimiser, start, members)

    def take(self, row: Array, weight: float, update: Update) -> None:
        moved, most = int(np.sum(row != self._loaded)), allowed(self.layout.size, self._up)
        if moved > most:
            raise ConfigError(
                f"flasc: expected at most {most} of {self.layout.size} values of rank {update.member.rank} "
                f"to change, {moved} did",
                remedy="send the largest changes, as the member's part of the method chooses them",
            )
        super().take(row, weight, update)

    def download(self, member: Member) -> Download:
        return Download(self._sent, extras={"upload_density": np.array(self._up)})

    def _use(self, row: Array) -> None:
        super()._use(row)
        self._loaded = np.where(largest(self.row, self._down), self.row, 0.0)
        self._sent = self.layout.factors(self._loaded)

    @property
    def origin(self) -> Array:
        return self._loaded


def load_lora_a2(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Alternating:
    return Alternating(number(settings, RANKS_SENT), start, members)


def load_flasc(settings: Mapping[str, Any], start: Factors, members: Sequence[Member]) -> Sparse:
    down, up = number(settings, DOWNLOAD_DENSITY), number(settings, UPLOAD_DENSITY)
    return Sparse(adaptive("adam", settings), down, up, start, members)
