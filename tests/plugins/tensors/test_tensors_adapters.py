"""Adapters as files: what peft and llama.cpp make of them is what their numbers say.

The oracle is transformers with peft: a tiny model of each family, the same weights as a GGUF, and the
logits of both programs, first without the adapter and then with it.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from edged_plugins import _libllama

from edged import ConfigError, EngineError

NEEDED = "needs torch, transformers, peft and safetensors: make install"
torch = pytest.importorskip("torch", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)
peft = pytest.importorskip("peft", reason=NEEDED)
safetensors = pytest.importorskip("safetensors.numpy", reason=NEEDED)
adapters = pytest.importorskip("edged_plugins._tensors.adapters", reason=NEEDED)

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, CONTEXT = 96, 32, 2, 4, 2, 64, 64
R, ALPHA = 3, 6.0
IDS = [5, 17, 3, 88, 41, 41, 2]
LOGITS_DIFFERENCE_MAX = 2e-4  # F32 on both sides, sums in another order
GELU_DIFFERENCE_MAX = 5e-3  # ggml looks GELU up in a table of F16

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def same(values: Any) -> Any:
    return values


def turned_halves(heads: int) -> Callable[[Any], Any]:
    """LlamaModel.permute of llama.cpp's converter."""
    return lambda w: (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def apart(w: Any) -> Any:
    """q, k, v of each head -> all q, all k, all v: GPTNeoXModel and BloomModel of the converter."""
    by_head = w.reshape(HEADS, 3, HIDDEN // HEADS, *w.shape[1:])
    return np.concatenate([by_head[:, part].reshape(HIDDEN, *w.shape[1:]) for part in range(3)])


@dataclass(frozen=True)
class Family:
    """How a family of transformers stands in GGUF. `changed`: by the last word of a tensor's GGUF name."""

    arch: str
    model: str
    config: Mapping[str, Any]
    targets: tuple[str, ...]
    changed: Mapping[str, Callable[[Any], Any]]
    keys: Mapping[str, Any]
    is_gelu: bool = False
    is_conv: bool = False


ROPE = {"rope.dimension_count": HIDDEN // HEADS, "rope.freq_base": 10000.0}
RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
NORM = {"attention.layer_norm_epsilon": 1e-5}
SIZED = {"key_length": 8, "value_length": 8}
FAMILIES = [
    Family(
        "llama",
        "Llama",
        LLAMA,
        (*LLAMA_TARGETS, "lm_head"),
        {"attn_q": turned_halves(HEADS), "attn_k": turned_halves(KV_HEADS)},
        ROPE | RMS,
    ),
    Family("qwen2", "Qwen2", LLAMA, LLAMA_TARGETS, {}, ROPE | RMS),
    Family(
        "qwen3",
        "Qwen3",
        LLAMA | {"head_dim": 8},
        LLAMA_TARGETS,
        {},
        RMS | {"rope.freq_base": 10000.0, "attention.key_length": 8, "attention.value_length": 8},
    ),
    Family(
        "gemma",
        "Gemma",
        LLAMA | {"head_dim": 8, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
        LLAMA_TARGETS,
        {"attn_norm": lambda w: w + 1, "ffn_norm": lambda w: w + 1, "output_norm": lambda w: w + 1},
        RMS | {"rope.freq_base": 10000.0, "attention.key_length": 8, "attention.value_length": 8},
        is_gelu=True,
    ),
    Family(
        "phi3",
        "Phi3",
        LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": CONTEXT},
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        {},
        ROPE | RMS | {"rope.scaling.original_context_length": CONTEXT},
    ),
    Family(
        "gpt2",
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": CONTEXT,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        ("c_attn", "c_proj", "c_fc"),
        dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), np.transpose),
        NORM,
        is_gelu=True,
        is_conv=True,
    ),
    Family(
        "gptneox",
        "GPTNeoX",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": FFN,
            "max_position_embeddings": CONTEXT,
            "rotary_pct": 0.5,
            "hidden_act": "gelu_new",  # ggml has one GELU
            "use_parallel_residual": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        {"attn_qkv": apart},
        NORM | {"rope.dimension_count": HIDDEN // HEADS // 2, "use_parallel_residual": True},
        is_gelu=True,
    ),
    Family(
        "bloom",
        "Bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        {"attn_qkv": apart},
        NORM,
        is_gelu=True,
    ),
]
by_arch = {family.arch: family for family in FAMILIES}


# peft asks transformers for a name that it will drop
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(family: Family, seed: int = 3) -> Any:
    """A random model whose layers outweigh its embedding, so that an adapter shows."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family.model}Config")(**family.config, attn_implementation="eager")
    head = "GPT2LMHeadModel" if family.model == "GPT2" else f"{family.model}ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / math.sqrt(HIDDEN))
            else:
                parameter.add_(torch.randn_like(parameter) / 8)
    return model


def write_base(family: Family, model: Any, path: Path) -> None:
    """The model's weights as llama.cpp's converter lays them out, F32, without a vocabulary."""
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch), LAYERS
    )
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS if family.arch in ("gpt2", "gptneox", "bloom") else KV_HEADS)
    writer.add_feed_forward_length(4 * HIDDEN if family.arch == "bloom" else FFN)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for key, value in family.keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{family.arch}.{key}", value)
    tied = model.config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        module, _, kind = key.rpartition(".")
        name = names.get_name(module) or names.get_name(module.removeprefix("transformer."))
        if name is None or kind not in ("weight", "bias"):
            assert "rotary" in key or "attn.bias" in key or "masked_bias" in key, key
            continue
        change = family.changed.get(name.rpartition(".")[2], same)
        writer.add_tensor(f"{name}.{kind}", np.ascontiguousarray(change(tensor.numpy())))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peft_of(family: Family, model: Any, **config: Any) -> Any:
    """The model with a random adapter of which A and B are both not zero."""
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": list(family.targets), "task_type": "CAUSAL_LM"}
    tuned = peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=family.is_conv, **settings | config))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
    return tuned.eval()


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def llama_logits(base: Path, adapter: Path | None) -> np.ndarray:
    """(tokens, vocabulary) of libllama, KV cache F32."""
    model = _libllama.open_model(str(base), n_gpu_layers=0)
    loaded, context, batch = None, None, llama_cpp.llama_batch_init(len(IDS), 0, 1)
    try:
        context = _libllama.open_context(
            model, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn_type=0
        )
        if adapter is not None:
            loaded = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
            assert loaded, "libllama refuses the adapter"
            held = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
            assert llama_cpp.llama_set_adapters_lora(context, held, 1, (ctypes.c_float * 1)(1.0)) == 0
        batch.n_tokens = len(IDS)
        for position, token in enumerate(IDS):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(IDS), VOCAB)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        if context is not None:
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)  # its adapters go with it


def state_of(tuned: Any) -> dict[str, np.ndarray]:
    state = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    return {name: tensor.numpy() for name, tensor in state.items()}


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


# --- llama.cpp ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=[family.arch for family in FAMILIES])
def test_llama_cpp_computes_with_the_made_file_what_peft_computes(family: Family, tmp_path: Path) -> None:
    model, base, made = model_of(family), tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    bound = GELU_DIFFERENCE_MAX if family.is_gelu else LOGITS_DIFFERENCE_MAX
    write_base(family, model, base)
    plain = logits_of(model)
    assert difference(plain, llama_logits(base, None)) < bound
    tuned = peft_of(family, model)
    tuned.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    adapters.to_gguf(tmp_path / "peft", base, made)
    expected = logits_of(tuned)
    assert difference(expected, plain) > 200 * bound
    assert difference(expected, llama_logits(base, made)) < bound
    assert stat.S_IMODE(made.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 1.5}},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    ],
    ids=["rslora", "patterns", "one layer"],
)
def test_every_way_to_scale_a_pair_is_the_same_in_llama_cpp(config: dict[str, Any], tmp_path: Path) -> None:
    model, base, made = model_of(by_arch["llama"]), tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_base(by_arch["llama"], model, base)
    tuned = peft_of(by_arch["llama"], model, **{"target_modules": list(LLAMA_TARGETS)} | config)
    tuned.save_pretrained(tmp_path / "peft")
    adapters.to_gguf(tmp_path / "peft", base, made)
    expected = logits_of(tuned)
    assert difference(expected, llama_logits(base, made)) < LOGITS_DIFFERENCE_MAX
    assert difference(expected, llama_logits(base, None)) > 100 * LOGITS_DIFFERENCE_MAX


def test_what_the_base_model_has_not_is_refused_by_name_and_leaves_no_file(tmp_path: Path) -> None:
    base, made = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_base(by_arch["gemma"], model_of(by_arch["gemma"]), base)
    q = "base_model.model.model.layers.{}.self_attn.q_proj"
    for module, words in (
        (q.format(LAYERS), "its gemma file has none for model.layers.2.self_attn.q_proj"),
        ("base_model.model.vision.q_proj", "none for vision.q_proj"),
        ("base_model.model.lm_head", "none for lm_head"),  # tied to the embedding
        (q.format(0), "q_proj with 32 inputs and 32 outputs, as the base model has it; 32 and 7 came"),
    ):
        folder = tmp_path / module
        write(folder, pair(module, rows=7))
        with pytest.raises(ConfigError, match=words):
            adapters.to_gguf(folder, base, made)
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["base.gguf"]


def test_an_architecture_whose_order_of_rows_is_not_known_is_refused_with_those_that_are(
    tmp_path: Path,
) -> None:
    write(tmp_path / "peft", pair("base_model.model.lm_head"))
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "mamba")
    writer.add_tensor("output.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"expected a base model of llama, qwen2, .*; mamba came"):
        adapters.to_gguf(tmp_path / "peft", tmp_path / "base.gguf", tmp_path / "a.gguf")


# --- PEFT -----------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def pair(module: str = Q, rows: int = 32, r: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        f"{module}.lora_A.weight": random.standard_normal((r, 32), dtype=np.float32),
        f"{module}.lora_B.weight": random.standard_normal((rows, r), dtype=np.float32),
    }


def write(folder: Path, tensors: Mapping[str, np.ndarray], r: int = 2, **settings: Any) -> None:
    adapters.write_peft(
        folder, tensors, **{"r": r, "alpha": 4.0, "targets": ["q_proj"], "base_name": "tiny"} | settings
    )


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_peft_loads_a_written_folder_and_computes_what_its_numbers_say(arch: str, tmp_path: Path) -> None:
    family = by_arch[arch]
    tuned = peft_of(family, model_of(family))
    expected = logits_of(tuned)
    write(
        tmp_path / "made",
        state_of(tuned),
        r=R,
        alpha=ALPHA,
        targets=family.targets,
        fan_in_fan_out=family.is_conv,
    )
    fresh = model_of(family)
    plain = logits_of(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "made").eval()
    assert difference(logits_of(loaded), expected) == 0
    assert difference(plain, expected) > 0.05
    merged = model_of(family)
    with torch.no_grad():  # W + scale B A by hand, on the plain model
        for module, found in adapters.pairs_of(*adapters.read_peft(tmp_path / "made")).items():
            weight, added = merged.get_submodule(module).weight, torch.tensor(found.scale * found.b @ found.a)
            weight.add_(added.T if family.is_conv else added)
    assert difference(logits_of(merged), expected) < LOGITS_DIFFERENCE_MAX


def test_a_folder_of_pefts_reads_as_it_was_saved(tmp_path: Path) -> None:
    tuned = peft_of(by_arch["qwen2"], model_of(by_arch["qwen2"]))
    tuned.save_pretrained(tmp_path)
    config, tensors = adapters.read_peft(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (R, ALPHA)
    assert all((tensors[name] == values).all() for name, values in state_of(tuned).items())
    assert len(tensors) == 2 * LAYERS * len(LLAMA_TARGETS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_read_as_f32(dtype: str, tmp_path: Path) -> None:
    tuned = peft_of(by_arch["qwen2"], model_of(by_arch["qwen2"])).to(getattr(torch, dtype))
    tuned.save_pretrained(tmp_path)
    _, tensors = adapters.read_peft(tmp_path)
    for name, tensor in peft.get_peft_model_state_dict(tuned, save_embedding_layers=False).items():
        assert tensors[name].dtype == np.float32
        assert (tensors[name] == tensor.float().numpy()).all()


def test_the_same_values_make_the_same_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    tensors = pair() | pair(Q.replace("q_proj", "v_proj"))
    write(tmp_path / "one", tensors, targets=["v_proj", "q_proj"])
    write(tmp_path / "two", dict(reversed(tensors.items())), targets=["q_proj", "v_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert stat.S_IMODE((tmp_path / "one" / name).stat().st_mode) == 0o600


def test_a_folder_appears_whole_and_no_other_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "made", pair())
    before = (tmp_path / "made" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(EngineError, match=r"expected to write an adapter at .*not empty"):
        write(tmp_path / "made", pair(rows=8))
    assert (tmp_path / "made" / "adapter_model.safetensors").read_bytes() == before

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        write(tmp_path / "other", pair())
    assert os.listdir(tmp_path) == ["made"]


def broken(values: np.ndarray, value: float) -> np.ndarray:
    values = values.copy()
    values[0, 0] = value
    return values


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
WRONG = [
    ({}, {}, "at least one pair"),
    ({A: pair()[A]}, {}, "A and B of model.layers.0.self_attn.q_proj; only A came"),
    (pair(r=3), {}, r"A \(2, in\) and B \(out, 2\) .* \(3, 32\) and \(32, 3\) came"),
    (pair() | {A: broken(pair()[A], np.nan)}, {}, "finite numbers in model.layers.0.self_attn.q_proj"),
    (pair() | {B: broken(pair()[B], np.inf)}, {}, "finite numbers"),
    (
        pair() | {"base_model.model.model.norm.weight": np.ones(3)},
        {},
        "a tensor 'base_model.model.model.norm",
    ),
    (pair() | {f"{Q}.lora_magnitude_vector": np.ones(3)}, {}, "a tensor '.*lora_magnitude_vector' came"),
    (pair(), {"peft_type": "IA3"}, "expected peft_type LORA; IA3 came"),
    (pair(), {"use_dora": True}, "expected a plain LoRA; use_dora = True came"),
    (pair(), {"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] came"),
    (pair(), {"init_lora_weights": "pissa"}, "init_lora_weights = pissa came"),
    (pair(), {"bias": "all"}, "bias = all came"),
    (pair(), {"r": True}, "expected r from 1 to 4096; True came"),
    (pair(), {"r": 0}, "expected r from 1 to 4096; 0 came"),
    (pair(), {"lora_alpha": float("nan")}, "expected a number above 0 as lora_alpha; nan came"),
    (pair(), {"rank_pattern": {"(a+)+$": 3}}, "expected plain module names in rank_pattern"),
    (
        pair(),
        {"alpha_pattern": {"q_proj": "8"}},
        "expected a number above 0 as alpha_pattern of q_proj; 8 came",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_what_is_no_plain_lora_is_refused_by_name_reading_and_writing(
    tensors: dict[str, np.ndarray], config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        write(tmp_path / "made", tensors, extra=config)
    assert not (tmp_path / "made").exists()
    write(tmp_path / "made", pair())
    path = tmp_path / "made" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    safetensors.save_file(tensors, tmp_path / "made" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=words):
        adapters.read_peft(tmp_path / "made")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("adapter_config.json", None, "expected adapter_config.json in the folder; No such file"),
        ("adapter_config.json", b"{", "expected JSON"),
        ("adapter_config.json", b"[]", "expected an object"),
        ("adapter_model.safetensors", None, "expected adapter_model.safetensors in the folder; No such file"),
        ("adapter_model.safetensors", b"", "expected a whole adapter_model.safetensors"),
        ("adapter_model.safetensors", b"\xff" * 64, "expected a whole adapter_model.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused_by_its_file(
    file: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    write(tmp_path / "made", pair())
    (tmp_path / "made" / file).unlink()
    if content is not None:
        (tmp_path / "made" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        adapters.read_peft(tmp_path / "made")
