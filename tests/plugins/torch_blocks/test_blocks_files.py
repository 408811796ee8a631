"""Files: what packing writes, what describing says, and what is refused, with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from blocks_rig import CONFIGS, LAYERS, VOCAB, write_tokenizer
from edged_plugins.shard._describe import describe as describe_for_shard
from edged_plugins.shard._random import Shape, write_model
from edged_plugins.torch_blocks import _packing, edged_engines
from edged_plugins.torch_blocks._describe import check, describe, measure
from edged_plugins.torch_blocks._engine import load, open_blocks
from edged_plugins.torch_blocks._packing import pack

from edged import ConfigError, EngineError, EngineSpec, EngineSpeed, ModelDescription
from edged.ingest import ingest

Tiny = Callable[[str], tuple[Any, Path]]


def folder_of(tiny: Tiny, family: str) -> Path:
    return tiny(family)[1].with_suffix("")


# --- packing --------------------------------------------------------------------------------------


def test_a_packed_file_is_one_that_safetensors_reads_with_all_texts(tiny: Tiny) -> None:
    model, path = tiny("llama")
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["config"])["model_type"] == "llama"
        assert json.loads(file.metadata()["tokenizer"])["model"]["type"] == "WordLevel"
        for name, value in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value)


def test_shards_pack_to_the_same_bytes_as_the_whole(tiny: Tiny, tmp_path: Path) -> None:
    model, path = tiny("llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    write_tokenizer(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert pack(tmp_path, tmp_path / "packed").read_bytes() == path.read_bytes()


def test_packing_never_holds_more_than_a_piece(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_packing, "PIECE_BYTES", 100)
    folder = folder_of(tiny, "llama")
    assert max(map(len, (p for e in _entries(folder) for p in _packing._pieces(*e)))) == 100
    assert pack(folder, tmp_path / "packed").read_bytes() == tiny("llama")[1].read_bytes()


def _entries(folder: Path) -> list[tuple[Path, Any]]:
    shard = folder / "model.safetensors"
    return [(shard, entry) for entry in _packing.read_safetensors_head(str(shard)).tensors.values()]


def test_packing_needs_no_torch() -> None:
    program = (
        "import sys, edged_plugins.torch_blocks._packing\n"
        "print(*({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _with(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)  # type: ignore[return-value]


def _twice(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without("config.json"), "expected a folder with config.json"),
        (_without("tokenizer.json"), "tokenizer.json: No such file"),
        (_without("model.safetensors"), "lacks weights of that kind"),
        (_with("config.json", "{"), "expected JSON in"),
        (_with("config.json", '{"model_type": "mamba"}'), "llama, mistral, qwen2, .* says 'mamba'"),
        (_with("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'), "map of file names"),
        (_with("model.safetensors.index.json", '{"weight_map": {"a": "b"}}'), "lacks b"),
        (_twice, "expected each tensor once; '.*' is in model.safetensors and more.safetensors"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_by_what_it_lacks(
    tiny: Tiny, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes((folder_of(tiny, "llama") / name).read_bytes())
    spoil(folder)
    with pytest.raises(ConfigError, match=words):
        pack(folder, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing half


def test_a_checkpoint_of_the_bare_model_loads_too(tiny: Tiny, tmp_path: Path) -> None:
    """As the hub has GPT-2: names without "transformer."."""
    model, path = tiny("gpt2")
    bare = {name: value.contiguous() for name, value in model.transformer.state_dict().items()}
    safetensors.torch.save_file(bare, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ids = torch.arange(12)[None]
    found = [
        open_blocks(str(file)).span(0, LAYERS, embed=True, head=True)
        for file in (path, pack(tmp_path, tmp_path / "packed"))
    ]
    assert torch.equal(*(span.project(span(ids)) for span in found))


# --- describing -----------------------------------------------------------------------------------


def test_a_gguf_is_described_as_the_shard_engine_describes_it(smol: Path) -> None:
    """But for the units, since nothing is cut here."""
    ours, theirs = describe(str(smol)), describe_for_shard(str(smol))
    for name in ("head_unit", "ffn_unit", "vocab_unit", "layer_cuts"):
        del ours[name], theirs[name]
    assert ours == theirs


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_packed_model_is_described_by_what_transformers_says_of_it(tiny: Tiny, family: str) -> None:
    model, path = tiny(family)
    found = msgspec.convert(describe(str(path)), ModelDescription)
    config = model.config
    assert found.architecture == family
    assert (found.layers, found.hidden, found.vocab) == (LAYERS, config.hidden_size, VOCAB)
    assert found.heads == config.num_attention_heads
    assert found.kv_heads == getattr(config, "num_key_value_heads", found.heads)
    assert found.parameters == sum(p.numel() for p in model.parameters())  # a tied head counts once
    assert found.weight_type == "F32"
    assert len(set(found.layer_bytes)) == 1
    total = sum(found.layer_bytes) + found.embedding_bytes + found.head_bytes
    tied = 4 * VOCAB * found.hidden if config.tie_word_embeddings else 0
    assert total - tied == sum(t.bytes for t in found.tensors) == 4 * found.parameters


def test_describing_needs_no_torch(smol: Path) -> None:
    program = (
        "import sys; from edged_plugins.torch_blocks._describe import describe\n"
        f"describe({str(smol)!r}); print(*({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def test_an_engine_that_generates_goes_on_describing_its_models() -> None:
    """Those that take fewer engines' models describe first; see `Transfers.add`."""
    (entry,) = edged_engines({})
    assert {"shard", "llama_cpp", "llama_rpc"} == set(entry.takes)
    assert entry.strategies == ()
    with pytest.raises(ConfigError, match="unknown setting 'thread'"):
        edged_engines({"thread": 1})


