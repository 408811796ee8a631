"""What tests of trainings on real nodes share: a tiny llama with an alphabet for words, rows, job files.

A worker of the tiny model is ready as soon as torch is imported, and a step takes milliseconds: what a test
sees is the work of daemons and workers, not of the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from support import GUARD_S, Document, Node, install_plugin

from edged.client import Client
from edged.errors import EdgedError

NEEDED = ("torch", "transformers", "peft", "safetensors", "gguf", "llama_cpp")
TRAINS = ("torch_blocks", "split_learning")  # plugins of a node that trains
LAYERS, HIDDEN, HEADS, FFN = 4, 32, 4, 64
CONTEXT = 128
MODEL = "tiny"
ROWS, HELD_OUT = 12, 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _alphabet() -> list[str]:
    """The 256 bytes as GPT-2's vocabulary spells them."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {byte: chr(byte) for byte in kept}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(kept)))}
    return [spelled[byte] for byte in range(256)]


def write_tiny(path: Path) -> None:
    """A llama of random F32 values; its words are bytes, and two marks of a chat template."""
    writer, random = GGUFWriter(path, "llama"), np.random.default_rng(3)
    words = [*_alphabet(), "Ġt", "<|im_start|>", "<|im_end|>"]
    writer.add_name(MODEL)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.NORMAL] * 257 + [TokenType.CONTROL] * 2)
    writer.add_token_merges(["Ġ t"])
    writer.add_eos_token_id(len(words) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(words), HIDDEN),
        "output.weight": (len(words), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        square = {f"attn_{name}.weight": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
        gated = {f"ffn_{name}.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        norms = {f"{name}_norm.weight": (HIDDEN,) for name in ("attn", "ffn")}
        of_layer = {**square, **gated, "ffn_down.weight": (HIDDEN, FFN), **norms}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        spread = 1.0 if len(shape) == 1 else 0.5 / shape[-1] ** 0.5
        values = random.standard_normal(shape, np.float32) * np.float32(spread)
        whole = np.ones(shape, np.float32) + values / 8 if len(shape) == 1 else values
        writer.add_tensor(name, whole.astype(np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()


def write_rows(path: Path, first: int = 0) -> Path:
    """Sums to learn, the last HELD_OUT of them held out."""
    rows = [
        {
            "instruction": "Add.",
            "input": f"{a}+{a + first}",
            "output": str(2 * a + first),
            "split": "train" if a < ROWS - HELD_OUT else "test",
        }
        for a in range(ROWS)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def table(clients: Sequence[tuple[str, str]], server: str = "", **changes: Any) -> Document:
    """A job's file: `clients` as (node, data)."""
    found: Document = {
        "model": MODEL,
        "cut": 1,
        "steps": 4,
        "batch_size": 2,
        "max_length": 48,
        "learning_rate": 0.01,
        "r": 2,
        "alpha": 4.0,
        "eval_every": 2,
        "eval_rows": 2,
        "checkpoint_every": 1,
        "clients": [{"node": node, "data": data} for node, data in clients],
    }
    if server:
        found["server"] = {"node": server}
    return {key: value for key, value in (found | changes).items() if value is not None}


def asked(settings: Document, kind: str = "split", **changes: Any) -> Document:
    """The body of `finetune`."""
    return {"kind": kind, "name": "sums", "settings": settings, "file_clients": [], **changes}


def add_rows(node: Node, file: Path, name: str = "sums") -> None:
    Followed(node, "data.add", {"name": name}, [file]).end()


def finetune(node: Node, body: Document, files: Sequence[Path] = ()) -> Document:
    """The document at the end."""
    return Followed(node, "finetune", body, files).end()


def refusal(node: Node, body: Document, files: Sequence[Path] = ()) -> EdgedError:
    try:
        document = finetune(node, body, files)
    except EdgedError as error:
        return error
    return pytest.fail(f"expected a refusal; {document} came")


class Followed:
    """A request of a node, read event by event."""

    def __init__(self, node: Node, kind: str, body: Document, files: Sequence[Path] = ()) -> None:
        self._client: Client = node.client()
        self._files = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in files]
        self._events = self._client.stream(kind, body, self._files, silence_s=GUARD_S)
        self.seen: list[Document] = []
        node.closes(self)

    def until(self, *kinds: str, step: int = 0) -> Document:
        """The next event of a kind, of this step or a later one; it fails where the job ends before."""
        for event in self._events:
            self.seen.append(event)
            if event["event"] in kinds and event.get("step", 0) >= step:
                return event
        return pytest.fail(f"expected {kinds} of step {step}; the job ended")

    def end(self) -> Document:
        """The document; EdgedError where it failed."""
        try:
            while True:
                self.seen.append(next(self._events))
        except StopIteration as end:
            document: Document = end.value
            return document
        finally:
            self.vanish()

    def vanish(self) -> None:
        """What the daemon sees of a client whose terminal is closed."""
        self._client.close()
        while self._files:
            os.close(self._files.pop())


def begun(node: Node, body: Document) -> str:
    """The id of a job that runs without a client."""
    return str(node.call("finetune", body | {"detach": True})["job_id"])


def followed(node: Node, job: str) -> Followed:
    return Followed(node, "jobs.show", {"job": job, "follow": True})


def until_step(node: Node, job: str, step: int = 0) -> None:
    """Return in the middle of a job that runs."""
    stream = followed(node, job)
    stream.until("step", step=step)
    stream.vanish()


def row_of(node: Node, job: str) -> Document:
    return node.call("jobs.show", {"job": job})["jobs"][0]


def steps_told(node: Node, job: str) -> list[tuple[int, float]]:
    """As the node's store has them: step and loss."""
    with contextlib.closing(sqlite3.connect(f"file:{node.home.store_file}?mode=ro", uri=True)) as store:
        rows = store.execute("SELECT step, said FROM steps WHERE job_id = ? AND kind = 'step'", (job,))
        return [(step, json.loads(said)["loss"]) for step, said in rows]


def adapter_files(node: Node, name: str) -> dict[str, bytes]:
    """Of an adapter that a training made, what it says and knows of no run in particular."""
    folder = node.home.adapters / name
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")
    }


# --- a training without tensors ---------------------------------------------------------------------

ABACUS = ("echo", "abacus")  # plugins of a node that plays it; `install_abacus` first


def install_abacus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).with_name("abacus_plugin.py").read_text()
    install_plugin(folder, monkeypatch, "abacus", source)


def abacus(clients: Sequence[str], server: str, /, **changes: Any) -> Document:
    """The body of `finetune` for it."""
    settings = {
        "model": "echo",
        "clients": [{"node": node, "data": "sums"} for node in clients],
        "server": {"node": server},
    }
    return asked(settings | changes, "abacus")


def expected(rows: Path, clients: int, steps: int) -> list[int]:
    """What the ranks' numbers are in the end, by the rule alone."""
    prime = (1 << 61) - 1
    data = sum(rows.read_bytes())
    values = [rank + 1 + data for rank in range(clients)] + [clients + 1]
    for _ in range(steps):
        for client in range(clients):
            values[-1] = (values[-1] * 48271 + values[client]) % prime
            values[client] = (values[client] * 48271 + values[-1]) % prime
    return values


def numbers_of(node: Node, name: str) -> list[int]:
    """As the adapter of an abacus has them."""
    data = (node.home.adapters / name / "adapter_model.safetensors").read_bytes()
    values = data[8 + int.from_bytes(data[:8], "little") :]
    return [int.from_bytes(values[at : at + 8], "little") for at in range(0, len(values), 8)]


def give(nodes: Sequence[Node], folder: Path) -> Path:
    """The model and the rows of an abacus on every node; the rows' file as it is stored."""
    model = folder / "echo.txt"
    model.write_text("edged-echo 1\n")
    rows = write_rows(folder / "abacus.jsonl")
    for node in nodes:
        node.add(model, "echo")
        add_rows(node, rows)
    return rows
