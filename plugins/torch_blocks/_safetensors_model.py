"""A packed safetensors file (see `_packing`) as a model of transformers: nothing of its values is changed."""

from __future__ import annotations

import safetensors
import torch

from edged import EngineError

from ._config import read_config
from ._safetensors_head import read_safetensors_head
from ._tokens import HubTokenizer, Tokenizer


class SafetensorsModel:
    """The model of the file at `path`. `config`: config.json's fields. `reads`: tensors read so far."""

    def __init__(self, path: str) -> None:
        self.path, self.head = path, read_safetensors_head(path)
        self.reads: list[str] = []
        self.config, self.family = read_config(self.head)

    def has(self, name: str) -> bool:
        return self._source(name) in self.head.tensors

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Tensor `name`; a matrix of `dtype`, a vector F32."""
        source = self._source(name)
        if source not in self.head.tensors:
            raise EngineError(f"{self.path} lacks tensor {name!r}")
        self.reads.append(source)
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                found: torch.Tensor = file.get_tensor(source)
        except (OSError, safetensors.SafetensorError) as error:
            raise EngineError(f"cannot read tensor {source!r} of {self.path}: {error}") from error
        if not found.is_floating_point():
            raise EngineError(f"expected tensor {source!r} of a float type, {found.dtype} came")
        return found.to(dtype if found.ndim > 1 else torch.float32)

    def stored(self, name: str) -> str:
        """The name in the file of transformers' tensor `name`."""
        return self._source(name)

    def rope_factors(self) -> torch.Tensor | None:
        """None: the configuration says it all."""
        return None

    def tokenizer(self) -> Tokenizer:
        return HubTokenizer(self.path, self.head.texts)

    def _source(self, name: str) -> str:
        """The name in the file: of the model for language modelling, or of the bare one; GPT-NeoX once called
        its head otherwise."""
        bare = name.removeprefix(f"{self.family.base}.")
        if name not in self.head.tensors and bare in self.head.tensors:
            return bare
        if name == f"{self.family.head}.weight" and "embed_out.weight" in self.head.tensors:
            return "embed_out.weight"
        return name
