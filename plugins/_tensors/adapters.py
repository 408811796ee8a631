"""LoRA adapters as files: PEFT's folder, which every other tool reads, and llama.cpp's GGUF.

A PEFT folder is `adapter_config.json` and `adapter_model.safetensors`, whose keys are
"base_model.model.<module>.lora_A.weight" of shape (r, in) and "....lora_B.weight" of shape (out, r); a
layer computes W x + scale * B A x, with scale alpha / r (alpha / sqrt(r) with rsLoRA). The same holds for
GPT-2's Conv1D, whose W alone is stored the other way round.

llama.cpp's file holds A and B under the base tensor's name with the rows of B in the base tensor's
order, which for some architectures is not that of transformers (`_rows_of_b`). Both orders are those of
llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
import safetensors.numpy

from edged import ConfigError, EngineError

from .._gguf import Head, Tensor, read_head

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES_MAX = 1 << 20
TENSORS_BYTES_MAX = 8 << 30  # they are read into memory; an adapter of a 70B model at r = 64 is 3 GB
R_MAX = 4096
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
NAME_CHARS = 200  # of a foreign name in a message
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "phi3", "gpt2", "gptneox", "bloom")  # GGUF's names
# PEFT features that a plain A and B do not say: (key, values that mean "off")
PLAIN: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("bias", ("none", None)),
    ("modules_to_save", (None, [])),
    ("use_dora", (False, None)),
    ("use_qalora", (False, None)),
    ("use_bdlora", (False, None)),
    ("lora_bias", (False, None)),
    ("layer_replication", (None, [])),
    ("trainable_token_indices", (None, [], {})),
    ("target_parameters", (None, [])),
    ("alora_invocation_tokens", (None, [])),
    ("arrow_config", (None,)),
    ("kasa_config", (None,)),
    ("monteclora_config", (None,)),
    ("velora_config", (None,)),
    # pissa, olora, corda, loftq and lora_ga change the base weights, too
    ("init_lora_weights", (True, False, None, "gaussian", "eva", "orthogonal")),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One module's A (r, in) and B (out, r), both F32, and what their product is multiplied with."""

    a: np.ndarray
    b: np.ndarray
    scale: float


# --- PEFT -----------------------------------------------------------------------------------------


