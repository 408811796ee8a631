"""The architectures this engine runs, each as one record of what is particular to it.

All are the same decoder: token embeddings, layers that add attention and a feed-forward to the
hidden states, a norm, an output matrix. A record says which norm, which rope, which activation,
which further tensors, which scales; `_tensors` makes the tensor table of it, `_layers` the graph.
What each does, and in which order, is what llama.cpp computes for it, which the tests compare with
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from . import _ggml

QKV = ("attn_q", "attn_k", "attn_v")
MATRICES = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
EVERY = (*MATRICES, "attn_norm", "ffn_norm", "output_norm", "token_embd_norm")  # but the output


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors of the embeddings, of what a layer adds to the hidden states, and of the logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


def _unscaled(hidden: int, layers: int) -> Scales:
    return Scales()


def _gemma_scales(hidden: int, layers: int) -> Scales:
    return Scales(embedding=float(np.sqrt(np.float32(hidden))))


def _minicpm_scales(hidden: int, layers: int) -> Scales:
    residual = np.float32(1.4) / np.sqrt(np.float32(layers))
    return Scales(12.0, float(residual), float(np.float32(256) / np.float32(hidden)))


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture. The defaults are Llama's."""

    norm: str = "rms_norm"  # ggml's operation; its weight is a factor, its bias, where there is one, added
    epsilon_key: str = "attention.layer_norm_rms_epsilon"
    rope: int | None = _ggml.ROPE_NORMAL  # how it pairs dimensions; None: positions come in otherwise
    rope_factors: tuple[str, ...] = ()  # tensors that may divide rope's frequencies
    activation: str = "swiglu_split"  # ggml's operation, on (gate, up) or, ungated, on up
    is_gated: bool = True
    has_fused_gate: bool = False  # the file's ffn_up is gate and up in one
    layer_norms: tuple[str, ...] = ()  # norms of a layer beyond the two before its halves
    embedding: tuple[str, ...] = ()  # tensors beyond token_embd that make the first hidden states
    biases: tuple[str, ...] = QKV  # tensors that may have a bias
    needs_biases: bool = False  # each of `biases` that the model has must have one
    parallel_key: str | None = None  # the key that says whether attention and feed-forward are parallel
    alibi: float = 0.0  # bias of attention by distance, ggml's max_bias
    has_scaled_queries: bool = False  # the scale is applied to the queries, not to the scores
    wide_scale_layers: int = 0  # a model of so many layers scales by hidden / heads, not head_dim
    attention_softcap: float = 0.0  # default of its key; 0: none, whatever the key says
    final_softcap: float = 0.0
    window: int = 0  # default of its key; 0: no layer attends through a window
    window_pattern: int = 2  # every so many layers the last one attends to everything
    scales: Callable[[int, int], Scales] = _unscaled  # of (hidden, layers)
    has_scale_keys: bool = False  # the file may say otherwise


_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")

_LLAMA = Architecture(rope_factors=_FACTORS, biases=MATRICES)
_MINICPM = Architecture(rope_factors=_FACTORS, biases=MATRICES, scales=_minicpm_scales, has_scale_keys=True)
_QWEN2 = Architecture(rope=_ggml.ROPE_NEOX, biases=(*QKV, "output"))
_QWEN3 = Architecture(rope=_ggml.ROPE_NEOX, layer_norms=("attn_q_norm", "attn_k_norm"))
_GEMMA = Architecture(
    rope=_ggml.ROPE_NEOX, activation="geglu_split", has_scaled_queries=True, scales=_gemma_scales
)
_GEMMA2 = Architecture(
    rope=_ggml.ROPE_NEOX,
    activation="geglu_split",
    layer_norms=("post_attention_norm", "post_ffw_norm"),
    has_scaled_queries=True,
    wide_scale_layers=46,  # Gemma 2 27B
    attention_softcap=50.0,
    final_softcap=30.0,
    window=4096,
    scales=_gemma_scales,
)
# The files of some Phi-3 models name a window; llama.cpp attends to everything, and so do we.
_PHI3 = Architecture(
    rope=_ggml.ROPE_NEOX,
    rope_factors=("rope_factors_long", "rope_factors_short"),
    has_fused_gate=True,
    has_scaled_queries=True,
)
_GPT = Architecture(
    norm="norm",
    epsilon_key="attention.layer_norm_epsilon",
    rope=None,
    activation="gelu",
    is_gated=False,
    biases=EVERY,
    needs_biases=True,
)
_GPT2 = replace(_GPT, embedding=("position_embd",))
_GPTNEOX = replace(_GPT, rope=_ggml.ROPE_NEOX, parallel_key="use_parallel_residual")
_BLOOM = replace(_GPT, embedding=("token_embd_norm",), alibi=8.0)

ARCHITECTURES = {
    "llama": _LLAMA,
    "minicpm": _MINICPM,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gptneox": _GPTNEOX,
    "bloom": _BLOOM,
}
