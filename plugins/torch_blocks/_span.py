"""A run of a model's blocks with frozen weights, and LoRA on their linear layers.

The blocks are transformers' own decoder layers, called with transformers' own rotary embedding; this
module holds what transformers' models do around them. They are made without memory (PyTorch's
meta device) and get their tensors one by one, so that no more of a model is ever loaded than asked for.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from edged import EngineError

from .._tensors.families import Family
from .._tensors.starts import start_of
from ._narrow import narrow
from ._tokens import Tokenizer

PREFIX = "base_model.model."  # of PEFT's names of tensors
ADAPTER = "default"
DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout")
RELOADED_APART = 16 << 20  # bytes of a tensor that is not read beside what it replaces
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Source(Protocol):
    """A model file: its family, its configuration, and its tensors by transformers' names."""

    path: str
    family: Family
    config: Mapping[str, Any]
    reads: list[str]

    def has(self, name: str) -> bool: ...

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor: ...

    def rope_factors(self) -> torch.Tensor | None: ...

    def tokenizer(self) -> Tokenizer: ...


def make_config(family: Family, fields: Mapping[str, Any]) -> Any:
    """Transformers' configuration, without dropout: the base is frozen, and only LoRA may have some.
    EngineError where transformers refuses the fields."""
    module = importlib.import_module(family.config_module)
    known = {key: value for key, value in fields.items() if key not in DROPOUTS}
    try:
        config = getattr(module, f"{family.classes}Config")(**known)
    except Exception as error:  # a file's own fields: each check of transformers has its own exception
        raise EngineError(f"transformers refuses this configuration of {family.name}: {error}") from error
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    config._attn_implementation = "sdpa"
    return config