def test_a_packed_model_is_stored_under_this_engine_and_opens_from_there(tiny: Tiny, tmp_path: Path) -> None:
    describers = [
        ["shard", "edged_plugins.shard._describe:describe"],
        ["llama_cpp", "edged_plugins._llama_describe:describe"],
        ["torch_blocks", "edged_plugins.torch_blocks._describe:describe"],
    ]
    with tiny("gpt2")[1].open("rb") as file:
        wanted = {
            "source_fd": file.fileno(),
            "name": "small",
            "models": str(tmp_path),
            "describe": describers,
        }
        stored = ingest(wanted, lambda event: None)
    assert stored["engine"] == "torch_blocks"
    blocks = open_blocks(stored["path"])
    assert (blocks.family, blocks.tokenizer.vocab) == ("gpt2", VOCAB)
    blocks.close()


def test_the_benchmark_names_its_own_weight_types() -> None:
    speeds = msgspec.convert(measure({"threads": 1}), list[EngineSpeed])
    assert [speed.weight_type for speed in speeds] == ["torch_f32", "torch_bf16"]
    assert all(speed.name == "torch_blocks" and speed.prefill_flops_s > 0 for speed in speeds)


def test_the_check_finds_a_cut_model_equal_to_the_whole() -> None:
    found = check({})
    assert found["max_error"] == 0.0
    assert "transformers" in found["version"]


# --- refusing -------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str, tensors: Sequence[str]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    for name in tensors:
        writer.add_tensor(name, np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "mamba", ["token_embd.weight"])
    for ask in (open_blocks, describe):
        with pytest.raises(EngineError, match=r"architecture 'mamba' .* llama, qwen2, .*, bloom"):
            ask(str(tmp_path / "m.gguf"))


def test_a_gguf_with_a_part_that_would_not_be_computed_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "m.gguf")
    write_model(path, Shape("qwen2", biases=("attn_q", "attn_k", "attn_v", "output")), "F32")
    for ask in (open_blocks, describe):
        with pytest.raises(EngineError, match=r"does not know tensor 'output\.bias'"):
            ask(path)
    write_model(path, Shape(biases=("attn_q",)), "F32")
    with pytest.raises(EngineError, match=r"does not know tensor 'blk\.0\.attn_q\.bias'"):
        open_blocks(path)


def test_a_gguf_that_lacks_a_part_names_it(tmp_path: Path) -> None:
    path = str(tmp_path / "m.gguf")
    write_model(path, Shape("qwen2", biases=("attn_q", "attn_k")), "F32")
    with pytest.raises(EngineError, match=r"lacks tensor 'blk\.1\.attn_v\.bias'"):
        open_blocks(path).span(1, 2)


