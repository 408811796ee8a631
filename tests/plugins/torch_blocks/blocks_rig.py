"""What the tests of blocks share: tiny models of each family, and losses whose gradients are compared."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from edged_plugins._tensors.families import FAMILIES
from edged_plugins.torch_blocks._packing import pack
from edged_plugins.torch_blocks._span import Span
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging

LAYERS, VOCAB = 4, 128
WINDOW, LENGTH = 7, 12  # rows are longer than a window where a model has one
EOS = "<end>"

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,  # blocks that outweigh the embedding
}
_GATED = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {  # with what is particular to each, so that a test can see it
    "llama": {**_GATED, "rope_parameters": LLAMA3, "attention_bias": True},
    "mistral": {**_GATED, "sliding_window": WINDOW},
    "qwen2": {**_GATED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {**_GATED, "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {**_GATED, "head_dim": 16},
    "phi3": {**_GATED, "sliding_window": WINDOW, "attention_dropout": 0.5},
    "gpt2": {**_COMMON, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {**_COMMON, "intermediate_size": 96, "max_position_embeddings": 64},
    "bloom": {**_COMMON, "num_attention_heads": 6, "hidden_size": 48},  # ALiBi of no power of two
}


def make(family: str, folder: Path) -> tuple[Any, Path]:
    """Transformers' random model of the family, and the same packed from the folder it saved it to."""
    record = FAMILIES[family]
    config = getattr(importlib.import_module(record.config_module), f"{record.classes}Config")
    kind = "GPT2LMHeadModel" if family == "gpt2" else f"{record.classes}ForCausalLM"
    torch.manual_seed(3)
    model = getattr(importlib.import_module(record.module), kind)(config(**CONFIGS[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that are not one and zero
                parameter += 0.2 * torch.randn(parameter.shape)
    model.requires_grad_(False)
    logging.disable_progress_bar()  # a thread of its own
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model, pack(folder, folder.with_suffix(".packed"))


def write_tokenizer(folder: Path, template: str = "") -> None:
    """A vocabulary of VOCAB words: <unk>, <end>, and w2, w3, ..."""
    words = {"<unk>": 0, EOS: 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": EOS}, **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def rows() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def through(spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    """Logits of spans one after the other."""
    x = ids
    for span in spans:
        x = span(x)
    return spans[-1].project(x)


def gradients(spans: Sequence[Span]) -> dict[str, torch.Tensor]:
    """Of LoRA's tensors, by PEFT's names."""
    found = {}
    for span in spans:
        for name, parameter in zip(span.lora(), span.trainable(), strict=True):
            assert parameter.grad is not None
            found[name] = parameter.grad
    return found


def random_lora(span: Span, seed: int = 11) -> dict[str, torch.Tensor]:
    """Values for LoRA of which none is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in span.lora().items()}
