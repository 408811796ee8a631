"""A tuned adapter says the same in peft as in `edged generate`, on one node and on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import training_rig as rig
from support import GUARD_S, WORK, Nodes

for _name in rig.NEEDED:
    pytest.importorskip(_name, reason="needs the extra train: make install")

ROWS = [
    {"instruction": f"Say the word for {number}.", "output": f"The word is {word}, and nothing else."}
    for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven"])
]
PROMPT = "<|im_start|>user\nSay the word for 9.<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 12


@pytest.mark.slow
def test_a_tuned_adapter_says_the_same_in_peft_and_here(nodes: Nodes, smol: Path, tmp_path: Path) -> None:
    laptop, phone = nodes.group("laptop", "phone", plugins=[*WORK, *rig.TRAINS])
    model = laptop.add(smol, "smol")["name"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    rig.add_rows(phone, rows)
    settings = {
        "model": model,
        "clients": [{"node": "phone", "data": "sums"}],
        "server": {"node": "laptop"},
        "steps": 12,
        "learning_rate": 3e-3,
        "max_length": 64,
        "eval_rows": 0,
        "adapter": "tuned",
    }
    document = rig.finetune(laptop, rig.asked(settings))
    assert document["loss"][-1] < 0.5 * document["loss"][0]
    asked = {
        "model": model,
        "prompt": PROMPT,
        "raw": True,
        "n": TOKENS,
        "temperature": 0.0,
        "numerics": "exact",
    }
    plain = laptop.call("generate", asked | {"strategy": "local"})["tokens"]
    tuned = laptop.call("generate", asked | {"strategy": "local", "adapter": "tuned"})["tokens"]
    cut = {"strategy": "tensor", "nodes": ["laptop", "phone"], "adapter": "tuned"}
    assert laptop.call("generate", asked | cut)["tokens"] == tuned
    assert tuned != plain
    assert tuned == _of_peft(smol, laptop.home.adapters / "tuned", len(tuned))


ORACLE = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompt, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
loaded = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
model, tokens = PeftModel.from_pretrained(loaded, adapter), []
ids = tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    for _ in range(count):
        tokens.append(int(model(input_ids=ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], 1)
print(json.dumps(tokens))
"""


def _of_peft(base: Path, adapter: Path, count: int) -> list[int]:
    """Greedy tokens of transformers' own model with the adapter that peft loads, in a process of its own."""
    command = [sys.executable, "-c", ORACLE, str(base), str(adapter), PROMPT, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GUARD_S)
    tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
    return tokens