def test_a_truncated_file_is_refused_before_a_tensor_is_read(tiny: Tiny, smol: Path, tmp_path: Path) -> None:
    for source in (smol, tiny("llama")[1]):
        cut = tmp_path / source.name
        with source.open("rb") as file:
            cut.write_bytes(file.read(source.stat().st_size * 2 // 3))
        with pytest.raises(EngineError, match="is truncated: tensor"):
            open_blocks(str(cut))


MANY = '{"model_type": "qwen2", "num_hidden_layers": 2000000000}'


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "would have 8 bytes"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "impossible shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "impossible shape"),
        ({"a": {"dtype": "X", "shape": [4], "data_offsets": [0, 16]}}, "type 'X'"),
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}, "impossible"),
        ({"a": {"shape": [4]}}, "lacks dtype"),
        ({"a": 3}, "lacks dtype"),
        ({"__metadata__": {"config": 3}}, "not a map of texts"),
        ({"__metadata__": {}}, "holds no config"),
        ({"__metadata__": {"config": "["}}, "expected JSON as its config"),
        ({"__metadata__": {"config": '{"model_type": "t5"}'}}, "model type 't5' .* llama, mistral"),
        ({"__metadata__": {"tokenizer": "", "config": '{"model_type": "llama"}'}}, "num_hidden_layers"),
        ({"__metadata__": {"tokenizer": "", "config": MANY}}, "num_hidden_layers .* from 1 to 1024"),
    ],
)
def test_a_damaged_head_costs_an_error_and_nothing_else(tmp_path: Path, head: Any, words: str) -> None:
    path = tmp_path / "m.safetensors"
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    for ask in (open_blocks, describe):
        with pytest.raises(EngineError, match=words):
            ask(str(path))


def test_a_head_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((1 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(EngineError, match="its head would have 1048576 bytes, the file has 10"):
        open_blocks(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: None, "lacks tensor '{name}'"),
        (lambda value: value[:-1], r"expected tensor '{name}' of shape \[64, 32\], \[63, 32\] came"),
        (lambda value: value.to(torch.int8), "expected tensor '{name}' of a float type, torch.int8 came"),
    ],
)
def test_a_missing_or_misfit_tensor_is_named(
    tiny: Tiny, tmp_path: Path, change: Callable[[torch.Tensor], Any], words: str
) -> None:
    model, _ = tiny("llama")
    name = "model.layers.2.mlp.up_proj.weight"
    values = dict(model.state_dict())
    if (changed := change(values.pop(name))) is not None:
        values[name] = changed.contiguous()
    safetensors.torch.save_file(values, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    blocks = open_blocks(str(pack(tmp_path, tmp_path / "packed")))
    blocks.span(0, 2)
    with pytest.raises(EngineError, match=words.format(name=name)):
        blocks.span(2, 3)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda blocks: blocks.span(0, LAYERS + 1), "within blocks 0 to 4, 0 to 5 came"),
        (lambda blocks: blocks.span(-1, 2), "-1 to 2 came"),
        (lambda blocks: blocks.span(3, 2), "3 to 2 came"),
        (lambda blocks: blocks.span(0, 1, dtype="int4"), "f32 or bf16, 'int4' came"),
        (lambda blocks: blocks.span(0, 1).project(torch.zeros(1, 32)), "with the output head"),
        (lambda blocks: lora(blocks, targets=["q_proj", "c_attn"]), "targets: .*q_proj.*; 'c_attn' came"),
        (lambda blocks: lora(blocks, r=0), "r of 1 or more"),
        (lambda blocks: lora(blocks, dropout=1.0), "dropout in"),
        (lambda blocks: lora(lora(blocks)), "without LoRA; this one has it"),
        (lambda blocks: lora(blocks).set_lora({}), "lora_A.weight' of shape .* nothing came"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(tiny: Tiny, ask: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        ask(open_blocks(str(tiny("llama")[1])))


def lora(place: Any, **more: Any) -> Any:
    """A span with LoRA; of blocks, or of a span that is one already."""
    span = place.span(1, 2) if hasattr(place, "tokenizer") else place
    span.add_lora(**({"r": 2, "alpha": 4, "targets": ["q_proj"], "seed": 0} | more))
    return span


def test_rows_longer_than_learned_positions_are_refused(tiny: Tiny) -> None:
    span = open_blocks(str(tiny("gpt2")[1])).span(0, 0, embed=True)
    with pytest.raises(EngineError, match=r"rows of at most 64 ids, \[1, 65\] came"):
        span(torch.zeros((1, 65), dtype=torch.int64))


def test_the_engine_opens_the_model_of_its_spec(tiny: Tiny) -> None:
    path = str(tiny("llama")[1])
    described = msgspec.convert(describe(path), ModelDescription)
    blocks = load(EngineSpec(path, described, (), 0, 64), None)  # type: ignore[arg-type]
    assert (blocks.family, blocks.layers, blocks.hidden, blocks.vocab) == ("llama", LAYERS, 32, VOCAB)
    assert blocks.context_tokens == 64
