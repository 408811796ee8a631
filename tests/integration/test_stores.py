"""Data sets and adapters of one real node, through its command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Nodes

from edged import cli

adapters = pytest.importorskip("edged_plugins._tensors.adapters", reason="needs safetensors: make install")

Q, V = (f"base_model.model.model.layers.3.self_attn.{name}_proj.lora_" for name in "qv")


@pytest.fixture
def edged(capsys: pytest.CaptureFixture[str], nodes: Nodes) -> Callable[..., Any]:
    """Run one command line against a node; its document."""

    def run(*words: object) -> Any:
        code = cli.main([*map(str, words), "--json"])
        document = json.loads(capsys.readouterr().out)
        assert (code == 0) == ("error" not in document)
        return document

    return run


def test_what_is_added_is_listed_given_back_and_removed(
    nodes: Nodes, smol: Path, tmp_path: Path, edged: Callable[..., Any]
) -> None:
    (node,) = nodes.start("laptop", plugins=["shard"])
    home = ("--home", node.home.path)

    rows = tmp_path / "notes.jsonl"
    rows.write_text('{"text": "a"}\n{"instruction": "b", "output": "c"}\n')
    added = edged("data", "add", "notes", rows, *home)
    assert (added["data"][0]["rows"], added["stored"]) == (2, "copied")
    rows.write_text('{"text": "a"}\n{"test": "b"}\n')
    refused = edged("data", "add", "other", rows, *home)["error"]
    assert (refused["code"], refused["message"][:6]) == ("bad-row", "row 2:")
    assert edged("data", "ls", *home)["data"] == added["data"]
    assert edged("data", "rm", "notes", *home)["data"] == added["data"]
    assert os.listdir(node.home.data) == []

    node.add(smol, "smol")
    random = np.random.default_rng(5)
    shapes = {f"{Q}A": (4, 576), f"{Q}B": (576, 4), f"{V}A": (4, 576), f"{V}B": (192, 4)}  # SmolLM2's
    tensors = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    told: dict[str, Any] = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "base_name": "smollm2"}
    adapters.write_peft(tmp_path / "peft", tensors, **told)
    (row,) = edged("adapters", "add", "mail", tmp_path / "peft", "--model", "smol", *home)["adapters"]
    assert (row["name"], row["r"], row["alpha"], row["kind"]) == ("mail", 4, 8.0, "lora")
    assert row["base_sha256"] == node.call("models.ls")["models"][0]["sha256"]
    tensors[f"{V}B.weight"] = tensors[f"{V}B.weight"][:100]
    adapters.write_peft(tmp_path / "wrong", tensors, **told)
    refused = edged("adapters", "add", "wrong", tmp_path / "wrong", "--model", "smol", *home)["error"]
    assert (refused["code"], "576 and 100 came" in refused["message"]) == ("bad-adapter", True)

    out = tmp_path / "out"
    written = edged("adapters", "export", "mail", out, *home)["files"]
    assert {row["name"]: row["bytes"] for row in written} == {
        path.name: path.stat().st_size for path in out.iterdir()
    }
    for file in (tmp_path / "peft").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert (out / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert edged("adapters", "rm", "mail", *home)["adapters"] == [row]
    assert (edged("adapters", "ls", *home), os.listdir(node.home.adapters)) == ({"adapters": []}, [])