def write_peft(
    folder: str | Path,
    tensors: Mapping[str, np.ndarray],
    *,
    r: int,
    alpha: float,
    targets: Sequence[str],
    base_name: str,
    task: str = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT folder that `peft.PeftModel.from_pretrained` loads; the same bytes for the same values.

    `folder`: new or empty; it appears whole, flushed to disk, or not at all. `tensors`: by PEFT's key names,
    checked as `read_peft` does. `fan_in_fan_out`: True for GPT-2, whose layers are Conv1D. `extra`: further
    keys of PEFT's LoraConfig. ConfigError where config and tensors do not agree.
    """
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "target_modules": sorted(set(targets)),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
        **(extra or {}),
    }
    _check_config(config)
    kept = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    pairs_of(config, kept)
    _write_folder(folder, config, kept)


def write_prompts(folder: str | Path, vectors: np.ndarray, *, base_name: str) -> None:
    """Write a PEFT folder of soft prompts (Lester et al., arXiv:2104.08691), which PeftModel loads, too.

    `vectors` (n, d): what stands before the embeddings of a row's tokens. `folder` as of `write_peft`.
    ConfigError where they are not finite vectors.
    """
    if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
        raise ConfigError(f"expected finite vectors as prompts, {list(vectors.shape)} came")
    count, width = vectors.shape
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": count,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    _write_folder(folder, config, {"prompt_embeddings": np.ascontiguousarray(vectors, "<f4")})


def _write_folder(folder: str | Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> None:
    target = Path(folder)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".adapter-"))
    try:
        # PEFT's own files say so; readers of several frameworks look at it
        _flushed(staged / TENSORS, safetensors.numpy.save(tensors, {"format": "pt"}))
        _flushed(staged / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        _fsync(staged)
        os.rename(staged, target)
        _fsync(target.parent)
    except OSError as error:
        raise EngineError(
            f"expected to write an adapter at {target}; {error.strerror or error}",
            remedy="name a new folder on a disk with room",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_peft(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and tensors of a PEFT folder, checked: a plain LoRA whose pairs are whole, finite and fit.

    Tensors by PEFT's key names, F32. ConfigError says what is wrong; what a plain LoRA is not (another
    `peft_type`, DoRA, biases, modules saved whole, ...) is refused by name.
    """
    config = _read_config(Path(folder) / CONFIG)
    tensors = _read_tensors(Path(folder) / TENSORS)
    pairs_of(config, tensors)
    return config, tensors


def pairs_of(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, Pair]:
    """By module ("model.layers.3.self_attn.q_proj"), in sorted order; ConfigError where they do not fit."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(tensors):
        match = KEY.fullmatch(name)
        if match is None:
            raise _wrong(f"expected LoRA's A and B of linear layers; a tensor {name[:NAME_CHARS]!r} came")
        sides.setdefault(match["module"], {})[match["side"]] = tensors[name]
    if not sides:
        raise _wrong("expected at least one pair of A and B; there is none")
    return {module: _pair(config, module, found) for module, found in sides.items()}


def _pair(config: Mapping[str, Any], module: str, found: Mapping[str, np.ndarray]) -> Pair:
    shown = module[:NAME_CHARS]
    if set(found) != {"A", "B"}:
        raise _wrong(f"expected A and B of {shown}; only {', '.join(found)} came")
    a, b = (np.asarray(found[side], np.float32) for side in "AB")
    r = _patterned(config, "rank_pattern", module, config["r"])
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != r or b.shape[1] != r or not a.size or not b.size:
        raise _wrong(f"expected A ({r}, in) and B (out, {r}) of {shown}; {a.shape} and {b.shape} came")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise _wrong(f"expected finite numbers in {shown}; NaN or infinity came")
    alpha = _patterned(config, "alpha_pattern", module, config["lora_alpha"])
    return Pair(a, b, alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _patterned(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """PEFT's rule for plain names: the first that is the module's name or its last parts."""
    for name, value in (config.get(key) or {}).items():
        if module == name.removeprefix("^") or module.endswith("." + name):
            return float(value) if key == "alpha_pattern" else int(value)
    return default


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(CONFIG_BYTES_MAX))
    except OSError as error:
        raise _wrong(f"expected {CONFIG} in the folder; {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(f"expected JSON in {CONFIG}; it is none") from error
    if not isinstance(config, dict):
        raise _wrong(f"expected an object in {CONFIG}; {type(config).__name__} came")
    _check_config(config)
    return config


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _wrong(
            f"expected peft_type LORA; {str(kind)[:NAME_CHARS]} came, which is not part of this version"
        )
    for key, off in PLAIN:
        value = config.get(key)
        if not any(type(value) is type(choice) and value == choice for choice in off):
            raise _wrong(f"expected a plain LoRA; {key} = {str(value)[:NAME_CHARS]} came")
    if type(config.get("r")) is not int or not 0 < config["r"] <= R_MAX:
        raise _wrong(f"expected r from 1 to {R_MAX}; {str(config.get('r'))[:NAME_CHARS]} came")
    _check_number("lora_alpha", config.get("lora_alpha"))
    for key in ("rank_pattern", "alpha_pattern"):
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise _wrong(f"expected a map in {key}; {type(found).__name__} came")
        for name, value in found.items():
            if not re.fullmatch(r"\^?[\w.]+", name):
                raise _wrong(f"expected plain module names in {key}; {name[:NAME_CHARS]!r} came")
            _check_number(f"{key} of {name[:NAME_CHARS]}", value)


def _check_number(what: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise _wrong(f"expected a number above 0 as {what}; {str(value)[:NAME_CHARS]} came")


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        size = path.stat().st_size
        if size > TENSORS_BYTES_MAX:
            raise _wrong(f"expected at most {TENSORS_BYTES_MAX} bytes in {TENSORS}; it has {size}")
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise _wrong(f"expected {TENSORS} in the folder; {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise _wrong(f"expected a whole {TENSORS}; it cannot be read ({error})") from error
    return {name: _array(name, entry) for name, entry in entries}


def _array(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype == "BF16":  # the upper half of an F32
        halves = np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16
        return halves.view(np.float32).reshape(shape)
    if dtype not in DTYPES:
        raise _wrong(f"expected F32, F16, BF16 or F64 in {name[:NAME_CHARS]}; {dtype} came")
    return np.frombuffer(entry["data"], DTYPES[dtype]).astype(np.float32).reshape(shape)


def _wrong(text: str) -> ConfigError:
    return ConfigError(text, remedy="export the adapter again as a LoRA of peft", code="bad-adapter")


# --- llama.cpp ------------------------------------------------------------------------------------


def adapt(folder: str, base: str, out: str) -> dict[str, Any]:
    """`EngineEntry.adapt`: check a PEFT folder for a model file, write `out` where that is a GGUF."""
    config, _ = read_peft(folder)
    with open(base, "rb") as file:
        if file.read(4) == b"GGUF":
            to_gguf(folder, base, out)
    made_for = config.get("base_model_name_or_path")
    return {
        "r": config["r"],
        "alpha": float(config["lora_alpha"]),
        "made_for": made_for[:NAME_CHARS] if isinstance(made_for, str) else None,
    }


def to_gguf(folder: str | Path, base: str | Path, out: str | Path) -> None:
    """Write llama.cpp's file (F32) of a PEFT folder for the base model in the GGUF `base`; atomically.

    ConfigError names the module that the base has not, or has in another shape, and an architecture whose
    order of rows is not known here. `out` exists only when it is whole.
    """
    config, tensors = read_peft(folder)
    head = read_head(str(base))
    architecture = str(head.keys.get("general.architecture"))
    if architecture not in FAMILIES:
        raise ConfigError(
            f"expected a base model of {', '.join(FAMILIES)}; {architecture[:NAME_CHARS]} came",
            remedy="use the PEFT folder with another tool",
            code="no-gguf-adapter",
        )
    pairs = pairs_of(config, tensors)
    scale = next(iter(pairs.values())).scale
    r = next(iter(pairs.values())).a.shape[0]
    half = Path(f"{out}.half")
    try:
        writer = gguf.GGUFWriter(half, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * r)
        for name, pair in _placed(pairs, head, architecture):
            # llama.cpp multiplies with alpha / r of each pair; what differs from that goes into B
            b = pair.b * np.float32(pair.scale * pair.a.shape[0] / (scale * r))
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(pair.a))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(half, 0o600)
        _fsync(half)
        os.rename(half, out)
        _fsync(Path(out).parent)
    except OSError as error:
        raise EngineError(
            f"expected to write an adapter at {out}; {error.strerror or error}", remedy="check the disk"
        ) from error
    finally:
        half.unlink(missing_ok=True)


def _placed(pairs: Mapping[str, Pair], head: Head, architecture: str) -> list[tuple[str, Pair]]:
    """(base tensor's name, pair with B's rows in its order), in the pairs' order."""
    places = Places(head, architecture)
    placed, taken = [], {}
    for module, pair in pairs.items():
        name = places.name_of(module)
        _check_fits(module, pair, head.tensors[f"{name}.weight"])
        if name in taken:
            raise _wrong(
                f"expected one adapter of each layer; {taken[name]} and {module[:NAME_CHARS]} are one"
            )
        taken[name] = module[:NAME_CHARS]
        b = pair.b[places.rows_of_b(name, pair.b.shape[0])]
        placed.append((f"{name}.weight", Pair(pair.a, b, pair.scale)))
    return placed


class Places:
    """Where a GGUF has the layers that transformers' names say."""

    def __init__(self, head: Head, architecture: str) -> None:
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        count = int(head.keys.get(f"{architecture}.block_count", 0))
        self._names = gguf.get_tensor_name_map(arch, count)
        self._head, self._architecture = head, architecture

    def name_of(self, module: str) -> str:
        """The base tensor's, without ".weight"; ConfigError where there is none."""
        # the second: BLOOM's
        name = self._names.get_name(module) or self._names.get_name(module.removeprefix("transformer."))
        base = self._head.tensors.get(f"{name}.weight") if name else None
        if name is None or base is None or name == "token_embd":
            raise ConfigError(
                f"expected a linear layer of the base model; its {self._architecture} file has none for "
                f"{module[:NAME_CHARS]}",
                remedy="tune other target modules, or use the PEFT folder with another tool",
                code="no-gguf-adapter",
            )
        return str(name)

    def rows_of_b(self, name: str, rows: int) -> np.ndarray:
        """For each row of the base tensor, the row of transformers' that it is."""
        return _rows_of_b(name, rows, self._head, self._architecture)


def _check_fits(module: str, pair: Pair, base: Tensor) -> None:
    came = (pair.a.shape[1], pair.b.shape[0])
    if base.shape != came:
        raise _wrong(
            f"expected {module[:NAME_CHARS]} with {base.shape[0]} inputs and {base.shape[1]} outputs, as the "
            f"base model has it; {came[0]} and {came[1]} came"
        )


def _rows_of_b(name: str, rows: int, head: Head, architecture: str) -> np.ndarray:
    """For each row of the base tensor in GGUF, the row of transformers' that it is.

    llama: the halves that RoPE turns lie side by side in GGUF (LlamaModel.permute). gptneox, bloom: q, k, v
    of each head lie one after the other in transformers, all q first in GGUF. Elsewhere the order is one.
    """
    index, layer = np.arange(rows), name.rpartition(".")[2]
    heads = _heads(head, architecture, "head_count")
    if architecture == "llama" and layer in ("attn_q", "attn_k"):
        if layer == "attn_k":
            heads = _heads(head, architecture, "head_count_kv", heads)
        return index.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    if architecture in ("gptneox", "bloom") and layer == "attn_qkv":
        return index.reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
    return index


def _heads(head: Head, architecture: str, key: str, default: int = 0) -> int:
    count = head.keys.get(f"{architecture}.attention.{key}", default)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"expected one {key} for all layers of the base model; it has another for each",
            remedy="use the PEFT folder with another tool",
            code="no-gguf-adapter",
        )
    return count


# --- files ----------------------------------------------------------------------------------------


def _flushed(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
