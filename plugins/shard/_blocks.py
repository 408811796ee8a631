"""A model for a training that takes no gradients: its losses with an adapter, on ggml alone.

`load` is what the worker calls for a training's role. Numerics are exact: the weights are those of the file,
in F32, and so is all that is computed. A slope is the difference of two losses that are a thousandth apart,
and the rounding of activations to 8 bits, as the quick kernels do, is larger than that.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edged import Channel, EngineError, EngineSpec, Role

from .._gguf import ggml_type
from .._tensors import adapters
from .._tensors.families import OF_ARCHITECTURE
from .._tensors.starts import adapter_start
from .._tensors.vocabulary import LlamaTokenizer
from . import _ggml
from ._adapter import Adapter
from ._layers import Shard
from ._loss import Loss
from ._model import Model, read_model
from ._place import find_place
from ._weights import Weights

PREFIX = "base_model.model."  # of PEFT's names


@dataclass(frozen=True, slots=True)
class Source:
    """The model's file."""

    path: str


def load(spec: EngineSpec, channel: Channel) -> Blocks:
    """The model of `spec.model_path`, opened: nothing of its weights is read before losses are asked for."""
    return Blocks(spec)


class Blocks:
    """What a training without gradients asks of an opened model, by transformers' names. EngineError where
    the file is of no family whose names are known."""

    has_gradients = False

    def __init__(self, spec: EngineSpec) -> None:
        self.source, self._threads = Source(spec.model_path), spec.threads
        self._model = read_model(spec.model_path)
        architecture = str(self._model.head.keys.get("general.architecture"))
        if architecture not in OF_ARCHITECTURE:
            raise EngineError(
                f"expected a model of {', '.join(OF_ARCHITECTURE)} to train; {architecture} came",
                remedy="train another model",
            )
        self._family = OF_ARCHITECTURE[architecture]
        self.family, self._architecture = self._family.name, architecture
        self.layers, self.vocab = self._model.layers, self._model.vocab

    @functools.cached_property
    def tokenizer(self) -> LlamaTokenizer:
        """The model's vocabulary and chat template, read when they are first asked for."""
        return LlamaTokenizer(self._model.head)

    def linears(self, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Full names of all blocks' linear layers that `targets` names, in the order in which they compute;
        how many values each gives and takes. EngineError where a target is unknown."""
        return {name: self._model.head.tensors[weight].shape[::-1] for name, weight in self._found(targets)}

    def lora_start(
        self, *, r: int, targets: Sequence[str], seed: int
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What an adapter on these layers begins with: A (r, in) and B (out, r), which is zero."""
        return adapter_start(self.linears(targets), r, seed)

    def losses(self, *, r: int, alpha: float, targets: Sequence[str], tokens_max: int) -> AdaptedLoss:
        """Of the whole model with an adapter, for rows of at most `tokens_max` tokens."""
        start = self.lora_start(r=r, targets=targets, seed=0)
        tensors = {
            f"{PREFIX}{name}.lora_{letter}.weight": values
            for name, pair in start.items()
            for letter, values in zip("AB", pair, strict=True)
        }
        with tempfile.TemporaryDirectory(prefix="edged-adapter-") as folder:
            peft, made = Path(folder) / "peft", Path(folder) / "adapter.gguf"
            adapters.write_peft(peft, tensors, r=r, alpha=alpha, targets=targets, base_name="")
            adapters.to_gguf(peft, self.source.path, made)
            places = adapters.Places(self._model.head, self._architecture)
            return AdaptedLoss(
                self._model, str(made), dict(self._found(targets)), places, self._threads, tokens_max
            )

    def close(self) -> None:
        """Give back what the vocabulary took."""
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()
            del self.tokenizer

    def _found(self, targets: Sequence[str]) -> list[tuple[str, str]]:
        """(name, the file's tensor) of each layer."""
        family = self._family
        unknown = [name for name in targets if name not in family.targets]
        if unknown:
            raise EngineError(f"targets: expected some of {', '.join(family.targets)}; {unknown[0]!r} came")
        found = [
            (f"{family.base}.{family.layers}.{number}.{part}", f"blk.{number}.{tensor}.weight")
            for number in range(self.layers)
            for part, tensor in family.blocks.items()
            if part.rpartition(".")[2] in targets
        ]
        missing = [weight for _, weight in found if weight not in self._model.head.tensors]
        if missing:
            raise EngineError(
                f"{self.source.path} lacks tensor {missing[0]!r}", remedy="choose other targets"
            )
        return found


class AdaptedLoss:
    """The loss of rows by a model in F32 with one adapter, whose values can be set."""

    def __init__(
        self,
        model: Model,
        adapter: str,
        weights: Mapping[str, str],
        places: adapters.Places,
        threads: int,
        tokens_max: int,
    ) -> None:
        """`adapter`: a file of its shapes; `weights`: by transformers' name a layer's in the model's."""
        whole = ((0, model.layers), (0, model.heads), (0, model.ffn), (0, model.vocab))
        place = find_place(model, (Role(0, "self", 0, *whole, share=1.0),), 0)
        lib = _ggml.load()
        self._weights, self._places = weights, places
        with contextlib.ExitStack() as stack:
            self._adapter = Adapter(lib, adapter, model, place, exact=True)
            stack.callback(self._adapter.close)
            held = Weights(lib, model, place, exact=True)
            stack.callback(held.close)
            backend = lib.backend_cpu_init()
            stack.callback(lib.backend_free, backend)
            lib.backend_cpu_set_n_threads(backend, threads)
            factors = model.rope_factors(tokens_max) if model.rope else None
            of_f32 = ggml_type("f32")
            shard = Shard(lib, backend, model, place, held, True, of_f32, factors, self._adapter)
            self._loss = Loss(shard, tokens_max)
            stack.callback(self._loss.close)
            self._stack = stack.pop_all()

    def set(self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """A (r, in) and B (out, r) F32 of every layer, by transformers' names."""
        for name, (a, b) in factors.items():
            weight = self._weights[name]
            self._adapter.write(weight, a, b[self._rows(weight, len(b))])

    def __call__(self, ids: np.ndarray, labels: np.ndarray) -> float:
        """As `Loss`."""
        return self._loss(ids, labels)

    def close(self) -> None:
        """Give all memory back; a second call does nothing."""
        self._stack.close()

    def _rows(self, weight: str, rows: int) -> np.ndarray:
        return self._places.rows_of_b(weight.removesuffix(".weight"), rows)
