"""The model families whose blocks are trained, each as one record of names.

Everything that computes is transformers' own; a record says which classes those are, what their
tensors are called in a Hugging Face model, and what llama.cpp calls the same tensors in a GGUF. What
llama.cpp changes of a tensor's values when it converts a model, whoever reads a GGUF undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


@dataclass(frozen=True, slots=True)
class Family:
    """One family. Names of tensors lack ".weight" and ".bias"; the defaults are Llama's.

    `blocks`: of a block's parts, by transformers' name, llama.cpp's. `undo`: what llama.cpp's converter did
    to the values of a part: rows "permuted" for its rope, a matrix "transposed", queries, keys and values no
    longer "interleaved" by heads, "plus one".
    """

    name: str  # transformers' `model_type`
    classes: str  # the prefix of its classes: LlamaDecoderLayer
    blocks: Mapping[str, str]
    targets: tuple[str, ...]
    architecture: str = ""  # in a GGUF; "": a GGUF calls it otherwise
    layer: str = "DecoderLayer"
    norm: str = "RMSNorm"  # "": torch's own LayerNorm
    base: str = "model"  # where the blocks live in the model for language modelling
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str = ""  # a learned embedding of positions
    embedding_norm: str = ""
    final_norm: str = "norm"
    head: str = "lm_head"
    has_rope: bool = True
    has_alibi: bool = False
    has_scaled_embedding: bool = False  # by the root of the width
    undo: Mapping[str, str] | None = None
    biases: tuple[str, ...] = ()  # parts with one, by llama.cpp's names; Llama may have them

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def config_module(self) -> str:
        return f"transformers.models.{self.name}.configuration_{self.name}"

    @property
    def outer(self) -> dict[str, str]:
        """Of the parts outside the blocks, by transformers' full name, llama.cpp's."""
        found = {
            f"{self.base}.{self.embedding}": "token_embd",
            f"{self.base}.{self.final_norm}": "output_norm",
            self.head: "output",
        }
        if self.positions:
            found[f"{self.base}.{self.positions}"] = "position_embd"
        if self.embedding_norm:
            found[f"{self.base}.{self.embedding_norm}"] = "token_embd_norm"
        return found


_GATED = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SEPARATE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_LLAMA_BLOCKS = {**_SEPARATE, **_GATED}
_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PERMUTED = {"self_attn.q_proj": "permuted", "self_attn.k_proj": "permuted"}
_GPT_FFN = {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}
_GPT_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_GPT_BIASES = (
    *("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    *("output_norm", "token_embd_norm"),
)
_GPT_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama", _LLAMA_BLOCKS, _LLAMA_TARGETS, "llama", undo=_PERMUTED),
        Family("mistral", "Mistral", _LLAMA_BLOCKS, _LLAMA_TARGETS, undo=_PERMUTED),
        Family(
            "qwen2", "Qwen2", _LLAMA_BLOCKS, _LLAMA_TARGETS, "qwen2", biases=("attn_q", "attn_k", "attn_v")
        ),
        Family(
            "qwen3",
            "Qwen3",
            {**_LLAMA_BLOCKS, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
            _LLAMA_TARGETS,
            "qwen3",
        ),
        Family(
            "gemma",
            "Gemma",
            _LLAMA_BLOCKS,
            _LLAMA_TARGETS,
            "gemma",
            has_scaled_embedding=True,
            undo={
                "input_layernorm": "plus one",
                "post_attention_layernorm": "plus one",
                "model.norm": "plus one",
            },
        ),
        Family(
            "phi3",
            "Phi3",
            {
                "self_attn.qkv_proj": "attn_qkv",
                "self_attn.o_proj": "attn_output",
                "mlp.gate_up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
                **_GPT_NORMS,
            },
            ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            "phi3",
        ),
        Family(
            "gpt2",
            "GPT2",
            {
                "ln_1": "attn_norm",
                "attn.c_attn": "attn_qkv",
                "attn.c_proj": "attn_output",
                "ln_2": "ffn_norm",
                "mlp.c_fc": "ffn_up",
                "mlp.c_proj": "ffn_down",
            },
            ("c_attn", "c_proj", "c_fc"),
            "gpt2",
            layer="Block",
            norm="",
            biases=_GPT_BIASES,
            base="transformer",
            layers="h",
            embedding="wte",
            positions="wpe",
            final_norm="ln_f",
            has_rope=False,
            undo=dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "transposed"),
        ),
        Family(
            "gpt_neox",
            "GPTNeoX",
            {
                "attention.query_key_value": "attn_qkv",
                "attention.dense": "attn_output",
                **_GPT_FFN,
                **_GPT_NORMS,
            },
            _GPT_TARGETS,
            "gptneox",
            layer="Layer",
            norm="",
            biases=_GPT_BIASES,
            base="gpt_neox",
            embedding="embed_in",
            final_norm="final_layer_norm",
            undo={"attention.query_key_value": "interleaved"},
        ),
        Family(
            "bloom",
            "Bloom",
            {
                "self_attention.query_key_value": "attn_qkv",
                "self_attention.dense": "attn_output",
                **_GPT_FFN,
                **_GPT_NORMS,
            },
            _GPT_TARGETS,
            "bloom",
            layer="Block",
            norm="",
            biases=_GPT_BIASES,
            base="transformer",
            layers="h",
            embedding="word_embeddings",
            embedding_norm="word_embeddings_layernorm",
            final_norm="ln_f",
            has_rope=False,
            has_alibi=True,
            undo={"self_attention.query_key_value": "interleaved"},
        ),
    )
}
OF_ARCHITECTURE = {family.architecture: family for family in FAMILIES.values() if family.architecture}