class Span(nn.Module):
    """Blocks `first` to `last - 1` of a model, with the embedding and the output head where asked for.

    Everything is frozen, and on the GPU where CUDA has one; what goes in and comes out is on the CPU, but for
    logits. Parameters are F32, or BF16 for matrices where `dtype` is "bf16"; all is computed
    in F32 (see `_narrow`). `checkpointing`: keep a block's input alone for the backward pass, and compute the
    block again there. Rows are padded on the right where they are: attention is causal, so no mask is needed.
    """

    def __init__(
        self,
        source: Source,
        first: int,
        last: int,
        *,
        embed: bool = False,
        head: bool = False,
        dtype: str = "f32",
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise EngineError(f"expected dtype f32 or bf16, {dtype!r} came")
        self.family, self._config = source.family, make_config(source.family, source.config)
        layers = self._config.num_hidden_layers
        if not 0 <= first <= last <= layers:
            raise EngineError(f"expected a span within blocks 0 to {layers}, {first} to {last} came")
        self.first, self.last, self.has_embedding, self.has_head = first, last, embed, head
        self.checkpointing = False
        self._build()
        if dtype == "bf16":
            narrow(self)
        self._load(source, DTYPES[dtype])
        self.requires_grad_(False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.to(self.device)
        for rotary in self._rotary:
            rotary.to(self.device)

    # --- making -----------------------------------------------------------------------------------

    def _build(self) -> None:
        self._base, self._blocks = _modules(
            self, self.family, self._config, range(self.first, self.last), self.has_embedding, self.has_head
        )
        self._rotary: tuple[nn.Module, ...] = ()
        if self.family.has_rope:
            module = importlib.import_module(self.family.module)
            self._rotary = (getattr(module, f"{self.family.classes}RotaryEmbedding")(self._config),)

    def _load(self, source: Source, dtype: torch.dtype) -> None:
        family, head = self.family, f"{self.family.head}.weight"
        embedding = f"{family.base}.{family.embedding}.weight"
        for name, parameter in list(self.named_parameters()):
            if name == head and not source.has(head):
                continue
            self._put(name, parameter, source.tensor(name, dtype))
        if self.has_head and not source.has(head):
            if not self._config.tie_word_embeddings:
                raise EngineError(f"{source.path} lacks tensor {head!r} of a model whose head is not tied")
            shared = self.get_parameter(embedding) if self.has_embedding else source.tensor(embedding, dtype)
            self._put(head, self.get_parameter(head), shared)
        factors = source.rope_factors()
        if factors is not None and self._rotary:
            self._rotary[0].inv_freq /= factors

    def reload(self, source: Source, name: str) -> torch.Tensor:
        """Tensor `name` as its file has it, of a span on the CPU in F32, for whoever changed it in place; a
        tied head follows. A large one's old values are given up before the new ones are read; small ones
        stay where they are, so that memory is not cut up."""
        parameter = self.get_parameter(name)
        if 4 * parameter.numel() < RELOADED_APART:
            return parameter.data.copy_(source.tensor(name))
        held = [each for each in self.parameters() if each.data_ptr() == parameter.data_ptr()]
        for each in held:
            each.data = torch.empty(0)
        value = source.tensor(name).contiguous()
        for each in held:
            each.data = value
        return value

    def _put(self, name: str, parameter: torch.Tensor, value: torch.Tensor) -> None:
        if value.shape != parameter.shape:
            raise EngineError(
                f"expected tensor {name!r} of shape {list(parameter.shape)}, {list(value.shape)} came"
            )
        parent, _, attribute = name.rpartition(".")
        setattr(self.get_submodule(parent), attribute, nn.Parameter(value.detach(), requires_grad=False))

    # --- computing --------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (B, S, d) after the last block, through the final norm where this span has the head.
        `x`: ids (B, S), int64, where it has the embedding; else hidden states (B, S, d), F32. `prompts`
        (n, d), of a span with the embedding: put before the vectors of each row's ids, so S is n more."""
        (hidden,) = deque(self._walk(x, prompts), maxlen=1)
        return self.normed(hidden) if self.has_head else hidden.cpu()

    def states(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states (B, S, d) before the first block and after each, before any final norm."""
        return [hidden.cpu() for hidden in self._walk(x)]

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """States of the last block, (..., d), through the final norm; of a span with the head."""
        if not self.has_head:
            raise EngineError("expected a span with the final norm; this one was loaded without")
        return self._part(self.family.final_norm)(hidden.to(self.device)).cpu()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocab) of what `forward` gives, (..., d), on the span's own device; with the head."""
        if not self.has_head:
            raise EngineError("expected a span with the output head; this one was loaded without")
        return self.get_submodule(self.family.head)(hidden.to(self.device))

    def vectors(self, ids: torch.Tensor) -> torch.Tensor:
        """What the model's embedding gives of ids (...): (..., d) F32, scaled where the family does so;
        positions and norm come later."""
        found = F.embedding(ids.to(self.device), self._part(self.family.embedding).weight).float()
        return found * self._config.hidden_size**0.5 if self.family.has_scaled_embedding else found

    def _walk(self, x: torch.Tensor, prompts: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        hidden = self._embed(x, prompts) if self.has_embedding else x.to(self.device)
        yield hidden
        if not self._blocks:
            return
        around = self._around(hidden)
        for number, block in zip(range(self.first, self.last), self._blocks, strict=True):
            more = around | {"attention_mask": self._mask(hidden, number)}
            if self.checkpointing and torch.is_grad_enabled():
                found = checkpoint(block, hidden, use_reentrant=False, **more)
            else:
                found = block(hidden, **more)
            hidden = found[0] if isinstance(found, tuple) else found
            yield hidden

    def _embed(self, ids: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
        family, config = self.family, self._config
        before = 0 if prompts is None else len(prompts)
        limit = config.max_position_embeddings - before if family.positions else ids.shape[1]
        if ids.ndim != 2 or ids.shape[1] > limit:
            raise EngineError(f"expected rows of at most {limit} ids, {list(ids.shape)} came")
        hidden = self.vectors(ids)
        if prompts is not None:
            hidden = torch.cat([prompts.to(self.device).expand(len(ids), *prompts.shape), hidden], 1)
        if family.positions:
            hidden = hidden + self._part(family.positions).weight[: hidden.shape[1]].float()
        if family.embedding_norm:
            hidden = self._part(family.embedding_norm)(hidden)
        return hidden

    def _around(self, hidden: torch.Tensor) -> dict[str, Any]:
        """What the model hands to each of its blocks, beside the mask."""
        if self.family.has_alibi:
            return {"alibi": _alibi(self._config.num_attention_heads, *hidden.shape[:2]).to(hidden.device)}
        if self._rotary:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            return {"position_embeddings": self._rotary[0](hidden, position_ids=positions)}
        return {}

    def _mask(self, hidden: torch.Tensor, number: int) -> torch.Tensor | None:
        """None: plain causal attention, which needs none; it is what all but a few layers have."""
        length = hidden.shape[1]
        if self.family.has_alibi:  # BLOOM adds the mask to its scores
            least = torch.finfo(hidden.dtype).min
            return hidden.new_full((length, length), least).triu(1)[None, None]
        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        if not window or length <= window or (kinds and kinds[number] != "sliding_attention"):
            return None
        at = torch.arange(length, device=hidden.device)
        ago = at[:, None] - at[None]
        return ((ago >= 0) & (ago < window))[None, None]

    def _part(self, name: str) -> Any:
        return self._base[0].get_submodule(name)

    # --- adapting ---------------------------------------------------------------------------------

    def linears(self, targets: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
        """The blocks' base linear layers of these names: full name -> (module it is in, attribute)."""
        _check_targets(self.family, targets)
        found = {}
        for name, module in self.named_modules():
            stem, _, attribute = name.rpartition(".")
            if stem.endswith(".base_layer") or attribute not in targets:
                continue
            if hasattr(module, "base_layer"):
                found[name] = (module, "base_layer")
            elif isinstance(module, (nn.Linear, Conv1D)):
                found[name] = (self.get_submodule(stem), attribute)
        return found

    def add_lora(
        self, *, r: int, alpha: float, targets: Sequence[str], seed: int, dropout: float = 0.0
    ) -> None:
        """Put LoRA (Hu et al., arXiv:2106.09685) of rank `r` on every linear layer named in `targets`.

        W x becomes W x + (alpha / r) B A x. A starts as PEFT's does, uniform within 1 / sqrt(columns), drawn
        from `seed` and the layer's full name alone, so that a block starts alike in every span; B is zero.
        EngineError where a target is unknown, naming `targets`, or where there is LoRA already.
        """
        if r < 1 or not 0 <= dropout < 1:
            raise EngineError(f"expected r of 1 or more and dropout in [0, 1); {r} and {dropout} came")
        if self.trainable():
            raise EngineError("expected a span without LoRA; this one has it")
        names = self.linears(targets)
        if not names:
            return
        _inject(self, r, alpha, dropout, names)
        with torch.no_grad():
            for name in names:
                layer = self.get_submodule(name)
                down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
                start = torch.from_numpy(start_of(seed, name, *down.weight.shape))
                down.weight = nn.Parameter(start.to(self.device))
                up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=self.device))

    def trainable(self) -> list[nn.Parameter]:
        """LoRA's parameters, block by block, A before B."""
        return [parameter for _, parameter in self._lora()]

    def lora(self) -> dict[str, torch.Tensor]:
        """Copies of LoRA's tensors by PEFT's names, with the model's own numbers of blocks."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self._lora()}

    def set_lora(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the values of `state`, which has what `lora` gives; names of other spans are passed over."""
        with torch.no_grad():
            for name, parameter in self._lora():
                if name not in state or state[name].shape != parameter.shape:
                    came = list(state[name].shape) if name in state else "nothing"
                    raise EngineError(f"expected {name!r} of shape {list(parameter.shape)}, {came} came")
                parameter.copy_(state[name])

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Within it the model is as it is without LoRA; what is to be trained is as before afterwards."""
        layers = [module for module in self.modules() if hasattr(module, "enable_adapters")]
        trained = [(parameter, parameter.requires_grad) for parameter in self.trainable()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, is_trained in trained:
                parameter.requires_grad_(is_trained)

    def merge(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add B A to the frozen weights for good, by the full names of `linears`: A (r, in), B (out, r).

        EngineError where a layer is not of this span, has another shape, or is not kept in F32: a narrower
        weight would lose what is added.
        """
        with torch.no_grad():
            for name, (down, up) in factors.items():
                layer = self.get_submodule(name)
                weight = getattr(layer, "base_layer", layer).weight
                added = (up @ down).to(weight.device)
                added = added.T if isinstance(getattr(layer, "base_layer", layer), Conv1D) else added
                if weight.dtype != torch.float32 or weight.shape != added.shape:
                    raise EngineError(
                        f"expected F32 weights {list(added.shape)} of {name!r} to merge into; they are "
                        f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
                    )
                weight.add_(added)

    def _lora(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                yield PREFIX + name.replace(f".{ADAPTER}.", "."), parameter


def shapes_of(family: Family, fields: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Transformers' names of all tensors of a model of this configuration, and their shapes."""
    config = make_config(family, fields)
    whole = nn.Module()
    _modules(whole, family, config, range(config.num_hidden_layers), True, True)
    return {name: parameter.shape for name, parameter in whole.named_parameters()}


def linear_shapes(
    family: Family, fields: Mapping[str, Any], targets: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Full names of all blocks' linear layers of these names, in the order in which a model computes them,
    and how many values each gives and takes. EngineError where a name is unknown."""
    _check_targets(family, targets)
    config = make_config(family, fields)
    root = nn.Module()
    _, blocks = _modules(root, family, config, range(config.num_hidden_layers), False, False)
    found = {}
    for number, block in enumerate(blocks):
        for part in family.blocks:  # it lists them in that order
            if part.rpartition(".")[2] in targets:
                rows, columns = block.get_submodule(part).weight.shape
                is_transposed = isinstance(block.get_submodule(part), Conv1D)
                name = f"{family.base}.{family.layers}.{number}.{part}"
                found[name] = (columns, rows) if is_transposed else (rows, columns)
    return found


def _check_targets(family: Family, targets: Sequence[str]) -> None:
    unknown = [name for name in targets if name not in family.targets]
    if unknown:
        raise EngineError(f"targets: expected some of {', '.join(family.targets)}; {unknown[0]!r} came")


def _modules(
    root: nn.Module, family: Family, config: Any, numbers: range, embed: bool, head: bool
) -> tuple[tuple[nn.Module], tuple[nn.Module, ...]]:
    """Put transformers' modules below `root`, without memory; the base in a tuple, and the blocks."""
    module = importlib.import_module(family.module)
    layer = getattr(module, family.classes + family.layer)
    width = config.hidden_size
    with torch.device("meta"):
        base = nn.Module()
        # by their number in the model, so that names are the model's own in every span
        blocks = nn.ModuleDict({str(i): layer(config, layer_idx=i) for i in numbers})
        base.add_module(family.layers, blocks)
        if embed:
            base.add_module(family.embedding, nn.Embedding(config.vocab_size, width))
        if embed and family.positions:
            base.add_module(family.positions, nn.Embedding(config.max_position_embeddings, width))
        if embed and family.embedding_norm:
            base.add_module(family.embedding_norm, _layer_norm(config))
        if head:
            norm = getattr(module, family.classes + family.norm) if family.norm else None
            made = norm(width, eps=config.rms_norm_eps) if norm else _layer_norm(config)
            base.add_module(family.final_norm, made)
            root.add_module(family.head, nn.Linear(width, config.vocab_size, bias=False))
        root.add_module(family.base, base)
    return (base,), tuple(blocks.values())  # tuples: a module that held them would register them twice


def _layer_norm(config: Any) -> nn.LayerNorm:
    epsilon = getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps
    return nn.LayerNorm(config.hidden_size, eps=epsilon)


def _alibi(heads: int, rows: int, length: int) -> torch.Tensor:
    """BLOOM's bias of attention by position, (rows * heads, 1, length): Press et al., arXiv:2108.12409."""
    bloom = importlib.import_module("transformers.models.bloom.modeling_bloom")
    return bloom.build_alibi_tensor(torch.ones(rows, length), heads, torch.float32)


def _inject(
    span: Span, r: int, alpha: float, dropout: float, names: Mapping[str, tuple[nn.Module, str]]
) -> None:
    peft = importlib.import_module("peft")
    layers = [span.get_submodule(name) for name in names]
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(names),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
        init_lora_weights=False,
    )
    with torch.random.fork_rng():  # PEFT draws values that are replaced
        peft.inject_adapter_in_model(config, span, adapter_name=ADAPTER)
